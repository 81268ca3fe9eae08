"""`lib.studies.alignment_study` and `lib.data.texts`: the comparisons of notebook 04, on small cases with known answers."""

import os

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from tiny_models import tiny_backbone

from lib.studies import alignment_study
from lib.studies.alignment_study import adjustments, gain_relation, shift_study, spectrum_stability
from lib.data.texts import alignment_texts, pair_texts
from lib.data.sts import DataSource, load_sts
from lib.data.sources import DATA
from lib.studies.spectrum import principal_components

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLE = DataSource("sample", DATA / "sample")


def ranks(*rates):
    """Tables from which a text's LAR is the given rate of its ten tokens."""
    rows = [(text, token, 10, 50, 1.0 if token < 10 * rate else np.nan) for text, rate in enumerate(rates) for token in range(10)]
    return pd.DataFrame(rows, columns=["text", "token", "length", "depth", "rank"])


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # three pairs, some resamples constant
def test_gains_by_hand():
    texts = ["a", "b", "c", "d"]
    data = Dataset.from_dict({"sentence1": ["a", "b", "a"], "sentence2": ["b", "c", "d"], "score": [1.0, 2.0, 3.0]})
    pairs = {"plain": pd.DataFrame({"gold": data["score"], "similarity": [3.0, 2.0, 1.0]}),
             "TP": pd.DataFrame({"gold": data["score"], "similarity": [1.0, 3.0, 2.0]})}
    found = gain_relation(pairs, {"plain": ranks(0, 0, 0, 0), "TP": ranks(0.4, 0.2, 0, 0.2)}, data, texts, draws=50)
    # LAR gains of the pairs: 0.3, 0.1, 0.3. Distances of ranks: 2, 0, 2 before and 0, 1, 1 after, of 3.
    assert found["gain in LAR"] == pytest.approx(0.7 / 3)
    assert found["gain in STS"] == pytest.approx(100 / 3 * (2 - 1 + 1) / 3)
    assert found["spearman"] == pytest.approx(100 * np.sqrt(3) / 2)  # ranks 2.5, 1, 2.5 and 3, 1, 2
    assert found["low"] <= found["spearman"] <= found["high"]


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
def test_a_text_without_tokens_is_left_out_of_the_gains():
    data = Dataset.from_dict({"sentence1": ["a", "c", "b"], "sentence2": ["b", "a", "b"], "score": [1.0, 2.0, 3.0]})
    pairs = {v: pd.DataFrame({"gold": data["score"], "similarity": s}) for v, s in {"plain": [1.0, 2, 3], "TP": [1.0, 3, 2]}.items()}
    without = {v: table[table["text"] != 2] for v, table in {"plain": ranks(0, 0, 0), "TP": ranks(0.5, 0.1, 1)}.items()}
    assert gain_relation(pairs, without, data, ["a", "b", "c"], draws=20)["gain in LAR"] == pytest.approx((0.3 + 0.1) / 2)


def test_a_change_along_the_first_component_is_stable():
    states = np.random.default_rng(0).normal(size=(60, 5)) + 4
    u1 = principal_components(states)[0][0]
    table = spectrum_stability({"m": states}, states - 2 * u1, (20, 60, 500))
    assert table["N"].tolist() == [20, 60, 20, 60] and table["centred"].tolist() == [False, False, True, True]
    whole = table[(table["N"] == 60) & ~table["centred"]].iloc[0]
    assert whole["v_1"] == pytest.approx(-2) and whole["share"] == pytest.approx(1) and whole["cosine"] == pytest.approx(1)
    assert (table.loc[table["centred"], "share"] < 0.9).all()  # without the mean the first component points elsewhere


@pytest.fixture
def backbone():
    return tiny_backbone("llama")


TEXTS = ["A dog runs home.", "The cat sleeps.", "Rain fell all day.", "A dog sleeps."]


def test_shifting_by_nothing_changes_nothing_and_by_much_does(backbone):
    states = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
    u1 = principal_components(states)[0][0]
    table = shift_study(backbone, {"m": states}, TEXTS, {"m": u1}, {"m": -3.0}, [0.0, 1.0, 200.0])
    assert set(table["metric"]) == set(alignment_study.STUDIED) and set(table["amount"]) == {0.0, 1.0, 200.0}
    at = table[table["metric"] == "LAR"].set_index("amount")["value"]
    unmoved = alignment_study.embedding_ranks(backbone, states, -1, TEXTS)
    assert at[0.0] == pytest.approx(alignment_study.alignment_metrics(unmoved, (10,))["LAR"].mean())
    # So far out all texts have the ranking of -u1, whatever they were.
    direction = alignment_study.embedding_ranks(backbone, np.tile(-u1, (4, 1)).astype(np.float32), -1, TEXTS)
    assert at[200.0] == pytest.approx(alignment_study.alignment_metrics(direction, (10,))["LAR"].mean())


def test_adjustments_are_measured_against_none(backbone):
    generator = np.random.default_rng(2)
    states = {"m": (generator.normal(size=(4, 32)) + 2).astype(np.float32)}
    corpus = {"m": (generator.normal(size=(50, 32)) + 2).astype(np.float32)}
    data = Dataset.from_dict({"sentence1": TEXTS[:3], "sentence2": TEXTS[1:], "score": [1.0, 2.0, 3.0]})
    components = {"m": principal_components(corpus["m"])[0]}
    table = adjustments(backbone, states, TEXTS, data, corpus, components, {"m": 0.0}, draws=20)
    assert table["adjustment"].tolist() == ["none", "shifted by v_1", "mean subtracted", "first component removed"]
    plain, shifted = table.iloc[0], table.iloc[1]
    assert plain["change"] == 0 and shifted["change"] == 0  # v_1 = 0 moves nothing
    assert plain["STS"] == shifted["STS"] and plain["LAR"] == shifted["LAR"]


def test_the_sample_has_texts_of_both_kinds(monkeypatch):
    monkeypatch.setattr("lib.data.texts.find_source", lambda: SAMPLE)
    found, missing = alignment_texts(10)
    assert list(found) == ["sample STS", "sample documents"] and not missing
    assert len(found["sample STS"].texts) <= 10 and len(found["sample documents"].texts) == 10
    assert found["sample STS"].provenance["caps"] == [{"count": 5, "seed": 0}]


def test_pair_texts_are_distinct_and_all_there():
    data = load_sts("sample", "dev", SAMPLE)
    texts = pair_texts(data).texts
    assert len(set(texts)) == len(texts) and set(texts) == {*data["sentence1"], *data["sentence2"]}


@pytest.mark.skipif("TP_DATA_DIR" not in os.environ, reason="TP_DATA_DIR is not set: no real evaluation data")
def test_real_texts_are_those_of_the_official_code():
    found, missing = alignment_texts(None)
    assert not missing and len(found["MS MARCO"].texts) == 500
    news = found["STS12 SMTnews"].texts
    # 291 pairs; their 582 sentences are several translations of the same ones, so only half of them are distinct.
    assert 250 < len(news) <= 582 and not any(" ." in text or " ?" in text for text in news)
