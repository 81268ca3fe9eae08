"""`lib.studies.key_tokens`, and the postprocesses that it uses, on small cases with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_backbone
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib.core.encoder import SentenceEncoder
from lib.core.postprocess import ComponentRemoved, ComponentShifted, MeanRemoved, principal_components
from lib.data.sources import EvaluationData
from lib.evaluation.alignment import alignment_metrics, alignment_scores, decode_logits, embedding_ranks
from lib.evaluation.sts import cosine, spearman
from lib.evaluation.vocabulary import CONTENT_RULE
from lib.studies import key_tokens
from lib.studies.key_tokens import CONTENT, MERGED, STUDIED, Spectrum

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["A dog runs home.", "The cat sleeps.", "Rain fell all day.", "A dog sleeps."]


def pairs_of(first, second, score):
    columns = {"subset": ["all"] * len(score), "sentence1": first, "sentence2": second, "score": score}
    return EvaluationData("pairs", Dataset.from_dict(columns), {})


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def spelled():
    """A backbone whose logits are its states, one for each of 60 words; `<s>` is a token that does not count."""
    core = Tokenizer(models.WordLevel({f"word{i}": i for i in range(60)} | {"<s>": 60}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    linear = torch.nn.Linear(61, 61, bias=False).requires_grad_(False)
    linear.weight.data = torch.eye(61)
    return SimpleNamespace(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<s>"), unembedding=linear,
        final_norm=None, num_layers=2, name="spelled", dtype=torch.float32, layer_index=lambda n: n % 3)


def speller(spelled, angles, found):
    """An encoder of given texts: their highest tokens are `found`, their cosines those of `angles` in degrees."""
    def encode_layers(texts, layers):
        states = np.zeros((len(texts), 61), np.float32)
        for state, text in zip(states, texts):
            state[[50, 51]] = -10 * np.cos(np.radians([angles[text], 90 - angles[text]]))
            state[found[text]] = 0.01
        return dict.fromkeys(layers, states)

    return SimpleNamespace(backbone=spelled, exit_layer=2, encode_layers=encode_layers)


def test_gains_by_hand(spelled):
    first, second, third, fourth, empty = "word0 word1", "word2 word3", "word4 word5", "word6 word7", "<s>"
    nothing = dict.fromkeys([first, second, third, fourth, empty], [40, 41])
    some = nothing | {first: [0, 1], second: [2, 40], fourth: [41, 7]}  # LAR 1, 1/2, 0 and 1/2
    angles = {first: 45, second: 55, third: 75, fourth: 15, empty: 45}
    encoders = {"baseline": speller(spelled, angles, nothing),
                "TP": speller(spelled, angles | {second: 75, third: 85, fourth: 25}, some)}
    data = pairs_of([first, second, first], [second, third, fourth], [1.0, 2.0, 3.0])
    found = key_tokens.gain_relation(encoders, spelled, data, [2], draws=200)
    # LAR gains of the pairs: 3/4, 1/4, 3/4. Distances of the ranks from gold: 2, 0, 2 before and 0, 1, 1 after, of 3.
    assert found[["variant", "layer"]].to_numpy().tolist() == [["TP", 2]]
    assert found["gain in LAR"][0] == pytest.approx(1.75 / 3)
    assert found["gain in STS"][0] == pytest.approx(100 / 3 * 2 / 3)
    assert found["spearman"][0] == pytest.approx(100 * np.sqrt(3) / 2)  # ranks 2.5, 1, 2.5 and 3, 1, 2
    assert found["low"][0] <= found["spearman"][0] <= found["high"][0]
    data = pairs_of([first, second, first, first], [second, third, fourth, empty], [1.0, 2.0, 3.0, 3.0])
    without = key_tokens.gain_relation(encoders, spelled, data, [2], draws=20)  # a pair with a text without tokens does not count
    assert without["gain in LAR"][0] == pytest.approx(1.75 / 3)


def test_scores_by_rule_and_layer(backbone):
    encoder = SentenceEncoder(backbone, "prompteol")
    table = key_tokens.key_token_scores({"a": encoder, "b": encoder}, backbone, TEXTS, layers=[2, -1], reference="b", draws=20)
    assert list(zip(table["rule"], table["layer"]))[::10] == [(MERGED, 2), (MERGED, 4), (CONTENT, 2), (CONTENT, 4)]
    assert (table["difference"] == 0).all()
    ranks = embedding_ranks(backbone, encoder.encode_layers(TEXTS, [2])[2], 2, TEXTS, CONTENT_RULE)
    expected = alignment_scores({"a": ranks}, (10,), draws=0)
    part = table[20:25]
    assert part["value"].tolist() == expected["value"].tolist()
    assert part["metric"].tolist() == [f"{metric}, content words" for metric in expected["metric"]]


@pytest.mark.parametrize("centred", [False, True])
def test_components_equal_numpys(centred):
    embeddings = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32) + 2
    components, values = principal_components(embeddings, centre=centred)
    shifted = embeddings.astype(np.float64) - (embeddings.astype(np.float64).mean(axis=0) if centred else 0)
    _, expected_values, expected = np.linalg.svd(shifted, full_matrices=False)
    np.testing.assert_allclose(values, expected_values)
    np.testing.assert_allclose(np.abs(np.sum(components * expected, axis=1)), 1)
    assert (components @ embeddings.mean(axis=0) > 0).all()
    np.testing.assert_allclose(principal_components(-embeddings, centre=centred)[0], -components, atol=1e-9)


def test_changing_embeddings_along_components():
    embeddings, along = np.array([[3.0, 1.0], [5.0, -1.0]], np.float32), np.array([0.6, 0.8])
    np.testing.assert_allclose(ComponentShifted(along, -5)(embeddings), [[0, -3], [2, -5]], atol=1e-6)
    np.testing.assert_allclose(ComponentRemoved(along)(embeddings) @ along, 0, atol=1e-6)
    np.testing.assert_allclose(ComponentRemoved(np.array([1.0, 0.0]))(embeddings), [[0, 1], [0, -1]])
    np.testing.assert_allclose(MeanRemoved(np.array([3.0, 0.0]))(embeddings), [[0, 1], [2, -1]])
    np.testing.assert_array_equal(embeddings, [[3, 1], [5, -1]])


def test_variation_by_hand():
    backbone = np.array([[2.0, 0.0, 0.0], [4.0, 0.0, 0.0]], np.float32)
    embedder = np.array([[1.0, 1.0, 2.0], [-1.0, 1.0, -2.0]], np.float32)
    table = key_tokens.component_variation(backbone, embedder, np.eye(3)[:2])
    # Changes (-1, 1, 2) and (-5, 1, -2), mean (-3, 1, 0): squared norms 6 and 30, of the mean 10.
    assert table["component"].tolist() == [1, 2]
    np.testing.assert_allclose(table[["variation", "deviation"]], [[-3, 2], [1, 0]])
    np.testing.assert_allclose(table[["share", "share_each"]], [[9 / 10, 26 / 36], [1 / 10, 2 / 36]])
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
        key_tokens.component_variation(backbone, embedder[:1], np.eye(3))


def test_an_embedder_that_only_moves_the_first_component_is_found_out():
    states = np.random.default_rng(0).normal(size=(60, 5)) + 4
    target = states - 2.5 * principal_components(states)[0][0]
    spectrum = Spectrum.between(states, target)
    np.testing.assert_allclose(spectrum.variation["variation"], [-2.5, 0, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(spectrum.shift()(states), target, atol=1e-5)
    table = key_tokens.spectrum_stability({"m": states}, target, (20, 60, 500))
    assert table["N"].tolist() == [20, 60, 20, 60] and table["centred"].tolist() == [False, False, True, True]
    whole = table[(table["N"] == 60) & ~table["centred"]].iloc[0]
    assert (whole["v_1"], whole["share"], whole["cosine"]) == pytest.approx((-2.5, 1, 1))
    assert (table.loc[table["centred"], "share"] < 0.9).all()  # without the mean the first component points elsewhere


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_contributions_add_up(family):
    backbone, generator = tiny_backbone(family), np.random.default_rng(2)
    state = generator.normal(size=32).astype(np.float32)
    component = np.eye(32)[3]
    table = key_tokens.contributions(backbone, state, component, k=5)
    along, bias = decode_logits(backbone, np.stack([(state @ component) * component, 0 * state]).astype(np.float32))
    assert np.any(bias) == (family == "phi")
    np.testing.assert_allclose(table["along"], (along - bias)[table["id"]], atol=1e-5)
    whole = decode_logits(backbone, state[None])[0, table["id"]]
    np.testing.assert_allclose(table["along"] + table["rest"], whole, atol=1e-5)
    assert table["logit"].is_monotonic_decreasing
    with pytest.raises(ValueError, match="not linear"):
        key_tokens.contributions(SimpleNamespace(unembedding=torch.nn.Sequential(), name="masked"), state, component)


@pytest.fixture(scope="module")
def study(backbone):
    """An encoder, its spectrum on other texts, with a target that lies nearer to the origin."""
    encoder = SentenceEncoder(backbone, "prompteol")
    states = encoder.encode([f"{text} {i}" for i, text in enumerate(TEXTS * 4)])
    return {"m": encoder}, {"m": Spectrum.between(states, 0.5 * states)}


def test_shifting_by_nothing_changes_nothing_and_by_much_all(backbone, study):
    table = key_tokens.shift_study(*study, backbone, TEXTS, [0.0, 200.0], draws=20)
    assert table["method"].unique() == ["m"] and set(table["metric"]) == set(STUDIED)
    at = table[table["metric"] == "LAR"].set_index("amount")["value"]
    first = np.tile(-study[1]["m"].first, (4, 1)).astype(np.float32)  # so far out, all texts have the ranking of -u_1
    for amount, states in {0.0: study[0]["m"].encode(TEXTS), 200.0: first}.items():
        rates = alignment_metrics(embedding_ranks(backbone, states, -1, TEXTS), (10,))["LAR"]
        assert at[amount] == pytest.approx(rates.mean())


def test_adjustments_are_measured_against_none(backbone, study):
    data = pairs_of(TEXTS[:3], TEXTS[1:], [1.0, 3.0, 2.0])
    table = key_tokens.adjustments(*study, backbone, data, draws=20).set_index("adjustment")
    assert list(table.index) == ["none", "shifted by v_1", "mean subtracted", "first component removed"]
    assert (table.loc["none", ["difference", "difference_low", "difference_high"]] == 0).all()
    states = MeanRemoved(study[1]["m"].mean)(study[0]["m"].encode(TEXTS))
    expected, centred = spearman(data["score"], cosine(states[:3], states[1:])), table.loc["mean subtracted"]
    assert centred["STS"] == pytest.approx(expected)
    assert centred["difference"] == pytest.approx(expected - table.loc["none", "STS"])
    rates = alignment_metrics(embedding_ranks(backbone, states, -1, TEXTS), (10,))["LAR"]
    assert centred["LAR"] == pytest.approx(rates.mean())
