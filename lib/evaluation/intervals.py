"""Every interval of the package: a percentile bootstrap over items, paired between runs, independent between data sets.
A *run* is the table of one encoder (setting, layer, retriever) on some data sets: columns `task`, `item` and what the
statistic needs. In a resample every run sees the same items drawn, so differences are paired. Each data set has a
generator of its own, seeded by its name: its interval does not depend on what else is loaded."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

CELLS = 2**16  # resamples x items that are held at once: 0.5 MB as float64, which a processor's cache holds
Tables = Sequence[pd.DataFrame]
Runs = dict[Hashable, pd.DataFrame | Sequence[pd.DataFrame]]


@dataclass(frozen=True)
class Statistic:
    """A function of the tables of one task (a table a run, all over the same items) and of how often each item counts:
    (tables, weights) -> float64 (draws, tables). `weights`: int (draws, items), the items in order of first rows."""

    function: Callable[[Tables, np.ndarray], np.ndarray]
    within: str = ""  # a column, if the items of each of its values are resampled by themselves
    centred: bool = False  # whether the mean of the draws, where these are biased, is moved to the measured value


def mean_of(column: str) -> Statistic:
    """The mean of a column, one row an item."""
    return Statistic(lambda tables, weights: weights @ _values(tables, weights, column) / weights.sum(axis=1)[:, None])


def _spearman(tables: Tables, weights: np.ndarray) -> np.ndarray:
    """Spearman's rho x 100 of the columns gold (the same in all tables) and similarity; nan if a column has one value.
    Ranks follow from running sums of the weights over groups of equal values: no resample is sorted."""
    similarities, weights, result = _values(tables, weights, "similarity"), weights.astype(np.float64), []
    gold = _centred_ranks(weights, tables[0]["gold"].to_numpy())
    gold_spread = np.einsum("dn,dn,dn->d", weights, gold, gold)
    for values in similarities.T:
        ranks = _centred_ranks(weights, values)
        joint, spread = (np.einsum("dn,dn,dn->d", weights, other, ranks) for other in (gold, ranks))
        with np.errstate(invalid="ignore"):
            result.append(100 * joint / np.sqrt(gold_spread * spread))
    return np.stack(result, axis=1)


def _centred_ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean rank of each value in each resample, less the mean of all ranks: (draws, items)."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    drawn = np.add.reduceat(weights[:, np.argsort(group)], np.cumsum(sizes) - sizes, axis=1)
    return (np.cumsum(drawn, axis=1) - drawn / 2 - weights.sum(axis=1, keepdims=True) / 2)[:, group]


def _area_under_roc(tables: Tables, weights: np.ndarray) -> np.ndarray:
    """How often a positive item's similarity is above another's, 0 to 1 (ties count half); column positive (bool)."""
    positive = tables[0]["positive"].to_numpy(bool)
    above, below = (part / part.sum(axis=1, keepdims=True) for part in (weights[:, positive], weights[:, ~positive]))
    values = _values(tables, weights, "similarity").T
    wins = (np.sign(of[positive][:, None] - of[~positive]) / 2 + 0.5 for of in values)
    return np.stack([((above @ win) * below).sum(axis=1) for win in wins], axis=1)


def _distinct_share(tables: Tables, weights: np.ndarray) -> np.ndarray:
    """The share of all items' distinct tokens that is found in one; a row per item and token, column found (bool)."""
    item, token = (pd.factorize(tables[0][column])[0] for column in ("item", "token"))
    counted = [np.ones(len(item)), *(table["found"].to_numpy() for table in tables)]
    found = (csr_array((of.astype(np.float32), (token, item))) @ (weights > 0).T.astype(np.float32) for of in counted)
    everything, *parts = ((of > 0).sum(axis=0) for of in found)
    return np.stack(parts, axis=1) / everything[:, None]


SPEARMAN = Statistic(_spearman)
area_under_roc = Statistic(_area_under_roc, within="positive")
distinct_share = Statistic(_distinct_share, centred=True)  # a resample repeats items and so holds fewer distinct tokens


def _values(tables: Tables, weights: np.ndarray, column: str) -> np.ndarray:
    """A column of every table, float64 (items, tables). Raises `ValueError` if an item has several rows."""
    if len(tables[0]) != weights.shape[1]:
        raise ValueError(f"{len(tables[0])} rows for {weights.shape[1]} items: a run has one row an item (one layer).")
    return np.stack([table[column].to_numpy(np.float64) for table in tables], axis=1)


def _by_task(runs: Runs, statistic: Statistic, draws: int) -> dict[str, np.ndarray]:
    """task -> the measured values (first row) and the resampled ones, float64 (1 + draws, runs)."""
    flat = [(name, of) for name, run in runs.items() for of in ([run] if isinstance(run, pd.DataFrame) else run)]
    own = [[place for place, (name, _) in enumerate(flat) if name == run] for run in runs]
    label, first = flat[0]
    same = {"task", "item"}.union({"gold", "token", statistic.within or "item"}.intersection(first))
    for other, table in flat:
        if not all(column in table and np.array_equal(table[column], first[column]) for column in same):
            raise ValueError(f"The runs {label!r} and {other!r} do not hold the same items in the same order.")
    found = {}
    for task, rows in first.groupby("task", sort=False).indices.items():
        tables = [table.iloc[rows].reset_index(drop=True) for _, table in flat]
        items = tables[0].drop_duplicates("item", ignore_index=True)
        groups = list(items.groupby(statistic.within or "task").indices.values())
        generator, size = np.random.default_rng([0, *str(task).encode()]), max(1, CELLS // len(items))
        weights = (_weights(generator, groups, min(size, draws - begin)) for begin in range(0, draws, size))
        measured = statistic.function(tables, np.ones((1, len(items)), int))
        found[task] = np.concatenate([measured, *(statistic.function(tables, of) for of in weights)])
        if statistic.centred and draws:
            found[task][1:] += measured - found[task][1:].mean(axis=0)
        found[task] = np.stack([found[task][:, places].mean(axis=1) for places in own], axis=1)
    return found


def _weights(generator: np.random.Generator, groups: Sequence[np.ndarray], draws: int) -> np.ndarray:
    """How often each item is drawn in each resample, int (draws, items); each group of items by itself."""
    weights = np.empty((draws, sum(map(len, groups))), int)
    for places in groups:
        drawn = generator.integers(0, len(places), (draws, len(places))) + np.arange(draws)[:, None] * len(places)
        weights[:, places] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return weights


def compare(runs: Runs, statistic: Statistic, reference: Hashable = None, ratio=False, draws=10_000) -> pd.DataFrame:
    """The statistic of every run on every task with 95 % intervals, and every run beside one of them.
    `runs` are label -> table with the columns task, item and what `statistic` (`SPEARMAN`, `area_under_roc`,
    `distinct_share` or `mean_of(column)`) needs, the same items in the same order; of a list of tables, such as those
    of several seeds, the mean of their statistics counts. `reference` is the label of the run that all are compared
    with, in pairs; `ratio`: whether to divide by it, too. `draws` is how many resamples there are; 0 leaves the
    intervals out, and those whose value is nan do not count.
    Returns a row per run and task, in the order of both, of several tasks also of their mean, `"Avg"`: run, task,
    value, low, high; with a reference difference, difference_low, difference_high; with `ratio` the same three of the
    ratio. `ValueError` if the runs do not hold the same items, or the reference is not one of them."""
    if reference is not None and reference not in runs:
        raise ValueError(f"There is no run {reference!r}; choose from {', '.join(map(repr, runs))}.")
    found = _by_task(runs, statistic, draws)
    if len(found) > 1:
        found["Avg"] = np.mean(list(found.values()), axis=0)
    table = pd.DataFrame({"run": [run for run in runs for _ in found], "task": [*found] * len(runs)})
    kinds = {"": (values := np.stack(list(found.values())))}  # (tasks, 1 + draws, runs)
    if reference is not None:
        of_reference = values[..., [list(runs).index(reference)]]
        kinds["difference"] = values - of_reference
        with np.errstate(divide="ignore", invalid="ignore"):
            kinds |= {"ratio": values / of_reference} if ratio else {}
    for kind, of_kind in kinds.items():
        table[kind or "value"] = of_kind[:, 0].T.ravel()
        for end, tail in (("low", 2.5), ("high", 97.5)) if draws else ():  # percentiles: a 95 % interval
            table[f"{kind}_{end}".strip("_")] = np.nanpercentile(of_kind[:, 1:], tail, axis=1).T.ravel()
    return table
