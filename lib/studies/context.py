"""How much the tokens of a sentence know of what comes after them: state similarity, and attention to the placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap, rankdata

from lib.studies.ablation import closing_tokens
from lib.core.encoder import SentenceEncoder
from lib.core.forward import read_states
from lib.core.backbone import Backbone


def context_dependency(encoder: SentenceEncoder, sentences: Sequence[str]) -> pd.DataFrame:
    """Spearman x 100, over the hidden dimensions, of each token's state with the last token's at the exit layer.

    Only tokens of the sentence count, not the prompt's own. Source: arXiv 2412.11556, section 5.9, where a rise under TP
    is read as a stronger dependency on later context.

    Returns:
        Columns sentence (its place), token (its place in the sentence), correlation.
    """
    layer, rows = encoder.exit_layer, []
    for number, sentence in enumerate(sentences):
        ids, span, _, applied = _one(encoder, sentence)
        with applied:
            states = read_states(encoder.backbone, ids, [layer])[layer][0].float().cpu().numpy()
        ranks = rankdata(np.concatenate([states[span], states[-1:]]), axis=1)
        rows += [(number, token, 100 * value) for token, value in enumerate(np.corrcoef(ranks)[-1, :-1])]
    return pd.DataFrame(rows, columns=["sentence", "token", "correlation"])


@torch.inference_mode()
def attention_to_placeholder(encoder: SentenceEncoder, sentences: Sequence[str]) -> pd.DataFrame:
    """The share of its attention that each sentence token gives to the placeholder in each block, mean over the heads.

    Needs an encoder with TP. Returns columns sentence, block (0-based), token (its place in the sentence), text, share.
    """
    backbone, rows = encoder.backbone, []
    with _eager_attention(backbone):
        for number, sentence in enumerate(sentences):
            ids, span, placeholder, applied = _one(encoder, sentence)
            with applied:
                attentions = backbone.base(input_ids=ids, use_cache=False, output_attentions=True).attentions
            texts = [backbone.tokenizer.decode(token).strip() for token in ids[0, span]]
            for block, weights in enumerate(attentions):
                shares = weights[0, :, span, placeholder].float().mean(dim=0).tolist()
                rows += [(number, block, token, text, share) for token, (text, share) in enumerate(zip(texts, shares))]
    return pd.DataFrame(rows, columns=["sentence", "block", "token", "text", "share"])


def _one(encoder: SentenceEncoder, sentence: str):
    """One sentence in the prompt's first template: token ids (1, tokens), the slice of its own tokens, the placeholder's
    position or None, and TP as a context."""
    rows = encoder._tokenize(encoder._templates[0], [encoder.prompt.prepare(sentence)], mean_span=True)
    rows.prefix = 0
    ids, placeholders, first, last = encoder._positions(rows, [0])
    span = slice(int(first), int(last) + 1 - closing_tokens(encoder.backbone, encoder.prompt))
    if encoder.tp is None:
        return ids, span, None, nullcontext()
    return ids, span, int(placeholders[0, 0]), encoder.tp.attach(encoder.backbone, placeholders, last)


@contextmanager
def _eager_attention(backbone: Backbone):
    """The attention implementation that hands its weights out; the model's own comes back afterwards."""
    before = backbone.model.config._attn_implementation
    backbone.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.model.set_attn_implementation(before)


def mean_interval(values: Sequence[float], draws: int = 5_000) -> tuple[float, float, float]:
    """The mean and its 95 % bootstrap interval (percentiles): mean, low, high."""
    found = bootstrap((values,), np.mean, n_resamples=draws, method="percentile", rng=np.random.default_rng(0))
    return float(np.mean(values)), *map(float, found.confidence_interval)
