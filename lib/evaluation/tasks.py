"""What a task is: a name, a suite, a loader and a score per item. Tables, intervals and storing work on any of them."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial

import pandas as pd

from lib.core.encoder import SentenceEncoder
from lib.data.retrieval import SETS, load_beir
from lib.data.sts import STS_TASKS, load_sts
from lib.data.transfer import TRANSFER_TASKS, load_transfer
from lib.evaluation.intervals import SPEARMAN, Runs, Statistic, compare, mean_of
from lib.evaluation.retrieval import dense_scores
from lib.evaluation.sts import sts_pairs
from lib.evaluation.transfer import transfer_predictions


@dataclass(frozen=True)
class Task:
    """A data set with a score per item; `items`: (encoder, {name: data}, layers or None: the exit layer) -> table."""

    name: str
    suite: str
    load: Callable[[], object]
    items: Callable[[SentenceEncoder, dict[str, object], Iterable[int] | None], pd.DataFrame]
    statistic: Statistic
    unit: str


def suite(name: str, tasks: Iterable[str], load: Callable, *rest) -> dict[str, Task]:
    """Tasks that differ in their data only, by name; `rest` are the last three arguments of `Task`."""
    return {task: Task(task, name, partial(load, task), *rest) for task in tasks}


STS = suite("STS", STS_TASKS, load_sts, sts_pairs, SPEARMAN, "Spearman x 100")
TRANSFER = suite("transfer", TRANSFER_TASKS, load_transfer, transfer_predictions, mean_of("correct"), "accuracy x 100")
RETRIEVAL = suite("retrieval", SETS, load_beir, dense_scores, mean_of("nDCG@10"), "nDCG@10")


def compare_suite(tasks: dict[str, Task], runs: Runs, reference: Hashable = None, **options) -> pd.DataFrame:
    """`lib.evaluation.intervals.compare` of tables of items, one layer each, with the average of the suite's tasks or,
    where none of them is there (sample data), of all that are."""
    statistic, found = next(iter(tasks.values())).statistic, next(iter(runs.values()))["task"]
    return compare(runs, statistic, reference, averaged=list(tasks) if found.isin(tasks).any() else (), **options)
