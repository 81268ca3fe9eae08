"""Evaluation data, checked before a number is made from it: STS pairs, subsets of rows, provenance.

Row counts are those of SentEval (arXiv 1803.05449), as used by SimCSE and the Token Prepending paper. What the notebooks
need from `lib.data.sources` and `lib.data.transfer` can be imported from here.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value

from lib.data.sources import DataError, DataSource, SampleDataWarning, find_source, forget_sources, make_dataset, read_numbered
from lib.data.transfer import TRANSFER_TASKS, load_transfer, transfer_tasks

__all__ = [
    "DataError", "DataSource", "SampleDataWarning", "find_source", "forget_sources",
    "STS_TASKS", "load_sts", "sts_tasks", "TRANSFER_TASKS", "load_transfer", "transfer_tasks", "cap_rows", "provenance",
]

STS_TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R")

STS_FEATURES = Features(
    {"subset": Value("string"), "sentence1": Value("string"), "sentence2": Value("string"), "score": Value("float64")}
)


@dataclass(frozen=True)
class PairFile:
    """A file of sentence pairs, one a line, columns separated by tabs, never quoted."""

    path: str  # below the source's folder
    rows: int  # how many scored pairs it holds, in the split it is read for
    columns: tuple[str, ...] = ("sentence1", "sentence2")  # by a column split, rows are chosen
    subset: str = ""  # of all rows, where no column says it
    scores: str = ""  # a file with the scores, line by line; an empty line means that the pair was never scored
    header: str = ""
    more: bool = False  # whether further columns may follow
    lowest: float = 0.0  # possible score; the highest is 5


_STSB = functools.partial(
    PairFile, columns=("subset", "file", "year", "number", "score", "sentence1", "sentence2"), more=True
)
_SICK = functools.partial(
    PairFile, columns=("number", "sentence1", "sentence2", "score", "entailment"), subset="SICK-R", lowest=1.0,
    header="pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment",
)
_SAMPLE = functools.partial(
    PairFile, "sts.tsv", columns=("split", "subset", "score", "sentence1", "sentence2"),
    header="split\tgenre\tscore\tsentence1\tsentence2",
)

# Scored pairs per subset. STS13 has no SMT: its licence keeps it out of SentEval.
_SEMEVAL = {
    "STS12": {"MSRpar": 750, "MSRvid": 750, "SMTeuroparl": 459, "surprise.OnWN": 750, "surprise.SMTnews": 399},
    "STS13": {"FNWN": 189, "headlines": 750, "OnWN": 561},
    "STS14": {"deft-forum": 450, "deft-news": 300, "headlines": 750, "images": 750, "OnWN": 750, "tweet-news": 750},
    "STS15": {"answers-forums": 375, "answers-students": 750, "belief": 375, "headlines": 750, "images": 750},
    "STS16": {"answer-answer": 254, "headlines": 249, "plagiarism": 230, "postediting": 244, "question-question": 209},
}


def _semeval(task: str) -> tuple[PairFile, ...]:
    stem = f"STS/{task}-en-test/STS."
    return tuple(
        PairFile(f"{stem}input.{subset}.txt", rows, subset=subset, scores=f"{stem}gs.{subset}.txt")
        for subset, rows in _SEMEVAL[task].items()
    )


# task -> split -> its files
STS_FILES: dict[str, dict[str, tuple[PairFile, ...]]] = {
    **{task: {"test": _semeval(task)} for task in _SEMEVAL},
    "STS-B": {
        "train": (_STSB("STS/STSBenchmark/sts-train.csv", 5749),),
        "dev": (_STSB("STS/STSBenchmark/sts-dev.csv", 1500),),
        "test": (_STSB("STS/STSBenchmark/sts-test.csv", 1379),),
    },
    "SICK-R": {
        "train": (_SICK("SICK/SICK_train.txt", 4500),),
        "dev": (_SICK("SICK/SICK_trial.txt", 500),),
        "test": (_SICK("SICK/SICK_test_annotated.txt", 4927),),
    },
    "sample": {"dev": (_SAMPLE(rows=80),), "test": (_SAMPLE(rows=160),)},
}


def sts_tasks(source: DataSource | None = None) -> tuple[str, ...]:
    """The STS tasks that a source really has: all seven, or the sample as the one task that it is."""
    source = source or find_source()
    return ("sample",) if source.is_sample else STS_TASKS


def load_sts(task: str, split: str = "test", source: DataSource | None = None) -> Dataset:
    """Load the scored sentence pairs of an STS task.

    Args:
        task: one of `STS_TASKS`, or `"sample"` where the source is the sample; the sample stands in for any of them.
        split: `"test"`; STS-B and SICK-R also have `"train"` and `"dev"`, the sample `"dev"`.
        source: from `find_source`, which is asked if it is None.

    Returns:
        Columns subset, sentence1, sentence2 (str, as in the file) and score (float, 0 to 5; SICK-R 1 to 5), with
        `provenance`. Pairs without a score are left out, as in SentEval.

    Raises `ValueError` if there is no such task or split, `DataError` if a file is missing, short or malformed or the sample
    has no such split.
    """
    source = source or find_source()
    tasks = tuple(STS_FILES) if source.is_sample else STS_TASKS
    if task not in tasks:
        raise ValueError(f"Unknown STS task {task!r}; choose from {', '.join(tasks)}.")
    if split not in STS_FILES[task]:
        raise ValueError(f"{task} has no split {split!r}; choose from {', '.join(STS_FILES[task])}.")
    name = "sample" if source.is_sample else task
    if split not in STS_FILES[name]:
        raise DataError(f"The sample data has no split {split!r}, only {', '.join(STS_FILES[name])}.")
    hashes: dict[str, str] = {}
    rows = [row for file in STS_FILES[name][split] for row in _read_pairs(source.path, file, split, hashes)]
    return make_dataset(rows, STS_FEATURES, source, hashes, task=name, split=split)


def cap_rows(dataset: Dataset, count: int | None, seed: int, within: str | None = None) -> Dataset:
    """At most `count` rows, drawn without replacement by an own generator, in their original order; None means all.

    With `within`, a column, at most `count` rows of each of its values; they are drawn value by value, in the order in
    which the values first appear. What was drawn is added to the provenance. Raises `ValueError` if `count` is below 1.
    """
    if count is None:
        return dataset
    if count < 1:
        raise ValueError(f"A data set needs at least one row, got count={count}.")
    values = np.array(dataset[within][:]) if within else np.zeros(len(dataset))
    groups = [np.flatnonzero(values == value) for value in dict.fromkeys(values)]
    if all(len(rows) <= count for rows in groups):
        return dataset
    generator = np.random.default_rng(seed)
    chosen = [generator.choice(rows, count, replace=False) if len(rows) > count else rows for rows in groups]
    capped, about = dataset.select(np.sort(np.concatenate(chosen))), provenance(dataset)
    cap = {"count": count, "seed": seed} | ({"within": within} if within else {})
    capped.info.description = json.dumps(about | {"caps": [*about["caps"], cap]})
    return capped


def provenance(dataset: Dataset) -> dict:
    """What a data set is: task ("sample" for the STS sample), split or, of a transfer task, splits (split -> rows before
    `cap_rows`), source, rows, rows_total (before `cap_rows`), caps (count, seed, and within if given, of each), files
    (path below the source's folder -> SHA-256).

    Raises `ValueError` for a data set from elsewhere.
    """
    try:
        return json.loads(dataset.info.description) | {"rows": len(dataset)}
    except json.JSONDecodeError:
        raise ValueError("This data set carries no provenance: it was not loaded by lib.data.sts.") from None


def _read_pairs(folder: Path, file: PairFile, split: str, hashes: dict[str, str]) -> list[dict]:
    """The scored pairs of one file, as dicts with the keys of `STS_FEATURES`. Adds to `hashes`. Raises `DataError`."""
    path = folder / file.path
    lines = read_numbered(folder, file.path, hashes, file.header)
    scores = read_numbered(folder, file.scores, hashes) if file.scores else [(where, "") for where, _ in lines]
    if len(scores) != len(lines):
        expected = f"{len(lines)}, one for each of {path.name}"
        raise DataError(f"{folder / file.scores}: found {len(scores)} lines, expected {expected}.")
    rows = []
    for (where, line), (score_where, score) in zip(lines, scores):
        fields, wanted = line.split("\t"), len(file.columns)
        if len(fields) < wanted or (len(fields) > wanted and not file.more):
            names = ", ".join(file.columns)
            raise DataError(f"{where}: found {len(fields)} columns, expected {wanted} between tabs: {names}.")
        row = {"subset": file.subset, "score": score} | dict(zip(file.columns, fields))
        if row.get("split", split) != split or (file.scores and not score.strip()):
            continue
        for key in ("sentence1", "sentence2"):
            if not row[key].strip():
                raise DataError(f"{where}: expected a sentence in {key}, found none.")
        rows.append(row | {"score": _score(row["score"], file.lowest, score_where)})
    if len(rows) != file.rows:
        raise DataError(f"{path}: found {len(rows)} scored rows, expected {file.rows}.")
    return rows


def _score(text: str, lowest: float, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not lowest <= score <= 5:
        raise DataError(f"{where}: expected a score from {lowest:g} to 5, found {text[:20]!r}.")
    return score
