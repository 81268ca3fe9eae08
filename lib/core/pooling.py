"""What an encoder reads: the last token's state, or a mean over the sentence's tokens.

A pooling runs one batch and returns what it read; it is the third of an encoder's four choices. `read` decides itself
which part of the model has to run, so a pooling that reads something else than hidden states is one more class here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from transformers import Cache

from lib.core.backbone import Backbone
from lib.core.forward import read_states
from lib.core.tokens import Batch


class Pooling(Protocol):
    """What an encoder expects of a pooling. `needs_span`: whether it uses `Batch.first`. `describe`: itself as plain data."""

    needs_span: bool

    def read(self, backbone: Backbone, batch: Batch, layers: Iterable[int], prefix: Cache | None) -> dict[int, torch.Tensor]:
        """Run the batch up to the last of `layers`: layer -> (batch, hidden), on the model's device."""

    def describe(self) -> dict: ...


@dataclass(frozen=True)
class LastToken:
    """The state of the prompt's last token."""

    needs_span = False

    def read(self, backbone, batch, layers, prefix=None):
        return read_states(backbone, batch.ids, layers, lambda states: last_state(states, batch.last), prefix)

    def describe(self) -> dict:
        return {"pooling": "last"}


@dataclass(frozen=True)
class Mean:
    """The mean state, from the first token of the sentence's last occurrence to the end of the prompt.

    Args:
        weighted: weigh the k-th of those tokens by k, counting from 1 (SGPT, arXiv 2202.08904).
    """

    weighted: bool = False
    needs_span = True

    def read(self, backbone, batch, layers, prefix=None):
        mean = partial(mean_state, first=batch.first, last=batch.last, weighted=self.weighted)
        return read_states(backbone, batch.ids, layers, mean, prefix)

    def describe(self) -> dict:
        return {"pooling": "weighted_mean" if self.weighted else "mean"}


POOLINGS: dict[str, Pooling] = {"last": LastToken(), "mean": Mean(), "weighted_mean": Mean(weighted=True)}


def get_pooling(pooling: str | Pooling) -> Pooling:
    """A pooling by its name in `POOLINGS`; an object passes through. Raises `ValueError`, listing the names."""
    if not isinstance(pooling, str):
        return pooling
    if pooling not in POOLINGS:
        raise ValueError(f"Unknown pooling {pooling!r}; choose from {', '.join(POOLINGS)} or pass a pooling.")
    return POOLINGS[pooling]


def last_state(states: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, hidden) -> (batch, hidden): the states at the positions `last`, int64 (batch,)."""
    return states[torch.arange(len(last), device=states.device), last.to(states.device)]


def mean_state(states: torch.Tensor, first: torch.Tensor, last: torch.Tensor, weighted: bool = False) -> torch.Tensor:
    """(batch, tokens, hidden) -> float32 (batch, hidden): the mean from `first` to `last`, both int64 (batch,), inclusive."""
    first, last = first.to(states.device), last.to(states.device)
    place = torch.arange(states.shape[1], device=states.device)[None] - first[:, None] + 1
    inside = (place >= 1) & (place <= (last - first + 1)[:, None])
    weights = (place if weighted else torch.ones_like(place)) * inside
    weights = weights.float() / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bth,bt->bh", states.float(), weights)
