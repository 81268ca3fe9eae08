"""Where attention is in a block, found by what the model does with its modules and not by their classes.

Some families norm what attention returns (Gemma 2 and 3, OLMo 2), some scale it (Granite), some add it together with
what the MLP returns (GPT-J, Phi).
"""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import nn

from lib.core.backbone import Backbone
from lib.core.forward import UnsupportedModelError, before_blocks, block_input, read_states


def residual_scale(backbone: Backbone) -> float:
    """By what a block multiplies its attention's output before it adds it (Granite and its kin; 1 elsewhere)."""
    return float(getattr(backbone.model.config.get_text_config(), "residual_multiplier", None) or 1.0)


def attention_modules(backbone: Backbone) -> list[nn.Module]:
    """Of each block, the module whose output its attention adds to the residual stream. Looked for once per model.

    A short pass records what every module of a block returns. Of those with `att` in their names, the one counts whose
    output and one more module's (the MLP's) make up what a block adds. `UnsupportedModelError` where none does.
    """
    if "attention_modules" not in vars(backbone):
        name = _find(backbone)
        backbone.attention_modules = [block.get_submodule(name) for block in backbone.layers]
    return backbone.attention_modules


def output_projection(backbone: Backbone, block: int) -> nn.Module:
    """The matrix that a block's attention ends with, its last of those with `att` in their names that a pass calls.
    Looked for once per model. Raises `UnsupportedModelError` where a block has none."""
    if "output_projections" not in vars(backbone):
        found = [[] for _ in backbone.layers]
        with ExitStack() as hooks:
            for modules, block_of in zip(found, backbone.layers):
                for name, module in block_of.named_modules():
                    if "att" in name and getattr(module, "weight", torch.empty(0)).dim() == 2:
                        called = partial(lambda modules, module, *_: modules.append(module), modules)
                        hooks.enter_context(module.register_forward_hook(called))
            read_states(backbone, probe_ids(backbone), [backbone.num_layers], lambda states: None)
        backbone.output_projections = [modules[-1] if modules else None for modules in found]
    if backbone.output_projections[block] is None:
        raise UnsupportedModelError(f"Block {block} of {backbone.name} has no attention with an output projection.")
    return backbone.output_projections[block]


def probe_ids(backbone: Backbone) -> torch.Tensor:
    """Eight tokens for a pass that looks at the model's structure, int64 (1, 8)."""
    return torch.arange(5, 13, device=backbone.device)[None] % backbone.embeddings.weight.shape[0]


@torch.inference_mode()
def _find(backbone: Backbone) -> str:
    ids = probe_ids(backbone)
    width = read_states(backbone, ids, [0])[0].shape[-1]
    entered, returned = [None] * backbone.num_layers, [{} for _ in backbone.layers]
    with ExitStack() as hooks:
        for i, block in enumerate(backbone.layers):
            for name, module in block.named_modules():
                def keep(_, __, output, outputs=returned[i], name=name):
                    states = returned_tensor(output)
                    if torch.is_tensor(states) and states.shape[-1] == width and states.numel() == ids.numel() * width:
                        outputs[name] = _probe(states)

                hooks.enter_context(module.register_forward_hook(keep))

        def enter(i, _, args, kwargs):
            entered[i] = _probe(block_input(args, kwargs))

        hooks.enter_context(before_blocks(backbone, range(backbone.num_layers), enter))
        read_states(backbone, ids, [backbone.num_layers], lambda states: None)
    errors = defaultdict(list)
    for before, outputs in zip(entered, returned):
        change = (outputs.pop("") - before) / residual_scale(backbone)
        attention = [name for name in outputs if "att" in name]
        for name, other in product(attention, outputs.keys() - attention):
            errors[name, other].append(float((change - outputs[name] - outputs[other]).norm() / change.norm()))
    whole = {names: median(found) for names, found in errors.items() if len(found) == backbone.num_layers}
    best = min(whole, key=whole.get, default=None)
    if best is None or whole[best] > (1e-3 if backbone.dtype == torch.float32 else 0.1):
        raise UnsupportedModelError(f"In {backbone.name} no module is found whose output attention adds to the states.")
    return best[0]


def _probe(states: torch.Tensor) -> torch.Tensor:
    """A copy, because some models add to it in place, without the first token, whose states are out of proportion."""
    return states.flatten(0, -2)[1:].float().clone()


def returned_tensor(output):
    """The states that a module returns, alone or with other things behind them."""
    return output[0] if isinstance(output, tuple) else output
