"""Embeddings from the attention blocks' outputs instead of the hidden state (value aggregation, arXiv 2602.01572)."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from lib.core.attention import attention_modules, residual_scale, returned_tensor
from lib.core.backbone import Backbone
from lib.core.forward import read_states
from lib.core.pooling import last_state
from lib.core.tokens import Batch


@dataclass(frozen=True)
class AttentionValues:
    """A pooling: the sum, over the blocks `start` to exit layer - 1, of what their attention adds at the last token.

    The sum is float32. No block after the last that is summed is run; at the last layer all of them are.

    Args:
        start: the first block that counts, 0-based.
    """

    start: int = 0
    needs_span = False

    def check(self, backbone: Backbone) -> None:
        """Find the model's attention now: a pass with a method attached would mislead the search. Raises
        `UnsupportedModelError` where it is not found."""
        attention_modules(backbone)

    def read(self, backbone: Backbone, batch: Batch, layers: Iterable[int], prefix=None) -> dict[int, torch.Tensor]:
        """Run the batch up to the last of `layers`: layer -> float32 (batch, hidden). `ValueError` for a layer that is
        not above `start`, `UnsupportedModelError` for a model whose attention is not found."""
        wanted, added, scale = sorted(set(layers)), {}, residual_scale(backbone)
        if wanted[0] <= self.start:
            raise ValueError(f"AttentionValues from block {self.start} on has nothing to sum at layer {wanted[0]}.")
        modules = attention_modules(backbone)
        with ExitStack() as hooks:
            for i in range(self.start, wanted[-1]):
                def keep(_, __, output, i=i):
                    added[i] = scale * last_state(returned_tensor(output), batch.last).float()

                hooks.enter_context(modules[i].register_forward_hook(keep))
            read_states(backbone, batch.ids, [wanted[-1]], lambda states: None, prefix)
        sums, total = {}, torch.zeros_like(added[self.start])
        for i in range(self.start, wanted[-1]):
            total = total + added[i].to(total.device)
            sums[i + 1] = total
        return {n: sums[n] for n in wanted}

    def describe(self) -> dict:
        """The pooling as plain data."""
        return {"pooling": "attention values", "first_block": self.start}
