"""Semantic textual similarity, scored as SentEval does (arXiv 1803.05449)."""

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from lib.core.encoder import SentenceEncoder
from lib.data.sources import EvaluationData


def sts_pairs(encoder: SentenceEncoder, data: dict[str, EvaluationData], layers: Iterable[int] = ()) -> pd.DataFrame:
    """Cosine similarity of every pair at each layer (default: the exit layer), all from one pass of the model. `data`
    is task -> data with the columns subset, sentence1, sentence2, score. Returns a row per layer (0 to num_layers) and
    pair: task, subset, item (its place), gold (the data's score), layer, similarity (float64, -1 to 1)."""
    layers = [encoder.backbone.layer_index(n) for n in (layers or [encoder.exit_layer])]
    frame, first, second = _items(data)
    states = encoder.encode_layers(first + second, layers)
    tables = [frame.assign(layer=layer, similarity=cosine(*np.split(states[layer], 2))) for layer in states]
    return pd.concat(tables, ignore_index=True)


def word_overlap(data: dict[str, EvaluationData]) -> pd.DataFrame:
    """The trivial baseline, in the columns of `sts_pairs`: of the lower-cased words of a pair's sentences, the
    share that both hold (Jaccard, 0 to 1; 0 without words). The layer is `"none"`."""
    frame, *sides = _items(data)
    words = ([set(re.findall(r"\w+", text.lower())) for text in side] for side in sides)
    return frame.assign(layer="none", similarity=[len(a & b) / max(len(a | b), 1) for a, b in zip(*words)])


def _items(data: dict[str, EvaluationData]) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The pairs of all tasks, a row each with task, subset, item and gold; and their first and second sentences."""
    tables = [pairs.to_pandas().assign(task=task, item=range(len(pairs))) for task, pairs in data.items()]
    table = pd.concat(tables, ignore_index=True).rename(columns={"score": "gold"})
    return table[["task", "subset", "item", "gold"]], table["sentence1"].tolist(), table["sentence2"].tolist()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of the rows of two arrays (pairs, hidden), float64 (pairs,); 0 where a row is all zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, 1e-12)


def spearman(gold, similarity) -> float:
    """Spearman's rank correlation x 100 of two sequences of numbers; equal values get their mean rank."""
    return 100 * float(spearmanr(gold, similarity).statistic)
