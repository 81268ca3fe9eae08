"""What is done to finished embeddings: the last of an encoder's four choices.

Each is fitted on stated texts, or on the model alone, and never on the texts that are evaluated. The principal
components follow arXiv 2406.17378 and its official code, which does not centre embeddings first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Postprocess(Protocol):
    """What an encoder expects of a postprocess. `describe`: itself as plain data, for provenance and fingerprints."""

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """Embeddings float32 (texts, hidden) -> the same shape and dtype."""

    def describe(self) -> dict: ...


@dataclass(frozen=True)
class Normalise:
    """Scales every embedding to length 1; a row of zeros stays as it is."""

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)

    def describe(self) -> dict:
        return {"postprocess": "Normalise"}


class _Fitted:
    """A postprocess that works with one vector (hidden,), float64."""

    def __init__(self, vector: np.ndarray, **numbers: float):
        self.vector, self.numbers = np.asarray(vector, np.float64), numbers

    def describe(self) -> dict:
        digest = hashlib.sha256(self.vector.tobytes()).hexdigest()[:16]
        return {"postprocess": type(self).__name__, "vector": digest, **self.numbers}


class MeanRemoved(_Fitted):
    """Subtracts a mean embedding (hidden,)."""

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings - self.vector).astype(np.float32)


class ComponentRemoved(_Fitted):
    """Takes away each embedding's part along a unit vector (hidden,)."""

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings - np.outer(embeddings @ self.vector, self.vector)).astype(np.float32)


class ComponentShifted(_Fitted):
    """Adds `amount` times a unit vector (hidden,): h + amount u. The paper's adjustment has amount v_1 and u_1."""

    def __init__(self, vector: np.ndarray, amount: float):
        super().__init__(vector, amount=float(amount))

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings + self.numbers["amount"] * self.vector).astype(np.float32)


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
