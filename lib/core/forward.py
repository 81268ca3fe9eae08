"""Run only the part of a model that is needed: chosen states, no block after the last of them, a shared prefix once.
Hooks work on the *inputs* of the decoder blocks: in every architecture a block's input is a plain tensor, equal to
`hidden_states[i]` of Hugging Face, while outputs differ in shape between families."""

import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import Cache, DynamicCache

if TYPE_CHECKING:
    from lib.core.backbone import Backbone

# Hooks belong to a model and not to a thread, so that passes of several threads, of whatever models, run one at a time.
ONE_AT_A_TIME = threading.RLock()


class UnsupportedModelError(ValueError):
    """The model has no structure that this package can work with; the message says what is missing."""


def block_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states (batch, tokens, hidden) that a decoder block was called with."""
    return args[0] if args else kwargs["hidden_states"]


def replace_input(states: torch.Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a decoder block with other hidden states, as a forward pre-hook returns them."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def returned_tensor(output):
    """The states that a module returns, alone or with other things behind them."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def active(hooks: Iterable):
    """Hooks, registered one by one, until the block is left, also by an error."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


def before_blocks(backbone: "Backbone", indices: Iterable[int], hook: Callable):
    """While active, `hook(index, block, args, kwargs)` is a forward pre-hook of each of these decoder blocks."""
    return active(backbone.layers[i].register_forward_pre_hook(partial(hook, i), with_kwargs=True) for i in indices)


@contextmanager
def safe_float16(first_block: nn.Module, device: torch.device, dtype: torch.dtype):
    """While active, a float16 model adds up its blocks' outputs, and norms the sum, in float32, lest it overflows. The
    matrix products stay in float16: autocast turns their inputs, which come out of norms and are small, back."""
    def widen(_, args, kwargs):
        return replace_input(block_input(args, kwargs).float(), args, kwargs)

    with ExitStack() as stack:
        if dtype == torch.float16:
            stack.enter_context(first_block.register_forward_pre_hook(widen, with_kwargs=True, prepend=True))
            stack.enter_context(torch.autocast(device.type, torch.float16))
        yield


def check_finite(states: torch.Tensor | np.ndarray, name: str, dtype: torch.dtype) -> None:
    """Raise `FloatingPointError` if a value is infinite or not a number, as where float16 overflows."""
    if not torch.isfinite(torch.as_tensor(states)).all():
        raise FloatingPointError(f"{name} gives infinite or undefined states in {dtype}; load it with dtype='float32'.")


@torch.inference_mode()
def read_states(backbone: "Backbone", input_ids: torch.Tensor, layers: Iterable[int],
                read: Callable[[torch.Tensor], torch.Tensor] = lambda states: states, prefix: Cache | None = None,
                **inputs) -> dict[int, torch.Tensor]:
    """One forward pass that stops after the last of the layers asked for: layer -> what `read` returned.

    Args:
        input_ids: int64 (batch, tokens). Pad on the right: under causal attention that needs no mask.
        layers: state indices 0..num_layers, see `Backbone`. prefix: from `run_prefix`, of the tokens before these.
        read: takes a state (batch, tokens, hidden) and returns what to keep of it.
        inputs: handed to the model (`attention_mask` and `position_ids` where the padding is on the left)."""
    wanted = sorted({backbone.layer_index(n) for n in layers})
    kept, stop = {}, Exception("The last state that is wanted was read.")

    def keep(index, _, args, kwargs):
        kept[index] = read(block_input(args, kwargs))
        if index == wanted[-1]:
            raise stop

    inner = [n for n in wanted if n < backbone.num_layers]
    safe = safe_float16(backbone.layers[0], backbone.device, backbone.dtype)
    with ONE_AT_A_TIME, safe, before_blocks(backbone, inner, keep):
        try:
            output = backbone.base(input_ids=input_ids, past_key_values=prefix, use_cache=prefix is not None, **inputs)
            if not hasattr(output, "last_hidden_state"):
                raise UnsupportedModelError(f"{backbone.name} without its head gives a {type(output).__name__} only.")
            kept[backbone.num_layers] = read(output.last_hidden_state)
        except Exception as raised:
            if raised is not stop:
                raise
            stop.__traceback__ = None  # its frames would keep this pass's activations alive
    if missing := set(wanted) - set(kept):
        raise UnsupportedModelError(f"The forward pass of {backbone.name} did not reach states {sorted(missing)}.")
    return {n: kept[n] for n in wanted}


class _Prefix(DynamicCache):
    """Keys and values of a shared prefix: the first pass fills it, later ones read it without appending theirs."""

    def __init__(self):
        super().__init__()  # without the model's config: a sliding window would drop keys that are still needed
        self.kept, self.filled = {}, False

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        own = key_states, value_states
        if not self.filled:
            self.kept[layer_idx] = own
            return super().update(*own, layer_idx, *args, **kwargs)
        joined = zip(self.kept[layer_idx], own)
        return tuple(torch.cat([old.expand(len(new), -1, -1, -1), new], dim=-2) for old, new in joined)


def probe_ids(backbone: "Backbone") -> torch.Tensor:
    """Eight tokens for a pass that looks at the model's structure, int64 (1, 8)."""
    return torch.arange(5, 13, device=backbone.device)[None] % backbone.embeddings.weight.shape[0]


@torch.inference_mode()
def run_prefix(backbone: "Backbone", prefix_ids: torch.Tensor, last_layer: int) -> Cache:
    """Keys and values of `prefix_ids` (int64, tokens) in the blocks before state `last_layer`, for `read_states`. Under
    causal attention nothing after a prefix can change it, so one pass serves every text that begins with it."""
    cache = _Prefix()
    # At least one block: models with learned positions count the prefix by the first block's keys.
    read_states(backbone, prefix_ids[None], [max(last_layer, 1)], read=lambda states: None, prefix=cache)
    cache.filled = True
    return cache


@torch.inference_mode()
def shares_prefix(backbone: "Backbone") -> bool:
    """Whether this model gives the same states when a prefix's keys and values are reused. Checked once per model; if
    not, it warns: embeddings are then computed from whole prompts, which is slower and just as right."""
    if "shares_prefix" not in vars(backbone):
        ids, n = probe_ids(backbone), backbone.num_layers
        whole = read_states(backbone, ids, [n])[n][:, 4:].float()
        try:
            joined = read_states(backbone, ids[:, 4:], [n], prefix=run_prefix(backbone, ids[0, :4], n))[n].float()
            difference = ((joined - whole).norm() / whole.norm()).item()
            reason = f"the states differ by {difference:.1%}"
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            difference, reason = float("inf"), f"{type(error).__name__}: {error}"
        backbone.shares_prefix = difference < (1e-3 if backbone.dtype == torch.float32 else 0.1)
        if not backbone.shares_prefix:
            warnings.warn(f"{backbone.name} cannot reuse a prompt's prefix ({reason}); running it all.", stacklevel=2)
    return backbone.shares_prefix
