"""SentEval's own classifier: a logistic regression by Adam's fixed steps, stopped early (arXiv 1803.05449, nhid 0).
On features that are small or not normalised it stops far from the minimum, and mostly scores below an exact fit."""

from collections.abc import Sequence

import numpy as np
import torch

SEED = 1111
L2 = (1e-5, 1e-4, 1e-3, 1e-2)  # the weakest first, which is chosen among equal ones
BATCH, PASSES, ROUNDS, TENACITY = 64, 4, 51, 5  # it begins rounds of 4 passes until more than 200 passes are done


def stopped_early(features: np.ndarray, labels: np.ndarray, fit: np.ndarray, test: np.ndarray,
                  strengths: Sequence[float], held=None) -> np.ndarray:
    """Predicted labels of the items `test` by a classifier for each strength of L2, (strengths, test items).

    A round is four passes over the items to fit, each in a new order, then accuracy on items held out. The sixth round
    that is no new best is the last, and the best round's weights predict. L2 is Adam's weight decay, of the bias too.
    The classifiers start alike and differ by their L2 only, so they take their steps side by side.
    `features` are (items, width), used as float32, `labels` int (items,), and `fit`, `test`, `held` places of items; if
    `held` is None it is a twentieth of `fit`, drawn at random and not fitted. Draws from its own generators, seeded
    anew in each call. Raises `ValueError` if the items to fit are of one class."""
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
