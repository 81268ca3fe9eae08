"""Several processes that run one program and share its encoding: `accelerate launch` or `run_all.sh --processes N`."""

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
    """Meet the other processes, once; what they exchange lies in main memory, so that gloo serves on GPUs too. Where no
    launcher started them, as a notebook's kernel, `meeting` is a file that does not exist yet."""
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
    parts = [list(items)] * count()
    if count() > 1:
        join()
        distributed.all_gather_object(parts, parts[index()])
    return [item for part in parts for item in part]
