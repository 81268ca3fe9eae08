"""The key tokens of embeddings, and the one direction in which an embedder leaves its backbone (notebook 04): by arXiv
2406.17378 and its code, the first component of the backbone's *uncentred* embeddings. Logits are linear only in what
the unembedding reads, so every spectrum here is one of last-layer embeddings."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.core.postprocess import ComponentRemoved, ComponentShifted, MeanRemoved, principal_components
from lib.data.sources import EvaluationData
from lib.evaluation.alignment import aligned_tokens, alignment_metrics, alignment_scores, decode_logits, embedding_ranks
from lib.evaluation.intervals import SPEARMAN, compare
from lib.evaluation.sts import cosine, sts_pairs
from lib.evaluation.vocabulary import RULES

Encoders, Spectra = dict[Hashable, SentenceEncoder], dict[str, "Spectrum"]
MERGED, CONTENT = list(RULES)[-2:]  # case and spaces merged, as everywhere; and content words alone
SHARES = ["of mean change", "of texts' changes"]
STUDIED = ("Hit@10", "LAR", "Hit@10, content words", "LAR, content words")


def key_token_scores(encoders: Encoders, decoder: Backbone, texts: Sequence[str], rules=(MERGED, CONTENT), layers=(-1,),
                     ks=(10,), reference: Hashable = None, draws: int = 1000) -> pd.DataFrame:
    """How well embeddings, decoded by `decoder`, align to the tokens of their own texts: `alignment_scores` under every
    rule (a name in `RULES`; `CONTENT` is named in the metric) at every layer, after columns rule, layer (0 to last)."""
    index, tables = [decoder.layer_index(n) for n in layers], {}
    states = {run: encoder.encode_layers(texts, index) for run, encoder in encoders.items()}
    for rule, layer in product(rules, index):
        ranks = {run: embedding_ranks(decoder, of[layer], layer, texts, RULES[rule]) for run, of in states.items()}
        tables[rule, layer] = alignment_scores(ranks, ks, reference, draws)
    table = pd.concat(tables, names=["rule", "layer", "row"]).reset_index().drop(columns="row")
    table["metric"] += np.where(table["rule"] == CONTENT, ", content words", "")
    return table


def gain_relation(encoders: Encoders, decoder: Backbone, data: EvaluationData, layers, draws=1000) -> pd.DataFrame:
    """Whether an STS pair whose sentences gain in alignment also gains in STS, from the first encoder to the others.
    A pair gains in LAR by the mean change of its sentences' LAR (one without tokens has none: the pair is left out),
    and in STS by how much nearer the rank of its similarity comes to that of its gold score, in percent of all ranks.
    Columns variant, layer, gain in LAR and gain in STS (means over pairs), and spearman of the two x 100, low, high."""
    sentences, before, rows = [*data["sentence1"], *data["sentence2"]], {}, []
    for variant, encoder in encoders.items():
        for layer, states in encoder.encode_layers(sentences, [decoder.layer_index(n) for n in layers]).items():
            rates = alignment_metrics(embedding_ranks(decoder, states, layer, sentences), (10,))["LAR"]
            rates = rates.reindex(range(len(sentences))).to_numpy().reshape(2, -1)
            distances = np.abs(rankdata(cosine(*np.split(states, 2))) - rankdata(data["score"])) / len(data)
            if layer not in before:
                before[layer] = rates, distances
                continue
            in_lar, in_sts = (rates - before[layer][0]).mean(axis=0), 100 * (before[layer][1] - distances)
            gains = pd.DataFrame({"gold": in_lar, "similarity": in_sts}).dropna()  # the names that SPEARMAN reads
            found = compare({variant: gains.assign(task=data.name, item=gains.index)}, SPEARMAN, draws=draws)
            rows.append((variant, layer, *gains.mean(), *found.loc[0, ["value", "low", "high"]]))
    return pd.DataFrame(rows, columns=["variant", "layer", "gain in LAR", "gain in STS", "spearman", "low", "high"])


@dataclass(frozen=True)
class Spectrum:
    """How an embedder's embeddings of some texts differ from an encoder's, along the encoder's principal components."""

    first: np.ndarray  # u_1 (see `principal_components`), float64 (hidden,)
    v1: float  # the mean change along it
    mean: np.ndarray  # of the encoder's embeddings, float64 (hidden,)
    # Columns component (from 1); variation, v_i, the mean change along it; deviation, that over texts; and `SHARES`, of
    # the squared norms of the mean change and, summed, of the texts' own changes, from 0 to 1.
    variation: pd.DataFrame

    @classmethod
    def between(cls, embeddings: np.ndarray, target: np.ndarray, centre: bool = False) -> "Spectrum":
        """From embeddings to an embedder's, `target`, both (texts, hidden). `ValueError` if their shapes differ."""
        if embeddings.shape != target.shape:
            raise ValueError(f"Both need the same texts and width: {embeddings.shape} and {target.shape}.")
        components, _ = principal_components(embeddings, centre)
        change = target.astype(np.float64) - embeddings
        along = change @ components.T
        variation = along.mean(axis=0)
        table = pd.DataFrame({
            "component": range(1, len(components) + 1), "variation": variation, "deviation": along.std(axis=0),
            SHARES[0]: variation**2 / (change.mean(axis=0) ** 2).sum(),
            SHARES[1]: (along**2).sum(axis=0) / (change**2).sum()})
        return cls(components[0], float(variation[0]), embeddings.mean(axis=0, dtype=np.float64), table)

    def shift(self, multiple: float = 1.0) -> ComponentShifted:
        """h + multiple v_1 u_1 for every embedding h; the paper's adjustment has the multiple 1."""
        return ComponentShifted(self.first, amount=multiple * self.v1)


def contributions(backbone: Backbone, state: np.ndarray, component: np.ndarray, k: int = 10) -> pd.DataFrame:
    """The k highest logits of a state (hidden,), split into the part along a unit vector (hidden,) and the rest, which
    has any bias: columns id, token, logit, along, rest. `ValueError` for a masked model's head, which is not linear."""
    if not hasattr(backbone.unembedding, "weight"):
        raise ValueError(f"The logits of {backbone.name} are not linear in its states, so they have no such parts.")
    table = aligned_tokens(backbone, state[None], k=k).drop(columns="text")
    parts = np.stack([(state @ component) * component, np.zeros_like(component)])
    along, bias = decode_logits(backbone, parts.astype(np.float32))[:, table["id"]]
    return table.assign(along=along - bias, rest=table["logit"] - (along - bias))


def spectrum_stability(changes: dict[str, tuple[np.ndarray, np.ndarray]], sizes: Sequence[int]) -> pd.DataFrame:
    """How much of a change, from embeddings (texts, hidden) to others of the same texts, lies along the first component
    of the former, by N texts drawn at random (texts may be in an order of topics). `changes`: name -> both. Columns
    change, N, v_1, cosine (of u_1 with that of all texts), and each of `SHARES`, 0 to 1, uncentred and centred."""
    rows = []
    for name, both in changes.items():
        (whole, _), order = principal_components(both[0]), np.random.default_rng(0).permutation(len(both[0]))
        for n in sorted({min(size, len(order)) for size in sizes}):
            plain, centred = (Spectrum.between(*(of[order[:n]] for of in both), centre) for centre in (False, True))
            shares = [part.variation.loc[0, share] for share in SHARES for part in (plain, centred)]
            rows.append((name, n, plain.v1, abs(plain.first @ whole[0]), *shares))
    names = (f"{share}{ending}" for share in SHARES for ending in ("", ", centred"))
    return pd.DataFrame(rows, columns=["change", "N", "v_1", "cosine", *names])


def shift_study(encoders: Encoders, spectra: Spectra, decoder: Backbone, texts, multiples, draws=200) -> pd.DataFrame:
    """The metrics of `STUDIED` after `Spectrum.shift` by each multiple: method, amount, metric, value, low, high."""
    shifted = {(name, m): encoder.changed(postprocess=spectra[name].shift(m))
               for (name, encoder), m in product(encoders.items(), multiples)}
    scores = key_token_scores(shifted, decoder, texts, draws=draws)
    scores["method"], scores["amount"] = zip(*scores["run"])
    return scores.loc[scores["metric"].isin(STUDIED), ["method", "amount", "metric", "value", "low", "high"]]


def adjustments(encoders: Encoders, spectra: Spectra, decoder: Backbone, data: EvaluationData, draws=1000):
    """What shifting, centring and removing the first component do to STS and to alignment, on the pairs of `data`:
    method, adjustment, `STUDIED`, STS (Spearman x 100); against none difference, difference_low, difference_high."""
    tables = []
    for method, spectrum in spectra.items():
        ways = {"none": None, "shifted by v_1": spectrum.shift(), "mean subtracted": MeanRemoved(spectrum.mean),
                "first component removed": ComponentRemoved(spectrum.first)}
        adjusted = {name: encoders[method].changed(postprocess=way) for name, way in ways.items()}
        scores = key_token_scores(adjusted, decoder, data.texts, draws=0).pivot(index="run", columns="metric")["value"]
        sts = {name: sts_pairs(changed, {data.name: data}) for name, changed in adjusted.items()}
        tables.append(compare(sts, SPEARMAN, "none", draws=draws).join(scores, on="run").assign(method=method))
    columns = ["method", "adjustment", *STUDIED, "STS", "difference", "difference_low", "difference_high"]
    return pd.concat(tables, ignore_index=True).rename(columns={"run": "adjustment", "value": "STS"})[columns]
