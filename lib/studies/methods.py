"""Notebook 08: the training-free methods that came after the two papers beside Token Prepending, alone and combined."""

from collections.abc import Callable, Sequence
from itertools import product

import pandas as pd

from lib.core.attention_values import AttentionValues
from lib.core.backbone import Backbone
from lib.core.contrastive import ContrastivePrompting
from lib.core.encoder import SentenceEncoder
from lib.core.postprocess import ComponentRemoved, EmbedFilter, MeanDirectionRemoved, MeanRemoved
from lib.core.store import EmbeddingStore
from lib.data.sources import EvaluationData
from lib.evaluation.sts import spearman, sts_pairs
from lib.report.settings import Setting

# The ways to read a prompt.
LAST, EXIT, TP, VALUES, BOTH, CP = "last layer", "exit layer", "TP", "AlignedWVA", "TP + AlignedWVA", "CP"
READINGS = (LAST, EXIT, TP, VALUES, BOTH, CP)
AFTER = {"mean removed": MeanRemoved, "mean direction removed": MeanDirectionRemoved, "u1 removed": ComponentRemoved}
FILTER = "EmbedFilter"
LADDER = {  # the steps of the ladder figure: a way to read, and what it adds to the one before
    LAST: "last layer", EXIT: "+ exit layer", TP: "+ TP", BOTH: "+ AlignedWVA",
    f"{BOTH}, mean direction removed": "+ mean direction removed",
}
TAUS = (2, 4, 8)
# The paper's grid, on a model of 32 blocks: blocks 2 to 6, strengths 0.5 to 4.
BLOCKS, STRENGTHS = (2, 3, 4, 6), (0.5, 1.0, 2.0, 4.0)


def readings(encoder: Callable[..., SentenceEncoder], prompt: str, setting: Setting) -> dict[str, SentenceEncoder]:
    """Each way to read a prompt before any postprocess: label -> encoder. `encoder` makes one from (prompt, method,
    exit layer) and the pooling; CP is there if the setting has it."""
    at, values = setting.exit_layer, AttentionValues()
    found = {LAST: encoder(prompt), EXIT: encoder(prompt, None, at), TP: encoder(prompt, setting.method, at),
             VALUES: encoder(prompt, pooling=values), BOTH: encoder(prompt, setting.method, pooling=values)}
    return found | ({CP: encoder(prompt, setting.contrastive, at)} if setting.contrastive else {})


def postprocessed(encoder: SentenceEncoder, texts: Sequence[str], on: str) -> dict[str, SentenceEncoder]:
    """The encoder with each postprocess, fitted on its own embeddings of these texts: label -> encoder.

    `on` says in words which texts these are: never those that are evaluated.
    """
    states = encoder.encode(texts)
    return {label: encoder.changed(postprocess=kind.fit(states, on)) for label, kind in AFTER.items()}


def filtered(encoder: SentenceEncoder, taus: Sequence[int] = TAUS) -> dict[str, SentenceEncoder]:
    """The encoder, read after the final norm, with EmbedFilter at each tau: label -> encoder."""
    return {f"{FILTER}, tau {tau}": encoder.changed(postprocess=EmbedFilter.fit(encoder.backbone, tau)) for tau in taus}


def search_contrastive(
    backbone: Backbone, prompt: str, exit_layer: int, data: EvaluationData, store: EmbeddingStore | None = None
) -> pd.DataFrame:
    """Spearman x 100 of every setting of CP on STS pairs at one layer: columns block, strength, rule, value."""
    grid = [*product(BLOCKS, STRENGTHS, ["NS"]), *product(BLOCKS, [1.0], ["NR"])]
    rows = []
    for block, strength, rule in grid:
        method = ContrastivePrompting(block, strength, rule)
        pairs = sts_pairs(SentenceEncoder(backbone, prompt, method, exit_layer, store=store), {data.name: data})
        rows.append((block, strength, rule, spearman(pairs["gold"], pairs["similarity"])))
    return pd.DataFrame(rows, columns=["block", "strength", "rule", "value"])
