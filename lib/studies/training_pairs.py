"""Positive pairs to train an embedder on: from training parts only, without any sentence that an evaluation uses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lib.data.sts import STS_TASKS, SampleDataWarning, find_source, load_sts, load_transfer, provenance

# STS part -> the lowest score of a positive pair; and the STS parts of which no sentence may be trained on.
POSITIVE = {("STS-B", "train"): 4.0, ("SICK-R", "train"): 4.2}
HELD_OUT = [("STS-B", "dev"), ("SICK-R", "dev"), *((task, "test") for task in STS_TASKS)]
SAMPLE_POSITIVE, SAMPLE_HELD_OUT = {("sample", "dev"): 4.0}, [("sample", "test")]


@dataclass(frozen=True)
class Pairs:
    """Positive pairs; those of the same group (int64, one a pair) are never each other's negatives."""

    first: list[str]
    second: list[str]
    groups: np.ndarray
    provenance: dict


def normalised(text: str) -> str:
    """A sentence as it is compared with others: its words in lower case, without punctuation, joined by single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def positive_pairs() -> Pairs:
    """The training pairs: STS-B train scored 4 or more, SICK-R train scored 4.2 or more, paraphrases of MRPC train.

    Without any sentence of `HELD_OUT` or of MRPC's test part. As STS-B's training part is a selection from STS12-16 and
    SICK-R's shares its sentences with its test part, this leaves mostly MRPC. Where the source is the sample, its STS dev
    pairs scored 4 or more stand in, with a `SampleDataWarning`.
    """
    source = find_source()
    positive, held_out = (SAMPLE_POSITIVE, SAMPLE_HELD_OUT) if source.is_sample else (POSITIVE, HELD_OUT)
    if source.is_sample:
        warnings.warn("The pairs to train on come from sample data; what is trained on them compares with nothing.",
                      SampleDataWarning, stacklevel=2)
    data = {part: load_sts(*part, source) for part in [*positive, *held_out]}
    pairs = {" ".join(part): _pairs(row for row in data[part] if row["score"] >= low) for part, low in positive.items()}
    held = [pair for part in held_out for pair in _pairs(data[part])]
    if not source.is_sample:
        mrpc = data["MRPC", "all"] = load_transfer("MRPC", source)
        pairs["MRPC train"] = _pairs(row for row in mrpc if row["split"] == "train" and row["label"] == 1)
        held += _pairs(row for row in mrpc if row["split"] == "test")
    return make_pairs(pairs, [text for pair in held for text in pair], [provenance(part) for part in data.values()])


def _pairs(rows: Iterable[dict]) -> list[tuple[str, str]]:
    return [(row["sentence1"], row["sentence2"]) for row in rows]


def make_pairs(
    positives: dict[str, Sequence[tuple[str, str]]], evaluation: Sequence[str], data: Sequence[dict] = ()
) -> Pairs:
    """Pairs without evaluation sentences, without repetitions, and with their groups.

    Left out is a pair with a sentence that is also in `evaluation`, one of two equal sentences, and one that came before;
    sentences are compared as `normalised`. The provenance counts them, by the keys of `positives`, and holds `data`. Two
    pairs are of one group if a chain of pairs that share sentences links them. Raises `ValueError` if no pair is left.
    """
    forbidden, seen, kept, counts = {normalised(text) for text in evaluation}, set(), [], {}
    for name, pairs in positives.items():
        count = counts[name] = {"positive": len(pairs), "in_evaluation": 0, "equal": 0, "repeated": 0, "kept": 0}
        for pair in pairs:
            key = frozenset(map(normalised, pair))
            fates = {"in_evaluation": key & forbidden, "equal": len(key) == 1, "repeated": key in seen, "kept": True}
            fate = next(name for name, applies in fates.items() if applies)
            count[fate] += 1
            if fate == "kept":
                seen.add(key)
                kept.append(pair)
    if not kept:
        raise ValueError(f"No positive pair is left to train on: {counts}.")
    first, second = map(list, zip(*kept))
    numbers, sentences = pd.factorize(np.array([normalised(text) for text in first + second], object))
    links = coo_array((np.ones(len(kept)), numbers.reshape(2, -1)), shape=(len(sentences), len(sentences)))
    groups = connected_components(links, directed=False)[1][numbers[: len(kept)]].astype(np.int64)
    return Pairs(first, second, groups, {"pairs": counts, "data": list(data)})
