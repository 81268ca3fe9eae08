"""Notebook 08: the training-free methods that came after the two papers beside Token Prepending, alone and combined."""

from collections.abc import Callable, Sequence

from lib.core.attention_values import AttentionValues
from lib.core.encoder import SentenceEncoder
from lib.core.postprocess import ComponentRemoved, EmbedFilter, MeanDirectionRemoved, MeanRemoved
from lib.report.settings import Setting

# The ways to read a prompt.
LAST, EXIT, TP, VALUES, BOTH, CP = "last layer", "exit layer", "TP", "AlignedWVA", "TP + AlignedWVA", "CP"
READINGS = (LAST, EXIT, TP, VALUES, BOTH, CP)
FILTER, DIRECTION = "EmbedFilter", "mean direction removed"
AFTER = {"mean removed": MeanRemoved, DIRECTION: MeanDirectionRemoved, "u1 removed": ComponentRemoved}
LADDER = {  # the steps of the ladder figure: a way to read, and what it adds to the one before
    LAST: "last layer", EXIT: "+ exit layer", TP: "+ TP", BOTH: "+ AlignedWVA",
    f"{BOTH}, {DIRECTION}": f"+ {DIRECTION}"}


def readings(encoder: Callable[..., SentenceEncoder], prompt: str, setting: Setting) -> dict[str, SentenceEncoder]:
    """Each way to read a prompt before any postprocess: label -> encoder. `encoder` makes one from (prompt, method,
    exit layer) and the pooling; CP is there if the setting has it."""
    at, values = setting.exit_layer, AttentionValues()
    found = {LAST: encoder(prompt), EXIT: encoder(prompt, None, at), TP: encoder(prompt, setting.method, at),
             VALUES: encoder(prompt, pooling=values), BOTH: encoder(prompt, setting.method, pooling=values)}
    return found | ({CP: encoder(prompt, setting.contrastive, at)} if setting.contrastive else {})


def postprocessed(encoder: SentenceEncoder, texts: Sequence[str], on: str) -> dict[str, SentenceEncoder]:
    """Label -> the encoder with a postprocess, fitted on its embeddings of texts (`on`, in words) never evaluated."""
    states = encoder.encode(texts)
    return {label: encoder.changed(postprocess=kind.fit(states, on)) for label, kind in AFTER.items()}


def filtered(encoder: SentenceEncoder, taus: Sequence[int] = (2, 4, 8)) -> dict[str, SentenceEncoder]:
    """The encoder, read after the final norm, with EmbedFilter at each tau: label -> encoder."""
    return {f"{FILTER}, tau {tau}": encoder.changed(postprocess=EmbedFilter.fit(encoder.backbone, tau)) for tau in taus}
