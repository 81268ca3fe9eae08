"""What a task is: a name, a suite, a loader and a score per item. Tables, intervals and storing work on any of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import pandas as pd

from lib.core.encoder import SentenceEncoder
from lib.data.sts import STS_TASKS, load_sts
from lib.data.transfer import TRANSFER_TASKS, load_transfer
from lib.evaluation.intervals import SPEARMAN, Statistic, mean_of
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


STS = {name: Task(name, "STS", partial(load_sts, name), sts_pairs, SPEARMAN) for name in STS_TASKS}
TRANSFER = {name: Task(name, "transfer", partial(load_transfer, name), transfer_predictions, mean_of("correct"))
            for name in TRANSFER_TASKS}
