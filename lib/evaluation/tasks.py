"""What a task is: a name, a suite, a loader and a score per item. Tables, intervals and storing work on any of them.

    runs = {label: transfer_predictions(encoder, data) for label, encoder in encoders.items()}
    compare_suite(TRANSFER, runs, reference="baseline")
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial

import pandas as pd

from lib.core.encoder import SentenceEncoder
from lib.data.retrieval import SETS, load_beir
from lib.data.sts import STS_TASKS, load_sts
from lib.data.transfer import TRANSFER_TASKS, load_transfer
from lib.evaluation.intervals import SPEARMAN, Statistic, compare, mean_of
from lib.evaluation.retrieval import dense_scores
from lib.evaluation.sts import sts_pairs
from lib.evaluation.transfer import transfer_predictions


@dataclass(frozen=True)
class Task:
    """A data set with a score per item.

    Args:
        name: such as STS-B. suite: such as STS.
        load: () -> the data, an `EvaluationData` or a `RetrievalData`.
        items: (encoder, {name: data}, layers or None for the exit layer) -> a table with the columns task, layer, item
            and what the statistic needs.
        statistic: of the items. unit: of its values.
    """

    name: str
    suite: str
    load: Callable[[], object]
    items: Callable[[SentenceEncoder, dict[str, object], Iterable[int] | None], pd.DataFrame]
    statistic: Statistic
    unit: str


def suite(name: str, tasks: Iterable[str], load: Callable[[str], object], *rest) -> dict[str, Task]:
    """Tasks that differ in their data only, by name; `rest` are the last three arguments of `Task`."""
    return {task: Task(task, name, partial(load, task), *rest) for task in tasks}


STS = suite("STS", STS_TASKS, load_sts, sts_pairs, SPEARMAN, "Spearman x 100")
TRANSFER = suite("transfer", TRANSFER_TASKS, load_transfer, transfer_predictions, mean_of("correct"), "accuracy x 100")
RETRIEVAL = suite("retrieval", SETS, load_beir, dense_scores, mean_of("nDCG@10"), "nDCG@10")


def compare_suite(
    tasks: dict[str, Task], runs: dict[Hashable, pd.DataFrame], reference: Hashable | None = None, **options
) -> pd.DataFrame:
    """`lib.evaluation.intervals.compare` of tables of items, one layer each, whose average is that of a suite.

    It is over all of the suite's tasks or, where none of them is there (sample data), over all that are.
    """
    statistic, found = next(iter(tasks.values())).statistic, next(iter(runs.values()))["task"]
    return compare(runs, statistic, reference, averaged=list(tasks) if found.isin(tasks).any() else (), **options)
