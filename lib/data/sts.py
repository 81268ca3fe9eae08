"""Scored sentence pairs for the STS tasks, in SentEval's files and counts (arXiv 1803.05449): see `pinned.yaml`."""

import pandas as pd

from lib.data.files import FILES, Reader
from lib.data.sources import DataError, DataSource, EvaluationData, find_source

STS_TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R")
STS_COLUMNS = ("subset", "sentence1", "sentence2", "score")


def sts_tasks(source: DataSource | None = None) -> tuple[str, ...]:
    """The STS tasks that a source really has: all seven, or the sample as the one task that it is."""
    return ("sample",) if (source or find_source()).is_sample else STS_TASKS


def dev_task(source: DataSource | None = None) -> str:
    """The task on whose dev split settings are chosen: STS-B, or the sample where that is all there is."""
    return "sample" if (source or find_source()).is_sample else "STS-B"


def load_sts(task: str, split: str = "test", source: DataSource | None = None) -> EvaluationData:
    """Load the sentence pairs of one of `STS_TASKS` that have a score. All have the split test, STS-B and SICK-R also
    train and dev, and the sample, which stands in for any of them where it is the source, dev. Returns columns subset,
    sentence1, sentence2 (str, as in the file), score (float, 0 to 5; SICK-R 1 to 5). `ValueError` if there is no such
    task or split; `DataError` if a file is missing, short or malformed or the sample has no such split."""
    source = source or find_source()
    tasks = (*STS_TASKS, "sample") if source.is_sample else STS_TASKS
    if task not in tasks:
        raise ValueError(f"Unknown STS task {task!r}; choose from {', '.join(tasks)}.")
    name = "sample" if source.is_sample else task
    for asked, error in ((task, ValueError), (name, DataError)):
        splits = list(dict.fromkeys(known for file in FILES[asked] for known in file["rows"]))
        if split not in splits:
            raise error(f"{asked} has no split {split!r}; choose from {', '.join(splits)}.")
    reader = Reader(source)
    pairs = pd.concat([reader.examples(file) for file in FILES[name] if split in file["rows"]])
    return reader.data(name, pairs[pairs["split"] == split], STS_COLUMNS, task=name, split=split)
