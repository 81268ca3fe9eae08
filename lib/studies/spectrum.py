"""The principal components of embeddings, what an embedder changes along them, and embeddings changed along them.

Source: arXiv 2406.17378 and its official code, which finds that most of what separates an embedder from its backbone lies
in the first component of the backbone's *uncentred* embeddings. Logits are linear only in what the unembedding reads, so
put states of earlier layers through `lib.evaluation.alignment.final_states` before anything here.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lib.evaluation.alignment import aligned_tokens, decode_logits
from lib.core.backbone import Backbone


def principal_components(embeddings: np.ndarray, centre: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Singular value decomposition of embeddings (texts, hidden), less their mean if `centre`.

    The paper does not centre, so its first component is close to the mean's direction.

    Returns:
        components, float64 (components, hidden): orthonormal right singular vectors u_1, u_2, ... as rows; and the singular
        values, float64, largest first. The sign of a component is free; here the texts' mean lies on its positive side,
        so that a negative change along it means less of what all texts share.
    """
    embeddings = np.asarray(embeddings, np.float64)
    mean = embeddings.mean(axis=0)
    _, values, components = np.linalg.svd(embeddings - mean if centre else embeddings, full_matrices=False)
    return components * np.where(components @ mean < 0, -1.0, 1.0)[:, None], values


def component_variation(backbone: np.ndarray, embedder: np.ndarray, components: np.ndarray) -> pd.DataFrame:
    """How embeddings of the same texts, (texts, hidden), differ along the backbone's components.

    Returns:
        One row per component: component (from 1); variation: v_i, the mean change from backbone to embedder along it;
        deviation: its standard deviation over texts; share: part of the squared norm of the mean change that lies in it;
        share_each: part of the summed squared norms of the texts' own changes.

    Raises `ValueError` if the two do not have the same shape.
    """
    if backbone.shape != embedder.shape:
        raise ValueError(f"Both need the same texts and width: {backbone.shape} and {embedder.shape}.")
    change = embedder.astype(np.float64) - backbone
    along = change @ components.T
    variation = along.mean(axis=0)
    return pd.DataFrame({
        "component": np.arange(1, len(components) + 1), "variation": variation, "deviation": along.std(axis=0),
        "share": variation**2 / (change.mean(axis=0) ** 2).sum(), "share_each": (along**2).sum(axis=0) / (change**2).sum(),
    })


def contributions(backbone: Backbone, state: np.ndarray, component: np.ndarray, k: int = 10) -> pd.DataFrame:
    """The k highest logits of a state (hidden,), split into the part along a unit vector (hidden,) and the rest.

    A bias of the unembedding (GPT-J, Phi) counts to the rest. Returns id, token, logit, along and rest.
    Raises `ValueError` if the logits are not linear in the state (the head of a masked model, as BERT's).
    """
    if not hasattr(backbone.unembedding, "weight"):
        raise ValueError(f"The logits of {backbone.name} are not linear in its states, so they have no parts that add up.")
    table = aligned_tokens(backbone, state[None], k=k).drop(columns="text")
    parts = np.stack([(state @ component) * component, np.zeros_like(component)])
    along, bias = decode_logits(backbone, parts.astype(np.float32))[:, table["id"]]
    return table.assign(along=along - bias, rest=table["logit"] - (along - bias))


def shift_component(embeddings: np.ndarray, component: np.ndarray, amount: float) -> np.ndarray:
    """h + amount * u for every embedding (texts, hidden), float32; the paper's adjustment is amount = v_1 with u_1."""
    return (embeddings + amount * component).astype(np.float32)


def remove_component(embeddings: np.ndarray, component: np.ndarray) -> np.ndarray:
    """Embeddings (texts, hidden) without their part along a unit vector (hidden,), float32."""
    return (embeddings - np.outer(embeddings @ component, component)).astype(np.float32)


def centre(embeddings: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Embeddings (texts, hidden) minus a mean (hidden,), float32."""
    return (embeddings - mean).astype(np.float32)
