"""Adapters (LoRA) on disk: written whole, checked when read, merged into a model."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel

from lib.core.backbone import Backbone
from lib.core.store import is_fresh


@contextmanager
def around_peft(device: torch.device):
    """peft draws from the global generators, which get their state back, and calls what Transformers has deprecated."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        warnings.filterwarnings("error", message=".*missing adapter keys.*")  # they would stay without effect
        yield


def save_adapter(model: PeftModel, folder: Path, about: dict) -> dict:
    """Write a trained adapter to `folder`, whole or not at all. Returns its provenance: `about` and its SHA-256."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary) / "adapter"
        model.save_pretrained(whole)
        text = json.dumps(about | {"adapter_sha256": _sha256(whole)}, indent=1, default=str)
        (whole / "provenance.json").write_text(text)
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)
    return json.loads(text)


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def read_adapter(folder: Path) -> dict | None:
    """The provenance of a trained adapter; None if there is none, or only one that is damaged or older than a fresh run."""
    file = folder / "provenance.json"
    if not file.exists() or not is_fresh(file):
        return None
    about = json.loads(file.read_text())
    if _sha256(folder) != about["adapter_sha256"]:
        warnings.warn(f"The adapter {folder.name} is damaged; training it again.", stacklevel=2)
        return None
    return about


def merge_adapter(model, adapter: str | Path):
    """`model` with a LoRA (folder or hub id) added to its own weights, in place. Raises `ValueError` if it does not fit."""
    try:
        with around_peft(model.device):
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (UserWarning, ValueError) as error:
        raise ValueError(f"The adapter {adapter} does not fit {type(model).__name__}: {str(error)[:300]}") from None


def merged_backbone(backbone: Backbone, adapter: str | Path, name: str) -> Backbone:
    """A copy of `backbone` with a LoRA in its weights: an ordinary `Backbone`, under this name."""
    model = merge_adapter(copy.deepcopy(backbone.model), adapter)
    revision = f"{backbone.name} {backbone.revision} + {Path(adapter).name if Path(adapter).is_dir() else adapter}"
    return Backbone.from_model(model, backbone.tokenizer, name, revision, dict(backbone.notes))
