"""Labelled sentences for the transfer tasks, in SentEval's files and counts (arXiv 1803.05449): see `pinned.yaml`."""

import pandas as pd

from lib.data.files import FILES, Reader
from lib.data.sources import DataSource, EvaluationData, find_source

TRANSFER_TASKS = ("MR", "CR", "SUBJ", "MPQA", "SST2", "TREC", "MRPC")
SAMPLE_TASKS = ("sentiment", "subjectivity", "question_type", "paraphrase")
PAIR_TASKS = ("MRPC", "paraphrase")  # whose examples are pairs of sentences


def transfer_tasks(source: DataSource | None = None) -> tuple[str, ...]:
    """The transfer tasks that a source really has: SentEval's seven, or the four of the sample."""
    return SAMPLE_TASKS if (source or find_source()).is_sample else TRANSFER_TASKS


def load_transfer(task: str, source: DataSource | None = None) -> EvaluationData:
    """Load the labelled sentences of a transfer task, one of `transfer_tasks(source)`, all splits of it.
    Returns columns split (str: "all", or "train", "dev", "test" as far as the task has them), sentence1, sentence2
    (str, as in the file; sentence2 is "" but for `PAIR_TASKS`) and label (int64). The labels are SentEval's: 1 is
    positive, objective (in the sample subjective) or a paraphrase, and question types are numbered by alphabet. The
    provenance counts the `splits`. `ValueError` if the source has no such task, and `DataError` as `load_sts`."""
    source = source or find_source()
    if task not in (tasks := transfer_tasks(source)):
        raise ValueError(f"No transfer task {task!r} in {source.label}; choose from {', '.join(tasks)}.")
    reader = Reader(source)
    table = pd.concat([reader.examples(file) for file in FILES[task]])
    splits = table["split"].value_counts(sort=False).to_dict()
    return reader.data(task, table, ("split", "sentence1", "sentence2", "label"), task=task, splits=splits)
