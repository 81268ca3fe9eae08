"""Contrastive Prompting (CP, arXiv 2505.12831): what a sentence says under a second, irrelevant prompt is taken away. A
first pass reads what enters the output projection of a block's attention at its last token; the second subtracts it."""

from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from lib.core.attention_values import find_attention
from lib.core.backbone import Backbone
from lib.core.forward import read_states
from lib.core.pooling import last_state
from lib.core.prompts import SENTENCE, Prompt
from lib.core.tokens import Batch, PromptTokenizer

IRRELEVANT = f'The irrelevant information of this sentence : "{SENTENCE}" means in one word:"'


@dataclass(frozen=True)
class ContrastivePrompting:
    """CP as a method of an encoder. `ValueError` for block < 0, an unknown rule and no `{sentence}` in `auxiliary`.

    Args:
        block: where, 0-based; the paper's layer is block + 1. strength: the paper's alpha, for `"NS"` alone.
        rule: what v, the prompt's value, becomes, with w, that of the auxiliary prompt: `"NS"` (scaled), strength x
            (v - w), or `"NR"` (renormed), v - w with the length of v. auxiliary: the second prompt's template."""

    block: int = 4
    strength: float = 2.0
    rule: str = "NS"
    auxiliary: str = IRRELEVANT

    def __post_init__(self):
        if self.block < 0 or SENTENCE not in self.auxiliary or self.rule not in ("NS", "NR"):
            raise ValueError(f"CP needs block >= 0, {SENTENCE} in its template and the rule NS or NR; got {self}.")

    def describe(self) -> dict:
        return {"method": type(self).__name__, **asdict(self)}

    def templates(self, prompt: Prompt) -> tuple[str, ...]:
        """The prompt's own. `ValueError` for a prompt that is not read at its last token."""
        if prompt.pooling != "last":
            raise ValueError(f"Prompt {prompt.name!r} is not read at its last token, so CP does not apply to it.")
        return prompt.templates

    def check(self, backbone: Backbone) -> None:
        """Raise `ValueError` if the model has no such block, `UnsupportedModelError` if its attention is not found."""
        if self.block >= backbone.num_layers:
            raise ValueError(f"CP at block {self.block}, but {backbone.name} has only {backbone.num_layers} blocks.")
        find_attention(backbone)

    @contextmanager
    def attach(self, backbone: Backbone, batch: Batch):
        """Run the first pass over the batch's sentences; while active, the second subtracts what it read."""
        self.check(backbone)
        projection, texts, read = find_attention(backbone).projections[self.block], batch.texts, []
        # Kept with the backbone, because it copies the tokenizer, and one of 262,000 tokens takes a second to copy.
        tokenize = vars(backbone).setdefault("tokenize", PromptTokenizer(backbone.tokenizer, backbone.max_length))
        rows = tokenize(self.auxiliary, texts)
        rows.prefix = 0  # whole prompts: a prefix's keys and values would be one more pass
        first = rows.batch(range(len(texts)), backbone.device)
        with projection.register_forward_pre_hook(lambda _, args: read.append(last_state(args[0], first.last).float())):
            read_states(backbone, first.ids, [self.block + 1], lambda states: None)

        def subtract(_, args):
            values = args[0].clone()
            rows, last = torch.arange(len(values), device=values.device), batch.last.to(values.device)
            own = values[rows, last].float()
            difference = own - read[0].to(values.device)  # read[0]: float32 (texts, width)
            length = own.norm(dim=-1, keepdim=True) / difference.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            values[rows, last] = (difference * (length if self.rule == "NR" else self.strength)).to(values.dtype)
            return (values, *args[1:])

        with projection.register_forward_pre_hook(subtract):
            yield self
