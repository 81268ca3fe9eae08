"""Semantic textual similarity, scored as SentEval does (arXiv 1803.05449)."""

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from lib.core.encoder import SentenceEncoder
from lib.data.sources import EvaluationData


def sts_pairs(
    encoder: SentenceEncoder, data: dict[str, EvaluationData], layers: Iterable[int] | None = None
) -> pd.DataFrame:
    """Cosine similarity of every pair at each layer (None: the exit layer), all from one pass of the model.

    `data`: task -> data with the columns subset, sentence1, sentence2, score. Returns a row per layer (0 to num_layers)
    and pair: task, subset, item (its place), gold (the data's score), layer, similarity (float64, -1 to 1).
    """
    layers = [encoder.backbone.layer_index(n) for n in (layers or [encoder.exit_layer])]
    sides = [list(pairs[column]) for column in ("sentence1", "sentence2") for pairs in data.values()]
    states = encoder.encode_layers([sentence for side in sides for sentence in side], layers)
    frame = pd.concat(
        pd.DataFrame({"task": task, "subset": pairs["subset"], "item": range(len(pairs)), "gold": pairs["score"]})
        for task, pairs in data.items()
    )
    tables = [frame.assign(layer=layer, similarity=cosine(*np.split(states[layer], 2))) for layer in states]
    return pd.concat(tables, ignore_index=True)


def word_overlap(data: dict[str, EvaluationData]) -> pd.DataFrame:
    """The trivial baseline, in the columns of `sts_pairs`: of the lower-cased words of a pair's sentences, the
    share that both hold (Jaccard, 0 to 1; 0 without words). The layer is `"none"`."""
    tables = []
    for task, pairs in data.items():
        sides = ([set(re.findall(r"\w+", text.lower())) for text in pairs[side]] for side in ("sentence1", "sentence2"))
        shared = [len(a & b) / max(len(a | b), 1) for a, b in zip(*sides)]
        about = {"task": task, "subset": pairs["subset"], "item": range(len(pairs)), "gold": pairs["score"]}
        tables.append(pd.DataFrame(about | {"layer": "none", "similarity": shared}))
    return pd.concat(tables, ignore_index=True)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of the rows of two arrays (pairs, hidden), float64 (pairs,); 0 where a row is all zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, 1e-12)


def spearman(gold, similarity) -> float:
    """Spearman's rank correlation x 100 of two sequences of numbers; equal values get their mean rank."""
    return 100 * float(spearmanr(gold, similarity).statistic)


def sts_scores(pairs: pd.DataFrame) -> pd.DataFrame:
    """SentEval's score of each task and subset, Spearman's rho x 100, from a table of `sts_pairs`.

    Subset `"all"` is one correlation over all pairs of a task (SentEval's "all", which the papers report), and not the
    mean over subsets. Returns columns layer, task, subset, score, pairs (how many).
    """
    groups = pd.concat([pairs.assign(subset="all"), pairs]).groupby(["layer", "task", "subset"], sort=False)
    rows = [(*key, spearman(group["gold"], group["similarity"]), len(group)) for key, group in groups]
    return pd.DataFrame(rows, columns=["layer", "task", "subset", "score", "pairs"])
