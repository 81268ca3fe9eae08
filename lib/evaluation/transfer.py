"""SentEval's transfer tasks: a logistic regression on frozen embeddings, its L2 strength chosen on held-out folds.

The protocol is SentEval's (arXiv 1803.05449), with its seed: nested 10-fold cross-validation for MR, CR, SUBJ and MPQA, the
given splits for SST-2, 10 folds of the training part and then the test part for TREC and MRPC. A pair (u, v) of MRPC has the
features |u - v|, u * v. Scikit-learn does the fitting. What differs from SentEval's own classifier:

- SentEval takes steps with Adam and stops early, when accuracy no longer rises on held-out items. Here its loss, mean
  cross-entropy + L2 / 2 * |W|^2 on raw features (the bias is not part of |W|), is brought to its minimum, on all of the
  training part. Stopping early keeps weights small, more than SentEval's L2 of 1e-5 to 1e-2 does, so the strengths here
  lie one decade higher.
- Features are centred and divided by one number, which speeds up the fit and leaves its minimum where it is, for L2 is
  scaled with it. Nothing is scaled feature by feature, because in SentEval nothing is.
- Where a class has fewer than 10 members there are fewer folds, so that few rows can be used. Complete data has enough.
- SentEval sorts the data by length before it makes folds, so its folds are others. Accuracy is that of all items together.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.parallel import Parallel, delayed
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from lib.data.sts import load_transfer, provenance
from lib.core.encoder import SentenceEncoder
from lib.report.results import Result, run_or_load

FOLDS = 10
SEED = 1111  # SentEval's
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)  # of L2, the strongest first: each fit starts from the one before
PAIR_TASKS = ("MRPC", "paraphrase")
AVERAGE = "Avg"
ACCURACY = "accuracy_x100"


def classify(features: np.ndarray, labels: Sequence[int], splits: Sequence[str], title: str = "") -> pd.DataFrame:
    """Fit and test a logistic regression; the split names decide the protocol.

    Args:
        features: (items, width). labels: (items,).
        splits: (items,), all of them `"all"` (nested folds, every item is tested once), or `"train"` and `"test"` (folds of
            the training part choose the strength), or `"train"`, `"dev"` and `"test"` (dev chooses it).
        title: of the progress bar, which is shown above 1,000 items.

    Returns:
        A row per tested item: item (its place in the data, ascending), gold, predicted, l2 (the strength chosen for the fit
        that predicted it).

    Raises `ValueError` for other splits, unequal lengths, features that are not finite, and too few members of a class.
    """
    features, labels, splits = np.asarray(features), np.asarray(labels), np.asarray(splits)
    if not len(features) == len(labels) == len(splits):
        raise ValueError(f"There are {len(features)} embeddings, {len(labels)} labels and {len(splits)} split names.")
    if not np.isfinite(features).all():
        raise ValueError("A feature is infinite or not a number.")
    # A round is one test: (items to train on, items to test, [(items to fit, items held out), ...] to choose the strength).
    part = {name: np.flatnonzero(splits == name) for name in np.unique(splits)}
    if set(part) == {"all"}:
        rounds = [(train, test, _folds(labels, train)) for train, test in _folds(labels, part["all"])]
    elif set(part) == {"train", "test"}:
        rounds = [(part["train"], part["test"], _folds(labels, part["train"]))]
    elif set(part) == {"train", "dev", "test"}:
        rounds = [(part["train"], part["test"], [(part["train"], part["dev"])])]
    else:
        raise ValueError(f"Splits must be all, or train and test, or train, dev and test; got {', '.join(map(str, part))}.")
    if any(len(np.unique(labels[train])) < 2 for train, _, _ in rounds):
        raise ValueError("All items to train on have the same label.")

    choices = [(k, fit, held) for k, (_, _, folds) in enumerate(rounds) for fit, held in folds]
    accuracy, tables = np.zeros((len(rounds), len(STRENGTHS))), []
    with (
        threadpool_limits(1),  # the cores are busy with a fold each
        Parallel(n_jobs=-1, prefer="threads", return_as="generator") as parallel,
    ):
        paths = parallel(delayed(_predict)(features, labels, fit, held, STRENGTHS) for _, fit, held in choices)
        bar = tqdm(paths, title, len(choices), unit="fold", disable=len(labels) <= 1000, leave=False)
        for path, (k, _, held) in zip(bar, choices):
            accuracy[k] += (path == labels[held]).mean(axis=1)
        best = accuracy.argmax(axis=1)
        jobs = [(train, test, STRENGTHS[: k + 1]) for (train, test, _), k in zip(rounds, best)]
        for path, (_, test, strengths) in zip(parallel(delayed(_predict)(features, labels, *job) for job in jobs), jobs):
            columns = {"item": test, "gold": labels[test], "predicted": path[-1], "l2": strengths[-1]}
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables).sort_values("item", ignore_index=True)


def _folds(labels: np.ndarray, items: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stratified (items to fit, items held out); every part to fit has two classes or more."""
    counts = Counter(labels[items].tolist())
    folds = min([FOLDS, *(n for _, n in counts.most_common(2))])
    if len(counts) < 2 or folds < 2:
        found = ", ".join(f"{n} of class {label}" for label, n in sorted(counts.items()))
        raise ValueError(f"Folds need two classes with 2 members each, nested folds 3; there are {found}.")
    with warnings.catch_warnings():
        # A third class may be rarer than there are folds; then some hold none of it, as in SentEval.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        pairs = StratifiedKFold(folds, shuffle=True, random_state=SEED).split(items, labels[items])
        return [(items[fit], items[held]) for fit, held in pairs]


def _predict(features, labels, fit: np.ndarray, test: np.ndarray, strengths: Sequence[float]) -> np.ndarray:
    """Fit at each strength, the strongest first: predicted labels, (strengths, test items)."""
    known = features[fit].astype(np.float64)
    mean = known.mean(axis=0)
    known -= mean
    scale = known.std() or 1.0
    known /= scale
    new = (features[test] - mean) / scale
    if len(known) < known.shape[1]:
        # The weights lie in the span of the items, so turning the axes into it loses nothing.
        basis = np.linalg.qr(known.T)[0]
        known, new = known @ basis, new @ basis
    binary = len(np.unique(labels[fit])) == 2
    # Newton steps bear features of very different size. With more classes their matrix is too large.
    model = LogisticRegression(solver="newton-cholesky" if binary else "lbfgs", tol=1e-3, max_iter=1000, warm_start=True)
    predicted = []
    for strength in strengths:
        # C weighs the sum of losses. For two classes scikit-learn's one vector w is the difference of the two in W, and
        # |W|^2 = |w|^2 / 2.
        model.C = (2 if binary else 1) * scale**2 / (len(fit) * strength)
        predicted.append(model.fit(known, labels[fit]).predict(new))
    return np.stack(predicted)


def pair_features(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SentEval's features of sentence pairs: |u - v| and u * v side by side, (pairs, 2 * hidden)."""
    return np.concatenate([np.abs(first - second), first * second], axis=1)


def transfer_predictions(
    encoder: SentenceEncoder, task: str, dataset: Dataset, layers: Iterable[int] | None = None
) -> pd.DataFrame:
    """Predicted labels of a task's test items at each layer (default: the exit layer), all from one pass of the model.

    Args:
        dataset: columns split, sentence1, sentence2, label.
        layers: in Hugging Face's numbering, -1 for the last; they come back as 0..num_layers.

    Returns:
        One row per test item and layer: task, layer, item (its place in the data set), gold, predicted, l2.
    """
    layers = [encoder.backbone.layer_index(n) for n in (layers or [encoder.exit_layer])]
    sides = ["sentence1", "sentence2"] if task in PAIR_TASKS else ["sentence1"]
    states = encoder.encode_layers([s for side in sides for s in dataset[side]], layers)
    tables = []
    for layer in list(states):
        features = states.pop(layer)  # so that each layer is gone when it is done
        if task in PAIR_TASKS:
            features = pair_features(*np.split(features, 2))
        table = classify(features, dataset["label"][:], dataset["split"][:], title=f"{task}, layer {layer}")
        tables.append(table.assign(task=task, layer=layer))
    return pd.concat(tables, ignore_index=True)[["task", "layer", "item", "gold", "predicted", "l2"]]


def stored_predictions(
    encoder: SentenceEncoder, task: str, dataset: Dataset, layers: Iterable[int] | None = None
) -> Result:
    """`transfer_predictions` through the result store; one result a task, so an interrupted run goes on at the task."""
    layers = [encoder.backbone.layer_index(n) for n in (layers or [encoder.exit_layer])]
    settings = encoder.describe() | {"layers": layers, "task": task, "data": provenance(dataset), "seed": SEED}
    return run_or_load(
        f"transfer-{encoder.prompt.name}-{task}", settings, lambda: transfer_predictions(encoder, task, dataset, layers),
        code=("transfer", "transfer_data"),
    )


def evaluate_transfer(encoder: SentenceEncoder, tasks: Iterable[str]) -> pd.DataFrame:
    """Scores of an encoder at its exit layer; columns as in `transfer_scores`."""
    return transfer_scores(pd.concat(transfer_predictions(encoder, task, load_transfer(task)) for task in tasks))


def transfer_scores(predictions: pd.DataFrame) -> pd.DataFrame:
    """Accuracy x 100 of each task, of pairs F1 x 100 too, and task `"Avg"`, the mean of the tasks' accuracies.

    Returns:
        Columns layer, task, metric (accuracy_x100 or f1_x100), value, items.
    """
    rows = []
    for (layer, task), table in predictions.groupby(["layer", "task"], sort=False):
        metrics = {ACCURACY: accuracy_score(table["gold"], table["predicted"])}
        if task in PAIR_TASKS:
            metrics["f1_x100"] = f1_score(table["gold"], table["predicted"], zero_division=0)
        rows += [(layer, task, metric, 100 * value, len(table)) for metric, value in metrics.items()]
    scores = pd.DataFrame(rows, columns=["layer", "task", "metric", "value", "items"])
    accuracies = scores[scores["metric"] == ACCURACY].groupby("layer", sort=False, as_index=False)
    average = accuracies.agg({"value": "mean", "items": "sum"})
    return pd.concat([scores, average.assign(task=AVERAGE, metric=ACCURACY)], ignore_index=True)


def bootstrap_accuracy(
    methods: Sequence[pd.DataFrame], draws: int = 10_000, seed: int = 0
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Accuracy x 100 of several methods on the same resampled test items.

    Of an item only matters which methods are right, so a resample is one multinomial draw of these patterns.

    Args:
        methods: tables from `transfer_predictions`, one layer each. `ValueError` if they don't hold the same items in one
            order.

    Returns:
        Tasks, the last of them `"Avg"`; accuracies (tasks, methods); resampled accuracies (tasks, draws, methods). Each task
        is resampled independently, and the average of a resample is that over its tasks.
    """
    keys = ["task", "item", "gold"]
    first = methods[0].reset_index(drop=True)
    if not all(first[keys].equals(table[keys].reset_index(drop=True)) for table in methods):
        raise ValueError("The tables do not hold the same items in the same order.")
    right = np.stack([table["gold"].to_numpy() == table["predicted"].to_numpy() for table in methods], axis=1)
    tasks, values, resampled = [], [], []
    for task, index in first.groupby("task", sort=False).indices.items():
        patterns, counts = np.unique(right[index], axis=0, return_counts=True)
        drawn = np.random.default_rng([seed, len(tasks)]).multinomial(len(index), counts / len(index), draws)
        tasks.append(task)
        values.append(100 * right[index].mean(axis=0))
        resampled.append(100 * drawn @ patterns / len(index))
    return [*tasks, AVERAGE], np.stack([*values, np.mean(values, 0)]), np.stack([*resampled, np.mean(resampled, 0)])


def intervals(ours: pd.DataFrame, base: pd.DataFrame | None = None, draws: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Accuracy x 100, or the difference ours - base, with a 95 % (paired) bootstrap interval over test items.

    Returns:
        Columns task (the last one `"Avg"`), value, low, high.
    """
    tasks, values, resampled = bootstrap_accuracy([ours] if base is None else [ours, base], draws, seed)
    if base is not None:
        values, resampled = -np.diff(values), -np.diff(resampled)
    low, high = np.percentile(resampled[..., 0], [2.5, 97.5], axis=1)
    return pd.DataFrame({"task": tasks, "value": values[:, 0], "low": low, "high": high})
