"""Logits, token rules, alignment metrics, their intervals and the spectrum: against models' own heads and hand computation."""

import itertools
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import FAMILIES, _after_last_block, build_tokenizer, tiny_backbone
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from lib.evaluation import alignment
from lib.report import results
from lib.evaluation.alignment import (
    aligned_tokens,
    alignment_metrics,
    alignment_scores,
    decode_logits,
    embedding_ranks,
    final_states,
    stored_ranks,
    token_lines,
    token_ranks,
    top_tokens,
)
from lib.core.encoder import SentenceEncoder
from lib.report.plots_alignment import (
    contribution_bars,
    layer_curves,
    scores_by_method,
    shift_curves,
    token_bars,
    token_labels,
    variation_stems,
)
from lib.studies.spectrum import centre, component_variation, contributions, principal_components, remove_component, shift_component
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
DOG, OF_DOG, BIG_DOG, OF_BIG_DOG, THE, OF_THE, STOP, SPACE, C3, E3, SPACES, RUN, NOT, LINE, SEVEN = range(1, len(ENTRIES))


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
        unembedding=linear.requires_grad_(False), final_norm=norm, num_layers=layers, name="by hand", dtype=weight.dtype,
        layer_index=lambda n: n + layers + 1 if n < 0 else n,
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
        with pytest.raises(ValueError, match="State 2 of tiny-opt_narrow has 32 dimensions, but its unembedding reads 16"):
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
    doubled = head(torch.eye(2), norm=lambda x: 2 * x)
    np.testing.assert_array_equal(decode_logits(doubled, states, 1), 2 * states)
    np.testing.assert_array_equal(decode_logits(doubled, states, 2), states)


def test_half_precision_models_get_float32_logits():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 16, generator=generator).bfloat16()
    states = 8 * torch.randn(5, 16, generator=generator)
    logits = decode_logits(head(weight, bias=torch.ones(300).bfloat16()), states.numpy())
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, states.double() @ weight.double().T + 1, atol=1e-4)
    assert any(len(np.unique(row.bfloat16().float())) < 300 for row in torch.from_numpy(logits))  # as bfloat16 they would tie


def test_chunks_of_texts_and_of_the_vocabulary_change_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    backbone = head(generator.normal(size=(37, 8)).astype(np.float32), bias=generator.normal(size=37).astype(np.float32))
    states = generator.normal(size=(11, 8)).astype(np.float32)
    whole, best = decode_logits(backbone, states), top_tokens(backbone, states, k=6)
    monkeypatch.setattr(alignment, "LOGIT_BYTES", 3 * 37 * 4)
    monkeypatch.setattr(alignment, "ROWS", 5)
    assert [len(chunk) for chunk in alignment._logits(backbone, states, -1)] == [3, 3, 3, 2]
    np.testing.assert_allclose(decode_logits(backbone, states), whole, atol=1e-5)
    np.testing.assert_array_equal(top_tokens(backbone, states, k=6)[0], best[0])
    np.testing.assert_array_equal(best[0], np.argsort(-whole, axis=1)[:, :6])
    np.testing.assert_allclose(best[1], -np.sort(-whole, axis=1)[:, :6])


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
    np.testing.assert_allclose(decode_logits(backbone, output.hidden_states[-1][0].numpy()), output.logits[0], atol=1e-5)
    with pytest.raises(ValueError, match="not linear"):
        contributions(backbone, output.hidden_states[-1][0, 0].numpy(), np.ones(16) / 4)


def test_top_tokens_of_a_rule_are_distinct_and_stand_where_their_best_entry_stands():
    backbone = head(torch.eye(6))
    states = np.array([[1, 9, 8, 7, 3, 2], [6, 1, 2, 3, 4, 5]], np.float32)
    classes = np.array([0, 1, 1, -1, 0, 5])
    ids, logits = top_tokens(backbone, states, k=3, classes=classes)
    assert ids.tolist() == [[1, 0, 5], [0, 5, 1]] and logits.tolist() == [[9, 3, 2], [6, 5, 2]]
    with pytest.raises(ValueError, match="from 1 to the number of tokens, 3; got 4"):
        top_tokens(backbone, states, k=4, classes=classes)
    with pytest.raises(ValueError, match="number of tokens, 6; got 0"):
        top_tokens(backbone, states, k=0)
    with pytest.raises(ValueError, match=r"shape \(texts, hidden\), got \(6,\)"):
        top_tokens(backbone, states[0], k=3)


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
    assert metrics["Hit@1"].tolist() == [0, 0] and metrics["Hit@2"].tolist() == [1, 0] and metrics["Hit@5"].tolist() == [1, 1]
    # Of {3, 5, 1} the prefix of length 4 holds 3 and 5, cut at 2 only 3; of {0, 9} the prefix of length 2 holds none.
    np.testing.assert_allclose(metrics["LAR"], [2 / 3, 0])
    np.testing.assert_allclose(metrics["LAR@2"], [1 / 3, 0])
    np.testing.assert_allclose(metrics["LAR@5"], [2 / 3, 0])
    with pytest.raises(ValueError, match="Hit@7 needs deeper rankings than 6"):
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
    with pytest.raises(ValueError, match="A text has 4 tokens, but the rankings end after 3"):
        token_ranks(TOP[:, :3], TEXTS)
    with pytest.raises(ValueError, match="2 rankings, but 1 texts"):
        token_ranks(TOP, TEXTS[:1])
    with pytest.raises(ValueError, match="same tokens of the same texts"):
        alignment_scores({"a": token_ranks(TOP, TEXTS), "b": token_ranks(TOP, TEXTS[::-1])}, ks=(1,))


def random_runs(count=40):
    generator = np.random.default_rng(5)
    texts = [generator.integers(0, 80, 6).tolist() for _ in range(count)]
    return texts, {run: np.stack([generator.permutation(80)[:20] for _ in range(count)]) for run in ("a", "b")}


def test_intervals_equal_resampling_text_by_text():
    texts, tops = random_runs()
    runs = {run: token_ranks(top, texts) for run, top in tops.items()}
    table = alignment_scores(runs, ks=(10,), reference="b", draws=60)
    weights = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=60)
    drawn = {run: [] for run in tops}
    for row in weights:
        chosen = np.repeat(np.arange(40), row)
        for run, top in tops.items():
            hit, local, overall = official_scores(top[chosen], [texts[i] for i in chosen], 20)
            drawn[run].append((official_scores(top[chosen], [texts[i] for i in chosen], 10)[0], local, overall))
    drawn = {run: np.array(values) for run, values in drawn.items()}
    table = table.set_index(["run", "metric"])
    for column, metric in enumerate(("Hit@10", "LAR", "GAR")):
        for names, values in ((("value", "low", "high"), drawn["a"]),
                              (("difference", "difference_low", "difference_high"), drawn["a"] - drawn["b"])):
            measured, values = table.loc[("a", metric), names[0]], values[:, column]
            if metric == "GAR":
                values = values - values.mean() + measured
            interval = table.loc[("a", metric), list(names[1:])].astype(float)
            np.testing.assert_allclose(interval, np.percentile(values, [2.5, 97.5]))
    own = table.loc["b"]
    assert (own[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)


def test_rankings_as_deep_as_the_longest_text():
    backbone = tiny_backbone("llama", "bytes_bos")
    texts = ["A dog.", "The stock market fell by 3.5 percent on Tuesday, analysts said. " * 4]
    states = np.random.default_rng(0).normal(size=(2, backbone.hidden_size)).astype(np.float32)
    ranks = embedding_ranks(backbone, states, -1, texts, OFFICIAL_RULE, deepest=2)
    assert ranks["length"].max() == len(backbone.tokenizer(texts[1])["input_ids"]) > 50
    logits = decode_logits(backbone, states)
    for row in ranks[ranks["rank"].notna()].itertuples():
        assert row.rank == 1 + (logits[row.text] > logits[row.text, row.token]).sum()


def test_stored_ranks_are_computed_once(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    encoder = SentenceEncoder(tiny_backbone(), "prompteol")
    texts = ["A dog.", "The plane takes off."]
    first = stored_ranks(encoder, texts, {"name": "by hand"}, layers=[2, -1])
    again = stored_ranks(encoder, texts, {"name": "by hand"}, layers=[2, -1])
    other = stored_ranks(encoder, texts, {"name": "by hand"}, layers=[2, -1], rule=OFFICIAL_RULE)
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    pd.testing.assert_frame_equal(first.value, again.value)
    assert sorted(first.value["layer"].unique()) == [2, 4]
    of_last = first.value[first.value["layer"] == 4].drop(columns="layer")
    expected = embedding_ranks(encoder.backbone, encoder.encode(texts), -1, texts)
    pd.testing.assert_frame_equal(of_last.reset_index(drop=True), expected)
    scores = alignment_scores({"last": of_last}, draws=10)
    assert scores["value"].between(0, 1).all()


def test_the_embedded_model(smollm2):
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


# --- spectrum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_components_equal_numpys(centred):
    embeddings = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32) + 2
    components, values = principal_components(embeddings, centre=centred)
    shifted = embeddings.astype(np.float64) - (embeddings.astype(np.float64).mean(axis=0) if centred else 0)
    _, expected_values, expected = np.linalg.svd(shifted, full_matrices=False)
    np.testing.assert_allclose(values, expected_values)
    np.testing.assert_allclose(np.abs(np.sum(components * expected, axis=1)), 1)
    np.testing.assert_allclose(components @ components.T, np.eye(8), atol=1e-12)
    assert (components @ embeddings.mean(axis=0) > 0).all()
    np.testing.assert_allclose(principal_components(-embeddings, centre=centred)[0], -components, atol=1e-9)


def test_components_by_hand():
    components, values = principal_components(np.array([[-3.0, 0.0], [-3.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_allclose(components, [[-1, 0], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(values, [np.sqrt(18), 2])


def test_variation_by_hand():
    backbone = np.array([[2.0, 0.0, 0.0], [4.0, 0.0, 0.0]], np.float32)
    embedder = np.array([[1.0, 1.0, 2.0], [-1.0, 1.0, -2.0]], np.float32)
    table = component_variation(backbone, embedder, np.eye(3)[:2])
    # Changes (-1, 1, 2) and (-5, 1, -2), mean (-3, 1, 0): squared norms 6 and 30, of the mean 10.
    assert table["component"].tolist() == [1, 2]
    np.testing.assert_allclose(table[["variation", "deviation"]], [[-3, 2], [1, 0]])
    np.testing.assert_allclose(table[["share", "share_each"]], [[9 / 10, 26 / 36], [1 / 10, 2 / 36]])
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
        component_variation(backbone, embedder[:1], np.eye(3))


def test_an_embedder_that_only_moves_the_first_component_is_found_out():
    backbone = np.random.default_rng(1).normal(size=(40, 6)) + 3
    components, _ = principal_components(backbone)
    table = component_variation(backbone, shift_component(backbone, components[0], -2.5), components)
    np.testing.assert_allclose(table["variation"], [-2.5, 0, 0, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(table.loc[0, ["share", "share_each"]].astype(float), 1, atol=1e-5)
    assert table["share"].sum() == pytest.approx(1)


def test_contributions_add_up(tokenizer):
    generator = np.random.default_rng(2)
    weight, bias = (generator.normal(size=size).astype(np.float32) for size in ((len(ENTRIES), 4), len(ENTRIES)))
    backbone = head(weight, bias)
    backbone.tokenizer = tokenizer
    state, component = generator.normal(size=4).astype(np.float32), np.array([0.6, 0.8, 0.0, 0.0])
    table = contributions(backbone, state, component, k=5)
    weight, bias = backbone.unembedding.weight.numpy()[table["id"]], backbone.unembedding.bias.numpy()[table["id"]]
    along = weight @ component * (state @ component)
    np.testing.assert_allclose(table["along"], along, atol=1e-5)
    np.testing.assert_allclose(table["rest"], weight @ state + bias - along, atol=1e-5)
    assert table["logit"].is_monotonic_decreasing and "text" not in table


def test_changing_embeddings_along_components():
    embeddings = np.array([[3.0, 1.0], [5.0, -1.0]], np.float32)
    along = np.array([0.6, 0.8])
    np.testing.assert_allclose(shift_component(embeddings, along, -5), [[0, -3], [2, -5]], atol=1e-6)
    np.testing.assert_allclose(remove_component(embeddings, along) @ along, 0, atol=1e-6)
    np.testing.assert_allclose(remove_component(embeddings, np.array([1.0, 0.0])), [[0, 1], [0, -1]])
    np.testing.assert_allclose(centre(embeddings, np.array([3.0, 0.0])), [[0, 1], [2, -1]])
    np.testing.assert_array_equal(embeddings, [[3, 1], [5, -1]])


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn():
    """Draws a figure as saving does, and closes it."""
    yield lambda figure: (figure.canvas.draw(), figure)[1]
    plt.close("all")


def test_labels_are_what_the_font_can_draw():
    assert token_labels(["␣dog", "a$b$", "\U00020000"]) == ["␣dog", r"a\$b\$", r"\U00020000"]


def test_tokens_in_the_text_are_marked(drawn):
    table = pd.DataFrame({"token": ["a", "$", "b"], "logit": [3.0, 2.0, 1.0], "in_text": [True, False, True]})
    figure = drawn(token_bars({"one": table, "two": table.assign(in_text=False)}, "title", columns=1))
    first, second = figure.axes
    assert len(first.collections[0].get_offsets()) == 2 and len(second.collections[0].get_offsets()) == 0
    assert [bar.get_width() for bar in first.patches] == [3, 2, 1]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", r"\$", "b"]


def test_curves_have_their_interval_and_their_labels(drawn):
    points = pd.DataFrame({"layer": [1, 2], "value": [0.2, 0.4], "low": [0.1, 0.3], "high": [0.3, 0.5]})
    keys = itertools.product(("prompteol", "ke"), ("plain", "TP"), ("LAR", "Hit@10"))
    curves = pd.concat(points.assign(prompt=prompt, variant=variant, metric=metric) for prompt, variant, metric in keys)
    figure = drawn(layer_curves(curves, "title"))
    assert len(figure.axes) == 4 and all(len(a.lines) == 2 and len(a.collections) == 2 for a in figure.axes)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["plain", "TP"]
    sweep = pd.concat([points.rename(columns={"layer": "amount"}).assign(method=m, metric="LAR") for m in ("a", "b", "c")])
    figure = drawn(shift_curves(sweep, "title"))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b", "c"] and len(figure.axes[0].lines) == 5
    dots = pd.concat(points.assign(method=["none", "ke"], variant=variant, metric="LAR") for variant in ("plain", "TP"))
    figure = drawn(scores_by_method(dots, "title"))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["no prompt", "KE"]


def test_component_figures(drawn):
    backbone = np.random.default_rng(0).normal(size=(20, 5)) + 1
    components, _ = principal_components(backbone)
    table = component_variation(backbone, shift_component(backbone, components[0], -2), components)
    figure = drawn(variation_stems({"one": table}, "title"))
    assert "$v_1$ = -2.00\n100% of the mean change" in figure.axes[0].texts[0].get_text()
    parts = pd.DataFrame({"token": ["a", "b"], "logit": [3.0, 2.0], "along": [4.0, 1.0], "rest": [-1.0, 1.0]})
    figure = drawn(contribution_bars({"one": parts}, "title"))
    assert [bar.get_width() for bar in figure.axes[0].patches] == [4, 1, -1, 1]
