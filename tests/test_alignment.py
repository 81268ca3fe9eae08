"""Logits, token rules, alignment metrics and their intervals: against models' own heads and hand computation."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, _after_last_block, build_tokenizer, tiny_backbone
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.evaluation import alignment
from lib.evaluation.alignment import (
    aligned_tokens,
    alignment_metrics,
    alignment_scores,
    decode_logits,
    embedding_ranks,
    final_states,
    logit_chunks,
    mean_logits,
    token_lines,
    token_ranks,
    top_tokens,
)
from lib.evaluation.vocabulary import (
    CONTENT_RULE,
    DEFAULT_RULE,
    OFFICIAL_RULE,
    TokenRule,
    text_tokens,
    token_classes,
    token_texts,
    visible,
)

pytestmark = pytest.mark.usefixtures("one_thread")

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


def head(weight, bias=None, norm=None, layers=2):
    """What the decoding needs of a backbone, around a given unembedding."""
    weight = torch.as_tensor(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight.dtype)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = torch.as_tensor(bias)
    return SimpleNamespace(
        unembedding=linear.requires_grad_(False), final_norm=norm, num_layers=layers, name="by hand",
        dtype=weight.dtype, layer_index=lambda n: n + layers + 1 if n < 0 else n,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_models_own_head(family):
    backbone = tiny_backbone(family)
    with torch.inference_mode():
        output = backbone.model(input_ids=torch.tensor([[5, 60, 70, 80, 90]]), output_hidden_states=True)
    ours = torch.from_numpy(decode_logits(backbone, output.hidden_states[-1][0].numpy()))
    cap = getattr(backbone.model.config, "final_logit_softcapping", None)
    ours = ours if cap is None else cap * torch.tanh(ours / cap)
    torch.testing.assert_close(ours, output.logits[0], rtol=1e-5, atol=1e-4)
    assert output.logits.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_states_before_the_last_go_through_the_final_norm(family):
    backbone = tiny_backbone(family)
    with torch.inference_mode():
        state = backbone.base(input_ids=torch.tensor([[5, 60, 70, 80]]), output_hidden_states=True).hidden_states[2][0]
        expected = _after_last_block(backbone.base, state)
    if family == "opt_narrow":  # its unembedding reads 16 of 32 dimensions, by way of a projection
        with pytest.raises(ValueError, match="tiny-opt_narrow"):
            decode_logits(backbone, state.numpy(), 2)
        return
    np.testing.assert_allclose(final_states(backbone, state.numpy(), 2), expected, rtol=1e-5, atol=1e-5)
    bias = getattr(backbone.unembedding, "bias", None)
    logits = expected @ backbone.unembedding.weight.T + (0 if bias is None else bias)
    np.testing.assert_allclose(decode_logits(backbone, state.numpy(), 2), logits, rtol=1e-4, atol=1e-4)
    assert not np.allclose(final_states(backbone, state.numpy(), 2), final_states(backbone, state.numpy(), -1))


def test_a_model_without_a_final_norm_is_decoded_as_it_is():
    states = np.array([[1.0, 2.0]], np.float32)
    np.testing.assert_array_equal(decode_logits(head(torch.eye(2)), states, 1), states)
    normed = head(torch.eye(2), norm=nn.LayerNorm(2))
    np.testing.assert_allclose(decode_logits(normed, states, 1), [[-1, 1]], atol=1e-4)
    np.testing.assert_array_equal(decode_logits(normed, states, 2), states)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_norm_states_in_float32(family, dtype):
    """A state before the final norm can be larger than float16 holds. The same model in float32 is the reference."""
    half = copy.deepcopy(tiny_backbone(family).model).to(dtype)
    exact = copy.deepcopy(half).float()
    half, exact = (Backbone.from_model(model, build_tokenizer(), family) for model in (half, exact))
    states = 1e6 * np.random.default_rng(0).normal(size=(3, half.hidden_size)).astype(np.float32)
    weights = {name: weight.clone() for name, weight in half.final_norm.named_parameters()}
    with torch.inference_mode():
        expected = exact.final_norm(torch.tensor(states)).numpy()
    np.testing.assert_allclose(final_states(half, states, 2), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(decode_logits(half, states, 2), decode_logits(exact, states, 2), rtol=1e-5, atol=1e-4)
    for name, weight in half.final_norm.named_parameters():
        assert weight.dtype == weights[name].dtype and torch.equal(weight, weights[name])


def test_logits_that_are_not_finite_are_refused():
    backbone = tiny_backbone()
    states = np.ones((2, backbone.hidden_size), np.float32)
    states[1, 0] = np.inf
    for decode in (decode_logits, top_tokens):
        for layer in (2, -1):
            with pytest.raises(FloatingPointError, match="tiny-llama"):
                decode(backbone, states, layer)


def test_half_precision_models_get_float32_logits():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 16, generator=generator).bfloat16()
    states = 8 * torch.randn(5, 16, generator=generator)
    logits = decode_logits(head(weight, bias=torch.ones(300).bfloat16()), states.numpy())
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, states.double() @ weight.double().T + 1, atol=1e-4)
    assert any(len(np.unique(row.bfloat16().float())) < 300 for row in torch.from_numpy(logits))  # they would tie


def test_chunks_of_texts_and_of_the_vocabulary_change_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    weight, bias, states = (generator.normal(size=size).astype(np.float32) for size in ((37, 8), 37, (11, 8)))
    backbone = head(weight, bias)
    whole, best = decode_logits(backbone, states), top_tokens(backbone, states, k=6)
    monkeypatch.setattr(alignment, "LOGIT_BYTES", 3 * 37 * 4)
    monkeypatch.setattr(alignment, "ROWS", 5)
    assert [len(chunk) for chunk in logit_chunks(backbone, states)] == [3, 3, 3, 2]
    np.testing.assert_allclose(decode_logits(backbone, states), whole, atol=1e-5)
    np.testing.assert_array_equal(top_tokens(backbone, states, k=6)[0], best[0])
    np.testing.assert_array_equal(best[0], np.argsort(-whole, axis=1)[:, :6])
    np.testing.assert_allclose(best[1], -np.sort(-whole, axis=1)[:, :6])
    np.testing.assert_allclose(mean_logits(logit_chunks(backbone, states)), whole.mean(axis=0), atol=1e-6)


def test_the_head_of_a_masked_model_is_used_whole():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).eval()
    backbone = SimpleNamespace(
        model=model, unembedding=model.cls, final_norm=None, num_layers=2, name="bert", dtype=torch.float32,
        layer_index=lambda n: n % 3,
    )
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([[4, 5, 6]]), output_hidden_states=True)
    logits = decode_logits(backbone, output.hidden_states[-1][0].numpy())
    np.testing.assert_allclose(logits, output.logits[0], atol=1e-5)


def test_top_tokens_of_a_rule_are_distinct_and_stand_where_their_best_entry_stands():
    backbone = head(torch.eye(6))
    states = np.array([[1, 9, 8, 7, 3, 2], [6, 1, 2, 3, 4, 5]], np.float32)
    classes = np.array([0, 1, 1, -1, 0, 5])
    ids, logits = top_tokens(backbone, states, k=3, classes=classes)
    assert ids.tolist() == [[1, 0, 5], [0, 5, 1]] and logits.tolist() == [[9, 3, 2], [6, 5, 2]]
    (merged,) = logit_chunks(backbone, states, classes=classes)
    gone = -np.inf
    assert merged.dtype == torch.float32 and merged[0].tolist() == [3, 9, gone, gone, gone, 2]
    with pytest.raises(ValueError, match="3; got 4"):
        top_tokens(backbone, states, k=4, classes=classes)
    with pytest.raises(ValueError, match="6; got 0"):
        top_tokens(backbone, states, k=0)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        top_tokens(backbone, states[0], k=3)


def test_the_mean_of_a_collection_is_taken_off_before_tokens_are_chosen():
    backbone, classes = head(torch.eye(5)), np.array([0, 1, 0, 3, -1])
    states = np.array([[5, 0, 7, 3, 9], [0, 4, 2, 6, 9]], np.float32)
    plain = top_tokens(backbone, states, k=3, classes=classes)
    assert plain[0].tolist() == [[0, 3, 1], [3, 1, 0]] and plain[1].tolist() == [[7, 3, 0], [6, 4, 2]]
    mean = mean_logits(logit_chunks(backbone, states, classes=classes))
    assert mean.tolist() == [4.5, 2, -np.inf, 4.5, -np.inf]
    ids, values = top_tokens(backbone, states, k=3, classes=classes, mean=mean)
    assert ids.tolist() == [[0, 3, 1], [1, 3, 0]] and values.tolist() == [[2.5, -1.5, -2], [2, 1.5, -2.5]]


def test_lines_of_tokens_mark_those_of_the_text(tokenizer):
    backbone = head(torch.eye(len(ENTRIES)))
    backbone.tokenizer = tokenizer
    states = np.zeros((2, len(ENTRIES)), np.float32)
    states[0, [STOP, RUN]], states[1, [RUN, DOG]] = (2, 1), (2, 1)
    assert token_lines(backbone, states, -1, 2, [".", "."]) == ["**.** run", "run dog"]


def test_token_texts(tokenizer):
    texts = token_texts(tokenizer, [OF_DOG, STOP, SPACE, C3, E3, LINE, 99])
    assert texts == [" dog", ".", " ", f"<id {C3}>", f"<id {E3}>", "\n", "<id 99>"]
    metaspace = build_tokenizer("metaspace")
    ids = metaspace("A dog")["input_ids"]
    assert "".join(token_texts(metaspace, ids[1:])) == " A dog"


def test_a_leading_space_survives_a_decoder_that_strips_it():
    core = Tokenizer(token_models.BPE({"▁dog": 0, "dog": 1, "▁▁": 2}, merges=[]))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llama = PreTrainedTokenizerFast(tokenizer_object=core)
    assert llama.decode([0]) == "dog"
    assert token_texts(llama, [0, 1, 2]) == [" dog", "dog", "  "]
    assert token_classes(llama, 3, OFFICIAL_RULE).tolist() == [0, 1, 2]
    assert token_classes(llama, 3, DEFAULT_RULE).tolist() == [0, 0, 2]


def test_rules_by_hand(tokenizer):
    size = len(ENTRIES) + 1  # one row that no token belongs to
    whole = list(range(size))
    assert token_classes(tokenizer, size, OFFICIAL_RULE).tolist() == whole
    assert token_classes(tokenizer, size, TokenRule(merge_space=False, merge_case=False)).tolist() == [-1, *whole[1:]]

    def changed(**rule):
        classes = token_classes(tokenizer, size, TokenRule(special=True, **rule))
        return {i: int(c) for i, c in enumerate(classes) if c != i}

    spaces = {OF_DOG: DOG, OF_BIG_DOG: BIG_DOG}
    assert changed(merge_case=False) == spaces
    assert changed(merge_space=False) == {BIG_DOG: DOG, OF_BIG_DOG: OF_DOG}
    assert changed() == {OF_DOG: DOG, BIG_DOG: DOG, OF_BIG_DOG: DOG, OF_THE: THE}
    content = token_classes(tokenizer, size, CONTENT_RULE)
    assert set(np.flatnonzero(content < 0)) == {0, THE, OF_THE, STOP, SPACE, SPACES, NOT, LINE}
    assert content[[DOG, OF_DOG, RUN, SEVEN]].tolist() == [DOG, DOG, RUN, SEVEN]
    with pytest.raises(ValueError, match="read-only"):
        token_classes(tokenizer, size, DEFAULT_RULE)[0] = 0


def test_text_tokens_keep_repeats_and_drop_what_does_not_count():
    bos = build_tokenizer("bytes_bos")
    exact = token_classes(bos, len(bos), OFFICIAL_RULE)
    ids = bos.encode("The dog, the dog")
    assert text_tokens(bos, ["The dog, the dog", ""], exact)[0].tolist() == ids
    assert text_tokens(bos, [""], exact)[0].tolist() == [bos.bos_token_id]
    merged = text_tokens(bos, ["The dog, the dog", ""], token_classes(bos, len(bos), DEFAULT_RULE))
    assert len(merged[0]) == len(ids) - 1 and len(merged[1]) == 0
    ends = bos.encode(",", add_special_tokens=False)
    assert np.count_nonzero(np.isin(merged[0], ends)) == 1
    half = np.flatnonzero(np.isin(merged[0], ends))[0]
    assert merged[0][:half][-1] == merged[0][-1]


def test_visible():
    shown = {" dog": "␣dog", "  ": "␣␣", "a b": "a b", "\n": "\\n", "\t x": "\\t x", "é": "é", "\u200b": "\\u200b"}
    assert {text: visible(text) for text in shown} == shown


def test_aligned_tokens_and_which_stand_in_the_text(tokenizer):
    backbone = head(torch.eye(len(ENTRIES)))
    backbone.tokenizer = tokenizer
    states = np.zeros((1, len(ENTRIES)), np.float32)
    states[0, [OF_DOG, LINE, BIG_DOG, 0]] = [4, 3, 2, 1]

    class Spelled:
        """The tokenizer with a known encoding; the one by hand has no merges."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **_):
            return {"input_ids": [[0, DOG] for _ in texts]}

    backbone.tokenizer = Spelled()
    table = aligned_tokens(backbone, states, k=4, texts=["dog"])
    assert list(table.columns) == ["text", "id", "token", "logit", "in_text"]
    assert table["id"].tolist() == [OF_DOG, LINE, BIG_DOG, 0] and table["logit"].tolist() == [4, 3, 2, 1]
    assert table["token"].tolist() == ["␣dog", "\\n", "Dog", "<s>"]
    assert table["in_text"].tolist() == [True, False, True, False]
    assert "in_text" not in aligned_tokens(backbone, states, k=4)


# Two texts, ranked over a vocabulary of 10. T of the first repeats token 3, so its prefix has 4 places for 3 tokens.
TOP = np.array([[7, 3, 9, 5, 1, 0], [2, 4, 6, 8, 0, 1]])
TEXTS = [[3, 3, 5, 1], [0, 9]]


def test_ranks_by_hand():
    ranks = token_ranks(TOP, TEXTS)
    assert ranks["text"].tolist() == [0, 0, 0, 1, 1] and ranks["token"].tolist() == [3, 5, 1, 0, 9]
    assert ranks["length"].tolist() == [4, 4, 4, 2, 2]
    np.testing.assert_array_equal(ranks["rank"], [2, 4, 5, 5, np.nan])


def test_metrics_by_hand():
    metrics = alignment_metrics(token_ranks(TOP, TEXTS), ks=(1, 2, 5))
    assert metrics[["Hit@1", "Hit@2", "Hit@5"]].to_numpy().tolist() == [[0, 1, 1], [0, 0, 1]]
    # Of {3, 5, 1} the prefix of length 4 holds 3 and 5, cut at 2 only 3; of {0, 9} the prefix of length 2 holds none.
    np.testing.assert_allclose(metrics["LAR"], [2 / 3, 0])
    np.testing.assert_allclose(metrics["LAR@2"], [1 / 3, 0])
    np.testing.assert_allclose(metrics["LAR@5"], [2 / 3, 0])
    with pytest.raises(ValueError, match="Hit@7"):
        alignment_metrics(token_ranks(TOP, TEXTS), ks=(1, 7))
    scores = alignment_scores({"a": token_ranks(TOP, TEXTS)}, ks=(2, 5), draws=20).set_index("metric")["value"]
    assert scores["Hit@5"] == 1 and scores["LAR"] == pytest.approx(1 / 3)
    assert scores["GAR"] == pytest.approx(2 / 5) and scores["GAR@2"] == pytest.approx(1 / 5)  # of {0, 1, 3, 5, 9}


def test_a_token_counts_once_in_gar_and_texts_without_tokens_not_at_all():
    ranks = token_ranks(np.array([[1, 2], [1, 2], [3, 4]]), [[1, 5], [2, 1], []])
    scores = alignment_scores({"a": ranks}, ks=(1,), draws=20).set_index("metric")["value"]
    assert scores["GAR"] == pytest.approx(2 / 3)  # 1 and 2 of {1, 2, 5}
    assert scores["Hit@1"] == 1 and scores["LAR"] == pytest.approx(3 / 4)


def official_scores(top, texts, k):
    """Hit@K, LAR and GAR step by step from the sets of ids, as the official code's description in the paper has it."""
    hits, local, matched, existing = [], [], set(), set()
    for ranking, own in zip(top.tolist(), texts):
        kept = ranking[:k]
        inside = set(kept[: len(own)]).intersection(own)
        hits.append(bool(set(kept).intersection(own)))
        local.append(len(inside) / len(set(own)))
        matched, existing = matched | inside, existing.union(own)
    return np.mean(hits), np.mean(local), len(matched) / len(existing)


@pytest.mark.parametrize("k", [1, 5, 10, 50])
def test_metrics_equal_the_official_definition_on_random_rankings(k):
    generator = np.random.default_rng(k)
    top = np.stack([generator.permutation(60)[:55] for _ in range(30)])
    texts = [generator.integers(0, 60, size).tolist() for size in generator.integers(1, 25, 30)]
    scores = alignment_scores({"a": token_ranks(top, texts)}, ks=(k,), draws=10).set_index("metric")["value"]
    np.testing.assert_allclose(scores[[f"Hit@{k}", f"LAR@{k}", f"GAR@{k}"]], official_scores(top, texts, k))
    np.testing.assert_allclose(scores[["LAR", "GAR"]], official_scores(top, texts, 55)[1:])


def test_rankings_that_are_too_shallow_or_do_not_fit_are_refused():
    for top, texts in ((TOP[:, :3], TEXTS), (TOP, TEXTS[:1])):
        with pytest.raises(ValueError, match="end after"):
            token_ranks(top, texts)
    with pytest.raises(ValueError, match="same items"):
        alignment_scores({"a": token_ranks(TOP, TEXTS), "b": token_ranks(TOP, TEXTS[::-1])}, ks=(1,))


def random_runs(count=40):
    generator = np.random.default_rng(5)
    texts = [generator.integers(0, 80, 6).tolist() for _ in range(count)]
    return texts, {run: np.stack([generator.permutation(80)[:20] for _ in range(count)]) for run in ("a", "b")}


def test_intervals_are_those_of_resampling_text_by_text():
    texts, tops = random_runs()
    runs = {run: token_ranks(top, texts) for run, top in tops.items()}
    table = alignment_scores(runs, ks=(10,), reference="b", draws=4000)
    assert table["run"].tolist() == ["a"] * 5 + ["b"] * 5
    assert table["metric"].tolist() == ["Hit@10", "LAR@10", "LAR", "GAR@10", "GAR"] * 2
    table, drawn = table.set_index(["run", "metric"]), {run: [] for run in tops}
    for chosen in np.random.default_rng(1).integers(0, 40, (2000, 40)):
        for run, top in tops.items():
            whole = official_scores(top[chosen], [texts[i] for i in chosen], 20)
            drawn[run].append((official_scores(top[chosen], [texts[i] for i in chosen], 10)[0], *whole[1:]))
    drawn = {run: np.array(values) for run, values in drawn.items()}
    for column, metric in enumerate(("Hit@10", "LAR", "GAR")):
        for kind, values in (("value", drawn["a"]), ("difference", drawn["a"] - drawn["b"])):
            measured, values = table.loc[("a", metric), kind], values[:, column]
            if metric == "GAR":  # a resample has fewer distinct tokens
                values = values - values.mean() + measured
            ends = ["low", "high"] if kind == "value" else ["difference_low", "difference_high"]
            low, high = np.percentile(values, [2.5, 97.5])
            step = {"Hit@10": 1 / 40, "LAR": 1 / 240, "GAR": 1 / 70}[metric]  # scores of resamples lie so far apart
            assert table.loc[("a", metric), ends].to_list() == pytest.approx([low, high], abs=1.2 * step)
    assert (table.loc["b"].filter(like="difference") == 0).all(axis=None)
    plain = alignment_scores(runs, ks=(10,), draws=0)
    assert list(plain.columns) == ["run", "metric", "value"] and plain["value"].tolist() == table["value"].tolist()


def test_rankings_as_deep_as_the_longest_text():
    backbone = tiny_backbone("llama", "bytes_bos")
    texts = ["A dog.", "The stock market fell by 3.5 percent on Tuesday, analysts said. " * 4]
    states = np.random.default_rng(0).normal(size=(2, backbone.hidden_size)).astype(np.float32)
    ranks = embedding_ranks(backbone, states, -1, texts, OFFICIAL_RULE, deepest=2)
    assert ranks["length"].max() == len(backbone.tokenizer(texts[1])["input_ids"]) > 50
    logits = decode_logits(backbone, states)
    for row in ranks[ranks["rank"].notna()].itertuples():
        assert row.rank == 1 + (logits[row.text] > logits[row.text, row.token]).sum()


def test_the_bundled_model(smollm2):
    text = "The capital of France is"
    encoder = SentenceEncoder(smollm2, "none")
    with torch.inference_mode():
        expected = smollm2.model(**smollm2.tokenizer(text, return_tensors="pt")).logits[0, -1]
    states = encoder.encode_layers([text], [28, -1])
    np.testing.assert_allclose(decode_logits(smollm2, states[-1])[0], expected, rtol=1e-4, atol=1e-3)
    assert aligned_tokens(smollm2, states[-1], k=1)["token"].tolist() == ["␣Paris"]
    assert "␣Paris" in aligned_tokens(smollm2, states[28], 28, k=20)["token"].tolist()
    texts = ["A young child is riding a horse.", "A man is playing a flute."]
    own = text_tokens(smollm2.tokenizer, texts, np.arange(len(smollm2.unembedding.weight)))
    top, _ = top_tokens(smollm2, SentenceEncoder(smollm2).encode(texts), k=50)
    hit, local, overall = official_scores(top, [row.tolist() for row in own], 10)
    ranks = embedding_ranks(smollm2, SentenceEncoder(smollm2).encode(texts), -1, texts, OFFICIAL_RULE)
    scores = alignment_scores({"prompteol": ranks}, draws=10).set_index("metric")["value"]
    np.testing.assert_allclose(scores[["Hit@10", "LAR@10", "GAR@10"]], (hit, local, overall))
    assert hit == 1 and 0 < local < 1
