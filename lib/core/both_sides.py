"""Models whose tokens attend to both sides, as ordinary encoders: a method, and the poolings that only they need."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lib.core.backbone import Backbone, UnsupportedModelError
from lib.core.forward import read_states
from lib.core.pooling import last_state, mean_state
from lib.core.prompts import PLACEHOLDER, Prompt
from lib.core.tokens import Batch

# In a template: the place of the tokenizer's own mask token.
MASK = "[MASK]"


@dataclass(frozen=True)
class BothSides:
    """The method of such a model: it sees a batch's real tokens only, and the mask token at a template's `[MASK]`.

    Its encoder needs `share_prefix=False`, because the states of a prefix depend on what comes after it.
    """

    def templates(self, prompt: Prompt) -> tuple[str, ...]:
        """The prompt's templates, with a placeholder for `[MASK]`."""
        return tuple(template.replace(MASK, PLACEHOLDER) for template in prompt.templates)

    def check(self, backbone: Backbone) -> None:
        """Raise `UnsupportedModelError` if another last token leaves the first state as it is: the model is causal."""
        ids, last = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=backbone.device), torch.tensor([3, 3])
        with self.attach(backbone, Batch(ids, None, last, last, [])):
            states = read_states(backbone, ids, [-1])[backbone.num_layers]
        if torch.equal(states[0, 0], states[1, 0]):
            raise UnsupportedModelError(f"{backbone.name} stays causal in this version of Transformers.")

    @contextmanager
    def attach(self, backbone: Backbone, batch: Batch):
        """While active, every forward pass of `backbone` is on this batch, with its padding masked."""
        ids, places = batch.ids.clone(), torch.arange(batch.ids.shape[1], device=batch.ids.device)
        if batch.placeholders is not None:
            ids.scatter_(1, batch.placeholders, backbone.tokenizer.mask_token_id)
        real = places <= batch.last.to(ids.device)[:, None]
        inputs = {"input_ids": ids, "attention_mask": real.long(), "return_dict": True}
        handle = backbone.base.register_forward_pre_hook(lambda *_: ((), inputs), with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def describe(self) -> dict:
        return {"method": "BothSides"}


@dataclass(frozen=True)
class RowPart:
    """The pooling of what does not depend on where the sentence stands in the row.

    Args:
        part: `"all"`, the mean state of all tokens, special tokens included; `"first"`, the first token's state;
            `"mask"`, the mask token's; `"pooler"`, what the model's own pooler makes of the first token's last state.
    """

    part: str
    needs_span = False

    def read(self, backbone: Backbone, batch: Batch, layers, prefix=None) -> dict[int, torch.Tensor]:
        """See `lib.core.pooling.Pooling`. Raises `ValueError` if a pooler is asked for another state than the last."""
        if self.part == "pooler" and list(layers) != [backbone.num_layers]:
            raise ValueError(f"The pooler of {backbone.name} works on the last state only, not on {list(layers)}.")
        first = torch.zeros_like(batch.last)
        reads = {
            "all": lambda states: mean_state(states, first, batch.last),
            "first": lambda states: last_state(states, first),
            "mask": lambda states: last_state(states, batch.placeholders[:, 0]),
            "pooler": lambda states: backbone.base.pooler(states),
        }
        return read_states(backbone, batch.ids, layers, reads[self.part])

    def describe(self) -> dict:
        return {"pooling": self.part}
