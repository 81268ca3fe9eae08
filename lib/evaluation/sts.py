"""Semantic textual similarity, scored as SentEval does, with paired bootstrap intervals for differences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import spearmanr

from lib.data.sts import load_sts, provenance
from lib.core.encoder import SentenceEncoder
from lib.report.results import Result, run_or_load

ALL = "all"
AVERAGE = "Avg"
TAILS = (2.5, 97.5)  # percentiles: the ends of a 95 % interval
CHUNK = 250  # resamples in memory at a time


def evaluate_sts(encoder: SentenceEncoder, tasks: Iterable[str], split: str = "test") -> pd.DataFrame:
    """Scores of an encoder at its exit layer; columns as in `sts_scores`."""
    return sts_scores(sts_pairs(encoder, {task: load_sts(task, split) for task in tasks}))


def sts_pairs(encoder: SentenceEncoder, data: dict[str, Dataset], layers: Iterable[int] | None = None) -> pd.DataFrame:
    """Cosine similarity of every pair at each layer (default: the exit layer), all from one pass.

    Args:
        data: task -> data set with columns subset, sentence1, sentence2, score.
        layers: in Hugging Face's numbering, -1 for the last; they come back as 0..num_layers.

    Returns:
        One row per pair and layer: task, subset, pair (its place in the data set), gold, layer, similarity.
    """
    layers = [encoder.backbone.layer_index(n) for n in (layers or [encoder.exit_layer])]
    sides = [list(dataset[column]) for column in ("sentence1", "sentence2") for dataset in data.values()]
    states = encoder.encode_layers([s for side in sides for s in side], layers)
    frame = pd.concat(
        pd.DataFrame({"task": task, "subset": dataset["subset"], "pair": range(len(dataset)), "gold": dataset["score"]})
        for task, dataset in data.items()
    )
    tables = [frame.assign(layer=layer, similarity=cosine(*np.split(states[layer], 2))) for layer in states]
    return pd.concat(tables, ignore_index=True)


def stored_pairs(encoder: SentenceEncoder, data: dict[str, Dataset], layers: Iterable[int] | None = None) -> Result:
    """`sts_pairs` through the result store, with the provenance of encoder and data."""
    layers = [encoder.backbone.layer_index(n) for n in (layers or [encoder.exit_layer])]
    settings = encoder.describe() | {"layers": layers, "data": {task: provenance(d) for task, d in data.items()}}
    return run_or_load(f"sts-{encoder.prompt.name}", settings, lambda: sts_pairs(encoder, data, layers), code=("sts",))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of the rows of two arrays (pairs, hidden); 0 where a row is all zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, 1e-12)


def sts_scores(pairs: pd.DataFrame) -> pd.DataFrame:
    """SentEval's score of each task and subset: Spearman's rho x 100 of similarity against gold.

    Subset `"all"` is one correlation over all pairs of the task together (SentEval's "all", which the papers report),
    not the mean over subsets. Task `"Avg"` is the mean of the tasks' `"all"` scores.

    Returns:
        Columns layer, task, subset, score, pairs.
    """
    groups = pd.concat([pairs.assign(subset=ALL), pairs]).groupby(["layer", "task", "subset"], sort=False)
    rows = [(*key, spearman(group["gold"], group["similarity"]), len(group)) for key, group in groups]
    scores = pd.DataFrame(rows, columns=["layer", "task", "subset", "score", "pairs"])
    whole = scores[scores["subset"] == ALL].groupby("layer", sort=False, as_index=False)
    average = whole.agg({"score": "mean", "pairs": "sum"})
    return pd.concat([scores, average.assign(task=AVERAGE, subset=ALL)], ignore_index=True)


def spearman(gold, similarity) -> float:
    """Spearman's rank correlation x 100 (ties get their mean rank)."""
    return 100 * float(spearmanr(gold, similarity).statistic)


def bootstrap_spearman(gold: np.ndarray, similarities: np.ndarray, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """Spearman x 100 of several methods on the same resampled pairs.

    A resample is how often each pair was drawn, and its ranks follow from running sums of those counts over the values
    in sorted order. So nothing is sorted again, and thousands of resamples are a few array operations.

    Args:
        gold: (pairs,). similarities: (methods, pairs).

    Returns:
        float64 (draws, methods). Take differences of its columns for a paired comparison.
    """
    generator, count = np.random.default_rng(seed), len(gold)
    orders = [_tie_groups(values) for values in (gold, *similarities)]
    result = np.empty((draws, len(similarities)))
    for begin in range(0, draws, CHUNK):
        size = min(CHUNK, draws - begin)
        drawn = generator.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        ranks = [_resampled_ranks(weights, *order) - (count + 1) / 2 for order in orders]
        spread = [np.einsum("dn,dn,dn->d", weights, r, r) for r in ranks]
        for k, (r, s) in enumerate(zip(ranks[1:], spread[1:])):
            joint = np.einsum("dn,dn,dn->d", weights, ranks[0], r)
            result[begin : begin + size, k] = 100 * joint / np.sqrt(spread[0] * s)
    return result


def _tie_groups(values) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorting order, where each group of equal values starts in it, and each value's group."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return np.argsort(group), np.cumsum(sizes) - sizes, group


def _resampled_ranks(weights: np.ndarray, order: np.ndarray, starts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Mean rank of each value in each resample, (draws, pairs); `weights` says how often each pair was drawn."""
    drawn = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(drawn, axis=1) - drawn / 2 + 0.5)[:, group]


def difference_interval(ours: pd.DataFrame, base: pd.DataFrame, draws: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Score of `ours` minus `base` per task and on average, with a 95 % paired bootstrap interval over sentence pairs.

    Args:
        ours, base: tables from `sts_pairs`, one layer each. `ValueError` if they don't hold the same pairs in one order.

    Returns:
        Columns task, difference, low, high.
    """
    keys = ["task", "subset", "pair", "gold"]
    ours, base = ours.reset_index(drop=True), base.reset_index(drop=True)
    if not ours[keys].equals(base[keys]):
        raise ValueError("The two tables do not hold the same pairs in the same order.")
    differences, resampled = {}, {}
    for task, pairs in ours.assign(base=base["similarity"]).groupby("task", sort=False):
        gold, *both = pairs[["gold", "similarity", "base"]].to_numpy().T
        differences[task] = spearman(gold, both[0]) - spearman(gold, both[1])
        resampled[task] = -np.diff(bootstrap_spearman(gold, both, draws, seed))[:, 0]
    differences[AVERAGE] = np.mean(list(differences.values()))
    resampled[AVERAGE] = np.mean(list(resampled.values()), axis=0)
    low, high = np.percentile(list(resampled.values()), TAILS, axis=1)
    return pd.DataFrame({"task": list(differences), "difference": differences.values(), "low": low, "high": high})


def compare_runs(runs: dict[str, pd.DataFrame], reference: str, draws: int = 10_000) -> pd.DataFrame:
    """Every run beside one of them, over the same pairs of one data set, with 95 % paired bootstrap intervals.

    Args:
        runs: label -> table from `sts_pairs` with one layer. reference: the label of the run to compare with.

    Returns:
        Columns run, score, score_low, score_high, difference, low, high (of the difference from the reference).
    """
    gold, at = runs[reference]["gold"].to_numpy(), list(runs).index(reference)
    similarities = [table["similarity"].to_numpy() for table in runs.values()]
    resampled, scores = bootstrap_spearman(gold, similarities, draws), np.array([spearman(gold, s) for s in similarities])
    score_low, score_high = np.percentile(resampled, TAILS, axis=0)
    low, high = np.percentile(resampled - resampled[:, [at]], TAILS, axis=0)
    return pd.DataFrame(
        {"run": list(runs), "score": scores, "score_low": score_low, "score_high": score_high}
        | {"difference": scores - scores[at], "low": low, "high": high}
    )


def stored_effects(ours: pd.DataFrame, base: pd.DataFrame, draws: int = 10_000, seed: int = 0) -> Result:
    """`difference_interval` through the result store; the two tables themselves are part of the settings."""
    tables = [hashlib.sha256(t.to_json(double_precision=15).encode()).hexdigest() for t in (ours, base)]
    settings = {"tables": tables, "draws": draws, "seed": seed}
    return run_or_load("sts-effect", settings, lambda: difference_interval(ours, base, draws, seed), code=("sts",))


def score_table(runs: dict[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """(prompt, variant) -> pairs of one layer, as one wide table: prompt, variant, layer, a column per task, Avg."""
    rows = []
    for (prompt, variant), pairs in runs.items():
        scores = sts_scores(pairs).query("subset == @ALL").set_index("task")["score"]
        rows.append({"prompt": prompt, "variant": variant, "layer": pairs["layer"].iloc[0], **scores})
    return pd.DataFrame(rows)


def describe_effects(effects: pd.DataFrame) -> str:
    """One sentence about differences with intervals; columns prompt, low, high."""
    better, worse = effects["low"] > 0, effects["high"] < 0
    groups = {"better": better, "worse": worse, "no different as far as these pairs can tell": ~better & ~worse}
    parts = [f"{label} for {', '.join(effects.loc[rows, 'prompt'])}" for label, rows in groups.items() if rows.any()]
    return f"With TP the average is {'; '.join(parts)}."
