"""Labelled sentences for the transfer tasks, in SentEval's files, counts, encodings and labels (arXiv 1803.05449)."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Value

from lib.data.sources import DataError, DataSource, find_source, make_dataset, read_numbered

TRANSFER_TASKS = ("MR", "CR", "SUBJ", "MPQA", "SST2", "TREC", "MRPC")
SAMPLE_TASKS = ("sentiment", "subjectivity", "question_type", "paraphrase")

TRANSFER_FEATURES = Features(
    {"split": Value("string"), "sentence1": Value("string"), "sentence2": Value("string"), "label": Value("int64")}
)


@dataclass(frozen=True)
class TextFile:
    """A file with one example a line."""

    path: str  # below the source's folder
    rows: dict[str, tuple[int, ...]]  # split -> how many examples, or the several counts that are right
    pattern: str = "(?P<sentence1>.*)"  # of a whole line; groups split (else the first of rows), label, sentence1, sentence2
    form: str = "a sentence"  # the pattern in words, for error messages
    label: str = ""  # of every line, where the line says none
    labels: tuple[str, ...] = ("0", "1")  # in the order of their numbers
    header: str = ""
    encoding: str = "utf-8-sig"  # latin-1 where SentEval reads it so: it makes a character of every byte


def _columns(*names: str) -> dict[str, str]:
    """Pattern and form of columns separated by tabs, never quoted, none of them blank."""
    return {"pattern": "\t".join(rf"(?P<{name}>[^\t]*\S[^\t]*)" for name in names), "form": "<tab>".join(names)}


def _two_classes(first: str, rows_first: int, second: str, rows_second: int) -> tuple[TextFile, TextFile]:
    """Label 1 is that of the first file. A line is a sentence, also where it is empty (CR has 4 such, MPQA 3)."""
    return (
        TextFile(first, {"all": (rows_first,)}, label="1", encoding="latin-1"),
        TextFile(second, {"all": (rows_second,)}, label="0", encoding="latin-1"),
    )


_SST = functools.partial(TextFile, **_columns("sentence1", "label"))
_QUESTIONS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
_TREC = functools.partial(
    TextFile, pattern=r"(?P<label>[^\s:]+):\S+ (?P<sentence1>.*\S.*)", form="'COARSE:fine question'", labels=_QUESTIONS,
    encoding="latin-1",
)
_MRPC = functools.partial(
    TextFile, **_columns("label", "id1", "id2", "sentence1", "sentence2"),
    header="Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
)
_SAMPLE = functools.partial(TextFile, header="split\tlabel\tsentence", **_columns("split", "label", "sentence1"))
_SAMPLE_SPLITS = {"train": (96,), "dev": (32,), "test": (32,)}

# task -> its files, in the order of their examples. SST2's train is the 6,920 whole sentences, or with their phrases 67,349.
TRANSFER_FILES: dict[str, tuple[TextFile, ...]] = {
    "MR": _two_classes("MR/rt-polarity.pos", 5331, "MR/rt-polarity.neg", 5331),
    "CR": _two_classes("CR/custrev.pos", 2407, "CR/custrev.neg", 1368),
    "SUBJ": _two_classes("SUBJ/subj.objective", 5000, "SUBJ/subj.subjective", 5000),
    "MPQA": _two_classes("MPQA/mpqa.pos", 3312, "MPQA/mpqa.neg", 7294),
    "SST2": (
        _SST("SST/binary/sentiment-train", {"train": (6920, 67349)}),
        _SST("SST/binary/sentiment-dev", {"dev": (872,)}),
        _SST("SST/binary/sentiment-test", {"test": (1821,)}),
    ),
    "TREC": (_TREC("TREC/train_5500.label", {"train": (5452,)}), _TREC("TREC/TREC_10.label", {"test": (500,)})),
    "MRPC": (
        _MRPC("MRPC/msr_paraphrase_train.txt", {"train": (4076,)}),
        _MRPC("MRPC/msr_paraphrase_test.txt", {"test": (1725,)}),
    ),
    "sentiment": (_SAMPLE("sentiment.tsv", _SAMPLE_SPLITS),),
    "subjectivity": (_SAMPLE("subjectivity.tsv", _SAMPLE_SPLITS),),
    "question_type": (_SAMPLE("question_type.tsv", {"train": (108,), "test": (36,)}, labels=_QUESTIONS),),
    "paraphrase": (
        TextFile(
            "paraphrase.tsv", {"train": (96,), "test": (32,)}, header="split\tlabel\tsentence1\tsentence2",
            **_columns("split", "label", "sentence1", "sentence2"),
        ),
    ),
}


def transfer_tasks(source: DataSource | None = None) -> tuple[str, ...]:
    """The transfer tasks that a source really has: SentEval's seven, or the four of the sample."""
    source = source or find_source()
    return SAMPLE_TASKS if source.is_sample else TRANSFER_TASKS


def load_transfer(task: str, source: DataSource | None = None) -> Dataset:
    """Load the labelled sentences of a transfer task, all splits of it.

    Args:
        task: one of `transfer_tasks(source)`. source: from `find_source`, which is asked if it is None.

    Returns:
        Columns split (str: "all", or "train", "dev", "test" as far as the task has them), sentence1, sentence2 (str, as in
        the file; sentence2 is "" but for pairs) and label (int64), with `provenance`. The labels are SentEval's: 1 is
        positive, objective or a paraphrase; question types are numbered by alphabet. In the sample's subjectivity, 1 is
        subjective.

    Raises `ValueError` if the source has no such task, `DataError` if a file is missing, short or malformed.
    """
    source = source or find_source()
    tasks = transfer_tasks(source)
    if task not in tasks:
        raise ValueError(f"No transfer task {task!r} in {source.label}; choose from {', '.join(tasks)}.")
    hashes: dict[str, str] = {}
    rows = [row for file in TRANSFER_FILES[task] for row in _read_examples(source.path, file, hashes)]
    splits = Counter(row["split"] for row in rows)
    return make_dataset(rows, TRANSFER_FEATURES, source, hashes, task=task, splits=splits)


def _read_examples(folder: Path, file: TextFile, hashes: dict[str, str]) -> list[dict]:
    """The examples of one file, as dicts with the keys of `TRANSFER_FEATURES`. Adds to `hashes`. Raises `DataError`."""
    rows = []
    for where, line in read_numbered(folder, file.path, hashes, file.header, file.encoding):
        match = re.fullmatch(file.pattern, line)
        if match is None:
            raise DataError(f"{where}: expected {file.form}, found {line[:40]!r}.")
        row = {"split": next(iter(file.rows)), "sentence2": "", "label": file.label} | match.groupdict()
        for key, known in (("split", file.rows), ("label", file.labels)):
            if row[key] not in known:
                raise DataError(f"{where}: expected the {key} {' or '.join(known)}, found {row[key][:20]!r}.")
        rows.append(row | {"label": file.labels.index(row["label"])})
    found = Counter(row["split"] for row in rows)
    for split, right in file.rows.items():
        if found[split] not in right:
            counts = f"found {found[split]} examples for the split {split!r}, expected {' or '.join(map(str, right))}"
            raise DataError(f"{folder / file.path}: {counts}.")
    return rows
