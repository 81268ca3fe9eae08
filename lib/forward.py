"""Run only the part of a model that is needed: chosen states, no block after the last of them, a shared prefix once.

Everything works on the *inputs* of the decoder blocks (forward pre-hooks): in every architecture a block's input is a
plain tensor, equal to `hidden_states[i]` of Hugging Face, while outputs differ in shape between families.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from lib.models import Backbone

Reader = Callable[[torch.Tensor], torch.Tensor]


class _Stop(Exception):
    """Raised by our own hook to end a forward pass; each pass catches only its own instance."""


def block_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states (batch, tokens, hidden) that a decoder block was called with."""
    return args[0] if args else kwargs["hidden_states"]


def replace_input(states: torch.Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a decoder block with other hidden states, as a forward pre-hook returns them."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


@torch.inference_mode()
def read_states(
    backbone: Backbone,
    input_ids: torch.Tensor,
    layers: Iterable[int],
    read: Reader = lambda states: states,
    prefix: Cache | None = None,
    **inputs,
) -> dict[int, torch.Tensor]:
    """One forward pass that keeps `read(state)` for each layer asked for and stops after the last of them.

    Args:
        input_ids: int64 (batch, tokens). Pad on the right: under causal attention that needs no mask.
        layers: state indices 0..num_layers in Hugging Face's numbering; only num_layers is after the final norm.
        read: takes a state (batch, tokens, hidden) and returns what to keep of it.
        prefix: keys and values of tokens before `input_ids`, from `run_prefix`.
        inputs: handed to the model (`attention_mask` and `position_ids` where the padding is on the left).

    Returns:
        layer -> what `read` returned.
    """
    wanted = sorted({backbone.layer_index(n) for n in layers})
    last, kept, stop = wanted[-1], {}, _Stop()

    def before_block(index: int, ends_here: bool):
        def hook(_, args, kwargs):
            kept[index] = read(block_input(args, kwargs))
            if ends_here:
                raise stop
        return hook

    with ExitStack() as hooks:
        for n in wanted:
            if n < backbone.num_layers:
                hook = before_block(n, ends_here=n == last)
                hooks.callback(backbone.layers[n].register_forward_pre_hook(hook, with_kwargs=True).remove)
        try:
            output = backbone.base(input_ids=input_ids, past_key_values=prefix, use_cache=prefix is not None, **inputs)
            kept[backbone.num_layers] = read(output.last_hidden_state)
        except _Stop as raised:
            if raised is not stop:
                raise
    missing = set(wanted) - set(kept)
    if missing:
        raise RuntimeError(f"The forward pass of {backbone.name} did not reach the states {sorted(missing)}.")
    return {n: kept[n] for n in wanted}


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values of a prefix: joined to each batch's own for its attention, and never grown."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        batch = key_states.shape[0]
        keys = torch.cat([self.keys.expand(batch, -1, -1, -1), key_states], dim=-2)
        values = torch.cat([self.values.expand(batch, -1, -1, -1), value_states], dim=-2)
        return keys, values


@torch.inference_mode()
def run_prefix(backbone: Backbone, prefix_ids: torch.Tensor, last_layer: int) -> Cache:
    """Keys and values of `prefix_ids` (int64, tokens) in the blocks before state `last_layer`.

    Under causal attention nothing after a prefix can change it, so one pass serves every text that begins with it. The
    cache can be handed to any number of `read_states` calls: it does not grow.
    """
    # Made without the model's config: a sliding-window layer would drop keys that a long prefix still needs.
    cache = DynamicCache()
    # At least one block: models with learned positions count the prefix by the first block's keys.
    read_states(backbone, prefix_ids[None], [max(last_layer, 1)], read=lambda states: None, prefix=cache)
    return Cache(layers=[_PrefixLayer(layer.keys, layer.values) for layer in cache.layers])


@torch.inference_mode()
def shares_prefix(backbone: Backbone) -> bool:
    """Whether this model gives the same states when a prefix's keys and values are reused. Checked once per model.

    Warns if not: embeddings are then computed from whole prompts, which is slower and just as right.
    """
    if "shares_prefix" not in vars(backbone):
        ids = torch.arange(5, 13, device=backbone.device)[None] % backbone.embeddings.weight.shape[0]
        n = backbone.num_layers
        whole = read_states(backbone, ids, [n])[n][:, 4:].float()
        try:
            joined = read_states(backbone, ids[:, 4:], [n], prefix=run_prefix(backbone, ids[0, :4], n))[n].float()
            difference = ((joined - whole).norm() / whole.norm()).item()
            reason = f"the states differ by {difference:.1%}"
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            difference, reason = float("inf"), f"{type(error).__name__}: {error}"
        backbone.shares_prefix = difference < (1e-3 if backbone.dtype == torch.float32 else 0.1)
        if not backbone.shares_prefix:
            warnings.warn(f"{backbone.name} cannot reuse a prompt's prefix ({reason}); running whole prompts.", stacklevel=2)
    return backbone.shares_prefix
