"""The bootstrap, against scipy, scikit-learn and resampling written out; what is paired, and what is independent."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, spearmanr
from sklearn.metrics import roc_auc_score

from lib.evaluation import intervals
from lib.evaluation.intervals import SPEARMAN, Statistic, area_under_roc, compare, distinct_share, mean_of, wide
from lib.evaluation.tasks import STS, compare_suite

SIZES = {"A": 50, "B": 40}


def run(noise: float, seed: int = 0, sizes=SIZES) -> pd.DataFrame:
    """Pairs of some tasks, with the same gold scores whatever the noise and the seed; `right` is 0 or 100."""
    tables = []
    for task, size in sizes.items():
        gold = np.round(np.random.default_rng(size).uniform(0, 5, size), 1)
        similarity = gold + noise * np.random.default_rng([seed, size]).normal(size=size)
        columns = {"gold": gold, "similarity": similarity, "right": 100.0 * (abs(similarity - gold) < 1)}
        tables.append(pd.DataFrame({"task": task, "item": range(size)} | columns))
    return pd.concat(tables, ignore_index=True)


def drawn(count: int, draws: int, seed: int = 0) -> np.ndarray:
    """How often each item is drawn, (draws, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)


def test_statistics_of_a_resample_are_those_of_its_repeated_rows():
    generator = np.random.default_rng(3)
    gold = generator.integers(0, 5, 25).astype(float)  # many ties
    weights = np.vstack([np.ones(25, int), drawn(25, 40)])
    tables = [pd.DataFrame({"gold": gold, "similarity": s, "positive": gold > 2})
              for s in (gold + generator.normal(size=25), np.round(generator.normal(size=25)))]
    repeated = [[table.loc[np.repeat(range(25), row)] for table in tables] for row in weights]
    for statistic, by_hand in (
        (SPEARMAN, lambda rows: 100 * spearmanr(rows["gold"], rows["similarity"]).statistic),
        (area_under_roc, lambda rows: roc_auc_score(rows["positive"], rows["similarity"])),
        (mean_of("gold"), lambda rows: rows["gold"].mean()),
    ):
        expected = [[by_hand(rows) for rows in of_draw] for of_draw in repeated]
        np.testing.assert_allclose(statistic(tables, weights), expected, atol=1e-9)


def test_groups_are_resampled_by_themselves():
    table = pd.DataFrame({"task": "t", "item": range(30), "positive": np.arange(30) % 3 == 0, "similarity": 1.0})
    sums = []

    def positives(tables, weights):
        sums.extend(weights[:, tables[0]["positive"]].sum(axis=1))
        return np.zeros((len(weights), len(tables)))

    compare({"a": table}, Statistic(positives, within="positive"), draws=50)
    assert len(sums) == 51 and set(sums) == {10}
    chance = compare({"a": table}, area_under_roc, draws=50).iloc[0]
    assert chance[["value", "low", "high"]].tolist() == pytest.approx([0.5] * 3)
    with pytest.raises(ValueError, match="same items"):
        compare({"a": table, "b": table.assign(positive=~table["positive"])}, area_under_roc)


def test_intervals_of_a_distinct_share_are_centred_on_the_measured_value():
    """Texts share a token with the next one, and every other text's tokens are found: fewer texts, a smaller share."""
    rows = [(text, token, text % 2 == 0) for text in range(20) for token in (text, text + 1)]
    table = pd.DataFrame(rows, columns=["item", "token", "found"]).assign(task="")
    kinds = (Statistic(distinct_share.function), distinct_share)
    plain, centred = (compare({"a": table}, statistic, draws=300).iloc[0] for statistic in kinds)
    assert centred["value"] == plain["value"] == pytest.approx(20 / 21)  # tokens 0 to 19 of 0 to 20
    assert plain["high"] < plain["value"] < centred["high"]
    assert centred["high"] - centred["low"] == pytest.approx(plain["high"] - plain["low"])
    weights = drawn(20, 300)
    shares = [table[row[table["item"]] > 0].groupby("token")["found"].any().mean() for row in weights]
    np.testing.assert_allclose(distinct_share([table], weights)[:, 0], shares, rtol=1e-6)


def test_differences_are_those_of_scipys_paired_bootstrap():
    one, other = run(0.8, 1, {"t": 200}), run(1.5, 2, {"t": 200})
    data = (one["gold"], one["similarity"], other["similarity"])
    low, high = bootstrap(
        data, lambda gold, a, b: 100 * (spearmanr(gold, a)[0] - spearmanr(gold, b)[0]), paired=True, n_resamples=1500,
        method="percentile", vectorized=False, rng=np.random.default_rng(0),
    ).confidence_interval
    found = compare({"one": one, "other": other}, SPEARMAN, "other").iloc[0]
    close = pytest.approx([low, high], abs=0.06 * (high - low))
    assert found[["difference_low", "difference_high"]].to_list() == close


def test_columns_and_rows():
    runs = {"base": run(1), ("TP", 3): run(2), 7: run(3)}
    table = compare(runs, mean_of("right"), "base", ratio=True, draws=20)
    assert list(table.columns) == [
        "run", "task", "value", "low", "high", "difference", "difference_low", "difference_high",
        "ratio", "ratio_low", "ratio_high",
    ]
    assert table["run"].tolist() == [name for name in runs for _ in range(3)]
    assert table["task"].tolist() == ["A", "B", "Avg"] * 3
    bare = compare(runs, mean_of("right"), "base", draws=0)
    assert list(bare.columns) == ["run", "task", "value", "difference"] and bare["value"].equals(table["value"])
    assert compare({"a": run(1, sizes={"A": 9})}, SPEARMAN, draws=5)["task"].tolist() == ["A"]  # no average of one
    means = runs[7].groupby("task")["right"].mean()
    assert bare["value"].tolist()[6:] == pytest.approx([means["A"], means["B"], means.mean()])


def test_a_run_beside_itself_and_beside_one_twice_as_high():
    base = run(1)
    runs = {"base": base, "half": base.assign(right=base["right"] / 2)}
    table = compare(runs, mean_of("right"), "base", ratio=True, draws=200)
    own, half = (table[table["run"] == name] for name in ("base", "half"))
    assert (own.filter(like="difference") == 0).all(axis=None) and (own.filter(like="ratio") == 1).all(axis=None)
    np.testing.assert_allclose(half.filter(like="ratio"), 0.5)
    np.testing.assert_allclose(half["difference"], -half["value"])


def test_an_interval_is_as_wide_as_theory_says():
    table = run(1, sizes={"t": 400})
    found = compare({"a": table}, mean_of("similarity"), draws=4000).iloc[0]
    width = 2 * 1.96 * table["similarity"].std(ddof=0) / np.sqrt(400)
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.05)


def test_data_sets_are_resampled_independently():
    """Two data sets with equal rows: their average varies less than either, by the square root of two."""
    table = run(1, sizes={"A": 300})
    both = {"a": pd.concat([table, table.assign(task="B")])}
    for statistic in (SPEARMAN, mean_of("right")):
        found = compare(both, statistic, draws=4000).set_index("task")
        width = found["high"] - found["low"]
        assert found.loc["A", "value"] == found.loc["B", "value"] == found.loc["Avg", "value"]
        assert width["Avg"] == pytest.approx(width[["A", "B"]].mean() / np.sqrt(2), rel=0.06)


def test_an_interval_does_not_depend_on_what_else_is_loaded():
    runs = {"a": run(1), "b": run(2, 1)}
    alone = {name: table[table["task"] == "B"] for name, table in runs.items()}
    expected = compare(runs, SPEARMAN, "a", draws=50).query("task == 'B'").reset_index(drop=True)
    pd.testing.assert_frame_equal(compare(alone, SPEARMAN, "a", draws=50), expected)
    expected = expected.iloc[1:, :5].reset_index(drop=True)
    pd.testing.assert_frame_equal(compare({"b": alone["b"]}, SPEARMAN, draws=50), expected)


def test_resampling_is_seeded_and_its_chunks_change_nothing(monkeypatch):
    first = compare({"a": run(1)}, SPEARMAN, draws=50)
    assert first.equals(compare({"a": run(1)}, SPEARMAN, draws=50))
    assert not first.equals(compare({"a": run(1)}, SPEARMAN, draws=50, seed=1))
    monkeypatch.setattr(intervals, "CELLS", 7 * 50)
    pd.testing.assert_frame_equal(compare({"a": run(1)}, SPEARMAN, draws=50), first)


@pytest.mark.parametrize("change", [
    lambda table: table.iloc[::-1], lambda table: table.iloc[:-1], lambda table: table.assign(gold=table["gold"] + 1),
    lambda table: table.assign(task="C"), lambda table: table.drop(columns="gold"),
], ids=["order", "number", "gold", "task", "column"])
def test_runs_over_other_items_are_refused(change):
    with pytest.raises(ValueError, match="'b' do not hold the same items"):
        compare({"a": run(1), "b": change(run(1))}, mean_of("right"), draws=10)


def test_what_else_is_refused_and_what_a_plain_function_may_be():
    with pytest.raises(ValueError, match="no run 'plain'; choose from 'a'"):
        compare({"a": run(1)}, SPEARMAN, "plain")
    several = pd.DataFrame({"task": "t", "item": [5, 5, 3, 3, 3], "gold": 1.0, "similarity": 2.0})
    with pytest.raises(ValueError, match="one row an item"):  # two layers, say
        compare({"a": several}, SPEARMAN, draws=10)
    shapes = []
    compare({"a": several}, lambda tables, weights: shapes.append(weights.shape) or weights[:, :1], draws=4)
    assert shapes == [(1, 2), (4, 2)]  # the function says what several rows of an item mean


def test_draws_without_a_value_are_left_out():
    few = pd.DataFrame({"task": "t", "item": range(3), "gold": [1.0, 2, 3], "similarity": [1.0, 3, 2]})
    found = compare({"a": few}, SPEARMAN, draws=200).iloc[0]
    assert found["value"] == pytest.approx(50) and (found["low"], found["high"]) == pytest.approx((-100, 100))


def test_an_average_is_that_of_the_suite_whatever_else_is_loaded():
    runs = {"a": run(1, sizes=dict.fromkeys([*STS, "STR-2022"], 30) | {"STR-2022": 31})}
    found = compare_suite(STS, runs, draws=20).set_index("task")
    assert list(found.index) == [*STS, "STR-2022", "Avg"]
    assert found.loc["Avg", "value"] == pytest.approx(found.loc[list(STS), "value"].mean())
    some = compare_suite(STS, {"a": runs["a"][runs["a"]["task"] != "STS13"]}, draws=20)
    assert "Avg" not in set(some["task"])  # six of seven have no average that can stand beside the paper's
    assert compare_suite(STS, {"a": run(1)}, draws=20)["task"].tolist() == ["A", "B", "Avg"]  # such as sample data


def test_a_wide_table_keeps_the_order_of_runs_and_tasks():
    long = compare({"b": run(1), "a": run(2)}, mean_of("right"), "b", draws=5)
    table = wide(long)
    assert list(table.columns) == ["run", "A", "B", "Avg"] and table["run"].tolist() == ["b", "a"]
    assert table.set_index("run").loc["a", "Avg"] == long["value"].iloc[-1]
    named = wide(long.assign(prompt="ke"), ["prompt", "run"], "difference")
    assert list(named.columns) == ["prompt", "run", "A", "B", "Avg"]
    assert named.loc[0, ["A", "B", "Avg"]].tolist() == [0, 0, 0]
