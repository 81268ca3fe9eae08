"""What a computation costs: seconds side by side, floating-point operations, tokens, memory, and the machine's own peak."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from lib.core.backbone import Backbone
from lib.core.forward import block_input

# torch's profiler writes two lines of its own to the terminal for every run, unless told otherwise before its first.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Square matrices large enough to reach the device's peak.
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
QUARTILES = ("lower quartile", "upper quartile")

PYTHON, OTHER = "Python, between operations", "other"
# Where an operation's time is booked; what is not named here is "other".
OPERATIONS = {
    "matrix products": "mm addmm bmm baddbmm matmul linear",
    "attention": "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _softmax softmax",
    "norms, activations, sums": (
        "add add_ sub mul mul_ div div_ neg pow rsqrt mean sum silu gelu tanh sin cos layer_norm native_layer_norm"
    ),
    "copies and indexing": (
        "copy_ _to_copy to clone contiguous cat index index_put_ _index_put_impl_ index_select embedding fill_ empty "
        "empty_strided empty_like repeat gather"
    ),
}
GROUPS = {f"aten::{name}": group for group, names in OPERATIONS.items() for name in names.split()} | {PYTHON: PYTHON}


def measure(paths: dict[Hashable, Callable[[], object]], rounds: int = 3) -> dict[Hashable, list[float]]:
    """Time several functions in turn, A B C, C B A, A B C ..., so that a machine that slows down slows them all.

    Returns name -> seconds of each round. Compare medians as ratios; absolute seconds say little about another machine.
    """
    seconds: dict[Hashable, list[float]] = {name: [] for name in paths}
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again, here or, worse, while the clock runs
    try:
        for i in range(rounds):
            for name in list(paths)[:: -1 if i % 2 else 1]:
                gc.collect()
                seconds[name].append(_seconds(paths[name]))
    finally:
        gc.unfreeze()
    return seconds


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratio_quartiles(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of seconds / reference, taken round by round."""
    low, median, high = np.quantile(np.asarray(seconds) / np.asarray(reference), [0.25, 0.5, 0.75])
    return float(median), float(low), float(high)


def _attention_flops(query, key, value, *_, out_shape=None, **__) -> int:
    """Two products, every query with every key; a kernel that skips what a causal mask hides does about half."""
    return 4 * math.prod(query) * key[-2]


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and attention in one call of `run`, as torch counts them.

    torch's own list lacks the attention kernel of the CPU, so that one is counted here, as torch counts those of CUDA.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops}) as counter:
        run()
    return counter.get_total_flops()


@contextmanager
def count_tokens(backbone: Backbone):
    """Yields a dict; afterwards its `"tokens"` holds how many tokens, padding included, went into the first block."""
    result = {"tokens": 0}

    def hook(_, args, kwargs):
        batch, tokens = block_input(args, kwargs).shape[:2]
        result["tokens"] += batch * tokens

    handle = backbone.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield result
    finally:
        handle.remove()


@torch.inference_mode()
def matmul_peak(dtype: torch.dtype, device: torch.device, repeats: int = 12) -> float:
    """Operations per second of a square matrix product in `dtype`: what this machine can reach, the best of `repeats`."""
    size = PEAK_SIZE.get(device.type, PEAK_SIZE["cpu"])
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: a @ b) for _ in range(repeats))


@contextmanager
def peak_memory(device: torch.device):
    """Yields a dict; afterwards its `"bytes"` holds the peak of torch's memory beyond what was in use at the start.

    It is the account of torch's own allocator, and so the same in every run. The process's resident memory would not
    do: the allocator keeps what is freed, and a second run seems to need none.
    """
    result: dict[str, int] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        yield result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    result["bytes"] = int(max(np.cumsum(changes), default=0))


def time_by_group(runs: dict[str, Callable[[], object]]) -> pd.DataFrame:
    """Profile one call of each run: columns run, group (of `OPERATIONS`, `PYTHON` or `OTHER`), share of the CPU time."""
    shares = {}
    for name, run in runs.items():
        run()  # warm-up
        with profile(activities=[ProfilerActivity.CPU], acc_events=False) as profiler:
            with record_function(PYTHON):  # its own time is what no operation in it accounts for
                run()
        shares[name] = group_shares({event.key: event.self_cpu_time_total for event in profiler.key_averages()})
    return pd.concat(shares, names=["run", "group"]).rename("share").reset_index()


def group_shares(events: dict[str, float]) -> pd.Series:
    """Operation -> own time, as group -> share of the whole, in a fixed order."""
    times = pd.Series(events, dtype=float).groupby(lambda name: GROUPS.get(name, OTHER)).sum()
    return times.reindex([*OPERATIONS, PYTHON, OTHER], fill_value=0.0) / times.sum()


def pareto_front(cost: Sequence[float], quality: Sequence[float]) -> np.ndarray:
    """Which points no other one beats: none is at most as costly and at least as good, and better in one of the two."""
    cost, quality = np.asarray(cost), np.asarray(quality)
    as_good = (cost <= cost[:, None]) & (quality >= quality[:, None])
    better = (cost < cost[:, None]) | (quality > quality[:, None])
    return ~(as_good & better).any(axis=1)
