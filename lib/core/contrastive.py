"""Contrastive Prompting (CP): what a sentence says under a second, irrelevant prompt is taken away (arXiv 2505.12831).

A method of two passes. The first, under the auxiliary prompt and only up to one block, reads what enters the output
projection of that block's attention at the last token; the second subtracts it from its own at the same place.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch

from lib.core.attention import output_projection
from lib.core.backbone import Backbone
from lib.core.forward import read_states
from lib.core.pooling import last_state
from lib.core.prompts import SENTENCE, Prompt
from lib.core.tokens import Batch, PromptTokenizer

IRRELEVANT = f'The irrelevant information of this sentence : "{SENTENCE}" means in one word:"'


@dataclass(frozen=True)
class ContrastivePrompting:
    """CP as a method of an encoder. With v and w, the values of the prompt and of the auxiliary prompt, v becomes

    - `"NS"` (scaled): strength x (v - w);
    - `"NR"` (renormed): v - w with the length of v.

    Args:
        block: where, 0-based; the paper's layer is block + 1.
        strength: the paper's alpha, for `"NS"` alone.
        rule: `"NS"` or `"NR"`.
        auxiliary: the second prompt's template.

    Raises `ValueError` for a negative block, an unknown rule and a template without `{sentence}`.
    """

    block: int = 4
    strength: float = 2.0
    rule: Literal["NS", "NR"] = "NS"
    auxiliary: str = IRRELEVANT

    def __post_init__(self):
        if self.block < 0 or SENTENCE not in self.auxiliary:
            raise ValueError(f"CP needs a block from 0 on and {SENTENCE} in its template; got {self}.")
        if self.rule not in get_args(self.__annotations__["rule"]):
            raise ValueError(f"Unknown rule {self.rule!r}; choose from NS, NR.")

    def describe(self) -> dict:
        """The method as plain data."""
        return {"method": type(self).__name__, **asdict(self)}

    def templates(self, prompt: Prompt) -> tuple[str, ...]:
        """The prompt's own. `ValueError` for a prompt that is not read at its last token."""
        if prompt.pooling != "last":
            raise ValueError(f"Prompt {prompt.name!r} is not read at its last token, so CP does not apply to it.")
        return prompt.templates

    def check(self, backbone: Backbone) -> None:
        """Raise `ValueError` if the model has no such block."""
        if self.block >= backbone.num_layers:
            raise ValueError(f"CP at block {self.block}, but {backbone.name} has only {backbone.num_layers} blocks.")

    @contextmanager
    def attach(self, backbone: Backbone, batch: Batch):
        """Run the first pass over the batch's sentences; while active, the second subtracts what it read."""
        self.check(backbone)
        projection = output_projection(backbone, self.block)
        auxiliary = self.auxiliary_values(backbone, batch.texts, projection)

        def subtract(_, args):
            values = args[0].clone()
            rows, last = torch.arange(len(values), device=values.device), batch.last.to(values.device)
            own = values[rows, last].float()
            difference = own - auxiliary.to(values.device)
            length = own.norm(dim=-1, keepdim=True) / difference.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            values[rows, last] = (difference * (length if self.rule == "NR" else self.strength)).to(values.dtype)
            return (values, *args[1:])

        with projection.register_forward_pre_hook(subtract):
            yield self

    def auxiliary_values(self, backbone: Backbone, texts: list[str], projection: torch.nn.Module) -> torch.Tensor:
        """What enters the projection at the last token under the auxiliary prompt, float32 (texts, width)."""
        tokenize, read = PromptTokenizer(backbone.tokenizer, backbone.max_length, (), ()), []
        rows = tokenize(self.auxiliary, texts)
        rows.prefix = 0  # whole prompts: a prefix's keys and values would be one more pass
        batch = rows.batch(range(len(texts)), backbone.device)
        with projection.register_forward_pre_hook(lambda _, args: read.append(last_state(args[0], batch.last).float())):
            read_states(backbone, batch.ids, [self.block + 1], lambda states: None)
        return read[0]
