"""Token Prepending (TP): each early block sees, in a placeholder before the sentence, a summary of all of it.
In a causal model the first tokens of a sentence cannot see its end. Before each of the early blocks, TP writes the last
token's state over a placeholder that every token of it attends to (arXiv 2412.11556, section 4)."""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args, get_origin

import numpy as np
import torch

from lib.core.backbone import Backbone
from lib.core.forward import before_blocks, block_input, replace_input
from lib.core.prompts import PLACES, Prompt
from lib.core.tokens import Batch

DRAWN, CONSTANT = {"normal": torch.randn, "uniform": torch.rand}, {"zeros": 0.0, "ones": 1.0}
INITS = ("normal", "zeros", "ones", "uniform", "space")


@dataclass(frozen=True)
class Placement:
    """Where TP reads and writes in a pass of your own, counted in tokens of its input: `placeholders`, int64 (batch,)
    or (batch, count), and the `last` real token of each row, int64 (batch,). In the encoder, a `Batch` says it."""

    placeholders: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class TokenPrepending:
    """TP as a method of an encoder: an immutable choice, and the context manager that applies it. Raises `ValueError`
    if start is negative or not below end, for an unknown init or place, and a count below 1.

    Args:
        start, end: 0-based block indices. Before block i, for start <= i < end, the last position's state is written
            over every placeholder's. This is the official code's convention; the paper's k is end + 1.
        init: a placeholder's vector at the embedding output: `"normal"` (standard normal, as the official code),
            `"zeros"`, `"ones"`, `"uniform"` (0 to 1), `"space"` (the space token's embedding) or a vector (hidden,).
        seed: of `"normal"` and `"uniform"`, which are drawn on the CPU, so that a seed means one vector everywhere.
        place, count: where placeholders of one vector stand (`PLACES`) and how many, unless a template has `<PST>`."""

    start: int = 1
    end: int = 7
    init: str | tuple[float, ...] = "normal"
    seed: int = 3407
    place: Literal[PLACES] = "before_quote"
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.start < self.end or self.count < 1:
            raise ValueError(f"TP needs 0 <= start < end and at least one placeholder, got {self}.")
        for field in fields(self):  # also those of a subclass
            if get_origin(field.type) is Literal and getattr(self, field.name) not in get_args(field.type):
                known = ", ".join(choice or "''" for choice in get_args(field.type))
                raise ValueError(f"Unknown {field.name} {getattr(self, field.name)!r}; choose from {known}.")
        if not isinstance(self.init, str):  # a plain tuple keeps the method hashable and comparable
            object.__setattr__(self, "init", tuple(np.asarray(self.init, float).reshape(-1).tolist()))
        elif self.init not in INITS:
            raise ValueError(f"Unknown init {self.init!r}; choose from {', '.join(INITS)} or give a vector.")

    def describe(self) -> dict:
        return {"method": type(self).__name__, **asdict(self)}

    def templates(self, prompt: Prompt) -> tuple[str, ...]:
        """The prompt's templates with placeholders. `ValueError` for a prompt that is not read at its last token."""
        if prompt.pooling != "last":
            raise ValueError(f"Prompt {prompt.name!r} is not read at its last token, so TP does not apply to it.")
        return prompt.with_placeholder(self.place, self.count)

    def check(self, backbone: Backbone) -> None:
        """Raise `ValueError` if the model has fewer than `end` blocks."""
        if self.end > backbone.num_layers:
            raise ValueError(f"TP end={self.end}, but {backbone.name} has only {backbone.num_layers} blocks.")

    def initial_vector(self, backbone: Backbone) -> torch.Tensor:
        """The placeholder's vector, float32 (hidden,), on the CPU, as a row of the embedding matrix would hold it."""
        size = backbone.hidden_size
        if self.init in DRAWN:
            return DRAWN[self.init](size, generator=torch.Generator().manual_seed(self.seed))
        if self.init in CONSTANT:
            return torch.full((size,), CONSTANT[self.init])
        if self.init == "space":
            if not (ids := backbone.tokenizer(" ", add_special_tokens=False)["input_ids"]):
                raise ValueError(f"The tokenizer of {backbone.name} has no token for a space; choose another init.")
            row = backbone.embeddings(torch.tensor(ids[-1:], device=backbone.device))[0].detach().float().cpu()
            return row / backbone.embed_scale
        if len(self.init) != size:
            raise ValueError(f"init has {len(self.init)} values; {backbone.name} has hidden size {size}.")
        return torch.tensor(self.init)

    @contextmanager
    def attach(self, backbone: Backbone, batch: Batch | Placement):
        """While active, every forward pass of `backbone` on this batch runs with TP. The model itself is not changed:
        the hooks go when the block is left, also by an error. `ValueError` if there are fewer than `end` blocks."""
        self.check(backbone)
        rows, targets = torch.arange(len(batch.last))[:, None], batch.placeholders.reshape(len(batch.last), -1)

        def write_last_state(_, __, args, kwargs):
            states = block_input(args, kwargs).clone()
            row, target, last = (t.to(states.device) for t in (rows, targets, batch.last))
            states[row, target] = states[row, last[:, None]]
            return replace_input(states, args, kwargs)

        with self.insert(backbone, targets), before_blocks(backbone, range(self.start, self.end), write_last_state):
            yield self

    @contextmanager
    def insert(self, backbone: Backbone, targets: torch.Tensor):
        """While active, the positions `targets`, int64 (batch, count), embed to `initial_vector`."""
        vector, rows = self.initial_vector(backbone) * backbone.embed_scale, torch.arange(len(targets))[:, None]

        def insert_placeholder(_, __, output):
            states = output.clone()
            states[rows.to(states.device), targets.to(states.device)] = vector.to(states.device, states.dtype)
            return states

        with backbone.embeddings.register_forward_hook(insert_placeholder):
            yield
