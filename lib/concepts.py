"""Aligned tokens as a description of meaning: minimal pairs, and the overlap of aligned tokens as a similarity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import rankdata

from lib.alignment import decode_logits, embedding_ranks, output_matrix
from lib.data import provenance
from lib.encoder import SentenceEncoder
from lib.models import Backbone
from lib.results import Result, run_or_load
from lib.sources import DATA
from lib.sparse import logit_chunks, mean_logits, strongest_tokens
from lib.sts import bootstrap_spearman, cosine, spearman
from lib.vocabulary import DEFAULT_RULE, text_tokens, token_classes

# How the two sentences of a minimal pair relate. All but the last are about the same thing; only the first mean the same.
KINDS = ("paraphrase", "negation", "antonym", "role swap", "topic shift")


def load_minimal_pairs() -> pd.DataFrame:
    """The pairs written for this project: columns kind (of `KINDS`), sentence1, sentence2; 16 pairs of each kind."""
    return pd.read_csv(DATA / "sample" / "minimal_pairs.tsv", sep="\t", keep_default_na=False)


def token_overlap(decoder: Backbone, first: np.ndarray, second: np.ndarray, layer: int, k: int) -> np.ndarray:
    """Share of the k aligned tokens that the two texts of a pair have in common, float64 (pairs,), 0 to 1.

    Each token's mean logit over all these texts is subtracted first, or the tokens that every text aligns to decide.

    Args:
        first, second: embeddings (pairs, hidden).
    """
    classes, both = token_classes(decoder.tokenizer, len(output_matrix(decoder)), DEFAULT_RULE), np.concatenate([first, second])
    chunks = partial(logit_chunks, both, partial(decode_logits, decoder, layer=layer), classes)
    ids = strongest_tokens(chunks(), k, mean_logits(chunks())).ids
    return np.array([len(np.intersect1d(a, b)) / k for a, b in zip(*np.split(ids, 2))])


def pair_similarities(encoder: SentenceEncoder, decoder: Backbone, pairs: Dataset, k: int) -> Result:
    """Cosine and overlap of every pair, through the result store: columns gold, cosine, overlap."""
    def compute() -> pd.DataFrame:
        first, second = np.split(encoder.encode([*pairs["sentence1"], *pairs["sentence2"]]), 2)
        overlap = token_overlap(decoder, first, second, encoder.exit_layer, k)
        return pd.DataFrame({"gold": pairs["score"], "cosine": cosine(first, second), "overlap": overlap})

    about = {"exit_layer": encoder.exit_layer, "decoder": decoder.describe(), "k": k, "data": provenance(pairs)}
    return run_or_load(f"concepts-{encoder.prompt.name}", encoder.describe() | about, compute, ("concepts", "sparse", "alignment", "vocabulary"))


def similarity_scores(pairs: pd.DataFrame, draws: int = 1000, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Spearman x 100 with the gold scores, of cosine, of overlap, and of the mean of their ranks.

    Returns:
        A table with the columns measure, score, low, high, and gain, gain_low, gain_high: against cosine alone, paired;
        and the resampled scores, float64 (draws, 3).
    """
    cos, overlap = (pairs[column].to_numpy() for column in ("cosine", "overlap"))
    measures = {"cosine": cos, "overlap": overlap, "both": rankdata(cos) + rankdata(overlap)}
    resampled = bootstrap_spearman(pairs["gold"].to_numpy(), np.stack(list(measures.values())), draws, seed)
    scores = np.array([spearman(pairs["gold"], values) for values in measures.values()])
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    gain_low, gain_high = np.percentile(resampled - resampled[:, :1], [2.5, 97.5], axis=0)
    table = pd.DataFrame({"measure": list(measures), "score": scores, "low": low, "high": high,
                          "gain": scores - scores[0], "gain_low": gain_low, "gain_high": gain_high})
    return table, resampled


def minimal_pair_table(encoder: SentenceEncoder, decoder: Backbone, pairs: pd.DataFrame, k: int, depth: int = 10) -> pd.DataFrame:
    """Every minimal pair under one encoder.

    Returns:
        The pairs' columns and cosine, overlap (of k tokens); changed: share of the tokens that only one of the two
        sentences has that are among its `depth` highest; shared: the same of the tokens that both have. A share of no
        tokens (as of changed ones after a role swap) is missing.
    """
    texts = [*pairs["sentence1"], *pairs["sentence2"]]
    embeddings = encoder.encode(texts)
    first, second = np.split(embeddings, 2)
    ranks = embedding_ranks(decoder, embeddings, encoder.exit_layer, texts, deepest=depth)
    classes = token_classes(decoder.tokenizer, len(output_matrix(decoder)), DEFAULT_RULE)
    own = [set(row) for row in text_tokens(decoder.tokenizer, texts, classes)]
    common = [a & b for a, b in zip(own[: len(pairs)], own[len(pairs) :])]
    ranks = ranks.assign(pair=ranks["text"] % len(pairs), aligned=ranks["rank"] <= depth)
    ranks["both"] = [token in common[pair] for token, pair in zip(ranks["token"], ranks["pair"])]
    share = ranks.groupby(["pair", "both"])["aligned"].mean().unstack().reindex(range(len(pairs)))
    return pairs.assign(
        cosine=cosine(first, second), overlap=token_overlap(decoder, first, second, encoder.exit_layer, k),
        changed=share[False].to_numpy(), shared=share[True].to_numpy(),
    )


def separation(values: Sequence[float], positive: Sequence[bool], draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Area under the ROC curve: how often a positive pair's value is above a negative one's (ties count half).

    Returns it with its 95 % interval, which resamples each of the two groups: value, low, high.
    """
    values, positive, generator = np.asarray(values), np.asarray(positive, bool), np.random.default_rng(seed)
    above, below = values[positive], values[~positive]
    wins = np.sign(above[:, None] - below[None]) / 2 + 0.5
    rows = generator.multinomial(len(above), np.full(len(above), 1 / len(above)), draws) / len(above)
    columns = generator.multinomial(len(below), np.full(len(below), 1 / len(below)), draws) / len(below)
    low, high = np.percentile(np.einsum("dp,pn,dn->d", rows, wins, columns), [2.5, 97.5])
    return float(wins.mean()), float(low), float(high)
