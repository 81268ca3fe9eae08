"""STS scores and bootstrap intervals, against scipy and against a resampling that sorts anew every time."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, spearmanr

from lib.evaluation import sts
from lib.evaluation.sts import (
    ALL,
    AVERAGE,
    bootstrap_spearman,
    compare_runs,
    cosine,
    describe_effects,
    difference_interval,
    score_table,
    spearman,
    sts_scores,
)


def pairs_table(seed=0, sizes=(("A", "x", 30), ("A", "y", 20), ("B", "z", 40)), noise=1.0):
    generator = np.random.default_rng(seed)
    tables = []
    for task, subset, size in sizes:
        gold = np.round(generator.uniform(0, 5, size), 1)
        similarity = gold + noise * generator.normal(size=size)
        tables.append(pd.DataFrame({"task": task, "subset": subset, "pair": range(size), "gold": gold, "similarity": similarity}))
    return pd.concat(tables, ignore_index=True).assign(layer=3)


def test_cosine():
    a = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
    b = np.array([[0.0, 2.0], [3.0, 3.0], [1.0, 0.0]], np.float32)
    assert cosine(a, b) == pytest.approx([0.0, 1.0, 0.0])


def test_spearman_by_hand():
    # Ranks 1 2 3 4 against 1 3 2 4: rho = 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15) = 0.8
    assert spearman([1, 2, 3, 4], [0.1, 0.5, 0.3, 0.9]) == pytest.approx(80.0)


def test_all_is_one_correlation_over_the_subsets_and_not_their_mean():
    pairs = pairs_table()
    scores = sts_scores(pairs).set_index(["task", "subset"])["score"]
    of_a = pairs[pairs["task"] == "A"]
    assert scores["A", ALL] == pytest.approx(100 * spearmanr(of_a["gold"], of_a["similarity"]).statistic)
    assert scores["A", ALL] != pytest.approx((scores["A", "x"] + scores["A", "y"]) / 2, abs=1e-3)
    assert scores[AVERAGE, ALL] == pytest.approx((scores["A", ALL] + scores["B", ALL]) / 2)


def test_score_table_is_wide():
    table = score_table({("p", "v"): pairs_table()})
    assert list(table.columns) == ["prompt", "variant", "layer", "A", "B", "Avg"]


def test_bootstrap_equals_resampling_with_sorting(monkeypatch):
    monkeypatch.setattr(sts, "CHUNK", 7)
    generator = np.random.default_rng(3)
    gold = generator.integers(0, 5, 25).astype(float)  # many ties
    methods = np.stack([gold + generator.normal(size=25), np.round(generator.normal(size=25))])
    draws = bootstrap_spearman(gold, methods, draws=40, seed=11)
    generator = np.random.default_rng(11)
    expected = []
    while len(expected) < 40:
        for rows in generator.integers(0, 25, (min(7, 40 - len(expected)), 25)):
            ranks = [rankdata(values[rows]) for values in (gold, *methods)]
            expected.append([100 * np.corrcoef(ranks[0], r)[0, 1] for r in ranks[1:]])
    np.testing.assert_allclose(draws, expected, atol=1e-9)


def test_bootstrap_is_seeded():
    gold, method = np.arange(30.0), np.random.default_rng(0).normal(size=(1, 30))
    assert (bootstrap_spearman(gold, method, 50, seed=1) == bootstrap_spearman(gold, method, 50, seed=1)).all()
    assert (bootstrap_spearman(gold, method, 50, seed=1) != bootstrap_spearman(gold, method, 50, seed=2)).any()


def test_interval_of_a_method_against_itself_is_zero():
    pairs = pairs_table()
    result = difference_interval(pairs, pairs, draws=100)
    assert (result[["difference", "low", "high"]] == 0).all(axis=None)


def test_interval_sees_a_real_difference_and_its_average_is_the_mean():
    good, bad = pairs_table(noise=0.3), pairs_table(noise=0.3)
    bad["similarity"] = np.random.default_rng(1).normal(size=len(bad))
    result = difference_interval(good, bad, draws=300).set_index("task")
    assert (result["low"] > 0).all() and (result["low"] <= result["difference"]).all() and (result["difference"] <= result["high"]).all()
    assert result.loc[AVERAGE, "difference"] == pytest.approx(result.loc[["A", "B"], "difference"].mean())
    assert result.loc[AVERAGE, "high"] - result.loc[AVERAGE, "low"] < result.loc["B", "high"] - result.loc["B", "low"]


def test_interval_refuses_other_pairs():
    pairs = pairs_table()
    with pytest.raises(ValueError, match="same pairs"):
        difference_interval(pairs, pairs.iloc[::-1])


def test_describe_effects():
    table = pd.DataFrame({"prompt": ["a", "b", "c"], "difference": [1, -1, 0], "low": [0.5, -2, -1], "high": [2, -0.5, 1]})
    assert describe_effects(table) == (
        "With TP the average is better for a; worse for b; no different as far as these pairs can tell for c."
    )


def test_runs_beside_a_reference_agree_with_the_paired_interval_of_two():
    generator = np.random.default_rng(3)
    gold = generator.uniform(0, 5, 80)
    frame = pd.DataFrame({"task": "t", "subset": "s", "pair": range(80), "gold": gold, "layer": 1})
    runs = {label: frame.assign(similarity=gold + generator.normal(0, noise, 80)) for label, noise in (("a", 1), ("b", 2), ("c", 3))}
    table = compare_runs(runs, "a", draws=400).set_index("run")
    assert table.loc["a", ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc["b", "score"] == pytest.approx(spearman(gold, runs["b"]["similarity"]))
    assert (table["score_low"] < table["score"]).all() and (table["score"] < table["score_high"]).all()
    expected = difference_interval(runs["c"], runs["a"], draws=400).iloc[0]
    np.testing.assert_allclose(table.loc["c", ["difference", "low", "high"]].astype(float), expected[1:].astype(float))
