"""Adapters (LoRA, by peft) on disk: written whole, checked when read, merged into a model."""

import copy
import hashlib
import json
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from peft import PeftModel

from lib.core.backbone import Backbone
from lib.core.store import follow_umask, is_fresh


@contextmanager
def around_peft(device: torch.device):
    """Give the global generators, which peft draws from, their state back; an adapter that fits in part is an error."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        yield


def save_adapter(model: PeftModel, folder: Path, about: dict) -> dict:
    """Write a trained adapter and its provenance, which is returned: `about` and the SHA-256 of the weights."""
    model.save_pretrained(folder)
    text = json.dumps(about | {"adapter_sha256": _sha256(folder)}, indent=1, default=str)
    follow_umask(folder)
    (folder / "provenance.json").write_text(text)  # last: where an interrupt leaves a part, `read_adapter` finds none
    return json.loads(text)


def read_adapter(folder: Path, fresh_since: float = 0.0) -> dict | None:
    """The provenance of an adapter not older than `fresh_since` (epoch seconds); None, with a warning, if damaged."""
    if not is_fresh(folder / "provenance.json", fresh_since):
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        about, _ = (json.loads((folder / name).read_text()) for name in ("provenance.json", "adapter_config.json"))
        if about["adapter_sha256"] == _sha256(folder):
            return about
    warnings.warn(f"The adapter {folder.name} is damaged, so it is trained again.", stacklevel=2)
    return None


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def merge_adapter(model, adapter: str | Path):
    """`model` with an adapter (folder or hub id) in its weights, which are changed. `ValueError` if it does not fit."""
    try:
        with around_peft(model.device):
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (UserWarning, ValueError) as error:
        raise ValueError(f"The adapter {adapter} does not fit {type(model).__name__}: {str(error)[:300]}") from None


def merged_backbone(backbone: Backbone, adapter: str | Path, name: str) -> Backbone:
    """A copy of `backbone` with an adapter in its weights: an ordinary `Backbone`, under this name."""
    model = merge_adapter(copy.deepcopy(backbone.model), adapter)
    revision = f"{backbone.name} {backbone.revision} + {Path(adapter).name if Path(adapter).is_dir() else adapter}"
    return Backbone.from_model(model, backbone.tokenizer, name, revision, dict(backbone.notes))
