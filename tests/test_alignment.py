"""Logits, token rules, alignment metrics, studies of key tokens and concepts: against models' own heads and by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from test_hardware import in_float16
from tiny_models import FAMILIES, after_last_block, tiny_backbone, untouched
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from torch import nn
from transformers import PreTrainedTokenizerFast

from lib import SentenceEncoder
from lib.core.postprocess import principal_components
from lib.data.sources import EvaluationData
from lib.data.texts import load_minimal_pairs
from lib.evaluation import alignment, vocabulary
from lib.evaluation.alignment import alignment_metrics, alignment_scores, decode_logits, embedding_ranks, top_tokens
from lib.evaluation.sts import spearman
from lib.evaluation.vocabulary import CONTENT_RULE, DEFAULT_RULE, OFFICIAL_RULE, TokenRule, token_classes, token_texts
from lib.studies import concepts, key_tokens
from lib.studies.concepts import INSTRUCTIONS, QUESTIONS, TASKS, WORDS
from lib.studies.key_tokens import STUDIED, Spectrum

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
        normed = after_last_block(backbone.base, state)
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
    np.testing.assert_allclose(alignment.final_states(backbone, state.numpy(), 2), normed, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        decode_logits(backbone, state.numpy(), 2), decode_logits(backbone, normed.numpy()), rtol=1e-4, atol=1e-4)
    assert not np.allclose(normed, state)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_norm_states_in_float32(family, dtype):
    """A state before the final norm can be larger than float16 holds. The same model in float32 is the reference."""
    half = in_float16(tiny_backbone(family), dtype)
    exact = in_float16(half, torch.float32)
    states = 1e6 * np.random.default_rng(0).normal(size=(3, half.hidden_size)).astype(np.float32)
    with torch.inference_mode():
        expected = exact.final_norm(torch.tensor(states)).numpy()
    with untouched(half):
        found, logits = alignment.final_states(half, states, 2), decode_logits(half, states, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(logits, decode_logits(exact, states, 2), rtol=1e-5, atol=1e-4)


def test_chunks_of_texts_and_of_the_vocabulary_change_nothing_and_logits_that_are_not_finite_are_refused(monkeypatch):
    for layer in (2, -1):
        with pytest.raises(FloatingPointError, match="tiny-llama"):
            top_tokens(tiny_backbone(), np.array([[1.0] * 32, [np.inf] + [1.0] * 31], np.float32), layer)
    generator = np.random.default_rng(0)
    weight, bias, states = (generator.normal(size=size).astype(np.float32) for size in ((37, 8), 37, (11, 8)))
    backbone, whole = head(weight, bias), states @ weight.T + bias
    monkeypatch.setattr(alignment, "LOGIT_BYTES", 3 * 37 * 4)
    monkeypatch.setattr(alignment, "ROWS", 5)
    assert [len(chunk) for chunk in alignment.logit_chunks(backbone, states)] == [3, 3, 3, 2]
    for layer in (1, -1):  # there is no final norm, so that all states are read as they are
        np.testing.assert_allclose(decode_logits(backbone, states, layer), whole, atol=1e-5)
    ids, logits = top_tokens(backbone, states, k=6)
    np.testing.assert_array_equal(ids, np.argsort(-whole, axis=1)[:, :6])
    np.testing.assert_allclose(logits, -np.sort(-whole, axis=1)[:, :6], atol=1e-5)
    mean = alignment.mean_logits(alignment.logit_chunks(backbone, states))
    np.testing.assert_allclose(mean, whole.mean(axis=0), atol=1e-6)


def test_top_tokens_of_a_rule_are_distinct_and_stand_where_their_best_entry_stands_minus_a_mean():
    backbone, classes = head(torch.eye(6)), np.array([0, 1, 1, -1, 0, 5])
    states = np.array([[1, 9, 8, 7, 3, 2], [6, 1, 2, 3, 4, 5.5]], np.float32)
    ids, logits = top_tokens(backbone, states, k=3, classes=classes)
    assert ids.tolist() == [[1, 0, 5], [0, 5, 1]] and logits.tolist() == [[9, 3, 2], [6, 5.5, 2]]
    mean = alignment.mean_logits(alignment.logit_chunks(backbone, states, classes=classes))
    assert mean.tolist() == [4.5, 5.5, -np.inf, -np.inf, -np.inf, 3.75]
    ids, logits = top_tokens(backbone, states, k=3, classes=classes, mean=mean)
    assert ids.tolist() == [[1, 0, 5], [5, 0, 1]] and logits.tolist() == [[3.5, -1.5, -1.75], [1.75, 1.5, -3.5]]
    for k, rule, rows in ((4, classes, states), (0, None, states), (3, None, states[0])):
        with pytest.raises(ValueError, match=r"3; got 4|6; got 0|\(6,\)"):
            top_tokens(backbone, rows, k=k, classes=rule)


def test_token_texts_and_rules_by_hand(tokenizer):
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
    content = token_classes(tokenizer, size, CONTENT_RULE)
    assert set(np.flatnonzero(content < 0)) == {0, THE, OF_THE, STOP, SPACE, SPACES, NOT, LINE}
    assert content[[DOG, OF_DOG, RUN, SEVEN]].tolist() == [DOG, DOG, RUN, SEVEN]
    with pytest.raises(ValueError, match="read-only"):
        token_classes(tokenizer, size, DEFAULT_RULE)[0] = 0


def test_aligned_tokens_and_which_stand_in_the_text(tokenizer):
    # The tokenizer by hand has no merges; here it has a known encoding.
    known = {"__call__": lambda self, texts, **_: {"input_ids": [[0, DOG] for _ in texts]}}
    spelled = type("Spelled", (PreTrainedTokenizerFast,), known)(tokenizer_object=tokenizer._tokenizer, bos_token="<s>")
    backbone = head(torch.eye(len(ENTRIES)), tokenizer=spelled)
    states = np.zeros((2, len(ENTRIES)), np.float32)
    states[0, [OF_DOG, LINE, BIG_DOG, 0]], states[1, [RUN, STOP, SEVEN, DOG]] = [4, 3, 2, 1], [4, 3, 2, 1]
    table = alignment.aligned_tokens(backbone, states, k=4, texts=["dog", "a dog"])
    rows = [(0, OF_DOG, "␣dog", 4, True), (0, LINE, "\\n", 3, False), (0, BIG_DOG, "Dog", 2, True),
            (0, 0, "<s>", 1, False), (1, RUN, "run", 4, False), (1, STOP, ".", 3, False), (1, SEVEN, "7", 2, False),
            (1, DOG, "dog", 1, True)]
    expected = pd.DataFrame(rows, columns=["text", "id", "token", "logit", "in_text"])
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    assert "in_text" not in alignment.aligned_tokens(backbone, states, k=4)
    lines = alignment.token_lines(backbone, states, -1, 4, ["dog", "a dog"])
    assert lines == ["**␣dog** \\n **Dog** <s>", "run . 7 **dog**"]


# Texts ranked over a vocabulary of 10. T of the first repeats 3, so its prefix has 4 places for 3 tokens; a text
# without tokens does not count.
TOP, OWN = np.array([[7, 3, 9, 5, 1, 0], [2, 4, 6, 8, 0, 1], [1, 2, 3, 4, 5, 6]]), [[3, 3, 5, 1], [0, 9, 5], []]


def test_ranks_metrics_and_scores_of_runs_with_their_differences_by_hand():
    ranks = alignment.token_ranks(TOP, OWN)
    assert ranks["text"].tolist() == [0, 0, 0, 1, 1, 1] and ranks["token"].tolist() == [3, 5, 1, 0, 9, 5]
    assert ranks["length"].tolist() == [4, 4, 4, 3, 3, 3]
    np.testing.assert_array_equal(ranks["rank"], [2, 4, 5, 5, np.nan, np.nan])
    metrics = alignment_metrics(ranks, ks=(1, 2, 5))
    assert metrics[["Hit@1", "Hit@2", "Hit@5"]].to_numpy().tolist() == [[0, 1, 1], [0, 0, 1]]
    # Of {3, 5, 1} the prefix of length 4 holds 3 and 5, cut at 2 only 3; of {0, 9, 5} the prefix of length 3 none.
    np.testing.assert_allclose(metrics[["LAR", "LAR@2", "LAR@5"]], [[2 / 3, 1 / 3, 2 / 3], [0, 0, 0]])
    with pytest.raises(ValueError, match="Hit@7"):
        alignment_metrics(ranks, ks=(1, 7))
    for shallow, own in ((TOP[:, :3], OWN), (TOP, OWN[:1])):
        with pytest.raises(ValueError, match="end after"):
            alignment.token_ranks(shallow, own)
    with pytest.raises(ValueError, match="same items"):
        alignment_scores({"a": ranks, "b": alignment.token_ranks(TOP, OWN[::-1])}, ks=(1,))
    # b finds {3, 5} of {0, 1, 3, 5, 9} (5 in one of its two texts), cut at 2 only 3; a {0, 1, 5} and {0, 1}.
    runs = {"b": ranks, "a": alignment.token_ranks(TOP[:, ::-1], OWN)}
    table = alignment_scores(runs, ks=(2,), reference="b", draws=200)
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
    ranks = embedding_ranks(backbone, states, -1, texts, OFFICIAL_RULE, deepest=2)
    assert ranks["length"].max() == len(backbone.tokenizer(texts[1])["input_ids"]) > 50
    logits = decode_logits(backbone, states)
    for row in ranks[ranks["rank"].notna()].itertuples():
        assert row.rank == 1 + (logits[row.text] > logits[row.text, row.token]).sum()


NO, KINDS = "no instruction", list(QUESTIONS["related: all of them above topic shift"])
TEXTS = ["A dog runs home.", "The cat sleeps.", "Rain fell all day.", "A dog sleeps."]


def pairs_of(first, second, score):
    columns = {"subset": ["all"] * len(score), "sentence1": first, "sentence2": second, "score": score}
    return EvaluationData("pairs", Dataset.from_dict(columns), {})


def spelled():
    """A backbone whose logits are its states, one for each of 60 words; `<s>` is a token that does not count."""
    core = Tokenizer(token_models.WordLevel({f"word{i}": i for i in range(60)} | {"<s>": 60}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<s>")
    return head(torch.eye(61), tokenizer=tokenizer)


def speller(angles, found):
    """An encoder of given texts: their highest tokens are those `found`, their cosines those of `angles` in degrees."""
    def encode_layers(texts, layers):
        states = np.zeros((len(texts), 61), np.float32)
        for state, text in zip(states, texts):
            state[[50, 51]] = -10 * np.cos(np.radians([angles[text], 90 - angles[text]]))
            state[found[text]] = 0.01
        return dict.fromkeys(layers, states)
    return SimpleNamespace(encode_layers=encode_layers)


def test_gains_by_hand():
    first, second, third, fourth, empty = "word0 word1", "word2 word3", "word4 word5", "word6 word7", "<s>"
    nothing = dict.fromkeys([first, second, third, fourth, empty], [40, 41])
    some = nothing | {first: [0, 1], second: [2, 40], fourth: [41, 7]}  # LAR 1, 1/2, 0 and 1/2
    angles = {first: 45, second: 55, third: 75, fourth: 15, empty: 45}
    later = angles | {second: 75, third: 85, fourth: 25}
    data = pairs_of([first, second, first, first], [second, third, fourth, empty], [1.0, 2.0, 3.0, 3.0])
    encoders = {"baseline": speller(angles, nothing), "TP": speller(later, some)}
    found = key_tokens.gain_relation(encoders, spelled(), data, [2], draws=200)
    # LAR gains of the pairs: 3/4, 1/4, 3/4. The fourth has a text without tokens, so it does not count among the gains.
    # Distances of the ranks from gold, of 4: 2, 0, 2.5 before and 0, 1, 1.5 after.
    [row] = found.to_dict("records")
    assert [row["variant"], row["layer"]] == ["TP", 2] and row["low"] <= row["spearman"] <= row["high"]
    assert [row["gain in LAR"], row["gain in STS"]] == pytest.approx([1.75 / 3, 100 / 4 * 2 / 3])
    assert row["spearman"] == pytest.approx(100 * np.sqrt(3) / 2)  # ranks 2.5, 1, 2.5 and 3, 1, 2


def test_variation_by_hand_and_of_what_only_moves_the_first_component():
    backbone = np.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], np.float32)  # its components are the first two axes
    embedder = backbone + np.array([[-1.0, 1.0, 2.0], [-5.0, 1.0, -2.0]], np.float32)
    spectrum = Spectrum.between(backbone, embedder)
    # The mean change is (-3, 1, 0). Squared norms: of the changes 6 and 30, of the mean one 10.
    assert spectrum.variation["component"].tolist() == [1, 2] and spectrum.v1 == -3
    np.testing.assert_allclose(spectrum.variation[["variation", "deviation"]], [[-3, 2], [1, 0]], atol=1e-12)
    np.testing.assert_allclose(spectrum.variation[key_tokens.SHARES], [[9 / 10, 26 / 36], [1 / 10, 2 / 36]])
    assert spectrum.first.tolist() == [1, 0, 0] and spectrum.mean.tolist() == [1, 0.5, 0]
    assert spectrum.shift(0.5)(backbone).tolist() == [[0.5, 0, 0], [-1.5, 1, 0]]
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
        Spectrum.between(backbone, embedder[:1])
    # An embedder that only moves the first component is found out without centring.
    states = np.random.default_rng(0).normal(size=(60, 5)) + 4
    target = states - 2.5 * principal_components(states)[0][0]
    np.testing.assert_allclose(Spectrum.between(states, target).shift()(states), target, atol=1e-5)
    table = key_tokens.spectrum_stability({"m": (states, target), "back": (target, states)}, (20, 60, 500))
    assert table["N"].tolist() == [20, 60] * 2 and table["change"].tolist() == ["m", "m", "back", "back"]
    assert table.loc[1, ["v_1", "cosine", *key_tokens.SHARES]].tolist() == pytest.approx([-2.5, 1, 1, 1])
    # Texts in an order of topics: the fewer stand for all topics, not for the first.
    topics = np.concatenate([states[:30], states[:30] + 40])
    few, every = key_tokens.spectrum_stability({"m": (topics, topics * 0.5)}, (20, 60))["v_1"]
    assert few == pytest.approx(every, rel=0.3)
    # Without the mean the first component points elsewhere.
    assert (table[[f"{share}, centred" for share in key_tokens.SHARES]] < 0.9).all(axis=None)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_contributions_add_up(family):
    backbone, component = tiny_backbone(family), np.eye(32)[3]
    state = np.random.default_rng(2).normal(size=32).astype(np.float32)
    table = key_tokens.contributions(backbone, state, component, k=5)
    parts = np.stack([(state @ component) * component, 0 * state, state]).astype(np.float32)
    along, bias, whole = decode_logits(backbone, parts)[:, table["id"]]
    assert np.any(bias) == (family == "phi") and table["logit"].is_monotonic_decreasing
    np.testing.assert_allclose(table["along"], along - bias, atol=1e-5)
    np.testing.assert_allclose(table["along"] + table["rest"], whole, atol=1e-5)
    with pytest.raises(ValueError, match="not linear"):
        key_tokens.contributions(SimpleNamespace(unembedding=torch.nn.Sequential(), name="masked"), state, component)


def test_shifts_change_alignment(backbone):
    """The spectrum is one of other texts, with a target that lies nearer to the origin."""
    encoder = SentenceEncoder(backbone, "prompteol")
    states = encoder.encode([f"{text} {i}" for i, text in enumerate(TEXTS * 4)])
    spectrum, own = Spectrum.between(states, 0.5 * states), encoder.encode(TEXTS)
    def mean_lar(embeddings):
        return alignment_metrics(embedding_ranks(backbone, embeddings, -1, TEXTS), (10,))["LAR"].mean()
    table = key_tokens.shift_study({"m": encoder}, {"m": spectrum}, backbone, TEXTS, [0.0, 200.0], draws=20)
    assert table["method"].unique() == ["m"] and set(table["metric"]) == set(STUDIED)
    at = table[table["metric"] == "LAR"].set_index("amount")["value"]
    far = np.tile(-spectrum.first, (4, 1)).astype(np.float32)  # so far out, all texts have the ranking of -u_1
    assert at[[0, 200]].tolist() == pytest.approx([mean_lar(own), mean_lar(far)])


def test_overlap_against_sets(backbone):
    first, second = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    found = concepts.token_overlap(backbone, first, second, -1, k=7)
    logits = decode_logits(backbone, np.concatenate([first, second]))
    classes = token_classes(backbone.tokenizer, logits.shape[1], DEFAULT_RULE)
    merged = np.stack([np.max(logits[:, classes == c], axis=1) for c in np.unique(classes[classes >= 0])], axis=1)
    top = np.argsort(-(merged - merged.mean(axis=0)), axis=1)[:, :7]
    assert found.tolist() == pytest.approx([len({*a} & {*b}) / 7 for a, b in zip(top[:5], top[5:])])


def test_gaps_between_similarity_and_relatedness():
    gold, other = np.arange(6.0), np.array([0, 1, 2, 3, 5, 4.0])
    sides = {"similar": {"cosine": gold[::-1], "overlap": other}, "related": {"cosine": other, "overlap": gold}}
    whole = pd.concat(pd.DataFrame({"task": task, "gold": gold, "method": "m"} | side) for task, side in sides.items())
    whole = whole.rename_axis("item").reset_index()
    near = spearman(gold, other)
    gaps = concepts.similarity_gaps(whole, draws=50).set_index("measure")
    assert (gaps["gap to"] == "related").all()
    assert gaps["value"][["cosine", "overlap"]].tolist() == pytest.approx([-100 - near, near - 100])
    assert gaps["difference"]["overlap"] == pytest.approx(2 * near)
    assert (gaps["low"] <= gaps["value"]).all() and (gaps["value"] <= gaps["high"]).all()


def test_the_data_fits_together():
    assert list(load_minimal_pairs().groupby("kind", sort=False).size().items()) == [(kind, 16) for kind in KINDS]
    for task in TASKS.values():
        assert task["aspect"] in INSTRUCTIONS and set(task["classes"]) <= set(WORDS)
    words = sum(map(list, WORDS.values()), [])
    assert len(words) == len(set(words))
    assert {prompt.templates[0].partition("{sentence}")[0] for prompt in INSTRUCTIONS.values()} == {'This sentence : "'}


def test_class_scores_by_hand():
    states, words = np.zeros((2, 61), np.float32), spelled()
    states[:, :4] = [[4, 2, 1, 9], [0, 2, 3, 9]]
    words.tokenizer = lambda text, **_: {"input_ids": {"good": [0], " good": [1], "bad": [2]}.get(text, [3, 3])}
    assert concepts.class_scores(words, states, 2, ["negative", "positive"]).tolist() == [[1, 3], [3, 1]]
    with pytest.raises(ValueError, match="None of the words of 'number'"):
        concepts.class_scores(words, states, 2, ["number"])


def test_answers_under_all_instructions(backbone):
    texts = [f"It was {word} on day {i}." for i in range(10) for word in ("awful", "wonderful")]
    data = {"CR": EvaluationData("CR", Dataset.from_dict({"sentence1": texts, "label": [0, 1] * 10}), {})}
    words = {"negative": ["a", "b"], "positive": ["c", "d"]}
    encoders = {aspect: SentenceEncoder(backbone, prompt) for aspect, prompt in INSTRUCTIONS.items()}
    answers = concepts.instruction_answers(encoders, data, words)
    table = answers.set_index(["measure", "instruction", "item"])["found"].sort_index()
    scores = concepts.class_scores(
        backbone, SentenceEncoder(backbone, "prompteol").encode(texts), -1, list(words), words)
    right = 100.0 * (scores.argmax(axis=1) == np.array([0, 1] * 10))
    assert table["zero-shot", NO].tolist() == right.tolist()
    assert set(table["zero-shot", "wrong"]) <= {0, 100 / 3, 200 / 3, 100}  # the mean over three instructions
    assert table["linear", "fitting"].mean() > 80  # the two words tell the classes apart
