"""Embeddings from the attention blocks' outputs instead of the hidden state (value aggregation, arXiv 2602.01572).
Attention is found by what a model does with its modules, because some families norm what it returns (Gemma 2 and 3,
OLMo 2), some scale it (Granite), some add it together with what the MLP returns (GPT-J, Phi)."""

from collections import defaultdict, namedtuple
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from statistics import median

import torch

from lib.core.backbone import Backbone
from lib.core.forward import ONE_AT_A_TIME, UnsupportedModelError, active, probe_ids, read_states, returned_tensor
from lib.core.pooling import last_state
from lib.core.tokens import Batch

# The attention of a model. Of each block, lists of nn.Module: `added`, whose output times `scale` (float, not 1 in
# Granite alone) attention adds to the residual stream, and `projections`, the last matrix that attention's pass calls.
Attention = namedtuple("Attention", "added projections scale")


@dataclass(frozen=True)
class AttentionValues:
    """A pooling: the float32 sum, over the blocks `start` (0-based) to exit layer - 1, of what their attention adds at
    the last token. No later block is run."""

    start: int = 0
    needs_span = False

    def check(self, backbone: Backbone) -> None:
        """Find the model's attention, while no method is attached. `UnsupportedModelError` where it is not found."""
        find_attention(backbone)

    def read(self, backbone: Backbone, batch: Batch, layers: Iterable[int], prefix=None) -> dict[int, torch.Tensor]:
        """Run the batch up to the last of `layers`: layer -> float32 (batch, hidden). `ValueError` for a layer that is
        not above `start`, `UnsupportedModelError` for a model whose attention is not found."""
        wanted, added, attention = sorted(set(layers)), {}, find_attention(backbone)
        if wanted[0] <= self.start:
            raise ValueError(f"AttentionValues from block {self.start} on has nothing to sum at layer {wanted[0]}.")

        def keep(module, _, output):  # a method may run a block twice, the last time as it is meant
            added[module] = attention.scale * last_state(returned_tensor(output), batch.last).float()

        modules = attention.added[self.start : wanted[-1]]
        with active(module.register_forward_hook(keep) for module in modules):
            read_states(backbone, batch.ids, [wanted[-1]], lambda states: None, prefix)
        sums = list(accumulate(map(added.get, modules), lambda total, more: total + more.to(total.device)))
        return {n: sums[n - self.start - 1] for n in wanted}

    def describe(self) -> dict:
        return {"pooling": "attention values", "first_block": self.start}


@torch.inference_mode()
def find_attention(backbone: Backbone) -> Attention:
    """Looked for once per model, by a short pass; a method must not be attached, which would mislead the search. Of the
    modules of a block with `att` in their names, the one counts whose output and one more module's (the MLP's) make up
    what the block adds. `UnsupportedModelError` where none does."""
    if "attention" in vars(backbone):
        return backbone.attention
    n, config = backbone.num_layers, backbone.model.config.get_text_config()
    scale = float(getattr(config, "residual_multiplier", None) or 1.0)
    entered, returned, projections = [], [{} for _ in range(n)], [None] * n

    def keep(i, name, module, _, output):
        states = returned_tensor(output)
        if torch.is_tensor(states) and states.dim() > 1 and _rows(states).shape == entered[i].shape:
            returned[i][name] = _rows(states)
        if "att" in name and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            projections[i] = module

    modules = [(module, i, name) for i, block in enumerate(backbone.layers) for name, module in block.named_modules()]
    with ONE_AT_A_TIME, active(module.register_forward_hook(partial(keep, i, name)) for module, i, name in modules):
        read_states(backbone, probe_ids(backbone), range(n + 1), lambda states: entered.append(_rows(states)))
    errors = defaultdict(list)
    for before, outputs in zip(entered, returned):
        change = (outputs.pop("") - before) / scale
        attention = [name for name in outputs if "att" in name]
        for name, other in product(attention, outputs.keys() - attention):
            errors[name, other].append(float((change - outputs[name] - outputs[other]).norm() / change.norm()))
    whole = {names: median(found) for names, found in errors.items() if len(found) == n}
    best = min(whole, key=whole.get, default=None)
    if best is None or whole[best] > (1e-3 if backbone.dtype == torch.float32 else 0.1) or None in projections:
        raise UnsupportedModelError(f"In {backbone.name} no module is found whose output attention adds to the states.")
    backbone.attention = Attention([block.get_submodule(best[0]) for block in backbone.layers], projections, scale)
    return backbone.attention


def _rows(states: torch.Tensor) -> torch.Tensor:
    """A copy, because some models add to it in place, without the first token, whose states are out of proportion."""
    return states.flatten(0, -2)[1:].to("cpu", torch.float32, copy=True)
