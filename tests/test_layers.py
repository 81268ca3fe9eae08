"""The search for settings, the rows of the ablation, what tokens know of what comes after them, and effects of TP."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import spearmanr
from test_hardware import in_float16, with_large_activations
from tiny_models import LAYERS, TP, hook_ids, prompt_ids, reference, tiny_backbone

from lib import PROMPTS, EmbeddingStore, SentenceEncoder, TokenPrepending, Variant
from lib.core import processes
from lib.core.variants import closing_tokens
from lib.data.sources import find_source
from lib.data.sts import load_sts
from lib.evaluation.sts import spearman, sts_pairs
from lib.report import results, settings
from lib.studies import effects, layers
from lib.studies.layers import attention_to_placeholder, context_dependency

pytestmark = pytest.mark.filterwarnings("ignore::lib.data.sources.SampleDataWarning")
SENTENCES = ["The plane takes off.", "Three children, who are cold, run across the snowy field.", "No."]


@pytest.fixture
def folders(monkeypatch, tmp_path, no_data):
    """Sample data, and settings in a folder of their own: `configs` for those of real data, `runs` for the others."""
    monkeypatch.setattr(settings, "FOLDER", tmp_path / "configs")
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(layers, "FIRST_PAIRS", 12)
    return SimpleNamespace(configs=settings.FOLDER, runs=settings.RUNS, store=EmbeddingStore(tmp_path / "store"))


def test_scores_of_spans_are_those_of_ordinary_encoders_and_are_stored(no_data, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    backbone, data = tiny_backbone(), load_sts("sample", "dev").first(10)
    compute = partial(layers.score_spans, backbone, "ck", [(1, 2), (1, 3)], data, [2, -1])
    first, second = (results.run_or_load("grid", {"data": data.provenance}, compute) for _ in range(2))
    assert not first.reused and second.reused
    table = first.value
    pd.testing.assert_frame_equal(table, second.value)
    assert len(table) == 3 * 2 and set(table["exit_layer"]) == {2, LAYERS} and (table["pairs"] == 10).all()
    for row in table.itertuples():
        method = TokenPrepending(row.start, row.end) if row.end > 0 else None
        pairs = sts_pairs(SentenceEncoder(backbone, "ck", method, row.exit_layer), {"dev": data})
        assert row.value == pytest.approx(spearman(pairs["gold"], pairs["similarity"]))
    baseline = table[table["end"] < 0].set_index("exit_layer")["value"]
    np.testing.assert_allclose(table["difference"], table["value"] - table["exit_layer"].map(baseline))
    assert table.loc[table["end"] > 0, "difference"].abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.*sentences were cut")  # MetaEOL's prompts leave this tiny model little room
def test_settings_of_sample_data_stay_under_runs_and_those_of_real_data_go_to_configs(folders, monkeypatch):
    backbone, data = tiny_backbone(), load_sts("sample", "dev")
    path = layers.choose(backbone, ["prompteol"], 16, folders.store, "try")
    assert layers.choose(backbone, ["metaeol"], 16, folders.store, "try") == path
    assert path.parent == folders.runs / "try" / "settings" and not folders.configs.exists()
    assert list(settings.load_settings(backbone.name, sample=True, profile="try")) == ["prompteol", "metaeol"]
    before, written = path.read_text(), yaml.safe_load(path.read_text())
    line = written["prompts"]["prompteol"]
    assert "sample" in written["chosen_by"] and line["dev_pairs"] == 16
    assert written["prompts"]["metaeol"]["dev_pairs"] == 12  # eight templates: the coarse search
    # The winner has the best score of the search, and what is recorded is what the encoder scores.
    scores = layers.search(backbone, "prompteol", data, 16, folders.store)
    assert line["dev_tp"] == round(scores.loc[scores["end"] > 0, "value"].max(), 2)
    assert line["dev_baseline_best"] == round(scores.loc[scores["end"] < 0, "value"].max(), 2)
    alone = layers.score_spans(backbone, "prompteol", [(line["start"], line["end"])], data.first(16), [line["exit"]])
    assert alone["value"].round(2).tolist() == [line["dev_baseline_same_exit"], line["dev_tp"]]
    monkeypatch.setattr(layers, "find_source", lambda: dataclasses.replace(find_source(), kind="downloads"))
    monkeypatch.setattr(layers, "load_sts", lambda task, split: data)
    assert layers.choose(backbone, ["prompteol"], 12, folders.store).parent == folders.configs
    assert [*folders.runs.rglob("*.yaml")] == [path] and path.read_text() == before


def test_the_best_row_has_a_score_and_among_equals_the_fewest_blocks(folders):
    rows = pd.DataFrame({"start": [1, 1, 0, 1], "end": [3, 2, 2, 2], "exit_layer": [3, 3, 3, 4], "value": [50.0] * 4})
    assert layers.best(rows)[["start", "end", "exit_layer"]].tolist() == [0, 2, 3]
    rows["value"] = [10.0, np.nan, np.nan, 5.0]
    assert layers.best(rows)["end"] == 3
    with pytest.raises(ValueError, match="No setting"):
        layers.best(rows[1:3])
    with pytest.raises(ValueError, match="3 pairs"):
        layers.choose(tiny_backbone(), ["prompteol"], 2, folders.store)
    assert not folders.runs.exists()


def test_other_processes_wait_for_the_main_one_to_write(folders, monkeypatch):
    """A second process goes on from a prompt only with what the main one sends after it has written its setting."""
    backbone, data, sent = tiny_backbone(), load_sts("sample", "dev"), []
    monkeypatch.setattr(layers, "choose_prompt", lambda *_: {"start": 1, "end": 2, "exit": 3})
    monkeypatch.setattr(layers, "load_sts", lambda *_: data)
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes, "from_main", lambda compute: sent.append(compute) or "the main process's file")
    assert layers.choose(backbone, ["prompteol", "cot"], 16) == "the main process's file"
    assert len(sent) == 2 and not folders.runs.exists()


@pytest.mark.parametrize("name", ["prompteol", "cot", "ke"])
def test_every_row_of_the_ablation_runs_and_changes_one_thing(name):
    backbone, tp = tiny_backbone(), TokenPrepending(1, 2)
    rows = layers.ablations(backbone, PROMPTS[name], tp, seeds=[3407, 1])
    assert [row.label for row in rows[:2]] == ["TP", "baseline"] and rows[1].method is None
    found = {(row.family, row.label): row for row in rows}
    assert len(found) == len(rows) and len({row.family for row in rows}) == 9
    assert (("place", 'before "this sentence"') in found) == (name != "prompteol")
    for row in rows:
        assert np.isfinite(SentenceEncoder(backbone, row.prompt, row.method).encode(["A cat."])).all(), row
        if row.family in ("place", "initial vector") and row.prompt is PROMPTS[name]:
            assert len(dataclasses.asdict(row.method).items() - dataclasses.asdict(tp).items()) == 1, row
        if row.family == "textual role":
            with pytest.raises(ValueError, match="holds a placeholder"):  # which needs a method that uses it
                SentenceEncoder(backbone, row.prompt)
    if name == "prompteol":  # the paper has changes of its score for some of the rows
        assert found["main", "TP"].paper == 0 and np.isnan(found["main", "baseline"].paper)
        assert found["place", "start of the prompt"].paper < 0 and np.isnan(found["what is written", "nothing"].paper)
    labels = {row.label for row in layers.ablations(backbone, PROMPTS[name], TokenPrepending(0, 2), [])}
    assert not {"state one block older", "before the span"} & labels and "after the span" in labels


@pytest.mark.parametrize("method", [None, TP])
def test_context_dependency_is_a_rank_correlation_with_the_last_state(method):
    backbone, sentence, prompt = tiny_backbone(), "The plane takes off .", PROMPTS["prompteol"]
    table = context_dependency(SentenceEncoder(backbone, prompt, method, exit_layer=3), [sentence])
    ids = prompt_ids(backbone, sentence, method, prompt)
    states, end = reference(backbone, ids, method)[3].numpy(), len(ids) - closing_tokens(backbone, prompt)
    expected = [100 * spearmanr(states[i], states[-1]).statistic for i in range(end - len(table), end)]
    np.testing.assert_allclose(table["correlation"], expected, atol=1e-3)
    text = backbone.tokenizer.decode(ids[end - len(table) : end])
    assert "plane takes off" in text and "sentence" not in text and "means" not in text


def test_attention_to_the_placeholder_is_that_of_the_model():
    backbone, encoder = tiny_backbone(), SentenceEncoder(tiny_backbone(), "prompteol", TP)
    attention_to_placeholder(encoder, SENTENCES[:1])  # the first time, Transformers puts hooks of its own on the model
    before, hooks = backbone.model.config._attn_implementation, hook_ids(backbone.model)
    table = attention_to_placeholder(encoder, SENTENCES)
    assert backbone.model.config._attn_implementation == before and hook_ids(backbone.model) == hooks
    assert set(table["block"]) == set(range(LAYERS)) and set(table["sentence"]) == {0, 1, 2}
    assert table["share"].between(0, 1).all() and table["share"].std() > 0
    # A block before the first write sees the placeholder's own vector, whatever is written later.
    later = attention_to_placeholder(encoder.changed(method=TokenPrepending(2, 3)), SENTENCES)
    same = np.isclose(table["share"], later["share"], rtol=1e-4)
    assert same[table["block"] == 0].all() and not same[table["block"] == 2].all()


def test_sums_beyond_float16_give_what_float32_gives_and_overflow_is_refused():
    """A pass outside `safe_float16` overflows in this model: its attention and its states are not numbers."""
    large = with_large_activations("llama")
    for study, column, apart in ((context_dependency, "correlation", 2), (attention_to_placeholder, "share", 0.02)):
        exact, half = (study(SentenceEncoder(b, "prompteol", TP), SENTENCES) for b in (large, in_float16(large)))
        np.testing.assert_allclose(half[column], exact[column], atol=apart)
        infinite = TokenPrepending(1, 3, init=(float("inf"),) * large.hidden_size)
        with pytest.raises(FloatingPointError):
            study(SentenceEncoder(large, "prompteol", infinite), SENTENCES)


def test_methods_for_each_vector_and_what_stands_below_the_trivial_row():
    rows = settings.Setting(TokenPrepending(1, 3), 3).with_placeholder([5, 6])
    assert rows["TP"] == [TokenPrepending(1, 3, seed=5), TokenPrepending(1, 3, seed=6)]
    assert rows["placeholder, unwritten"] == [Variant(1, 3, seed=seed, write="nothing") for seed in (5, 6)]
    table = pd.DataFrame({"prompt": ["most", "a", "b"], "variant": "TP", "task": "MR", "value": [6, 7, 5.0]})
    table = pd.concat([table, table.assign(task="CR", value=[8, 6, 7.0]), table.assign(task="SUBJ", value=[1, 3, 2.0])])
    text = effects.describe_below(table, "most")
    assert text == "Below the most: on MR (6.0) b (TP); on CR (8.0) every row."
    assert effects.describe_below(table[table["task"] == "SUBJ"], "most") == "Below the most: no row on any task."


def test_what_chance_would_find_and_how_many_items_show_a_difference():
    ends = {"difference_low": [0, 1, -3, -2, np.nan], "difference_high": [0, 3, 3, -1, 2]}
    table = pd.DataFrame({"low": 1.0, "high": 2.0} | ends)
    assert effects.by_chance(table).startswith("2 of 3 intervals leave 0 out; if nothing differed, ")
    assert effects.by_chance(table[["low", "high"]]).startswith("5 of 5 intervals")
    # Half widths of 1 and 3 points from 50 items; a width half as large takes four times as many.
    assert "it takes 13 to 113 texts" in effects.items_needed(table[1:3], 50)
    assert "it takes 51 to 451 texts" in effects.items_needed(table[1:3], 50, wanted=1)
