"""Batches of sentences: cut by tokens, and halved where memory runs out."""

from __future__ import annotations

import torch

# Tokens in one batch: enough to keep the matrix units busy, few enough for the caches (CPU) and memory (GPU).
BATCH_TOKENS = {"cpu": 512, "cuda": 32768}


def token_budget(device: torch.device) -> int:
    """How many tokens a batch may have on this kind of device."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])


def token_batches(lengths: list[int], budget: int, batch_size: int | None = None) -> list[list[int]]:
    """Cut row indices into batches of similar length: rows x longest row <= `budget`, rows <= `batch_size`.

    A row longer than the budget gets a batch of its own. The longest come first, so that memory runs out at once or not at all.
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = not batches or (len(batches[-1]) + 1) * longest > budget or len(batches[-1]) == batch_size
        if full:
            batches.append([])
            longest = max(lengths[i], 1)
        batches[-1].append(i)
    return batches


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised this because an accelerator or the machine had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halves(batch: list[int]) -> list[list[int]]:
    """The two halves of a batch, the later one first; a batch of one stays whole."""
    middle = (len(batch) + 1) // 2
    return [batch[middle:], batch[:middle]] if len(batch) > 1 else [batch]
