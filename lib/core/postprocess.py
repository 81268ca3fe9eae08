"""What is done to finished embeddings, fitted on stated texts or the model alone and never on texts that are evaluated.
The principal components follow arXiv 2406.17378 and its official code, which does not centre first."""

import hashlib

import numpy as np


class Postprocess:
    """Called with embeddings, float32 (texts, hidden), it returns them changed. It may hold a vector (hidden,)."""

    def __init__(self, vector: np.ndarray = (), **numbers: float):
        self.vector, self.numbers = np.asarray(vector, np.float64), numbers

    def describe(self) -> dict:
        """The postprocess as plain data, for provenance and fingerprints."""
        digest = hashlib.sha256(self.vector.tobytes()).hexdigest()[:16]
        return {"postprocess": type(self).__name__, "vector": digest, **self.numbers}


class Normalise(Postprocess):
    """Scales every embedding to length 1; a row of zeros stays as it is."""

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


class MeanRemoved(Postprocess):
    """Subtracts a mean embedding (hidden,)."""

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings - self.vector).astype(np.float32)


class ComponentRemoved(Postprocess):
    """Takes away each embedding's part along a unit vector (hidden,)."""

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings - np.outer(embeddings @ self.vector, self.vector)).astype(np.float32)


class ComponentShifted(Postprocess):
    """Adds `amount` times a unit vector (hidden,): h + amount u. The paper's adjustment has amount v_1 and u_1."""

    def __init__(self, vector: np.ndarray, amount: float):
        super().__init__(vector, amount=float(amount))

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings + self.numbers["amount"] * self.vector).astype(np.float32)


def principal_components(embeddings: np.ndarray, centre: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Singular value decomposition of embeddings (texts, hidden), less their mean if `centre`.

    Returns the components, float64 (components, hidden), orthonormal right singular vectors u_1, u_2, ... as rows, and
    the singular values, float64, largest first. The sign of a component is free; here the texts' mean lies on its
    positive side, so that a negative change along it means less of what all texts share.
    """
    embeddings = np.asarray(embeddings, np.float64)
    mean = embeddings.mean(axis=0)
    _, values, components = np.linalg.svd(embeddings - mean if centre else embeddings, full_matrices=False)
    return components * np.where(components @ mean < 0, -1.0, 1.0)[:, None], values
