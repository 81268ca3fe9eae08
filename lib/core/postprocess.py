"""What is done to finished embeddings, fitted on stated texts or the model alone, never on texts that are evaluated."""

import hashlib
import json
from pathlib import Path

import numpy as np

from lib.core.backbone import Backbone


class Postprocess:
    """Called with embeddings, float32 (texts, hidden), it returns them changed. It may hold a vector (hidden,) or a
    matrix (hidden, kept), and numbers. `fitted_on` says in words on what, for the provenance."""

    def __init__(self, vector: np.ndarray = (), fitted_on: str = "", **numbers: float):
        self.vector, self.fitted_on, self.numbers = np.asarray(vector, np.float64), fitted_on, numbers

    def describe(self) -> dict:
        """The postprocess as plain data, for provenance and fingerprints."""
        about = {"fitted_on": self.fitted_on} if self.fitted_on else {}
        digest = hashlib.sha256(self.vector.tobytes()).hexdigest()[:16]
        return {"postprocess": type(self).__name__, "vector": digest, **self.numbers, **about}

    def save(self, path: Path) -> None:
        """Write it to one `.npz` file, which `load_postprocess` reads."""
        np.savez(path, vector=self.vector, about=json.dumps(self.describe()))


class Normalise(Postprocess):
    """Scales every embedding to length 1; a row of zeros stays as it is."""

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


class MeanRemoved(Postprocess):
    """Subtracts a mean embedding (hidden,): R1 of arXiv 2511.11041."""

    @classmethod
    def fit(cls, embeddings: np.ndarray, fitted_on: str = "") -> "MeanRemoved":
        """The mean of embeddings (texts, hidden)."""
        return cls(np.mean(embeddings, axis=0, dtype=np.float64), fitted_on)

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings - self.vector).astype(np.float32)


class ComponentRemoved(Postprocess):
    """Takes away each embedding's part along a unit vector (hidden,)."""

    @classmethod
    def fit(cls, embeddings: np.ndarray, fitted_on: str = "") -> "ComponentRemoved":
        """The first principal component u_1 of (texts, hidden), not centred, as in the code of arXiv 2406.17378."""
        return cls(principal_components(embeddings)[0][0], fitted_on)

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings - np.outer(embeddings @ self.vector, self.vector)).astype(np.float32)


class MeanDirectionRemoved(ComponentRemoved):
    """Takes away each embedding's part along the mean's direction, then normalises: R2 of arXiv 2511.11041."""

    @classmethod
    def fit(cls, embeddings: np.ndarray, fitted_on: str = "") -> "MeanDirectionRemoved":
        """The direction of the mean of embeddings (texts, hidden). `ValueError` if the mean is zero."""
        mean = np.mean(embeddings, axis=0, dtype=np.float64)
        if not (length := np.linalg.norm(mean)):
            raise ValueError("The mean of these embeddings is zero, so it has no direction.")
        return cls(mean / length, fitted_on)

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return Normalise()(super().__call__(embeddings))


class EmbedFilter(Postprocess):
    """Projects states after the final norm on the middle of the unembedding's spectrum, float32 (texts, hidden/tau)."""

    @classmethod
    def fit(cls, backbone: Backbone, tau: int = 2) -> "EmbedFilter":
        """Keep, of the model alone (arXiv 2606.07502), hidden / tau right singular vectors of the unembedding matrix
        (vocabulary, hidden), with as many dropped at either end. `ValueError` unless 1 <= tau <= hidden."""
        weight = backbone.unembedding.weight.detach()
        hidden = weight.shape[1]
        if not 1 <= tau <= hidden:
            raise ValueError(f"tau must be from 1 to the hidden size, {hidden}; got {tau}.")
        # The right singular vectors are the eigenvectors of the Gram matrix, summed up in slices to spare memory.
        gram = sum((part.double().T @ part.double()).cpu() for part in weight.split(16384))
        kept = hidden // tau
        skip = (hidden - kept) // 2
        vectors = np.linalg.eigh(gram.numpy())[1][:, ::-1]  # largest singular value first
        return cls(vectors[:, skip : skip + kept], f"unembedding of {backbone.name}", tau=tau)

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings @ self.vector).astype(np.float32)


class ComponentShifted(Postprocess):
    """Adds `amount` times a unit vector (hidden,): h + amount u. The paper's adjustment has amount v_1 and u_1."""

    def __init__(self, vector: np.ndarray, amount: float, fitted_on: str = ""):
        super().__init__(vector, fitted_on, amount=float(amount))

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        return (embeddings + self.numbers["amount"] * self.vector).astype(np.float32)


def load_postprocess(path: Path) -> Postprocess:
    """What `Postprocess.save` wrote. Raises `ValueError` for a kind that does not exist."""
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"])) | {"vector": file["vector"]}
    kinds = Normalise, MeanRemoved, ComponentRemoved, MeanDirectionRemoved, EmbedFilter, ComponentShifted
    name, kinds = about.pop("postprocess"), {kind.__name__: kind for kind in kinds}
    if name not in kinds:
        raise ValueError(f"{path} holds a {name!r}; choose from {', '.join(kinds)}.")
    return kinds[name](**about)


def principal_components(embeddings: np.ndarray, centre: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Singular value decomposition of embeddings (texts, hidden), less their mean if `centre`: the right singular
    vectors u_1, u_2, ... as rows, float64 (components, hidden), and the singular values, float64, largest first. The
    sign is free; here the texts' mean is on the positive side, so that less of u_1 is less of what all texts share."""
    embeddings = np.asarray(embeddings, np.float64)
    mean = embeddings.mean(axis=0)
    _, values, components = np.linalg.svd(embeddings - mean if centre else embeddings, full_matrices=False)
    return components * np.where(components @ mean < 0, -1.0, 1.0)[:, None], values
