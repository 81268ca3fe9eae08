"""What a computation costs: seconds side by side, floating-point operations, memory, and the machine's own peak."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.forward import block_input
from lib.models import Backbone


def measure(paths: dict[str, Callable[[], object]], rounds: int = 3) -> dict[str, list[float]]:
    """Time several functions in turn, A B C A B C ..., so that a machine that slows down slows them all.

    Returns name -> seconds of each round. Compare medians as ratios; absolute seconds say little about another machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, run in paths.items():
            gc.collect()
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and attention in one call of `run`, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
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
def matmul_peak(dtype: torch.dtype, device: torch.device, size: int = 2048, repeats: int = 12) -> float:
    """Operations per second of a square matrix product in `dtype`: what this machine can reach, the best of `repeats`."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds = measure({"product": lambda: a @ b}, repeats)["product"]
    return 2 * size**3 / min(seconds[1:])


@contextmanager
def peak_memory(device: torch.device):
    """Yields a dict; afterwards its `"bytes"` holds the peak memory beyond what was in use at the start.

    CUDA: the allocator's own account. Otherwise the process's resident memory, sampled every 5 ms.
    """
    result: dict[str, int] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    samples = [before]

    def sample():
        while not done.wait(0.005):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()
    result["bytes"] = max(*samples, process.memory_info().rss) - before


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over rounds of reference / seconds: how many times faster than the reference, round by round."""
    return statistics.median(r / s for s, r in zip(seconds, reference))
