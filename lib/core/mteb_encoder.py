"""A `SentenceEncoder` as an encoder of mteb (version 2), so that `mteb.evaluate` can score it. mteb is needed here alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from lib.core.encoder import SentenceEncoder
from lib.core.store import fingerprint

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
except ImportError as error:
    raise ImportError(f'lib.core.mteb_encoder needs mteb and cannot import it ({error}): pip install "mteb>=2,<3"') from error


class MtebEncoder(AbsEncoder):
    """What mteb's `EncoderProtocol` asks for (mteb 2.26, `mteb/models/models_protocols.py`).

    The prompt is the encoder's own for every task and both sides of a pair; mteb's instructions are not used. Similarity is
    the cosine. mteb files results by `mteb_model_meta`: name and revision (see `mteb_identity`) and `experiment_kwargs`,
    which hold the main settings as plain values (mteb hashes a long list) and a fingerprint of all settings and of the code.
    """

    def __init__(self, encoder: SentenceEncoder):
        name, revision = mteb_identity(encoder.backbone.name, encoder.backbone.revision, encoder.backbone.fingerprint)
        about = encoder.describe()
        method = about["method"] or {"method": "baseline"}
        method = {key: method[key] for key in ("method", "start", "end", "init") if key in method}
        if not isinstance(method.get("init", ""), str):
            method["init"] = "vector"
        experiment = {key: about[key] for key in ("prompt", "exit_layer", "pooling", "dtype")}
        experiment |= {key if key == "method" else f"method_{key}": value for key, value in method.items()}
        experiment |= {"setting": fingerprint(about | {"code": encoder.code})}
        self.encoder = encoder
        overwrites = {"name": name, "revision": revision, "experiment_kwargs": experiment}
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=overwrites)

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs) -> np.ndarray:
        """Embed mteb's batches, dicts with a list of texts in `"text"`: float32 (texts, hidden), in their order.

        `kwargs` are mteb's `encode_kwargs`: `batch_size` and what else `SentenceEncoder.encode` takes. Its batches are made
        anew, of texts of one length. The other arguments tell of the task, and change nothing.

        Raises:
            ValueError: no texts, a batch size below 1, or a `precision` other than float32. TypeError: an unknown option.
        """
        if (precision := kwargs.pop("precision", "float32")) != "float32":
            raise ValueError(f"Embeddings come in float32 only, not as precision={precision!r}.")
        return self.encoder.encode([text for batch in inputs for text in batch["text"]], **kwargs)


def mteb_identity(name: str, revision: str, weights: str) -> tuple[str, str]:
    """Name and revision for mteb, which wants `organisation/name`: of a model from the hub its id and commit, of any other
    (a folder, the embedded model) `local/` with the last part of its name, and `weights`, the fingerprint of its weights."""
    if re.fullmatch("[0-9a-f]{40}", revision) and "/" in name:
        return name, revision
    return f"local/{Path(name).resolve().name}", weights
