"""What every hook of this package shares: how a decoder block's input is read and replaced, and float16 made safe.

Hooks work on the *inputs* of the decoder blocks (forward pre-hooks): in every architecture a block's input is a plain
tensor, equal to `hidden_states[i]` of Hugging Face, while outputs differ in shape between families.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn


def block_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states (batch, tokens, hidden) that a decoder block was called with."""
    return args[0] if args else kwargs["hidden_states"]


def replace_input(states: torch.Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a decoder block with other hidden states, as a forward pre-hook returns them."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


@contextmanager
def safe_float16(first_block: nn.Module, device: torch.device, dtype: torch.dtype):
    """While active, a float16 model adds up its blocks' outputs, and norms the sum, in float32; else it does nothing.

    That sum (the residual stream) is what overflows float16 in models with large activations. The matrix products stay in
    float16: autocast turns their inputs, which come out of norms and are small, back.
    """
    if dtype != torch.float16:
        yield
        return

    def widen(_, args, kwargs):
        return replace_input(block_input(args, kwargs).float(), args, kwargs)

    handle = first_block.register_forward_pre_hook(widen, with_kwargs=True, prepend=True)
    try:
        with torch.autocast(device.type, torch.float16):
            yield
    finally:
        handle.remove()
