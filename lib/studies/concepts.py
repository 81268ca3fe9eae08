"""Aligned tokens as a description of meaning: minimal pairs, and the overlap of aligned tokens as a similarity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from datasets import Dataset

from lib.evaluation.alignment import decode_logits, embedding_ranks, output_matrix
from lib.data.sts import provenance
from lib.core.encoder import SentenceEncoder
from lib.core.backbone import Backbone
from lib.report.results import Result, run_or_load
from lib.data.sources import DATA
from lib.studies.sparse import logit_chunks, mean_logits, strongest_tokens
from lib.evaluation.sts import bootstrap_spearman, cosine, spearman
from lib.evaluation.vocabulary import DEFAULT_RULE, token_classes

# How the two sentences of a minimal pair relate. All but the last are about the same thing; only the first mean the same.
KINDS = ("paraphrase", "negation", "antonym", "role swap", "topic shift")
# How many of an embedding's tokens count as its highest.
HIGHEST = 10


def load_minimal_pairs() -> pd.DataFrame:
    """The pairs written for this project: columns kind (of `KINDS`), sentence1, sentence2; 16 pairs of each kind."""
    return pd.read_csv(DATA / "sample" / "minimal_pairs.tsv", sep="\t", keep_default_na=False)


def token_overlap(decoder: Backbone, first: np.ndarray, second: np.ndarray, layer: int, k: int) -> np.ndarray:
    """Share of the k aligned tokens that the two texts of a pair have in common, float64 (pairs,), 0 to 1.

    Each token's mean logit over all these texts is subtracted first, or the tokens that every text aligns to decide.

    Args:
        first, second: embeddings (pairs, hidden).
    """
    classes = token_classes(decoder.tokenizer, len(output_matrix(decoder)), DEFAULT_RULE)
    decode = partial(decode_logits, decoder, layer=layer)
    chunks = partial(logit_chunks, np.concatenate([first, second]), decode, classes)
    ids = strongest_tokens(chunks(), k, mean_logits(chunks())).ids
    return np.array([len(np.intersect1d(a, b)) / k for a, b in zip(*np.split(ids, 2))])


def pair_similarities(encoder: SentenceEncoder, decoder: Backbone, pairs: Dataset, k: int) -> Result:
    """Cosine and overlap of every pair, through the result store: columns gold, cosine, overlap."""
    def compute() -> pd.DataFrame:
        first, second = np.split(encoder.encode([*pairs["sentence1"], *pairs["sentence2"]]), 2)
        overlap = token_overlap(decoder, first, second, encoder.exit_layer, k)
        return pd.DataFrame({"gold": pairs["score"], "cosine": cosine(first, second), "overlap": overlap})

    about = {"exit_layer": encoder.exit_layer, "decoder": decoder.describe(), "k": k, "data": provenance(pairs)}
    code = ("concepts", "sparse", "alignment", "vocabulary")
    return run_or_load(f"concepts-{encoder.prompt.name}", encoder.describe() | about, compute, code)


def similarity_scores(pairs: pd.DataFrame, draws: int = 1000) -> tuple[pd.DataFrame, np.ndarray]:
    """Spearman x 100 with the gold scores, of cosine, of overlap, and of the mean of their ranks.

    Returns:
        A table with the columns measure, score, low, high, and gain, gain_low, gain_high: against cosine alone, paired;
        and the resampled scores, float64 (draws, 3).
    """
    measures = pairs[["cosine", "overlap"]].assign(both=pairs["cosine"].rank() + pairs["overlap"].rank())
    resampled = bootstrap_spearman(pairs["gold"].to_numpy(), measures.to_numpy().T, draws)
    scores = np.array([spearman(pairs["gold"], values) for _, values in measures.items()])
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    gain_low, gain_high = np.percentile(resampled - resampled[:, :1], [2.5, 97.5], axis=0)
    table = pd.DataFrame({"measure": measures.columns, "score": scores, "low": low, "high": high,
                          "gain": scores - scores[0], "gain_low": gain_low, "gain_high": gain_high})
    return table, resampled


def minimal_pair_table(encoder: SentenceEncoder, decoder: Backbone, pairs: pd.DataFrame, k: int) -> pd.DataFrame:
    """Every minimal pair under one encoder.

    Returns:
        The pairs' columns and cosine, overlap (of k tokens); changed: share of the tokens that only one of the two
        sentences has that are among its `HIGHEST`; shared: the same of the tokens that both have. A share of no tokens
        (as of changed ones after a role swap) is missing.
    """
    texts = [*pairs["sentence1"], *pairs["sentence2"]]
    embeddings = encoder.encode(texts)
    first, second = np.split(embeddings, 2)
    ranks = embedding_ranks(decoder, embeddings, encoder.exit_layer, texts, deepest=HIGHEST)
    ranks = ranks.assign(pair=ranks["text"] % len(pairs), found=ranks["rank"] <= HIGHEST)
    ranks["both"] = ranks.duplicated(["pair", "token"], keep=False)
    share = ranks.groupby(["pair", "both"])["found"].mean().unstack().reindex(range(len(pairs)))
    return pairs.assign(
        cosine=cosine(first, second), overlap=token_overlap(decoder, first, second, encoder.exit_layer, k),
        changed=share[False].to_numpy(), shared=share[True].to_numpy(),
    )


def separation(values: Sequence[float], positive: Sequence[bool], draws: int = 1000) -> tuple[float, float, float]:
    """Area under the ROC curve: how often a positive pair's value is above a negative one's (ties count half).

    Returns it with its 95 % interval, which resamples each of the two groups: value, low, high.
    """
    values, positive, generator = np.asarray(values), np.asarray(positive, bool), np.random.default_rng(0)
    above, below = values[positive], values[~positive]
    wins = np.sign(above[:, None] - below) / 2 + 0.5
    rows, columns = (generator.multinomial(n, np.full(n, 1 / n), draws) / n for n in wins.shape)
    low, high = np.percentile(np.einsum("dp,pn,dn->d", rows, wins, columns), [2.5, 97.5])
    return float(wins.mean()), float(low), float(high)
