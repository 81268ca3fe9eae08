"""A `SentenceEncoder` as an encoder of mteb (version 2), for `mteb.evaluate`. mteb is needed here alone."""

import re
from pathlib import Path

import numpy as np

from lib.core.encoder import SentenceEncoder
from lib.core.store import fingerprint

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
except ImportError as error:
    raise ImportError(f'lib.core.mteb_encoder cannot import mteb ({error}): pip install "mteb>=2,<3"') from error


class MtebEncoder(AbsEncoder):
    """What mteb's `EncoderProtocol` asks for (mteb 2.26, `mteb/models/models_protocols.py`).

    The encoder's own prompt is used for every task and both sides of a pair, none of mteb's instructions. mteb files
    results by name and revision (`mteb_identity`) and by `experiment_kwargs`: the main settings as plain values (mteb
    hashes a long list) and a fingerprint of all settings and of the code. Similarity is the cosine.
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
        experiment["setting"] = fingerprint(about | {"code": encoder.code})
        overwrites = {"name": name, "revision": revision, "experiment_kwargs": experiment}
        self.encoder, self.mteb_model_meta = encoder, ModelMeta.create_empty(overwrites=overwrites)

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs) -> np.ndarray:
        """Embed mteb's batches, dicts with a list of texts in `"text"`: float32 (texts, hidden), in their order.

        `kwargs` are mteb's `encode_kwargs`: what `SentenceEncoder.encode` takes, such as `batch_size`. The other
        arguments tell of the task, and change nothing. Raises `ValueError` for a `precision` other than float32.
        """
        if (precision := kwargs.pop("precision", "float32")) != "float32":
            raise ValueError(f"Embeddings come in float32 only, not as precision={precision!r}.")
        return self.encoder.encode([text for batch in inputs for text in batch["text"]], **kwargs)


def mteb_identity(name: str, revision: str, weights: str) -> tuple[str, str]:
    """Name and revision for mteb, which wants `organisation/name`: of a model from the hub its id and commit, of any
    other (a folder, a bundled model) `local/` with the last part of its name, and its `weights`' fingerprint."""
    from_hub = "/" in name and re.fullmatch("[0-9a-f]{40}", revision)
    return (name, revision) if from_hub else (f"local/{Path(name).resolve().name}", weights)
