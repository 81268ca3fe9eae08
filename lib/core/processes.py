"""Several processes that run one program and share its encoding: under `accelerate launch`, or `run_all.sh --processes N`.

Every process runs all of the program. What one of them decides for all (is it in the store?) comes from the main process,
and what is computed in parts is gathered, so that all hold the same values. In a single process these functions do
nothing but call or return what they are given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

# torchrun and accelerate tell each process its number and how many there are by these two variables.


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Which of them this is; 0 is the main process."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return index() == 0


def join(meeting: Path | str) -> None:
    """Meet the other processes by means of a file that all can reach and that does not exist yet.

    Only needed in a process that a launcher's own children started, such as a notebook's kernel.
    """
    if count() > 1:
        from torch import distributed

        # What is exchanged lies in main memory, so that gloo serves on GPUs too.
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=index(), world_size=count())


def from_main(compute: Callable):
    """What `compute()` gives in the main process, in all of them; the others do not call it."""
    if count() == 1:
        return compute()
    from accelerate.utils import broadcast_object_list

    _meet()
    holder = [compute() if is_main() else None]
    return broadcast_object_list(holder)[0]


def gather(items: Iterable) -> list:
    """The items of all processes, those of process 0 first, in all of them."""
    if count() == 1:
        return list(items)
    from accelerate.utils import gather_object

    _meet()
    return gather_object(list(items))


def _meet() -> None:
    """Makes accelerate's process group, unless `join` has made one."""
    from accelerate import PartialState

    PartialState()
