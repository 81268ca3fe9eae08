"""What an encoder reads of a batch: the last token's state, or a mean over the sentence's tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lib.core.backbone import Backbone
from lib.core.forward import read_states
from lib.core.tokens import Batch


def last_state(states: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, hidden) -> (batch, hidden): the states at the positions `last`, int64 (batch,)."""
    return states[torch.arange(len(last), device=states.device), last.to(states.device)]


def mean_state(states: torch.Tensor, first: torch.Tensor, last: torch.Tensor, weighted: bool = False) -> torch.Tensor:
    """(batch, tokens, hidden) -> float32 (batch, hidden): the mean from `first` to `last`, both int64 (batch,)."""
    first, last = first.to(states.device), last.to(states.device)
    place = torch.arange(states.shape[1], device=states.device)[None] - first[:, None] + 1
    inside = (place >= 1) & (place <= (last - first + 1)[:, None])
    weights = (place if weighted else torch.ones_like(place)) * inside
    weights = weights.float() / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bth,bt->bh", states.float(), weights)


# What is read of one layer's states, (batch, tokens, hidden) -> (batch, hidden).
READS = {
    "last": lambda states, batch, _: last_state(states, batch.last),
    "mean": lambda states, batch, _: mean_state(states, batch.first, batch.last),
    "weighted_mean": lambda states, batch, _: mean_state(states, batch.first, batch.last, weighted=True),
    "all": lambda states, batch, _: mean_state(states, torch.zeros_like(batch.last), batch.last),
    "first": lambda states, batch, _: states[:, 0],
    "mask": lambda states, batch, _: last_state(states, batch.placeholders[:, 0]),
    "pooler": lambda states, batch, backbone: backbone.base.pooler(states),
}


@dataclass(frozen=True)
class Pooling:
    """What an encoder reads, by a name in `READS` (`ValueError` for another). A pooling of your own has `needs_span`,
    `read`, `describe` and, if wanted, `check(backbone)`, which is called before any method is attached.

    `"last"` is the state of the prompt's last token; `"mean"` the mean from the first token of the sentence's last
    occurrence to the end of the prompt; `"weighted_mean"` that with weight k for the k-th token, from 1 (SGPT, arXiv
    2202.08904). For models whose tokens attend to both sides: `"all"` is the mean of all tokens, special ones included;
    `"first"` the first token; `"mask"` the mask token; `"pooler"` what the pooler makes of the first's last state."""

    name: str

    def __post_init__(self):
        if self.name not in READS:
            raise ValueError(f"Unknown pooling {self.name!r}; choose from {', '.join(READS)} or pass one of your own.")

    @property
    def needs_span(self) -> bool:
        """Whether it uses `Batch.first`."""
        return self.name in ("mean", "weighted_mean")

    def read(self, backbone: Backbone, batch: Batch, layers: Iterable[int], prefix=None) -> dict[int, torch.Tensor]:
        """Run the batch up to the last of `layers`: layer -> (batch, hidden). A pooler reads the last state only."""
        if self.name == "pooler" and list(layers) != [backbone.num_layers]:
            raise ValueError(f"The pooler of {backbone.name} works on the last state only, not on {list(layers)}.")
        pick = READS[self.name]
        return read_states(backbone, batch.ids, layers, lambda states: pick(states, batch, backbone), prefix)

    def describe(self) -> dict:
        return {"pooling": self.name}
