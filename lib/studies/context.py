"""How much a sentence's tokens know of what comes after them: similarity of states, attention to the placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.core.forward import check_finite, read_states, safe_float16
from lib.core.variants import closing_tokens


def context_dependency(encoder: SentenceEncoder, sentences: Sequence[str]) -> pd.DataFrame:
    """Spearman x 100, over the hidden dimensions, of each token's state with the last token's at the exit layer.

    Only tokens of the sentence count, not the prompt's own. Source: arXiv 2412.11556, section 5.9, which reads a rise
    under TP as a stronger dependency on later context.

    Returns:
        Columns sentence (its place), token (its place in the sentence), correlation.

    Raises:
        FloatingPointError: a state is not finite.
    """
    layer, rows = encoder.exit_layer, []
    for number, sentence in enumerate(sentences):
        batch, span, attached = _one(encoder, sentence)
        with attached:
            states = read_states(encoder.backbone, batch.ids, [layer])[layer][0]
        check_finite(states, encoder.backbone.name, encoder.backbone.dtype)
        states = states.float().cpu().numpy()
        ranks = rankdata(np.concatenate([states[span], states[-1:]]), axis=1)
        rows += [(number, token, 100 * value) for token, value in enumerate(np.corrcoef(ranks)[-1, :-1])]
    return pd.DataFrame(rows, columns=["sentence", "token", "correlation"])


def attention_to_placeholder(encoder: SentenceEncoder, sentences: Sequence[str]) -> pd.DataFrame:
    """The share of its attention that each sentence token gives to the placeholder in each block, mean over the heads.

    Needs an encoder whose method has one placeholder.

    Returns:
        Columns sentence, block (0-based), token (its place in the sentence), text, share (0 to 1).

    Raises:
        FloatingPointError: a share is not finite, because the pass overflowed.
    """
    backbone, rows = encoder.backbone, []
    for number, sentence in enumerate(sentences):
        batch, span, attached = _one(encoder, sentence)
        safe = safe_float16(backbone.layers[0], backbone.device, backbone.dtype)
        with torch.inference_mode(), attached, _eager_attention(backbone), safe:
            attentions = backbone.base(input_ids=batch.ids, use_cache=False, output_attentions=True).attentions
        placeholder = int(batch.placeholders[0, 0])
        texts = [backbone.tokenizer.decode(token).strip() for token in batch.ids[0, span]]
        for block, weights in enumerate(attentions):
            shares = weights[0, :, span, placeholder].float().mean(dim=0)
            check_finite(shares, backbone.name, backbone.dtype)
            rows += [(number, block, *row) for row in zip(range(len(texts)), texts, shares.tolist(), strict=True)]
    return pd.DataFrame(rows, columns=["sentence", "block", "token", "text", "share"])


def by_sentence(table: pd.DataFrame, column: str, task: str) -> pd.DataFrame:
    """Mean of a column over each sentence, as `lib.evaluation.intervals.compare` takes it: task, item, the column.

    `task` is a column, whose every value is then a task (`"block"`), or any other name for all rows together.
    """
    table = table if task in table else table.assign(**{task: task})
    means = table.groupby([task, "sentence"], as_index=False)[column].mean()
    return means.rename(columns={task: "task", "sentence": "item"}).astype({"task": str})


def _one(encoder: SentenceEncoder, sentence: str):
    """One sentence in the first template: its batch of one row, the slice of its own tokens, the method attached."""
    encoder = encoder.changed(share_prefix=False, pooling="mean")  # a mean needs to know where the sentence begins
    rows = encoder.passes([sentence])[0].rows
    batch = encoder.batch(rows, [0])
    span = slice(int(batch.first), int(batch.last) + 1 - closing_tokens(encoder.backbone, encoder.prompt))
    return batch, span, encoder.method.attach(encoder.backbone, batch) if encoder.method else nullcontext()


@contextmanager
def _eager_attention(backbone: Backbone):
    """The attention implementation that hands its weights out; the model's own comes back afterwards."""
    before = backbone.model.config._attn_implementation
    backbone.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.model.set_attn_implementation(before)
