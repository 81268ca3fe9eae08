"""What an encoder has to compute for some sentences: its passes, their tokens and their floating-point operations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lib.core.batches import token_batches, token_budget
from lib.core.encoder import SentenceEncoder
from lib.core.forward import run_prefix, shares_prefix
from lib.core.tokens import TokenRows


def passes(
    encoder: SentenceEncoder, sentences: list[str], batch_size: int | None
) -> list[tuple[TokenRows, list[list[int]]]]:
    """What `encoder.encode` runs, template by template and chunk by chunk: token rows, and which of them form a batch."""
    texts, result = list(dict.fromkeys(map(encoder.prompt.prepare, sentences))), []
    for template in encoder._templates:
        for chunk in encoder.chunks(texts):
            rows = encoder._tokenize(template, chunk, mean_span=encoder.pooling != "last")
            rows.prefix *= encoder.share_prefix and shares_prefix(encoder.backbone)
            lengths = [len(row) - rows.prefix for row in rows.ids]
            result.append((rows, token_batches(lengths, token_budget(encoder.backbone.device), batch_size)))
    return result


class Workload(NamedTuple):
    """Tokens that enter the first block, padding included, and the floating-point operations of the blocks that run."""

    tokens: int
    flops: int


def workload(encoder: SentenceEncoder, sentences: list[str], batch_size: int | None = None, prefix: bool = True) -> Workload:
    """Counted from the model's shape and the token counts, without a run; `count_flops` is the check.

    A token costs 2 operations per weight of every matrix in the blocks up to the exit layer, and 4 x (heads x head size) per
    key in attention, of which there are as many as the batch is wide, and the prefix. A mixture of experts would be
    counted with all of its experts.

    Args:
        prefix: also count the passes that compute the prompts' shared prefixes, one per template and chunk.
    """
    config, blocks = encoder.backbone.model.config.get_text_config(), encoder.backbone.layers[: encoder.exit_layer]
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() > 1)
    heads = config.num_attention_heads
    attended = len(blocks) * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens = flops = 0
    for rows, batches in passes(encoder, sentences, batch_size):
        shapes = [(len(batch), max(len(rows.ids[i]) for i in batch) - rows.prefix, rows.prefix) for batch in batches]
        if prefix and rows.prefix:
            shapes.append((1, rows.prefix, 0))
        for count, width, before in shapes:
            tokens += count * width
            flops += count * width * (2 * weights + 4 * attended * (before + width))
    return Workload(tokens, flops)


class PreparedRun:
    """The paper's protocol: one sentence at a time, its token ids and the keys and values of the prompt's prefix at hand."""

    def __init__(self, encoder: SentenceEncoder, sentences: list[str]):
        self.encoder, self.passes = encoder, passes(encoder, sentences, batch_size=1)
        heads = [torch.tensor(rows.ids[0][: rows.prefix], device=encoder.backbone.device) for rows, _ in self.passes]
        self.prefixes = [run_prefix(encoder.backbone, head, encoder.exit_layer) if len(head) else None for head in heads]

    def __call__(self) -> np.ndarray:
        """Embeddings of the distinct sentences, longest first, template after template: float32 (all of them, hidden)."""
        layer, states = self.encoder.exit_layer, []
        for (rows, batches), prefix in zip(self.passes, self.prefixes):
            for batch in sorted(batches):
                states.append(self.encoder._run(rows, batch, [layer], prefix)[layer].float().cpu().numpy())
        return np.concatenate(states)
