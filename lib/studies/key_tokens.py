"""The key tokens of embeddings, and the one direction in which an embedder leaves its backbone (notebook 04).

Source: arXiv 2406.17378 and its official code. They find that most of what separates an embedder from its backbone lies
in the first component of the backbone's *uncentred* embeddings. Logits are linear only in what the unembedding reads,
so every spectrum here is one of last-layer embeddings.
"""

from __future__ import annotations

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
from lib.evaluation.sts import sts_pairs
from lib.evaluation.vocabulary import RULES

MERGED, CONTENT = list(RULES)[-2:]  # case and spaces merged, as everywhere; and content words alone
STUDIED = ("Hit@10", "LAR", "Hit@10, content words", "LAR, content words")


def key_token_scores(
    encoders: dict[Hashable, SentenceEncoder], decoder: Backbone, texts: Sequence[str],
    rules: Sequence[str] = (MERGED, CONTENT), layers: Sequence[int] = (-1,), ks: Sequence[int] = (10,),
    reference: Hashable | None = None, draws: int = 1000,
) -> pd.DataFrame:
    """How well embeddings of texts align to the tokens of these texts, for every counting rule and layer.

    Args:
        encoders: run -> encoder. decoder: the backbone whose unembedding decodes the embeddings of all of them.
        rules: names in `lib.evaluation.vocabulary.RULES`. layers: in Hugging Face's numbering.
        ks, reference, draws: as in `lib.evaluation.alignment.alignment_scores`.

    Returns:
        Columns rule, layer (0 to num_layers), and those of `alignment_scores`. Metrics under `CONTENT` are named so, as
        in `LAR, content words`.
    """
    index, tables = [decoder.layer_index(n) for n in layers], []
    states = {run: encoder.encode_layers(texts, index) for run, encoder in encoders.items()}
    for rule, layer in product(rules, index):
        ranks = {run: embedding_ranks(decoder, of[layer], layer, texts, RULES[rule]) for run, of in states.items()}
        table = alignment_scores(ranks, ks, reference, draws)
        table["metric"] += ", content words" if rule == CONTENT else ""
        table.insert(0, "rule", rule)
        table.insert(1, "layer", layer)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def gain_relation(
    encoders: dict[str, SentenceEncoder], decoder: Backbone, data: EvaluationData, layers: Sequence[int],
    draws: int = 1000,
) -> pd.DataFrame:
    """Whether a pair whose sentences gain in alignment also gains in STS, from the baseline to other encoders.

    A pair gains in LAR by the mean change of its two sentences' LAR, and in STS by how much nearer the rank of its
    similarity comes to the rank of its gold score, in percent of all ranks. Pairs with a sentence in which no token
    counts have no LAR and are left out.

    Args:
        encoders: "baseline" and other variants. data: with columns of `lib.data.sts.load_sts`.

    Returns:
        A row per variant and layer: variant, layer; gain in LAR and gain in STS, means over pairs; spearman of the two
        gains x 100, with its 95 % bootstrap interval over pairs low, high.
    """
    sentences = [*data["sentence1"], *data["sentence2"]]
    texts = list(dict.fromkeys(sentences))
    places = pd.Series(range(len(texts)), texts)[sentences].to_numpy().reshape(2, -1)
    rates, distances, rows = {}, {}, []
    for variant, encoder in encoders.items():
        pairs, states = sts_pairs(encoder, {data.name: data}, layers), encoder.encode_layers(texts, layers)
        for layer in layers:
            ranks = embedding_ranks(decoder, states[layer], layer, texts)
            rates[variant, layer] = alignment_metrics(ranks, (10,))["LAR"].reindex(range(len(texts))).to_numpy()[places]
            of = pairs[pairs["layer"] == decoder.layer_index(layer)]
            distances[variant, layer] = np.abs(rankdata(of["similarity"]) - rankdata(of["gold"])) / len(data)
    for variant, layer in product([name for name in encoders if name != "baseline"], layers):
        in_lar = (rates[variant, layer] - rates["baseline", layer]).mean(axis=0)
        in_sts = 100 * (distances["baseline", layer] - distances[variant, layer])
        gains = pd.DataFrame({"gold": in_lar, "similarity": in_sts}).dropna()  # the names that SPEARMAN reads
        table = {variant: gains.assign(task=data.name, item=gains.index)}
        spearman = compare(table, SPEARMAN, draws=draws).loc[0, ["value", "low", "high"]]
        rows.append((variant, decoder.layer_index(layer), *gains.mean(), *spearman))
    return pd.DataFrame(rows, columns=["variant", "layer", "gain in LAR", "gain in STS", "spearman", "low", "high"])


@dataclass(frozen=True)
class Spectrum:
    """The principal components of an encoder's embeddings, and how an embedder's embeddings of the same texts differ.

    Args:
        components: float64 (components, hidden), u_1, u_2, ... as rows, see `principal_components`.
        mean: float64 (hidden,), of the encoder's embeddings. variation: from `component_variation`.
    """

    components: np.ndarray
    mean: np.ndarray
    variation: pd.DataFrame

    @classmethod
    def between(cls, embeddings: np.ndarray, target: np.ndarray, centre: bool = False) -> Spectrum:
        """Of embeddings (texts, hidden), with the change to those of an embedder, `target`, of the same shape."""
        components, _ = principal_components(embeddings, centre)
        variation = component_variation(embeddings, target, components)
        return cls(components, embeddings.mean(axis=0, dtype=np.float64), variation)

    @property
    def first(self) -> np.ndarray:
        """u_1, float64 (hidden,)."""
        return self.components[0]

    @property
    def v1(self) -> float:
        """v_1, the embedder's mean change along u_1."""
        return float(self.variation["variation"].iloc[0])

    def shift(self, multiple: float = 1.0) -> ComponentShifted:
        """h + multiple v_1 u_1 for every embedding h; the paper's adjustment has the multiple 1."""
        return ComponentShifted(self.first, multiple * self.v1)

def component_variation(backbone: np.ndarray, embedder: np.ndarray, components: np.ndarray) -> pd.DataFrame:
    """How embeddings of the same texts, (texts, hidden), differ along the backbone's components.

    Returns:
        One row per component: component (from 1); variation: v_i, the mean change from backbone to embedder along it;
        deviation: its standard deviation over texts; share: part of the squared norm of the mean change that lies in
        it; share_each: part of the summed squared norms of the texts' own changes.

    Raises `ValueError` if the two do not have the same shape.
    """
    if backbone.shape != embedder.shape:
        raise ValueError(f"Both need the same texts and width: {backbone.shape} and {embedder.shape}.")
    change = embedder.astype(np.float64) - backbone
    along = change @ components.T
    table = pd.DataFrame({"variation": along.mean(axis=0), "deviation": along.std(axis=0)})
    table.insert(0, "component", np.arange(1, len(components) + 1))
    table["share"] = table["variation"] ** 2 / (change.mean(axis=0) ** 2).sum()
    return table.assign(share_each=(along**2).sum(axis=0) / (change**2).sum())


def contributions(backbone: Backbone, state: np.ndarray, component: np.ndarray, k: int = 10) -> pd.DataFrame:
    """The k highest logits of a state (hidden,), split into the part along a unit vector (hidden,) and the rest.

    A bias of the unembedding (GPT-J, Phi) counts to the rest. Returns id, token, logit, along and rest.
    Raises `ValueError` if the logits are not linear in the state (the head of a masked model, as BERT's).
    """
    if not hasattr(backbone.unembedding, "weight"):
        raise ValueError(f"The logits of {backbone.name} are not linear in its states, so they have no such parts.")
    table = aligned_tokens(backbone, state[None], k=k).drop(columns="text")
    parts = np.stack([(state @ component) * component, np.zeros_like(component)])
    along, bias = decode_logits(backbone, parts.astype(np.float32))[:, table["id"]]
    return table.assign(along=along - bias, rest=table["logit"] - (along - bias))


def spectrum_stability(states: dict[str, np.ndarray], target: np.ndarray, sizes: Sequence[int]) -> pd.DataFrame:
    """The first component from the first N texts, uncentred and centred: how much of the change to `target` lies in it.

    Args:
        states: method -> embeddings (texts, hidden). target: those of the embedder, the same texts.

    Returns columns method, N, centred, v_1, share, share_each (see `component_variation`, over the N texts), and cosine
    with the uncentred first component of all texts.
    """
    rows = []
    for method, embeddings in states.items():
        whole = principal_components(embeddings)[0][0]
        counts = sorted({min(size, len(embeddings)) for size in sizes})
        for centred, n in product((False, True), counts):
            part = Spectrum.between(embeddings[:n], target[:n], centred)
            shares = part.variation.loc[0, ["share", "share_each"]]
            rows.append((method, n, centred, part.v1, *shares, abs(part.first @ whole)))
    return pd.DataFrame(rows, columns=["method", "N", "centred", "v_1", "share", "share_each", "cosine"])


def shift_study(
    encoders: dict[str, SentenceEncoder], spectra: dict[str, Spectrum], decoder: Backbone, texts: Sequence[str],
    multiples: Sequence[float], draws: int = 200,
) -> pd.DataFrame:
    """Alignment after `Spectrum.shift` by each multiple.

    Returns columns method, amount (the multiple), and metric (of `STUDIED`), value, low, high of `key_token_scores`.
    """
    shifted = {(name, m): encoder.changed(postprocess=spectra[name].shift(m))
               for (name, encoder), m in product(encoders.items(), multiples)}
    scores = key_token_scores(shifted, decoder, texts, draws=draws)
    scores["method"], scores["amount"] = zip(*scores["run"])
    return scores.loc[scores["metric"].isin(STUDIED), ["method", "amount", "metric", "value", "low", "high"]]


def adjustments(
    encoders: dict[str, SentenceEncoder], spectra: dict[str, Spectrum], decoder: Backbone, data: EvaluationData,
    draws: int = 1000,
) -> pd.DataFrame:
    """What shifting, centring and removing the first component do to STS and to alignment, on the pairs of `data`.

    Returns columns method, adjustment, those of `STUDIED`, STS (Spearman x 100), and difference, difference_low and
    difference_high of STS, against embeddings without adjustment.
    """
    texts, tables = list(dict.fromkeys([*data["sentence1"], *data["sentence2"]])), []
    for method, encoder in encoders.items():
        spectrum = spectra[method]
        ways = {"none": None, "shifted by v_1": spectrum.shift(), "mean subtracted": MeanRemoved(spectrum.mean),
                "first component removed": ComponentRemoved(spectrum.first)}
        adjusted = {name: encoder.changed(postprocess=way) for name, way in ways.items()}
        scores = key_token_scores(adjusted, decoder, texts, draws=0).set_index(["run", "metric"])["value"].unstack()
        sts = {name: sts_pairs(changed, {data.name: data}) for name, changed in adjusted.items()}
        sts = compare(sts, SPEARMAN, "none", draws=draws).rename(columns={"value": "STS", "run": "adjustment"})
        tables.append(sts.join(scores, on="adjustment").assign(method=method))
    columns = ["method", "adjustment", *STUDIED, "STS", "difference", "difference_low", "difference_high"]
    return pd.concat(tables, ignore_index=True)[columns]
