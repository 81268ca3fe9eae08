"""Several processes that run one program and share its encoding: under `accelerate launch`, or `run_all.sh --processes N`.

Every process runs all of the program. What one of them decides for all (is it in the store?) comes from the main process,
and what is computed in parts is gathered, so that all hold the same values. torchrun and accelerate tell each process its
number and how many there are by the variables RANK and WORLD_SIZE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import distributed


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Which of them this is; 0 is the main process."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return index() == 0


def join(meeting: Path | str = "") -> None:
    """Meet the other processes, once; what they exchange lies in main memory, so that gloo serves on GPUs too.

    Args:
        meeting: a file that does not exist yet, for a notebook's kernel, which no launcher started. Else the launcher's.
    """
    if count() > 1 and not distributed.is_initialized():
        options = {"init_method": f"file://{meeting}", "rank": index(), "world_size": count()} if meeting else {}
        distributed.init_process_group("gloo", **options)


def from_main(compute: Callable):
    """What `compute()` gives in the main process, in all of them; the others do not call it."""
    if count() == 1:
        return compute()
    join()
    holder = [compute() if is_main() else None]
    distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def gather(items: Iterable) -> list:
    """The items of all processes, those of process 0 first, in all of them."""
    if count() == 1:
        return list(items)
    join()
    parts = [None] * count()
    distributed.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]
