"""Token Prepending (TP): each early block sees, in a placeholder before the sentence, a summary of all of it.

Source: arXiv 2412.11556, section 4. In a causal model the first tokens of a sentence cannot see its end. TP puts a
placeholder token before the sentence and, before each of the early blocks, writes the last token's state over the
placeholder's. From then on every token of the sentence can attend to what the last token has gathered so far.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch

from lib.core.backbone import Backbone
from lib.core.forward import block_input, replace_input
from lib.core.prompts import PLACES, Prompt
from lib.core.tokens import Batch

INITS = ("normal", "zeros", "ones", "uniform", "space")


@dataclass(frozen=True)
class Placement:
    """Where TP reads and writes in a forward pass of your own; inside the encoder, a `Batch` says the same.

    Args:
        placeholders: int64 (batch,) or (batch, count), counted in the tokens handed to the model.
        last: int64 (batch,), the last real token of each row, whose state is written.
    """

    placeholders: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class TokenPrepending:
    """TP as a method of an encoder: an immutable choice, and the context manager that applies it.

    Args:
        start, end: 0-based block indices. Before block i, for start <= i < end, the last position's state is written
            over every placeholder's. This is the official code's convention; the paper's k is end + 1.
        init: a placeholder's vector at the embedding output: `"normal"` (standard normal, as the official code),
            `"zeros"`, `"ones"`, `"uniform"` (0 to 1), `"space"` (the space token's embedding) or a vector (hidden,).
        seed: of the generator for `"normal"` and `"uniform"`; it runs on the CPU, so a seed means one vector everywhere.
        place: where the placeholders stand, one of `PLACES`, in templates that do not say it themselves with `<PST>`.
        count: how many placeholders stand there, all with the same vector.

    Raises:
        ValueError: start is negative or not below end, or an unknown init or place, or count below 1.
    """

    start: int = 1
    end: int = 7
    init: str | tuple[float, ...] = "normal"
    seed: int = 3407
    place: str = "before_quote"
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.start < self.end:
            raise ValueError(f"TP needs 0 <= start < end, got start={self.start}, end={self.end}.")
        if self.place not in PLACES:
            raise ValueError(f"Unknown place {self.place!r}; choose from {', '.join(PLACES)}.")
        if self.count < 1:
            raise ValueError(f"TP needs at least one placeholder, got count={self.count}.")
        if isinstance(self.init, str):
            if self.init not in INITS:
                raise ValueError(f"Unknown init {self.init!r}; choose from {', '.join(INITS)} or give a vector.")
        else:  # a plain tuple keeps the method hashable and comparable
            object.__setattr__(self, "init", tuple(float(x) for x in np.asarray(self.init).reshape(-1)))

    def describe(self) -> dict:
        """The method as plain data, for provenance and fingerprints."""
        return {"method": type(self).__name__, **asdict(self)}

    def templates(self, prompt: Prompt) -> tuple[str, ...]:
        """The prompt's templates with placeholders. Raises `ValueError` for a prompt that is not read at its last token."""
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
        generator = torch.Generator().manual_seed(self.seed)
        if self.init == "normal":
            return torch.randn(size, generator=generator)
        if self.init == "uniform":
            return torch.rand(size, generator=generator)
        if self.init == "zeros":
            return torch.zeros(size)
        if self.init == "ones":
            return torch.ones(size)
        if self.init == "space":
            ids = backbone.tokenizer(" ", add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(f"The tokenizer of {backbone.name} has no token for a space; choose another init.")
            row = backbone.embeddings(torch.tensor([ids[-1]], device=backbone.device))[0].detach().float().cpu()
            return row / _scale(backbone)
        if len(self.init) != size:
            raise ValueError(f"init has {len(self.init)} values; {backbone.name} has hidden size {size}.")
        return torch.tensor(self.init)

    @contextmanager
    def attach(self, backbone: Backbone, batch: Batch | Placement):
        """While active, every forward pass of `backbone` on this batch runs with TP. The model itself is not changed.

        The hooks go when the block is left, also by an error. Raises `ValueError` if there are fewer than `end` blocks.
        """
        self.check(backbone)
        rows, targets = torch.arange(len(batch.last))[:, None], batch.placeholders.reshape(len(batch.last), -1)

        def write_last_state(_, args, kwargs):
            states = block_input(args, kwargs).clone()
            row, target, last = (t.to(states.device) for t in (rows, targets, batch.last))
            states[row, target] = states[row, last[:, None]]
            return replace_input(states, args, kwargs)

        with self.insert(backbone, targets), ExitStack() as hooks:
            for block in backbone.layers[self.start : self.end]:
                hooks.callback(block.register_forward_pre_hook(write_last_state, with_kwargs=True).remove)
            yield self

    @contextmanager
    def insert(self, backbone: Backbone, targets: torch.Tensor):
        """While active, the positions `targets`, int64 (batch, count), hold `initial_vector` at the embedding output."""
        vector = self.initial_vector(backbone) * _scale(backbone)
        rows = torch.arange(len(targets))[:, None]

        def insert_placeholder(_, __, output):
            states = output.clone()
            states[rows.to(states.device), targets.to(states.device)] = vector.to(states.device, states.dtype)
            return states

        handle = backbone.embeddings.register_forward_hook(insert_placeholder)
        try:
            yield
        finally:
            handle.remove()


def _scale(backbone: Backbone) -> float:
    """By which some families (Gemma) multiply the rows of their embedding matrix."""
    return float(getattr(backbone.embeddings, "embed_scale", 1.0))
