"""Token Prepending with one thing changed, to see what its effect is due to (arXiv 2412.11556, section 5, app. A)."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from lib.core.backbone import Backbone
from lib.core.forward import before_blocks, block_input, replace_input, returned_tensor
from lib.core.pooling import last_state, mean_state
from lib.core.prompts import SENTENCE, Prompt
from lib.core.token_prepending import TokenPrepending


@dataclass(frozen=True)
class Variant(TokenPrepending):
    """TP with one thing changed: a method like `TokenPrepending`, whose arguments and errors it has beside these.
    Raises `ValueError` for an unknown write, hide or open, and `"older"` with start 0.

    Args:
        write: what is written before block i. `"last"`: the last token's state that enters block i (the paper).
            `"older"`: the one that entered block i - 1. `"same"`: the one that block i itself makes, found by running
            it first. `"mean"`: the mean of all states after the placeholder. `"nothing"`: the placeholder stays.
        resume: writing starts again before this block and stays on to the end; None: never.
        hide: no token attends to the placeholder (it keeps its place) in the blocks `"before"` start or `"after"` end.
        open: attention in the blocks start to end - 1 is not causal: tokens after the placeholder see the
            `"last_token"`, or the whole `"sentence"` (but for `closing` tokens, see `closing_tokens`) all of itself."""

    write: Literal["last", "mean", "older", "same", "nothing"] = "last"
    resume: int | None = None
    hide: Literal["", "before", "after"] = ""
    open: Literal["", "last_token", "sentence"] = ""
    closing: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.write == "older" and self.start == 0:
            raise ValueError("Before block 0 there is no older state to write; start must be at least 1.")

    @contextmanager
    def attach(self, backbone: Backbone, batch):
        self.check(backbone)
        rows, targets = torch.arange(len(batch.last))[:, None], batch.placeholders.reshape(len(batch.last), -1)
        entered = {}  # block -> the last token's state that entered it

        def before(index, block, args, kwargs):
            states = block_input(args, kwargs)
            row, target, last = (t.to(states.device) for t in (rows, targets, batch.last))
            entered[index] = last_state(states, last)
            within = self.start <= index < self.end
            hidden = index < self.start if self.hide == "before" else self.hide == "after" and index >= self.end
            if hidden or self.open and within:
                kwargs = kwargs | {"attention_mask": self._mask(states, kwargs, target, last)}
            if self.write != "nothing" and (within or self.resume is not None and index >= self.resume):
                value = entered[index - (self.write == "older")]
                if self.write == "mean":
                    value = mean_state(states, target.max(dim=1).values + 1, last)
                elif self.write == "same":  # by `forward` itself, so that no hook runs twice
                    value = last_state(returned_tensor(block.forward(*args, **kwargs)), last)
                states = states.clone()
                states[row, target] = value[:, None].to(states.dtype)
            return replace_input(states, args, kwargs)

        with self.insert(backbone, targets), before_blocks(backbone, range(backbone.num_layers), before):
            yield self

    def _mask(self, states, kwargs, target, last) -> torch.Tensor:
        """What is added to a block's attention scores, (batch, 1, queries, keys): 0 or as good as minus infinity. It
        takes the place of the model's own mask, so a sliding window is not kept."""
        if "attention_mask" not in kwargs:
            raise ValueError("This architecture hands its blocks no attention mask; hide and open are not possible.")
        cache, tokens = kwargs.get("past_key_values"), states.shape[1]
        skip = cache.get_seq_length() if cache is not None else 0
        key = torch.arange(-skip, tokens, device=states.device)[None, None, :]
        query = key.mT[:, skip:]
        first, last = target.max(dim=1).values[:, None, None] + 1, last[:, None, None]
        visible = (key <= query).expand(len(states), -1, -1)
        for column in target.T if self.hide else ():
            visible = visible & ((key != column[:, None, None]) | (query == key))
        if self.open == "last_token":
            visible = visible | ((key == last) & (query >= first))
        if self.open == "sentence":
            inside = (torch.minimum(key, query) >= first) & (torch.maximum(key, query) <= last - self.closing)
            visible = visible | inside
        return torch.where(visible, 0.0, torch.finfo(states.dtype).min).to(states.dtype)[:, None]


def closing_tokens(backbone: Backbone, prompt: Prompt) -> int:
    """How many tokens a prompt's first template has after the sentence (one may have swallowed its full stop)."""
    closing = prompt.templates[0].partition(SENTENCE)[2]
    return len(backbone.tokenizer(closing, add_special_tokens=False)["input_ids"])
