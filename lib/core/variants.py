"""Token Prepending with one thing changed, to see what it owes its effect to (arXiv 2412.11556, section 5, appendix A).

A `Variant` is a method like any other: `SentenceEncoder(backbone, prompt, Variant(1, 3, write="mean"))`.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from lib.core.backbone import Backbone
from lib.core.forward import block_input, replace_input
from lib.core.pooling import last_state, mean_state
from lib.core.prompts import SENTENCE, Prompt
from lib.core.token_prepending import TokenPrepending

CHOICES = {
    "write": ("last", "mean", "older", "same", "nothing"),
    "hide": ("", "before", "after"),
    "open": ("", "last_token", "sentence"),
}


@dataclass(frozen=True)
class Variant(TokenPrepending):
    """TP with one thing changed; the arguments not named here are those of `TokenPrepending`.

    Args:
        write: what is written before block i. `"last"`: the last token's state that enters block i, which block i - 1 made
            (the paper). `"older"`: the one that entered block i - 1. `"same"`: the one that block i itself makes, found by
            running it first without keeping the result. `"mean"`: the mean of all states after the placeholder, the
            sentence's and the closing words'. `"nothing"`: the placeholder stays as it is.
        resume: writing starts again before this block and stays on to the end; None: never.
        hide: the placeholder cannot be attended to in the blocks `"before"` start or `"after"` end. Its place stays taken,
            so the positions of the other tokens are the same.
        open: attention in the blocks start to end - 1 is not causal: tokens after the placeholder see the `"last_token"`,
            or the whole `"sentence"` (without the prompt's closing words) sees all of itself.
        closing: how many tokens follow the sentence, for `open="sentence"`; see `closing_tokens`.

    Raises:
        ValueError: as `TokenPrepending`; an unknown write, hide or open; `"older"` with start 0.
    """

    write: str = "last"
    resume: int | None = None
    hide: str = ""
    open: str = ""
    closing: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}; choose from {', '.join(map(repr, known))}.")
        if self.write == "older" and self.start == 0:
            raise ValueError("Before block 0 there is no older state to write; start must be at least 1.")

    @contextmanager
    def attach(self, backbone: Backbone, batch):
        """As `TokenPrepending.attach`."""
        self.check(backbone)
        rows, targets = torch.arange(len(batch.last))[:, None], batch.placeholders.reshape(len(batch.last), -1)
        previous: dict[int, torch.Tensor] = {}  # block -> the last token's state that entered it

        def before(index):
            def hook(block, args, kwargs):
                states = block_input(args, kwargs)
                row, target, last = (t.to(states.device) for t in (rows, targets, batch.last))
                previous[index] = last_state(states, last)
                if self._masks(index):
                    kwargs = kwargs | {"attention_mask": self._mask(states, kwargs, target, last)}
                if self._writes(index):
                    older = self.write == "older"
                    value = previous[index - 1] if older else self._value(block, states, args, kwargs, target, last)
                    states = states.clone()
                    states[row, target] = value[:, None].to(states.dtype)
                return replace_input(states, args, kwargs)
            return hook

        with self.insert(backbone, targets), ExitStack() as hooks:
            for index, block in enumerate(backbone.layers):
                hooks.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            yield self

    def _writes(self, index: int) -> bool:
        resumed = self.resume is not None and index >= self.resume
        return self.write != "nothing" and (self.start <= index < self.end or resumed)

    def _masks(self, index: int) -> bool:
        hidden = {"": False, "before": index < self.start, "after": index >= self.end}[self.hide]
        return hidden or bool(self.open) and self.start <= index < self.end

    def _value(self, block, states, args, kwargs, target, last) -> torch.Tensor:
        """What is written: (batch, hidden)."""
        if self.write == "mean":
            return mean_state(states, target.max(dim=1).values + 1, last)
        if self.write == "same":
            output = block.forward(*args, **kwargs)  # `forward` itself, so that no hook runs twice
            states = output[0] if isinstance(output, tuple) else output
        return last_state(states, last)

    def _mask(self, states, kwargs, target, last) -> torch.Tensor:
        """What is added to the attention scores of a block, (batch, 1, queries, keys): 0 or as good as minus infinity.

        It takes the place of the model's own mask, so a sliding window is not kept.
        """
        if "attention_mask" not in kwargs:
            raise ValueError("This architecture does not hand its blocks an attention mask; hide and open are not possible.")
        cache = kwargs.get("past_key_values")
        skip = cache.get_seq_length() if cache is not None else 0
        tokens = states.shape[1]
        query = torch.arange(tokens, device=states.device)[None, :, None]
        key = torch.arange(-skip, tokens, device=states.device)[None, None, :]
        first, last = target.max(dim=1).values[:, None, None] + 1, last[:, None, None]
        visible = (key <= query).expand(len(states), -1, -1)
        if self.hide:
            for column in target.T:
                visible = visible & ((key != column[:, None, None]) | (query == key))
        if self.open == "last_token":
            visible = visible | ((key == last) & (query >= first))
        if self.open == "sentence":
            end = last - self.closing
            visible = visible | ((key >= first) & (key <= end) & (query >= first) & (query <= end))
        mask = torch.zeros(visible.shape, dtype=states.dtype, device=states.device)
        return mask.masked_fill(~visible, torch.finfo(states.dtype).min)[:, None]


def closing_tokens(backbone: Backbone, prompt: Prompt) -> int:
    """How many tokens a prompt's first template has after the sentence (one of them may have swallowed its full stop)."""
    closing = prompt.templates[0].partition(SENTENCE)[2]
    return len(backbone.tokenizer(closing, add_special_tokens=False)["input_ids"]) if closing else 0
