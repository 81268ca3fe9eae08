"""The comparisons of notebook 04 that take more than one call: gains, stability of the spectrum, adjusted embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import rankdata

from lib.evaluation.alignment import alignment_metrics, alignment_scores, embedding_ranks
from lib.core.backbone import Backbone
from lib.studies.spectrum import centre, component_variation, principal_components, remove_component, shift_component
from lib.evaluation.sts import bootstrap_spearman, compare_runs, cosine, spearman
from lib.evaluation.vocabulary import CONTENT_RULE, DEFAULT_RULE, TokenRule

CONTENT = ", content words"
STUDIED = ("Hit@10", "LAR", f"Hit@10{CONTENT}", f"LAR{CONTENT}")


def gain_relation(
    pairs: dict[str, pd.DataFrame], ranks: dict[str, pd.DataFrame], data: Dataset, texts: Sequence[str], draws: int = 1000
) -> dict[str, float]:
    """Whether a pair whose sentences gain in alignment also gains in STS.

    Args:
        pairs: "plain" and "TP" -> table from `lib.evaluation.sts.sts_pairs` over `data`, one layer. ranks: the same two -> table from
            `lib.evaluation.alignment.token_ranks` over `texts`, which hold every sentence of `data`.

    Returns:
        gain in LAR: the two sentences' change; gain in STS: how much nearer the rank of the similarity comes to the rank of
        the gold score, in percent of all ranks (both: mean over pairs); spearman: of the two gains x 100, with its 95 %
        bootstrap interval low, high.
    """
    rates = {v: alignment_metrics(r, (10,))["LAR"].reindex(range(len(texts))).to_numpy() for v, r in ranks.items()}
    alignment = (rates["TP"] - rates["plain"])[_places(data, texts)].mean(axis=0)
    distance = {v: np.abs(rankdata(p["similarity"]) - rankdata(p["gold"])) / len(p) for v, p in pairs.items()}
    known = ~np.isnan(alignment)  # a sentence without tokens that count has no rate
    alignment, gain = alignment[known], 100 * (distance["plain"] - distance["TP"])[known]
    # A resample of few pairs can hold one value only, and then has no correlation.
    low, high = np.nanpercentile(bootstrap_spearman(alignment, gain[None], draws), [2.5, 97.5])
    means = {"gain in LAR": alignment.mean(), "gain in STS": gain.mean()}
    return means | {"spearman": spearman(alignment, gain), "low": low, "high": high}


def spectrum_stability(states: dict[str, np.ndarray], target: np.ndarray, sizes: Sequence[int]) -> pd.DataFrame:
    """The first component from the first N texts, uncentred and centred: how much of the change to `target` lies in it.

    Args:
        states: method -> embeddings (texts, hidden). target: those of the embedder, the same texts.

    Returns columns method, N, centred, v_1, share, share_each (see `lib.studies.spectrum.component_variation`, over the N texts) and
    cosine with the uncentred first component of all texts.
    """
    rows = []
    for method, embeddings in states.items():
        whole = principal_components(embeddings)[0][0]
        counts = sorted({min(size, len(embeddings)) for size in sizes})
        for centred, n in product((False, True), counts):
            components = principal_components(embeddings[:n], centred)[0]
            first = component_variation(embeddings[:n], target[:n], components).iloc[0]
            shares = first[["variation", "share", "share_each"]]
            rows.append((method, n, centred, *shares, abs(components[0] @ whole)))
    return pd.DataFrame(rows, columns=["method", "N", "centred", "v_1", "share", "share_each", "cosine"])


def two_rule_scores(runs: Callable[[TokenRule], dict], ks: Sequence[int] = (10,), draws: int = 200) -> pd.DataFrame:
    """`alignment_scores` of all tokens, and of content words alone (metrics named so).

    `runs` gives for a counting rule the tables of `lib.evaluation.alignment.token_ranks` by label.
    """
    content = alignment_scores(runs(CONTENT_RULE), ks, draws=draws)
    content["metric"] += CONTENT
    return pd.concat([alignment_scores(runs(DEFAULT_RULE), ks, draws=draws), content], ignore_index=True)


def shift_study(
    backbone: Backbone, states: dict[str, np.ndarray], texts: Sequence[str], first: dict[str, np.ndarray],
    v1: dict[str, float], multiples: Sequence[float],
) -> pd.DataFrame:
    """Alignment of the last layer's embeddings after h + m v_1 u_1, for each multiple m.

    Args:
        states: method -> embeddings (texts, hidden). first, v1: method -> u_1 (hidden,) and v_1.

    Returns columns method, amount (m), metric (of `STUDIED`), value, low, high.
    """
    tables = []
    for method, h in states.items():
        scores = _decoded_scores(backbone, {m: shift_component(h, first[method], m * v1[method]) for m in multiples}, texts)
        tables.append(scores.rename(columns={"run": "amount"}).assign(method=method))
    return pd.concat(tables)


def adjustments(
    backbone: Backbone, states: dict[str, np.ndarray], texts: Sequence[str], data: Dataset, corpus: dict[str, np.ndarray],
    components: dict[str, np.ndarray], v1: dict[str, float], draws: int = 1000,
) -> pd.DataFrame:
    """What shifting, centring and removing the first component do to alignment and to STS.

    Args:
        states: method -> last layer's embeddings of `texts`, which hold every sentence of `data`. corpus: method ->
            embeddings that mean, components and v_1 come from.

    Returns columns method, adjustment, those of `STUDIED`, STS (Spearman x 100), and change, low, high of STS against none.
    """
    at, tables = _places(data, texts), []
    for method, h in states.items():
        u1 = components[method][0]
        adjusted = {
            "none": h, "shifted by v_1": shift_component(h, u1, v1[method]),
            "mean subtracted": centre(h, corpus[method].mean(axis=0)), "first component removed": remove_component(h, u1),
        }
        aligned = _decoded_scores(backbone, adjusted, texts, draws=2).pivot(index="run", columns="metric", values="value")
        runs = {name: pd.DataFrame({"gold": data["score"], "similarity": cosine(*e[at])}) for name, e in adjusted.items()}
        sts = compare_runs(runs, "none", draws).set_index("run")[["score", "difference", "low", "high"]]
        tables.append(aligned.loc[list(adjusted)].join(sts).reset_index(names="adjustment").assign(method=method))
    table = pd.concat(tables).rename(columns={"score": "STS", "difference": "change"})
    return table[["method", "adjustment", *STUDIED, "STS", "change", "low", "high"]]


def _decoded_scores(backbone: Backbone, embeddings: dict, texts: Sequence[str], draws: int = 200) -> pd.DataFrame:
    """`two_rule_scores` of the last layer's embeddings of `texts`, by label; metrics of `STUDIED` only."""
    def ranks(rule: TokenRule) -> dict:
        return {label: embedding_ranks(backbone, states, -1, texts, rule) for label, states in embeddings.items()}

    scores = two_rule_scores(ranks, draws=draws)
    return scores[scores["metric"].isin(STUDIED)]


def _places(data: Dataset, texts: Sequence[str]) -> np.ndarray:
    """Where the two sentences of each pair stand in `texts`, (2, pairs)."""
    place = {text: i for i, text in enumerate(texts)}
    return np.array([[place[s] for s in data[column]] for column in ("sentence1", "sentence2")])
