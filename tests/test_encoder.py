"""Sentences in, embeddings out: order, batches, pooling, prompts, bad input, and an encoder's four choices."""

import contextlib
import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import HIDDEN, LAYERS, TP, assert_same, loop_states, prompt_ids, tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.forward import block_input, read_states, replace_input
from lib.core.hardware import token_batches
from lib.core.postprocess import MeanRemoved, Normalise
from lib.core.prompts import PROMPTS, Prompt, clean_sentence
from lib.core.store import EmbeddingStore

SENTENCES = [*tiny_models.SENTENCES, "No.", "The stock market fell by 3.5 percent on Tuesday, analysts said."]


def test_clean_sentence():
    cleaned = {
        "He is eating": "He is eating.", "He is.": "He is.", "Is he here??": "Is he here?.", " \n": "", "?": ".",
        "He is!": "He is!.", "(aside)": "(aside).", 'He said "no"': "He said 'no'", 'He said "no': "He said 'no.",
        "the dogs'": "the dogs'", '"': "'", "  many \t spaces\nand lines ": "many spaces and lines."}
    assert {sentence: clean_sentence(sentence) for sentence in cleaned} == cleaned


@pytest.mark.parametrize("tp", [None, TP], ids=["baseline", "tp"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_batch_size_changes_nothing_but_the_batches(backbone, passes, tp, share_prefix):
    encoder = SentenceEncoder(backbone, "prompteol", tp, share_prefix=share_prefix)
    sentences = [*SENTENCES, "No", "  No. "]  # equal ones, also once cleaned, are computed once
    expected = encoder.encode(sentences)  # the first call may check whether the model can share a prefix
    assert all(np.array_equal(expected[2], expected[i]) for i in (5, -2, -1))
    for batch_size, rows in [(1, [1] * 6), (4, [4, 2]), (64, [6]), (None, [6])]:
        passes.clear()
        assert_same(encoder.encode(sentences, batch_size=batch_size), expected)
        assert [batch for batch, _ in passes] == [1] * share_prefix + rows


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 300), st.sampled_from([None, 1, 3, 64]))
def test_batches_keep_to_their_limits(lengths, budget, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.core.hardware.BATCH_TOKENS", {"cpu": budget, "cuda": 10})
        batches = token_batches(lengths, torch.device("meta"), size)  # a kind without an own budget has the CPU's
        assert token_batches([5, 5, 5, 5], torch.device("cuda")) == [[0, 1], [2, 3]]
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True) and (size is None or max(map(len, batches)) <= size)
    assert all(len(b) == 1 or len(b) * width <= budget for b, width in zip(batches, widths))


def test_shapes_and_types(backbone):
    encoder = SentenceEncoder(backbone, method=TP)
    many, one = encoder.encode(SENTENCES), encoder.encode(SENTENCES[0])
    assert many.shape == (len(SENTENCES), HIDDEN) and one.shape == (HIDDEN,) and many.dtype == one.dtype == np.float32
    tensor = encoder.encode(SENTENCES, convert_to_numpy=False)
    assert isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and not tensor.requires_grad
    assert encoder.encode(SENTENCES[0], convert_to_numpy=False).shape == (HIDDEN,)
    for other in (tensor.numpy(), *map(encoder.encode, (tuple(SENTENCES), np.array(SENTENCES), iter(SENTENCES)))):
        assert np.array_equal(other, many)
    normalised = encoder.encode(SENTENCES, normalize_embeddings=True)
    np.testing.assert_allclose(normalised, many / np.linalg.norm(many, axis=1, keepdims=True), rtol=1e-6)
    assert_same(encoder.encode(SENTENCES[0], normalize_embeddings=True), normalised[0])
    normalised[:] = 0  # what was handed out is the caller's own
    assert np.array_equal(encoder.encode(SENTENCES), many)


def test_layers_keep_their_names_and_equal_single_passes(backbone, passes):
    encoder = SentenceEncoder(backbone, method=TP, share_prefix=False)
    found = encoder.encode_layers(SENTENCES, [-1, 2, 0, LAYERS])
    assert list(found) == [-1, 2, 0, LAYERS] and len(passes) == 1
    assert encoder.changed().describe() == encoder.describe() != encoder.changed(exit_layer=2).describe()
    for layer, embeddings in found.items():
        assert np.array_equal(embeddings, encoder.changed(exit_layer=layer).encode(SENTENCES))
    assert encoder.changed(exit_layer=-2).exit_layer == LAYERS - 1
    assert encoder.max_length == encoder.changed(max_length=512).max_length == backbone.max_length == 256


def test_a_progress_bar_is_shown_for_many_sentences_or_when_asked_for(backbone, capsys):
    encoder = SentenceEncoder(backbone, exit_layer=0)
    for count, show, shown in [(7, True, True), (1000, None, False), (1001, None, True), (1001, False, False)]:
        encoder.encode([str(n) for n in range(count)], show_progress_bar=show)
        assert ("prompteol" in capsys.readouterr().err) == shown, (count, show)


@pytest.mark.parametrize("choices, message", [
    ({"prompt": "eol"}, "'eol'.*none, prompteol, cot, ke, ck, metaeol, echo"),
    ({"pooling": "max"}, "'max'.*last, mean, weighted_mean"),
    *(({"exit_layer": n}, rf"Layer {n} does not exist.*0\.\.{LAYERS}") for n in (LAYERS + 1, -LAYERS - 2)),
    ({"prompt": "echo", "method": TP}, "'echo'"), ({"prompt": "ke", "max_length": 20}, "max_length=20"),
    ({"prompt": Prompt("own", ("<PST> {sentence}",))}, "needs a method")])
def test_bad_choices_are_refused(backbone, choices, message):
    with pytest.raises(ValueError, match=message):
        SentenceEncoder(backbone, **choices).encode("No.")


def pooled(states: np.ndarray, pooling: str) -> np.ndarray:
    weights = np.arange(1, len(states) + 1) if pooling == "weighted_mean" else np.ones(len(states))
    return (states.astype(np.float64) * weights[:, None]).sum(0) / weights.sum()


def first_token(tokenizer, text: str, sentence: str) -> int:
    """The first token of a sentence that ends a text: from the next one on, the tokens do not spell all of it."""
    ids = tokenizer(text)["input_ids"]
    return max(i for i in range(len(ids)) if tokenizer.decode(ids[i:]).endswith(sentence))


# The space before the sentence joins its first token, so a prefix "... word : " must not be run by itself.
JOINED = Prompt("mine", ("In one short word : {sentence}",), clean=False, pooling="mean")
ODD = ["The rewritten sentence: a", "日本 ☃", " spaces ", PROMPTS["echo"].templates[0].replace("{sentence}", "x")]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("pooling", [None, "mean", "weighted_mean"])
@pytest.mark.parametrize("prompt, kind, sentences", [
    (PROMPTS["none"], "bytes", SENTENCES + ODD),
    *((PROMPTS["echo"], kind, SENTENCES + ODD) for kind in tiny_models.KINDS),
    *((JOINED, "bytes", sentences) for sentences in (["one"], ["sentence one", "sentence two"], ["one", "two", "(3)"])),
    (dataclasses.replace(JOINED, before=("[",), after=("]", "</s>")), "bytes", SENTENCES)])
def test_poolings_against_numpy(prompt, kind, sentences, pooling, share_prefix):
    """Echo pools exactly the second copy of the sentence, the bare sentence all of it; unless one is given, its own."""
    backbone, (template,) = tiny_backbone("llama", kind), prompt.templates
    before, after = (backbone.tokenizer.convert_tokens_to_ids(list(side)) for side in (prompt.before, prompt.after))
    encoder = SentenceEncoder(backbone, prompt, pooling=pooling, share_prefix=share_prefix)
    found = encoder.encode_layers(sentences, [1, LAYERS])
    for i, sentence in enumerate(sentences):
        text = template.replace("{sentence}", sentence)
        states = loop_states(backbone, [*before, *backbone.tokenizer(text)["input_ids"], *after])
        first = len(before) + first_token(backbone.tokenizer, text, sentence)
        if (pooling or prompt.pooling) == "last":
            first = len(states[0]) - 1
        for layer in (1, LAYERS):
            expected = pooled(states[layer][first:].numpy(), pooling)
            assert_same(found[layer][i], expected.astype(np.float32), f"{sentence!r}, layer {layer}")
            for k in {first - 1, first + 1} & set(range(len(states[layer]))):  # else it would not be seen
                assert np.abs(pooled(states[layer][k:].numpy(), pooling) - expected).max() > 1e-3


def test_a_postprocess_is_applied_to_the_exit_layer_alone(backbone, tmp_path):
    mean, store = np.arange(HIDDEN), EmbeddingStore(tmp_path)
    encoder = SentenceEncoder(backbone, "prompteol", TP, 2, postprocess=MeanRemoved(mean), store=store)
    expected = SentenceEncoder(backbone, "prompteol", TP, 2).encode(SENTENCES)
    for _ in range(2):  # what is stored is the embedding before it
        np.testing.assert_allclose(encoder.encode(SENTENCES), expected - mean, atol=1e-5)
    assert np.array_equal(encoder.changed(postprocess=None).encode(SENTENCES), expected)
    with pytest.raises(ValueError, match="postprocess belongs to layer 2"):
        encoder.encode_layers(SENTENCES, [1, 2])
    lengths = np.linalg.norm(encoder.changed(postprocess=Normalise()).encode(SENTENCES), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


class Doubled:
    """A method of one's own: the last token's state is doubled before block 2."""
    def describe(self):
        return {"method": "Doubled"}

    @contextlib.contextmanager
    def attach(self, backbone, batch):
        def double(_, args, kwargs):
            states = block_input(args, kwargs).clone()
            states[torch.arange(len(states)), batch.last] *= 2
            return replace_input(states, args, kwargs)
        with backbone.layers[2].register_forward_pre_hook(double, with_kwargs=True):
            yield


class FirstOfSentence:
    """A pooling of one's own: the state of the sentence's first token, negative."""
    needs_span = True

    def read(self, backbone, batch, layers, prefix=None):
        rows = torch.arange(len(batch.first))
        return read_states(backbone, batch.ids, layers, lambda states: -states[rows, batch.first], prefix)

    def describe(self):
        return {"pooling": "first of sentence"}


def test_a_method_and_a_pooling_of_ones_own(backbone):
    encoder = SentenceEncoder(backbone, JOINED, Doubled())
    def change(i, h, block, args, kwargs, states):
        h[:, -1] *= 2 if i == 2 else 1
        return h, kwargs
    states = loop_states(backbone, prompt_ids(backbone, "one plane", prompt=JOINED), change=change)[LAYERS]
    first = first_token(backbone.tokenizer, "In one short word : one plane", "one plane")
    poolings = {"last": states[-1], "mean": states[first:].mean(0), FirstOfSentence(): -states[first]}
    for pooling, expected in poolings.items():
        assert_same(encoder.changed(pooling=pooling).encode(["one plane", "No."])[0], expected, str(pooling))
