"""The store of embeddings: nothing is computed twice, nothing stale or damaged is served, no interrupt costs much."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
from tiny_models import HIDDEN, assert_same, build_tokenizer, cosines, randomise

import lib.core.encoder
from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS
from lib.core.store import EmbeddingStore
from lib.core.token_prepending import TokenPrepending

TP = TokenPrepending(1, 3)
SENTENCES = ["The plane takes off.", "No.", "Is it cold?", "No.", "\x00", "a\u2028b", "e\u0301", "\u00e9"]


def stored(backbone, folder, **choices) -> SentenceEncoder:
    store = EmbeddingStore(folder) if folder else None
    choices = {"prompt": "prompteol", "method": TP, "share_prefix": False} | choices
    return SentenceEncoder(backbone, **choices, store=store)


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


def test_what_is_stored_does_not_decide_what_is_computed(backbone, tmp_path):
    """Other neighbours in a batch mean other rounding: a call gives the same bits, whatever ran before it."""
    stored(backbone, tmp_path).encode(SENTENCES[:3])
    assert np.array_equal(stored(backbone, tmp_path).encode(SENTENCES), stored(backbone, None).encode(SENTENCES))


def test_ck_is_the_mean_of_cot_and_ke_and_finds_what_they_stored(backbone, passes, tmp_path):
    cot, ke = (stored(backbone, tmp_path, prompt=name).encode(SENTENCES) for name in ("cot", "ke"))
    passes.clear()
    assert_same(stored(backbone, tmp_path, prompt="ck").encode(SENTENCES), (cot + ke) / 2)
    assert not passes


TPS = {"start": [0], "end": [4], "seed": [1], "init": ["zeros", np.arange(HIDDEN)], "place": ["start"], "count": [2]}
PARTS = {"clean": False, "before": ("[",), "after": ("</s>",)}  # of a prompt


@pytest.mark.parametrize("change", [
    {"method": None}, {"prompt": "cot"}, {"pooling": "mean"}, {"exit_layer": 2}, {"max_length": 100},
    {"share_prefix": True},
    *({"method": dataclasses.replace(TP, **{key: value})} for key, values in TPS.items() for value in values),
    *({"prompt": dataclasses.replace(PROMPTS["prompteol"], **{key: value})} for key, value in PARTS.items()),
], ids=str)
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
    reasoned = dataclasses.replace(backbone, notes={"dtype_reason": "another reason"})
    stored(reasoned, tmp_path).encode(SENTENCES)
    assert not passes
    stored(backbone, tmp_path).encode(SENTENCES, batch_size=4)
    assert [rows for rows, _ in passes] == [4, 3]
    encoder = stored(backbone, tmp_path)
    encoder.code = "other code"
    encoder.encode(SENTENCES)
    assert len(passes) == 3
    model = copy.deepcopy(backbone.model)
    randomise(model, seed=1)
    other = Backbone.from_model(model, build_tokenizer(), name=backbone.name, revision=backbone.revision)
    assert cosines(stored(other, tmp_path).encode(SENTENCES), first).max() < 0.9


def test_a_damaged_chunk_is_noticed_and_computed_again(backbone, passes, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.core.encoder, "CHUNK", 4)
    first = stored(backbone, tmp_path).encode(SENTENCES)
    file, _ = sorted(tmp_path.glob("*.npy"), key=lambda path: -path.stat().st_size)  # chunks of 4 and 3
    file.write_bytes(file.read_bytes()[:-50])
    passes.clear()
    with pytest.warns(UserWarning, match=f"{file.name} is damaged"):
        again = stored(backbone, tmp_path).encode(SENTENCES)
    assert [rows for rows, _ in passes] == [4] and np.array_equal(again, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored(backbone, tmp_path).encode(SENTENCES)
    assert len(passes) == 1


def test_an_interrupted_run_goes_on_where_it_stopped(backbone, passes, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.core.encoder, "CHUNK", 2)
    calls, layers = [], [2, -1]

    def interrupt(_, args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = backbone.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        stored(backbone, tmp_path).encode_layers(SENTENCES, layers)
    handle.remove()
    assert len(list(tmp_path.iterdir())) == 4  # two chunks, two layers, nothing else
    passes.clear()
    found = stored(backbone, tmp_path).encode_layers(SENTENCES, layers)
    assert sum(rows for rows, _ in passes) == 7 - 2 * 2
    expected = stored(backbone, None).encode_layers(SENTENCES, layers)
    for layer in layers:
        assert np.array_equal(found[layer], expected[layer])


def test_states_that_are_not_finite_are_refused_and_not_stored(backbone, tmp_path):
    handle = backbone.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * float("inf"), *args[1:]))
    with pytest.raises(FloatingPointError, match="float32"):
        stored(backbone, tmp_path).encode(SENTENCES)
    handle.remove()
    assert not list(tmp_path.iterdir())
