"""Stores on disk, of results and of embeddings: nothing is computed twice, nothing stale or damaged is served, and no
interrupt and no full disk costs much."""

import copy
import dataclasses
import errno
import shutil
from functools import partial
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from tiny_models import HIDDEN, TP, assert_same, build_tokenizer, cosines, randomise, tiny_backbone

from lib.core import encoder, processes, store
from lib.core.backbone import Backbone
from lib.core.code_version import code_version, dependencies
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS
from lib.core.store import ROOT, EmbeddingStore
from lib.core.token_prepending import TokenPrepending
from lib.data.sources import EvaluationData
from lib.evaluation.intervals import SPEARMAN, mean_of
from lib.evaluation.sts import sts_pairs
from lib.report import results
from lib.report.results import code_of, describe, run_or_load
from lib.report.settings import Setting

with_a_line = "{}\nassert 1 + 1 == 2\n".format
TABLE = pd.DataFrame({"task": ["STS12", "2024"], "pair": [0, 1], "score": [1 / 3, np.nan], "ok": [True, False]})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def counting() -> tuple[Mock, partial]:
    """A computation, and it as a partial of a function of lib, which calls it."""
    computed = Mock(return_value=TABLE)
    return computed, partial(processes.from_main, computed)


def test_a_result_is_computed_once_and_again_for_other_settings_other_code_or_a_fresh_run(monkeypatch, folder):
    computed, compute = counting()
    first, second = (run_or_load("a name/with: signs", {"seed": 1}, compute) for _ in range(2))
    [path] = folder.iterdir()
    assert computed.call_count == 1 and (first.reused, second.reused) == (False, True)
    pd.testing.assert_frame_equal(first.value, second.value)
    pd.testing.assert_frame_equal(first.value, TABLE, check_dtype=False)
    assert first.value["score"][0] == 1 / 3
    assert first.provenance == second.provenance and second.provenance["settings"] == {"seed": 1}
    assert second.provenance["environment"]["packages"]["torch"] and second.provenance["seconds"] >= 0
    assert not run_or_load("a name/with: signs", {"seed": 2}, compute).reused
    stored, again = path.stat().st_mtime, partial(run_or_load, "a name/with: signs", {"seed": 1}, compute)
    assert again(fresh_since=stored - 1).reused and not again(fresh_since=stored + 1).reused
    assert computed.call_count == 3
    monkeypatch.setattr(results, "code_version", lambda *modules: f"another version of {modules}")
    assert not again().reused


@pytest.mark.parametrize("damage", [
    lambda b: b[:-20], lambda b: b.replace(b"0.33", b"0.44"), lambda b: b"", lambda b: b"[]", lambda b: b"\xff" + b])
def test_a_damaged_file_is_noticed_and_computed_again(folder, damage):
    computed, compute = counting()
    run_or_load("r", {}, compute)
    [path] = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"):
        assert run_or_load("r", {}, compute).value["score"][0] == 1 / 3
    assert run_or_load("r", {}, compute).reused and computed.call_count == 2


def pairs(*sentences, name="STS-B"):
    return EvaluationData(name, Dataset.from_dict({"sentence1": sentences}), {"split": "test"})


def test_a_description_tells_arguments_apart_and_holds_no_texts_and_no_store(tmp_path):
    sentence = "A sentence of a data set whose licence does not let us copy it."
    ragged = np.array([np.zeros(2), np.ones(1)], dtype=object)
    different = [
        None, 1, "a", ["a", "b"], {"a": 1}, [sentence], [sentence, sentence], list(range(200)), np.int64(2),
        np.zeros(3), np.zeros((3, 1)), np.ones(3), np.zeros(3, int), ragged, ragged * 2,
        TABLE, TABLE.assign(score=1 / 3 + 1e-16), pairs(sentence), pairs(sentence, sentence), pairs("Another."),
        SPEARMAN, mean_of("a"), mean_of("b"), pairs, partial(pairs, 1), partial(pairs, 2),
        Setting(None, 1), Setting(None, 2)]
    described = [repr(describe(thing)) for thing in different]
    assert len(set(described)) == len(different)
    assert described == [repr(describe(thing)) for thing in different]
    assert not any(sentence in text for text in described)
    assert describe({"store": EmbeddingStore(tmp_path)}) == {"store": None}
    with pytest.raises(TypeError, match="describe"):
        describe(object())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_could_not_be_stored_is_an_error_and_leaves_the_old_file_and_no_other(monkeypatch, folder, step):
    def no_space(*_, **__):
        assert path.read_bytes() == old, "so that a process that is killed here leaves it, too"
        raise OSError(errno.ENOSPC, "No space left on device")
    _, compute = counting()
    run_or_load("scores", {}, compute)
    [path] = folder.iterdir()
    old = path.read_bytes()
    with monkeypatch.context() as full:
        full.setattr(store.os, step, no_space)
        with pytest.raises(OSError, match="No space left"):
            run_or_load("scores", {}, compute, fresh_since=path.stat().st_mtime + 1)
        with pytest.raises(OSError, match="No space left"):
            EmbeddingStore(folder).save("embeddings", np.ones((2, 3)))
    assert [path] == list(folder.iterdir()) and path.read_bytes() == old and run_or_load("scores", {}, compute).reused


def test_any_changed_byte_of_stored_embeddings_is_noticed_and_old_ones_are_not_fresh(tmp_path):
    files = EmbeddingStore(tmp_path)
    files.save("key", np.arange(6.0).reshape(2, 3))
    whole, stored = (tmp_path / "key.npy").read_bytes(), (tmp_path / "key.npy").stat().st_mtime
    fresh = [EmbeddingStore(tmp_path, fresh_since=stored + later).load("key") for later in (-1, 1)]
    assert fresh[0].tolist() == [[0, 1, 2], [3, 4, 5]] and fresh[1] is None
    changed = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    with pytest.warns(UserWarning, match="damaged") as caught:
        for content in changed + [whole[:length] for length in range(len(whole))]:
            (tmp_path / "key.npy").write_bytes(content)
            assert files.load("key") is None
    assert len(caught) == 2 * len(whole)
    (tmp_path / "key.npy").write_bytes(whole)
    assert files.load("key").tolist() == [[0, 1, 2], [3, 4, 5]]


def modules_of(method) -> set[str]:
    """Whose code the STS results of an encoder with this method hang on."""
    return code_of(partial(sts_pairs, SentenceEncoder(tiny_backbone(), method=method), {}))


@pytest.mark.parametrize("file, change, stale", [  # whether the STS results of the baseline and of TP are stale
    *((file, with_a_line, [True, True]) for file in (
        "core/tokens.py", "core/forward.py", "core/pooling.py", "core/hardware.py", "core/encoder.py",
        "evaluation/sts.py", "data/sources.py")),
    ("core/token_prepending.py", lambda text: text.replace("= states[row, last", "= -states[row, last"), [False, True]),
    ("core/forward.py", lambda text: text.replace('"""', '"""Other words. ', 1), [False, False]),
    ("core/tokens.py", lambda text: text.replace("    def ", "\n    # A comment.\n    def "), [False, False]),
    ("core/prompts.yaml", lambda text: text + 'another: {templates: ["Text: \\"{sentence}\\""]}\n', [False, False]),
    *((file, with_a_line, [False, False]) for file in (
        "report/figures.py", "report/results.py", "run/publish.py", "evaluation/transfer.py", "__init__.py"))])
def test_new_code_makes_stale_what_used_it_and_texts_plots_and_other_evaluations_nothing(tmp_path, file, change, stale):
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    path, text = tmp_path / "lib" / file, (ROOT / "lib" / file).read_text()
    assert change(text) != text
    path.write_text(change(text))
    used = (modules_of(None), modules_of(TokenPrepending(1, 2)))
    assert [code_version(*modules, root=tmp_path) != code_version(*modules) for modules in used] == stale


def small_lib(folder, **modules: str):
    for name, text in modules.items():
        path = folder / "lib" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    return folder


def test_every_form_of_import_is_followed_wherever_it_stands(tmp_path):
    root = small_lib(
        tmp_path, core__a="from lib.core import b\nimport lib.core.c, numpy\n", report__results="", core__f="",
        core__b="def f():\n    from lib.core.d import name\n", core__c="from .e import name\nfrom . import f\n",
        core__d="from lib.report.results import Result\n", core__e="if False:\n    import lib.core.a\n")
    assert dependencies("lib.core.a", root=root) == {f"lib.core.{name}" for name in "abcdef"}
    small_lib(tmp_path, core__g="from lib import SentenceEncoder\n")
    with pytest.raises(ValueError, match="SentenceEncoder"):  # a name that hides its module
        dependencies("lib.core.g", root=root)


def test_results_know_the_code_of_encoders_methods_and_arguments_and_trust_none_that_they_cannot_read():
    for module, same in (("__nowhere__", False), (__name__, True)):
        assert (code_version(module) == code_version(module)) == same
    assert "lib.core.pooling" in dependencies(__name__), "one's own method counts with what it imports from lib"
    assert {"lib.evaluation.sts", "lib.core.encoder", "lib.core.pooling"} <= modules_of(None)
    assert modules_of(TokenPrepending(1, 2)) - modules_of(None) == {"lib.core.token_prepending"}
    own = SentenceEncoder(tiny_backbone())
    own.method = type("Own", (), {"__module__": "__main__"})()  # written in a notebook
    assert "__main__" in code_of(partial(sts_pairs, own, {}))
    for outside in (lambda: None, small_lib, partial(small_lib, 1)):
        with pytest.raises(ValueError, match="no function of lib"):
            code_of(outside)


TPS = {"start": [0], "end": [4], "seed": [1], "init": ["zeros", np.arange(HIDDEN)], "place": ["start"], "count": [2]}
PARTS = {"clean": False, "before": ("[",), "after": ("</s>",)}  # of a prompt
SENTENCES = ["The plane takes off.", "No.", "Is it cold?", "No.", "\x00", "a\u2028b", "e\u0301", "\u00e9"]


def stored(backbone, folder, **choices) -> SentenceEncoder:
    choices = {"prompt": "prompteol", "method": TP, "share_prefix": False} | choices
    return SentenceEncoder(backbone, **choices, store=EmbeddingStore(folder) if folder else None)


def test_nothing_is_computed_twice(backbone, passes, tmp_path):
    layers = [2, -1]
    expected = stored(backbone, None).encode_layers(SENTENCES, layers)
    first = stored(backbone, tmp_path).encode_layers(SENTENCES, layers)
    passes.clear()
    again = stored(backbone, tmp_path).encode_layers(SENTENCES[::-1], layers)
    one_layer = stored(backbone, tmp_path, exit_layer=2).encode(SENTENCES)
    assert not passes
    for layer in layers:
        assert np.array_equal(first[layer], expected[layer]) and np.array_equal(again[layer], first[layer][::-1])
    assert np.array_equal(one_layer, first[2])
    three = stored(backbone, tmp_path).encode_layers(SENTENCES, [2, 3])[3]
    assert len(passes) == 1 and np.array_equal(three, stored(backbone, None, exit_layer=3).encode(SENTENCES))
    # Other neighbours in a batch mean other rounding: a call gives the same bits, whatever ran before it.
    stored(backbone, tmp_path / "other").encode(SENTENCES[:3])
    assert np.array_equal(stored(backbone, tmp_path / "other").encode(SENTENCES), expected[-1])
    # CK is the mean of CoT and KE, and finds what they stored.
    cot, ke = (stored(backbone, tmp_path, prompt=name).encode(SENTENCES) for name in ("cot", "ke"))
    passes.clear()
    assert_same(stored(backbone, tmp_path, prompt="ck").encode(SENTENCES), (cot + ke) / 2)
    assert not passes


@pytest.mark.parametrize("change", [
    {"method": None}, {"prompt": "cot"}, {"pooling": "mean"}, {"exit_layer": 2}, {"max_length": 100},
    {"share_prefix": True},
    *({"method": dataclasses.replace(TP, **{key: value})} for key, values in TPS.items() for value in values),
    *({"prompt": dataclasses.replace(PROMPTS["prompteol"], **{key: value})} for key, value in PARTS.items())], ids=str)
def test_every_choice_counts(backbone, passes, tmp_path, change):
    stored(backbone, tmp_path).encode(SENTENCES)
    expected = stored(backbone, None, **change).encode(SENTENCES)
    passes.clear()
    assert np.array_equal(stored(backbone, tmp_path, **change).encode(SENTENCES), expected)
    assert passes


def test_batches_code_and_weights_count_and_prose_does_not(backbone, passes, tmp_path):
    """What decides the rounding counts; why a dtype was chosen does not."""
    first = stored(backbone, tmp_path).encode(SENTENCES)
    passes.clear()
    stored(dataclasses.replace(backbone, notes={"dtype_reason": "another reason"}), tmp_path).encode(SENTENCES)
    assert not passes
    stored(backbone, tmp_path).encode(SENTENCES, batch_size=4)
    assert [rows for rows, _ in passes] == [4, 3]
    recoded = stored(backbone, tmp_path)
    recoded.code = "other code"
    recoded.encode(SENTENCES)
    assert len(passes) == 3
    model = randomise(copy.deepcopy(backbone.model), seed=1)
    other = Backbone.from_model(model, build_tokenizer(), name=backbone.name, revision=backbone.revision)
    assert cosines(stored(other, tmp_path).encode(SENTENCES), first).max() < 0.9


def test_of_an_interrupted_run_or_a_damaged_chunk_only_what_is_missing_is_computed(
        backbone, passes, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK", 2)
    layers, interrupt = [2, -1], Mock(side_effect=[None, None, KeyboardInterrupt])  # in the third batch
    expected = stored(backbone, None).encode_layers(SENTENCES, layers)
    with pytest.raises(KeyboardInterrupt), backbone.layers[2].register_forward_pre_hook(interrupt):
        stored(backbone, tmp_path).encode_layers(SENTENCES, layers)
    file, *others = tmp_path.iterdir()
    assert len(others) == 3  # two chunks, two layers, nothing else
    passes.clear()
    found = stored(backbone, tmp_path).encode_layers(SENTENCES, layers)
    assert sum(rows for rows, _ in passes) == 7 - 2 * 2
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.warns(UserWarning, match=f"{file.name} is damaged"):
        again = stored(backbone, tmp_path).encode_layers(SENTENCES, layers)
    assert [rows for rows, _ in passes[2:]] == [2] and not passes[3:]
    assert all(np.array_equal(of[layer], expected[layer]) for of in (found, again) for layer in layers)


def test_states_that_are_not_finite_are_refused_and_not_stored(backbone, tmp_path):
    infinite = backbone.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * float("inf"), *args[1:]))
    with infinite, pytest.raises(FloatingPointError, match="float32"):
        stored(backbone, tmp_path).encode(SENTENCES)
    assert not list(tmp_path.iterdir())
