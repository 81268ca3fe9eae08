"""SentEval's transfer tasks: a logistic regression on frozen embeddings, its L2 strength chosen on held-out folds.

The protocol is SentEval's (arXiv 1803.05449), with its seed: nested 10-fold cross-validation for MR, CR, SUBJ and MPQA,
the given splits for SST-2, 10 folds of the training part and then the test part for TREC and MRPC.
`classifier="senteval"` is all its own, for figures beside published ones. What differs with the default, `"exact"`:
- SentEval takes steps with Adam and stops early, when accuracy no longer rises on held-out items. Here its loss, mean
  cross-entropy + L2 / 2 * |W|^2 (the bias is not part of |W|), is brought to its minimum, on all of the training part.
- Features are centred and divided by one number, their standard deviation. L2 on raw features would hold back states
  after the final norm, and hardly those of inner layers, which are ten times longer: layers would be judged by length.
- A class of fewer than 10 members makes for fewer folds, so that few rows can be used. Complete data has enough.
- SentEval sorts the data by length before it makes folds, so its folds are others. Accuracy is that of all items."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.utils import check_array, check_consistent_length
from sklearn.utils.parallel import Parallel, delayed
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from lib.core.encoder import SentenceEncoder
from lib.data.sources import EvaluationData
from lib.data.transfer import PAIR_TASKS

FOLDS, SEED = 10, 1111  # SentEval's
STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3)  # of L2, the strongest first: each fit starts from the one before
# Of SentEval's own: L2, the weakest first, chosen among equals; rounds of 4 passes begin until over 200 are done.
L2, BATCH, PASSES, ROUNDS, TENACITY = (1e-5, 1e-4, 1e-3, 1e-2), 64, 4, 51, 5


def transfer_predictions(encoder: SentenceEncoder, data: dict[str, EvaluationData], layers: Iterable[int] = (),
                         classifier: str = "exact") -> pd.DataFrame:
    """Predicted labels of the tasks' test items at each layer (default: the exit layer), a pass of the model per task.
    `data`: task -> data with the columns split, sentence1, sentence2, label. Returns a row per task, layer (0 to
    num_layers) and test item: task, layer, the columns of `classify`, and correct (100.0 or 0.0). `classifier` is that
    of `classify`; "senteval" has each split in SentEval's order: by words of sentence1 and sentence2, then by label."""
    _chosen(classifier)  # refused before the model has passed over the sentences
    layers, tables = [encoder.backbone.layer_index(n) for n in (layers or [encoder.exit_layer])], []
    for task, items in data.items():
        pairs, order = task in PAIR_TASKS, np.arange(len(items["label"]))
        if classifier == "senteval":
            words = [[len(text.split()) for text in items[side]] for side in ("sentence2", "sentence1")]
            order = np.lexsort([items["label"], *words])  # its last key is the first to sort by
        labels, splits = (np.asarray(items[column])[order] for column in ("label", "split"))
        states = encoder.encode_layers(items["sentence1"] + (items["sentence2"] if pairs else []), layers)
        for layer in list(states):
            features = states.pop(layer)  # so that a layer's memory is free when it is done
            features = pair_features(*np.split(features, 2)) if pairs else features
            table = classify(features[order], labels, splits, f"{task}, layer {layer}", classifier)
            table = table.assign(item=order[table["item"]]).sort_values("item")
            tables.append(table.assign(task=task, layer=layer, correct=100.0 * (table["gold"] == table["predicted"])))
    return pd.concat(tables, ignore_index=True)[["task", "layer", "item", "gold", "predicted", "l2", "correct"]]


def pair_f1(predictions: pd.DataFrame) -> pd.Series:
    """F1 x 100 of each task of pairs, by name, from a table of `transfer_predictions` of one layer."""
    pairs = predictions[predictions["task"].isin(PAIR_TASKS)].groupby("task", sort=False)
    return pd.Series({task: 100 * f1_score(of.gold, of.predicted, zero_division=0) for task, of in pairs}, dtype=float)


def pair_features(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SentEval's features of sentence pairs: |u - v| and u * v side by side, (pairs, 2 * hidden)."""
    return np.concatenate([np.abs(first - second), first * second], axis=1)


def classify(features: np.ndarray, labels: Sequence, splits: Sequence, title="", classifier="exact") -> pd.DataFrame:
    """Fit and test a logistic regression on features, float (items, width), and labels, int (items,).
    The names in `splits` (items,) decide the protocol: all are `"all"` (nested folds, every item is tested once), or
    `"train"` and `"test"` (the strength is chosen on folds of the training part), or also `"dev"` (it is chosen there).
    `classifier` is `"exact"`, or `"senteval"`: `stopped_early`, its last fit by dev or a twentieth of train. `title` is
    that of the progress bar, which is shown above 1,000 items.
    Returns a row per tested item: item (its place, ascending), gold, predicted, l2 (the strength chosen for its fit).
    `ValueError` for other splits or classifiers, unequal lengths, too few members of a class, infinite features."""
    fit_and_predict, strengths = _chosen(classifier)
    features, labels, splits = check_array(features), np.asarray(labels), np.asarray(splits)
    check_consistent_length(features, labels, splits)
    # A round is one test: (items to train on, items to test, [(items to fit, items held out), ...] to choose by).
    part = {name: np.flatnonzero(splits == name) for name in np.unique(splits)}
    if set(part) == {"all"}:
        rounds = [(train, test, _folds(labels, train)) for train, test in _folds(labels, part["all"])]
    elif set(part) - {"dev"} == {"train", "test"}:
        folds = [(part["train"], part["dev"])] if "dev" in part else _folds(labels, part["train"])
        rounds = [(part["train"], part["test"], folds)]
    else:
        raise ValueError(f"Splits must be all, or train, (dev) and test; got {', '.join(map(str, part))}.")
    choices = [(k, fit, held) for k, (_, _, folds) in enumerate(rounds) for fit, held in folds]
    accuracy, predict = np.zeros((len(rounds), len(strengths))), delayed(partial(fit_and_predict, features, labels))
    # The cores are busy with a fold each, so that each fit has one.
    with threadpool_limits(1), Parallel(n_jobs=-1, prefer="threads", return_as="generator") as parallel:
        paths = parallel(predict(fit, held, strengths, held) for _, fit, held in choices)
        bar = tqdm(paths, title, len(choices), unit="fold", disable=len(labels) <= 1000, leave=False)
        for path, (k, _, held) in zip(bar, choices):
            accuracy[k] += (path == labels[held]).mean(axis=1)
        if classifier == "senteval":  # it rounds to 0.01 %, so that a tie is one
            accuracy = (accuracy / [[len(folds)] for _, _, folds in rounds]).round(4)
        jobs = [(*of[:2], strengths[: k + 1], part.get("dev")) for of, k in zip(rounds, accuracy.argmax(axis=1))]
        tables = [pd.DataFrame({"item": test, "gold": labels[test], "predicted": path[-1], "l2": used[-1]})
                  for path, (_, test, used, _) in zip(parallel(predict(*job) for job in jobs), jobs)]
    return pd.concat(tables).sort_values("item", ignore_index=True)


def _folds(labels: np.ndarray, items: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stratified (items to fit, items held out); every part to fit has two classes or more."""
    counts = Counter(labels[items].tolist())
    folds = min([FOLDS, *(n for _, n in counts.most_common(2))])
    if len(counts) < 2 or folds < 2:
        raise ValueError(f"Folds need two classes with 2 members each, nested folds 3; there are {dict(counts)}.")
    with warnings.catch_warnings():
        # A third class may be rarer than there are folds; then some hold none of it, as in SentEval.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        pairs = StratifiedKFold(folds, shuffle=True, random_state=SEED).split(items, labels[items])
        return [(items[fit], items[held]) for fit, held in pairs]


def _chosen(classifier: str) -> tuple:
    """What fits and predicts, and its strengths of L2 in the order of preference."""
    choices = {"exact": (_predict, STRENGTHS), "senteval": (stopped_early, L2)}
    if classifier not in choices:
        raise ValueError(f"No classifier {classifier!r}; choose from {', '.join(choices)}.")
    return choices[classifier]


def _predict(features, labels, fit: np.ndarray, test: np.ndarray, strengths: Sequence[float], held=None) -> np.ndarray:
    """Fit at each strength, the strongest first: predicted labels, (strengths, test items). Needs no items held out."""
    known = features[fit].astype(np.float64)
    known -= (mean := known.mean(axis=0))
    known /= (size := known.std() or 1.0)
    new = (features[test] - mean) / size
    if len(known) < known.shape[1]:
        basis = np.linalg.qr(known.T)[0]  # the weights lie in the span of the items: turning the axes into it is exact
        known, new = known @ basis, new @ basis
    binary = len(np.unique(labels[fit])) == 2
    # Newton steps bear features of very different size. With more classes their matrix is too large.
    solver, predicted = "newton-cholesky" if binary else "lbfgs", []
    model = LogisticRegression(solver=solver, tol=1e-3, max_iter=1000, warm_start=True)
    for strength in strengths:
        # C weighs the sum of losses. For two classes scikit-learn's w is the difference of W's two: |W|^2 = |w|^2 / 2.
        model.C = (2 if binary else 1) / (len(fit) * strength)
        predicted.append(model.fit(known, labels[fit]).predict(new))
    return np.stack(predicted)


def stopped_early(features: np.ndarray, labels: np.ndarray, fit: np.ndarray, test: np.ndarray,
                  strengths: Sequence[float], held=None) -> np.ndarray:
    """SentEval's own classifier, a logistic regression by Adam's fixed steps, stopped early (arXiv 1803.05449, nhid 0):
    predicted labels of the items `test` for each strength of L2, (strengths, test items). On features that are small or
    not normalised it stops far from the minimum, and mostly scores below an exact fit. A round is four passes over the
    items to fit, each in a new order, then accuracy on items held out. The sixth round that is no new best is the last,
    and the best round's weights predict. L2 is Adam's weight decay, of the bias too. The classifiers start alike and
    differ by their L2 only, so they take their steps side by side. `features` are (items, width), used as float32,
    `labels` int (items,), and `fit`, `test`, `held` places of items; if `held` is None it is a twentieth of `fit`,
    drawn at random and not fitted. Each call is seeded anew. `ValueError` if the items of `fit` are of one class."""
    orders, start, names = np.random.RandomState(SEED), torch.Generator().manual_seed(SEED), np.unique(labels[fit])
    if len(names) < 2:
        raise ValueError(f"A classifier needs two classes or more; the items to fit have one class, {names}.")
    if held is None:
        held, fit = np.split(fit[orders.permutation(len(fit))], [max(1, len(fit) // 20)])
    known, dev, new = (np.c_[features[part], np.ones(len(part))].astype(np.float32) for part in (fit, held, test))
    gold, width, classes = np.searchsorted(names, labels[fit]), features.shape[1], len(names)
    # PyTorch's first weights, then its first biases, which are the last row: (width + 1, strengths * classes).
    first = [torch.empty(classes, rows).uniform_(-(width**-0.5), width**-0.5, generator=start) for rows in (width, 1)]
    weights = np.tile(torch.cat(first, dim=1).numpy().T, len(strengths))
    decay = np.repeat(np.float32(strengths), classes)
    mean, square, step = np.zeros_like(weights), np.zeros_like(weights), 0
    best, accuracy, misses = weights.copy(), np.full(len(strengths), -1.0), np.zeros(len(strengths), int)
    while step < ROUNDS * PASSES * -(-len(fit) // BATCH) and (misses <= TENACITY).any():
        for order in [orders.permutation(len(fit)) for _ in range(PASSES)]:
            for rows in np.split(order, range(BATCH, len(order), BATCH)):
                logits = (known[rows] @ weights).reshape(-1, classes)  # a row for each item and strength
                slope = np.exp(logits - logits.max(axis=1, keepdims=True))
                slope /= slope.sum(axis=1, keepdims=True)
                slope[np.arange(len(slope)), np.repeat(gold[rows], len(strengths))] -= 1
                gradient = known[rows].T @ slope.reshape(len(rows), -1) / len(rows) + decay * weights
                mean, square, step = mean + 0.1 * (gradient - mean), square + 0.001 * (gradient**2 - square), step + 1
                weights = weights - 0.001 / (1 - 0.9**step) * mean / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        now = (names[(dev @ weights).reshape(len(dev), -1, classes).argmax(axis=2).T] == labels[held]).mean(axis=1)
        better = (now > accuracy) & (misses <= TENACITY)
        accuracy[better], misses[~better] = now[better], misses[~better] + 1
        best = np.where(np.repeat(better, classes), weights, best)
    return names[(new @ best).reshape(len(test), -1, classes).argmax(axis=2).T]
