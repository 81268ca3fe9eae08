"""Logits, token rules and alignment metrics: against models' own heads and hand computation."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, _after_last_block, build_tokenizer, tiny_backbone
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from torch import nn
from transformers import PreTrainedTokenizerFast

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.evaluation import alignment, vocabulary
from lib.evaluation.alignment import alignment_scores, decode_logits, final_states, logit_chunks, top_tokens
from lib.evaluation.vocabulary import DEFAULT_RULE, OFFICIAL_RULE, TokenRule, token_classes, token_texts

# A byte-level vocabulary by hand. Bytes C3 and E3 are parts of characters; lower case would turn the name of one into
# the other's ("Ã" into "ã").
ENTRIES = ["<s>", "dog", "Ġdog", "Dog", "ĠDog", "the", "ĠThe", ".", "Ġ", "Ã", "ã", "ĠĠ", "run", "n't", "Ċ", "7"]
PLACES = range(1, len(ENTRIES))
DOG, OF_DOG, BIG_DOG, OF_BIG_DOG, THE, OF_THE, STOP, SPACE, C3, E3, SPACES, RUN, NOT, LINE, SEVEN = PLACES


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(token_models.BPE({entry: i for i, entry in enumerate(ENTRIES)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def head(weight, bias=None, **more):
    """What the decoding needs of a backbone with two blocks and no final norm, around a given unembedding."""
    linear = nn.Linear(*reversed(np.shape(weight)), bias=bias is not None).requires_grad_(False)
    linear.load_state_dict({"weight": torch.as_tensor(weight)} | ({} if bias is None else {"bias": torch.tensor(bias)}))
    return SimpleNamespace(unembedding=linear, final_norm=None, num_layers=2, name="by hand", dtype=torch.float32,
                           layer_index=lambda n: n % 3, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_models_own_head_and_states_before_the_last_go_through_its_norm(family):
    backbone = tiny_backbone(family)
    with torch.inference_mode():
        output = backbone.model(input_ids=torch.tensor([[5, 60, 70, 80, 90]]), output_hidden_states=True)
        state, last = (output.hidden_states[n][0] for n in (2, -1))
        normed = _after_last_block(backbone.base, state)
    ours = torch.from_numpy(decode_logits(backbone, last.numpy()))
    cap = getattr(backbone.model.config, "final_logit_softcapping", None)
    ours = ours if cap is None else cap * torch.tanh(ours / cap)
    torch.testing.assert_close(ours, output.logits[0], rtol=1e-5, atol=1e-4)
    assert output.logits.std() > 0.1
    if family == "opt_narrow":  # its unembedding reads 16 of 32 dimensions, by way of a projection
        assert backbone.final_norm is None
        with pytest.raises(ValueError, match="tiny-opt_narrow"):
            decode_logits(backbone, state.numpy(), 2)
        return
    np.testing.assert_allclose(final_states(backbone, state.numpy(), 2), normed, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        decode_logits(backbone, state.numpy(), 2), decode_logits(backbone, normed.numpy()), rtol=1e-4, atol=1e-4)
    assert not np.allclose(normed, state)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_norm_states_in_float32(family, dtype):
    """A state before the final norm can be larger than float16 holds. The same model in float32 is the reference."""
    half = copy.deepcopy(tiny_backbone(family).model).to(dtype)
    exact = copy.deepcopy(half).float()
    half, exact = (Backbone.from_model(model, build_tokenizer(), family) for model in (half, exact))
    states = 1e6 * np.random.default_rng(0).normal(size=(3, half.hidden_size)).astype(np.float32)
    before = copy.deepcopy(half.final_norm.state_dict())
    with torch.inference_mode():
        expected = exact.final_norm(torch.tensor(states)).numpy()
    np.testing.assert_allclose(final_states(half, states, 2), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(decode_logits(half, states, 2), decode_logits(exact, states, 2), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dict(half.final_norm.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [2, -1])
def test_logits_that_are_not_finite_are_refused(layer):
    states = np.ones((2, tiny_backbone().hidden_size), np.float32)
    states[1, 0] = np.inf
    with pytest.raises(FloatingPointError, match="tiny-llama"):
        top_tokens(tiny_backbone(), states, layer)


def test_chunks_of_texts_and_of_the_vocabulary_change_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    weight, bias, states = (generator.normal(size=size).astype(np.float32) for size in ((37, 8), 37, (11, 8)))
    backbone, whole = head(weight, bias), states @ weight.T + bias
    monkeypatch.setattr(alignment, "LOGIT_BYTES", 3 * 37 * 4)
    monkeypatch.setattr(alignment, "ROWS", 5)
    assert [len(chunk) for chunk in logit_chunks(backbone, states)] == [3, 3, 3, 2]
    for layer in (1, -1):  # there is no final norm, so that all states are read as they are
        np.testing.assert_allclose(decode_logits(backbone, states, layer), whole, atol=1e-5)
    ids, logits = top_tokens(backbone, states, k=6)
    np.testing.assert_array_equal(ids, np.argsort(-whole, axis=1)[:, :6])
    np.testing.assert_allclose(logits, -np.sort(-whole, axis=1)[:, :6], atol=1e-5)
    np.testing.assert_allclose(alignment.mean_logits(logit_chunks(backbone, states)), whole.mean(axis=0), atol=1e-6)


def test_top_tokens_of_a_rule_are_distinct_and_stand_where_their_best_entry_stands_minus_a_mean():
    backbone, classes = head(torch.eye(6)), np.array([0, 1, 1, -1, 0, 5])
    states = np.array([[1, 9, 8, 7, 3, 2], [6, 1, 2, 3, 4, 5.5]], np.float32)
    ids, logits = top_tokens(backbone, states, k=3, classes=classes)
    assert ids.tolist() == [[1, 0, 5], [0, 5, 1]] and logits.tolist() == [[9, 3, 2], [6, 5.5, 2]]
    mean = alignment.mean_logits(logit_chunks(backbone, states, classes=classes))
    assert mean.tolist() == [4.5, 5.5, -np.inf, -np.inf, -np.inf, 3.75]
    ids, logits = top_tokens(backbone, states, k=3, classes=classes, mean=mean)
    assert ids.tolist() == [[1, 0, 5], [5, 0, 1]] and logits.tolist() == [[3.5, -1.5, -1.75], [1.75, 1.5, -3.5]]
    for k, rule, rows in ((4, classes, states), (0, None, states), (3, None, states[0])):
        with pytest.raises(ValueError, match=r"3; got 4|6; got 0|\(6,\)"):
            top_tokens(backbone, rows, k=k, classes=rule)


def test_token_texts(tokenizer):
    texts = token_texts(tokenizer, [OF_DOG, STOP, SPACE, C3, E3, LINE, 99])
    assert texts == [" dog", ".", " ", f"<id {C3}>", f"<id {E3}>", "\n", "<id 99>"]
    shown = {" dog": "␣dog", "  ": "␣␣", "a b": "a b", "\n": "\\n", "\t x": "\\t x", "é": "é", "\u200b": "\\u200b"}
    assert {text: vocabulary.visible(text) for text in shown} == shown
    core = Tokenizer(token_models.BPE({"▁dog": 0, "dog": 1, "▁▁": 2}, merges=[]))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llama = PreTrainedTokenizerFast(tokenizer_object=core)
    assert llama.decode([0]) == "dog" and token_texts(llama, [0, 1, 2]) == [" dog", "dog", "  "]
    assert token_classes(llama, 3, OFFICIAL_RULE).tolist() == [0, 1, 2]
    assert token_classes(llama, 3, DEFAULT_RULE).tolist() == [0, 0, 2]


def test_rules_by_hand(tokenizer):
    size = len(ENTRIES) + 1  # one row that no token belongs to
    assert token_classes(tokenizer, size, OFFICIAL_RULE).tolist() == list(range(size))
    exact = token_classes(tokenizer, size, TokenRule(merge_space=False, merge_case=False))
    assert exact.tolist() == [-1, *range(1, size)]

    def changed(**rule):
        classes = token_classes(tokenizer, size, TokenRule(special=True, **rule))
        return {i: int(c) for i, c in enumerate(classes) if c != i}

    assert changed(merge_case=False) == {OF_DOG: DOG, OF_BIG_DOG: BIG_DOG}
    assert changed(merge_space=False) == {BIG_DOG: DOG, OF_BIG_DOG: OF_DOG}
    assert changed() == {OF_DOG: DOG, BIG_DOG: DOG, OF_BIG_DOG: DOG, OF_THE: THE}
    content = token_classes(tokenizer, size, vocabulary.CONTENT_RULE)
    assert set(np.flatnonzero(content < 0)) == {0, THE, OF_THE, STOP, SPACE, SPACES, NOT, LINE}
    assert content[[DOG, OF_DOG, RUN, SEVEN]].tolist() == [DOG, DOG, RUN, SEVEN]
    with pytest.raises(ValueError, match="read-only"):
        token_classes(tokenizer, size, DEFAULT_RULE)[0] = 0


def test_text_tokens_keep_repeats_and_drop_what_does_not_count():
    bos, texts = build_tokenizer("bytes_bos"), ["The dog, the dog", ""]
    exact, merged = (vocabulary.text_tokens(bos, texts, token_classes(bos, len(bos), rule))
                     for rule in (OFFICIAL_RULE, DEFAULT_RULE))
    assert [row.tolist() for row in exact] == [bos.encode(texts[0]), [bos.bos_token_id]]
    assert len(merged[0]) == len(exact[0]) - 1 and len(merged[1]) == 0
    [comma] = np.flatnonzero(np.isin(merged[0], bos.encode(",", add_special_tokens=False)))
    assert merged[0][comma - 1] == merged[0][-1]


def test_aligned_tokens_and_which_stand_in_the_text(tokenizer):
    class Spelled:
        """The tokenizer with a known encoding; the one by hand has no merges."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **_):
            return {"input_ids": [[0, DOG] for _ in texts]}

    backbone = head(torch.eye(len(ENTRIES)), tokenizer=Spelled())
    states = np.zeros((2, len(ENTRIES)), np.float32)
    states[0, [OF_DOG, LINE, BIG_DOG, 0]], states[1, [RUN, STOP, SEVEN, DOG]] = [4, 3, 2, 1], [4, 3, 2, 1]
    table = alignment.aligned_tokens(backbone, states, k=4, texts=["dog", "a dog"])
    assert list(table.columns) == ["text", "id", "token", "logit", "in_text"]
    assert table["text"].tolist() == [0] * 4 + [1] * 4
    assert table["id"].tolist()[:4] == [OF_DOG, LINE, BIG_DOG, 0] and table["logit"].tolist() == [4, 3, 2, 1] * 2
    assert table["token"].tolist()[:4] == ["␣dog", "\\n", "Dog", "<s>"]
    assert table["in_text"].tolist() == [True, False, True, False, False, False, False, True]
    assert "in_text" not in alignment.aligned_tokens(backbone, states, k=4)
    lines = alignment.token_lines(backbone, states, -1, 4, ["dog", "a dog"])
    assert lines == ["**␣dog** \\n **Dog** <s>", "run . 7 **dog**"]


# Texts ranked over a vocabulary of 10. T of the first repeats 3, so its prefix has 4 places for 3 tokens; a text
# without tokens does not count.
TOP, OWN = np.array([[7, 3, 9, 5, 1, 0], [2, 4, 6, 8, 0, 1], [1, 2, 3, 4, 5, 6]]), [[3, 3, 5, 1], [0, 9, 5], []]


def test_ranks_and_metrics_by_hand():
    top, texts = TOP, OWN
    ranks = alignment.token_ranks(top, texts)
    assert ranks["text"].tolist() == [0, 0, 0, 1, 1, 1] and ranks["token"].tolist() == [3, 5, 1, 0, 9, 5]
    assert ranks["length"].tolist() == [4, 4, 4, 3, 3, 3]
    np.testing.assert_array_equal(ranks["rank"], [2, 4, 5, 5, np.nan, np.nan])
    metrics = alignment.alignment_metrics(ranks, ks=(1, 2, 5))
    assert metrics[["Hit@1", "Hit@2", "Hit@5"]].to_numpy().tolist() == [[0, 1, 1], [0, 0, 1]]
    # Of {3, 5, 1} the prefix of length 4 holds 3 and 5, cut at 2 only 3; of {0, 9, 5} the prefix of length 3 none.
    np.testing.assert_allclose(metrics[["LAR", "LAR@2", "LAR@5"]], [[2 / 3, 1 / 3, 2 / 3], [0, 0, 0]])
    with pytest.raises(ValueError, match="Hit@7"):
        alignment.alignment_metrics(ranks, ks=(1, 7))
    for shallow, own in ((top[:, :3], texts), (top, texts[:1])):
        with pytest.raises(ValueError, match="end after"):
            alignment.token_ranks(shallow, own)
    with pytest.raises(ValueError, match="same items"):
        alignment_scores({"a": ranks, "b": alignment.token_ranks(top, texts[::-1])}, ks=(1,))


def test_scores_of_runs_by_hand_and_their_differences():
    """b finds {3, 5} of {0, 1, 3, 5, 9} (5 in one of its two texts), cut at 2 only 3; a {0, 1, 5} and {0, 1}."""
    ranks = {"b": alignment.token_ranks(TOP, OWN), "a": alignment.token_ranks(TOP[:, ::-1], OWN)}
    table = alignment_scores(ranks, ks=(2,), reference="b", draws=200)
    assert table["run"].tolist() == ["b"] * 5 + ["a"] * 5
    assert table["metric"].tolist() == ["Hit@2", "LAR@2", "LAR", "GAR@2", "GAR"] * 2
    values = [1 / 2, 1 / 6, 1 / 3, 1 / 5, 2 / 5, 1, 1 / 3, 1 / 2, 2 / 5, 3 / 5]
    assert table["value"].tolist() == pytest.approx(values)
    assert table["difference"].tolist() == pytest.approx([0] * 5 + list(np.subtract(values[5:], values[:5])))
    assert {"low", "high", "difference_low", "difference_high"} < {*table.columns}


def test_rankings_as_deep_as_the_longest_text():
    backbone = tiny_backbone("llama", "bytes_bos")
    texts = ["A dog.", "The stock market fell by 3.5 percent on Tuesday, analysts said. " * 4]
    states = np.random.default_rng(0).normal(size=(2, backbone.hidden_size)).astype(np.float32)
    ranks = alignment.embedding_ranks(backbone, states, -1, texts, OFFICIAL_RULE, deepest=2)
    assert ranks["length"].max() == len(backbone.tokenizer(texts[1])["input_ids"]) > 50
    logits = decode_logits(backbone, states)
    for row in ranks[ranks["rank"].notna()].itertuples():
        assert row.rank == 1 + (logits[row.text] > logits[row.text, row.token]).sum()


def test_the_bundled_model(smollm2):
    states = SentenceEncoder(smollm2, "none").encode_layers(["The capital of France is"], [28, -1])
    assert alignment.aligned_tokens(smollm2, states[-1], k=1)["token"].tolist() == ["␣Paris"]
    assert "␣Paris" in alignment.aligned_tokens(smollm2, states[28], 28, k=20)["token"].tolist()
