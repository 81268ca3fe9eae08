"""Positive pairs to train an embedder on: from training parts only, without any sentence that an evaluation uses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lib.data import STS_TASKS, DataSource, SampleDataWarning, find_source, load_sts, load_transfer, provenance

# Evaluations of which no sentence may be trained on: the dev and test part of an STS task, the test part of MRPC.
EVALUATIONS = (*STS_TASKS, "MRPC")

# Training part -> the lowest score of a positive pair.
POSITIVE = {("STS-B", "train"): 4.0, ("SICK-R", "train"): 4.2}
SAMPLE_POSITIVE = {("sample", "dev"): 4.0}


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


def positive_pairs(clean: Sequence[str] = EVALUATIONS, source: DataSource | None = None) -> Pairs:
    """The training pairs: STS-B train scored 4 or more, SICK-R train scored 4.2 or more, paraphrases of MRPC train.

    Where the source is the sample, its STS dev pairs scored 4 or more stand in, with a `SampleDataWarning`.

    Args:
        clean: of `EVALUATIONS`, those that the trained model will be judged by. STS-B's training part is a selection from
            STS12-16 and SICK-R's shares its sentences with its test part, so keeping all of them clean leaves mostly MRPC.
        source: from `find_source`, which is asked if it is None.

    Raises `ValueError` for an unknown evaluation.
    """
    if unknown := set(clean) - set(EVALUATIONS):
        raise ValueError(f"Unknown evaluation {sorted(unknown)}; choose from {', '.join(EVALUATIONS)}.")
    source = source or find_source()
    if source.is_sample:
        warnings.warn("The pairs to train on come from sample data; what is trained on them compares with nothing.",
                      SampleDataWarning, stacklevel=2)
        wanted, held = SAMPLE_POSITIVE, [("sample", "test")]
    else:
        own_dev = ("STS-B", "SICK-R")
        wanted = POSITIVE
        held = [(t, s) for t in clean if t in STS_TASKS for s in (("dev", "test") if t in own_dev else ("test",))]
    data = {part: load_sts(*part, source) for part in [*wanted, *held]}
    positives = {" ".join(part): [(r["sentence1"], r["sentence2"]) for r in data[part] if r["score"] >= lowest]
                 for part, lowest in wanted.items()}
    evaluation = [text for part in held for column in ("sentence1", "sentence2") for text in data[part][column]]
    if not source.is_sample:
        data["MRPC", "all"] = mrpc = load_transfer("MRPC", source)
        positives["MRPC train"] = [(r["sentence1"], r["sentence2"]) for r in mrpc if r["split"] == "train" and r["label"] == 1]
        if "MRPC" in clean:
            evaluation += [r[column] for r in mrpc if r["split"] == "test" for column in ("sentence1", "sentence2")]
    return make_pairs(positives, evaluation, {"clean": list(clean), "data": [provenance(part) for part in data.values()]})


def make_pairs(positives: dict[str, Sequence[tuple[str, str]]], evaluation: Sequence[str], about: dict | None = None) -> Pairs:
    """Pairs without evaluation sentences, without repetitions, and with their groups.

    Left out is a pair with a sentence that is also in `evaluation`, one of two equal sentences, and one that came before;
    sentences are compared as `normalised`. The provenance counts them, by the keys of `positives`. Two pairs are of one
    group if they share a sentence or are linked by a chain of pairs that do. Raises `ValueError` if no pair is left.
    """
    forbidden, seen, kept, counts = {normalised(text) for text in evaluation}, set(), [], {}
    for name, pairs in positives.items():
        count = counts[name] = {"positive": len(pairs), "in_evaluation": 0, "equal": 0, "repeated": 0, "kept": 0}
        for pair in pairs:
            key = frozenset(map(normalised, pair))
            fate = "in_evaluation" if key & forbidden else "equal" if len(key) == 1 else "repeated" if key in seen else "kept"
            count[fate] += 1
            if fate == "kept":
                seen.add(key)
                kept.append(pair)
    if not kept:
        raise ValueError(f"No positive pair is left to train on: {counts}.")
    number: dict[str, int] = {}
    edges = np.array([[number.setdefault(normalised(text), len(number)) for text in pair] for pair in kept])
    links = coo_matrix((np.ones(len(edges)), edges.T), shape=(len(number), len(number)))
    groups = connected_components(links, directed=False)[1][edges[:, 0]].astype(np.int64)
    return Pairs([a for a, _ in kept], [b for _, b in kept], groups, {"pairs": counts, **(about or {})})
