"""The search for settings, the rows of the ablation, and how effects of TP are put beside each other."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny_models import LAYERS, tiny_backbone

from lib.core import processes
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS
from lib.core.store import EmbeddingStore
from lib.core.token_prepending import TokenPrepending
from lib.data.sources import find_source
from lib.data.sts import load_sts
from lib.evaluation.intervals import compare, mean_of
from lib.evaluation.sts import spearman, sts_pairs
from lib.report import settings
from lib.studies import effects, layers

pytestmark = [
    pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::lib.data.sources.SampleDataWarning")
]


@pytest.fixture
def folders(monkeypatch, tmp_path, no_data):
    """Sample data, and settings in a folder of their own: `configs` for those of real data, `runs` for the others."""
    monkeypatch.setattr(settings, "FOLDER", tmp_path / "configs")
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(layers, "FIRST_PAIRS", 12)
    store = EmbeddingStore(tmp_path / "store")
    return SimpleNamespace(configs=tmp_path / "configs", runs=tmp_path / "runs", store=store)


def test_scores_of_spans_are_those_of_ordinary_encoders(no_data):
    backbone, data = tiny_backbone(), load_sts("sample", "dev").first(10)
    table = layers.score_spans(backbone, "ck", [(1, 2), (1, 3)], data, [2, -1])
    assert len(table) == 3 * 2 and set(table["exit_layer"]) == {2, LAYERS} and (table["pairs"] == 10).all()
    for row in table.itertuples():
        method = TokenPrepending(row.start, row.end) if row.end > 0 else None
        pairs = sts_pairs(SentenceEncoder(backbone, "ck", method, row.exit_layer), {"dev": data})
        assert row.value == pytest.approx(spearman(pairs["gold"], pairs["similarity"]))
    baseline = table[table["end"] < 0].set_index("exit_layer")["value"]
    np.testing.assert_allclose(table["difference"], table["value"] - table["exit_layer"].map(baseline))
    assert table.loc[table["end"] > 0, "difference"].abs().max() > 0.1


def test_settings_of_sample_data_stay_under_runs_and_keep_those_of_other_prompts(folders):
    backbone = tiny_backbone()
    path = layers.choose(backbone, ["prompteol"], 16, folders.store, "try")
    assert layers.choose(backbone, ["metaeol"], 16, folders.store, "try") == path
    assert path.parent == folders.runs / "try" / "settings" and not folders.configs.exists()
    chosen = settings.load_settings(backbone.name, sample=True, profile="try")
    assert list(chosen) == ["prompteol", "metaeol"]
    written = yaml.safe_load(path.read_text())
    assert "sample" in written["chosen_by"] and written["prompts"]["prompteol"]["dev_pairs"] == 16
    assert written["prompts"]["metaeol"]["dev_pairs"] == 12  # eight templates: the coarse search
    # A run on real data does not see them.
    with pytest.raises(FileNotFoundError):
        settings.load_settings(backbone.name)


def test_settings_of_real_data_go_to_configs(folders, monkeypatch):
    source = dataclasses.replace(find_source(), kind="downloads")
    data = load_sts("sample", "dev")
    monkeypatch.setattr(layers, "find_source", lambda: source)
    monkeypatch.setattr(layers, "load_sts", lambda task, split: data)
    path = layers.choose(tiny_backbone(), ["prompteol"], 12, folders.store)
    assert path.parent == folders.configs and not folders.runs.exists()


def test_the_winner_has_the_best_score_and_records_those_of_the_encoder(folders):
    backbone, data = tiny_backbone(), load_sts("sample", "dev")
    scores = layers.search(backbone, "prompteol", data, 16, folders.store)
    line = layers.choose_prompt(backbone, "prompteol", data, 16, folders.store)
    assert line["dev_tp"] == round(scores.loc[scores["end"] > 0, "value"].max(), 2)
    assert line["dev_baseline_best"] == round(scores.loc[scores["end"] < 0, "value"].max(), 2)
    alone = layers.score_spans(backbone, "prompteol", [(line["start"], line["end"])], data.first(16), [line["exit"]])
    assert alone["value"].round(2).tolist() == [line["dev_baseline_same_exit"], line["dev_tp"]]


def test_too_few_pairs_and_scores_that_are_no_numbers_choose_nothing(folders):
    with pytest.raises(ValueError, match="3 pairs"):
        layers.choose(tiny_backbone(), ["prompteol"], 2, folders.store)
    rows = pd.DataFrame({"start": [1, 1], "end": [2, 3], "exit_layer": [4, 4], "value": [np.nan, 10.0]})
    assert layers.best(rows)["end"] == 3
    with pytest.raises(ValueError, match="No setting"):
        layers.best(rows[:1])
    assert not folders.runs.exists()


def test_among_equal_scores_the_cheapest_setting_wins():
    rows = pd.DataFrame({"start": [1, 1, 0, 1], "end": [3, 2, 2, 2], "exit_layer": [3, 3, 3, 4], "value": [50.0] * 4})
    assert layers.best(rows)[["start", "end", "exit_layer"]].tolist() == [0, 2, 3]


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
    labels = [(row.family, row.label) for row in rows]
    assert len(set(labels)) == len(labels)
    assert {"place", "initial vector", "number of placeholders", "what is written", "hidden", "textual role",
            "attention both ways, no TP"} <= {row.family for row in rows}
    assert any(row.paper == "place=before_this_sentence" for row in rows) == (name != "prompteol")
    for row in rows:
        assert np.isfinite(SentenceEncoder(backbone, row.prompt, row.method).encode(["A cat."])).all(), row
        if row.family in ("place", "initial vector") and row.prompt is PROMPTS[name]:
            changed = [k for k, v in dataclasses.asdict(row.method).items() if v != dataclasses.asdict(tp)[k]]
            assert len(changed) == 1, row


def test_a_prompt_that_holds_a_placeholder_needs_a_method():
    backbone = tiny_backbone()
    rows = layers.ablations(backbone, PROMPTS["prompteol"], TokenPrepending(1, 2), [])
    role = next(row for row in rows if row.family == "textual role")
    with pytest.raises(ValueError, match="holds a placeholder"):
        SentenceEncoder(backbone, role.prompt)


def test_published_changes_stand_beside_the_rows_that_have_one():
    rows = layers.ablations(tiny_backbone(), PROMPTS["prompteol"], TokenPrepending(1, 2), [])
    found = {(row.family, row.label): value for row, value in zip(rows, layers.published_changes("prompteol", rows))}
    assert found["main", "TP"] == 0 and np.isnan(found["main", "baseline"])
    assert found["place", "start of the prompt"] < 0 and np.isnan(found["what is written", "nothing"])


def test_scores_by_layer_hold_every_layer_with_its_interval():
    generator = np.random.default_rng(0)
    gold = generator.uniform(0, 5, 80)
    pairs = pd.concat(
        pd.DataFrame({"task": "dev", "item": range(80), "gold": gold, "layer": layer,
                      "similarity": gold + noise * generator.normal(size=80)})
        for layer, noise in ((3, 1.0), (4, 9.0))
    )
    table = layers.scores_by_layer(pairs, draws=300)
    assert table["exit_layer"].tolist() == [3, 4]
    assert (table["low"] < table["value"]).all() and (table["value"] < table["high"]).all()
    assert table["value"][0] == pytest.approx(spearman(gold, pairs.loc[pairs["layer"] == 3, "similarity"]))


def runs_with_accuracy(accuracies: dict, items: int = 200) -> dict[object, pd.DataFrame]:
    """Tables of two tasks, in which the first items of each are right: as many as the accuracy says."""
    return {
        name: pd.concat(pd.DataFrame({"task": task, "item": range(items), "layer": 7,
                                      "correct": 100.0 * (np.arange(items) < accuracy / 100 * items)}) for task in "AB")
        for name, accuracy in accuracies.items()
    }


def test_variants_stand_beside_the_reference_of_their_own_prompt():
    runs = {"cot": runs_with_accuracy({"baseline": 40, "TP": 70}), "echo": runs_with_accuracy({"baseline": 50})}
    table = effects.compare_variants(runs, mean_of("correct"), "TP", draws=200)
    assert table["task"].drop_duplicates().tolist() == ["A", "B", "Avg"] and (table["layer"] == 7).all()
    average = effects.overall(table).set_index(["prompt", "variant"])
    assert average.loc[("cot", "baseline"), "difference"] == -30 and average.loc[("cot", "TP"), "difference"] == 0
    assert np.isnan(average.loc[("echo", "baseline"), "difference"])
    wide = effects.score_table(table)
    assert wide.columns.tolist() == ["prompt", "variant", "layer", "A", "B", "Avg", "low", "high"]
    assert wide["Avg"].tolist() == [40, 70, 50] and (wide["low"] < wide["Avg"]).all()


def test_one_task_is_its_own_average():
    runs = {name: table[table["task"] == "A"] for name, table in runs_with_accuracy({"TP": 60}).items()}
    table = effects.compare_variants({"cot": runs}, mean_of("correct"), draws=50)
    assert effects.overall(table)["value"].tolist() == [60]


def test_ends_are_compared_with_the_best_one():
    runs = runs_with_accuracy({2: 50, 8: 80, 14: 79})
    table = effects.compare_ends(runs, mean_of("correct"), draws=500).set_index("end")
    assert table["value"].tolist() == [50, 80, 79] and table["difference"].tolist() == [-30, 0, -1]
    assert table.loc[2, "difference_high"] < -20
    assert table.loc[8, ["difference_low", "difference_high"]].tolist() == [0, 0]
    whole = compare(runs, mean_of("correct"), draws=500)
    assert whole.query("task == 'Avg'")["low"].tolist() == table["low"].tolist()


def ends_table(scores, apart: float) -> pd.DataFrame:
    """A table as of `compare_ends` for ends 2, 8 and 14; an end is told apart that is more than `apart` behind."""
    scores = np.array(scores, float)
    behind = scores - max(scores)
    return pd.DataFrame({"end": [2, 8, 14], "value": scores, "low": scores - 5, "high": scores + 5,
                         "difference": behind, "difference_low": behind - apart, "difference_high": behind + apart})


def test_ends_are_described_by_what_the_intervals_tell_apart():
    near, far = ends_table([71, 70, 60], 3.0), ends_table([50, 60, 80], 3.0)
    text = effects.describe_ends(far, near)
    assert "transfer is best at 14 (80.0, 95 % interval 75.0 to 85.0) and STS-B dev is best at 2 (71.0" in text
    assert text.endswith("deeper for transfer, and paired intervals tell them apart on transfer and STS-B dev.")
    assert effects.describe_ends(near, ends_table([50, 60, 80], 99.0)).endswith("tell them apart on transfer.")
    text = effects.describe_ends(ends_table([1, 2, 3], 9), ends_table([3, 2, 1], 9))
    assert text.endswith("no paired interval tells them apart.")
    assert effects.describe_ends(far, far).endswith("the same end for both.")


def test_effects_are_described_by_their_intervals():
    table = pd.DataFrame({"prompt": ["a", "b", "c"], "difference_low": [1, -1, -3], "difference_high": [2, 1, -2]})
    text = effects.describe_effects(table, "items")
    assert text.endswith("better for a; worse for c; no different as far as these items can tell for b.")


def test_the_grid_is_stored_and_read_again(tmp_path, monkeypatch, no_data):
    """A function of lib with plain arguments: the store of results takes it."""
    from functools import partial

    from lib.report import results

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    data = load_sts("sample", "dev").first(6)
    compute = partial(layers.score_spans, tiny_backbone(), "prompteol", [(1, 2)], data, [LAYERS])
    first, second = (results.run_or_load("grid", {"data": data.provenance}, compute) for _ in range(2))
    assert not first.reused and second.reused
    pd.testing.assert_frame_equal(first.value, second.value)
