"""The result store: one file a result, computed once, and again exactly when something that decides it has changed."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from lib.core import processes
from lib.core.code_version import code_version
from lib.core.store import CACHE, ROOT, EmbeddingStore, fingerprint, is_fresh, write_atomically
from lib.data.sources import EvaluationData

RESULTS = CACHE / "results"
PACKAGES = ("torch", "transformers", "datasets", "numpy", "scipy", "scikit-learn", "pandas")


@dataclass(frozen=True)
class Result:
    """A table and how it came about (settings, environment, seconds); `reused`: whether it was read from the store."""

    value: pd.DataFrame
    provenance: dict
    reused: bool


def run_or_load(name: str, settings: dict, compute: Callable[[], pd.DataFrame], fresh_since: float = 0.0) -> Result:
    """The stored result for these settings and the present code (see `code_of`), or `compute()`, stored.

    Args:
        name: a readable beginning of the file name.
        settings: all that decides the result, as plain data (see `describe`).
        compute: a function of `lib`, or a `functools.partial` of one; `ValueError` for any other.
        fresh_since: a result stored before this time, in seconds of the epoch, does not count.

    A damaged file is reported and computed again. Raises `OSError` if the result cannot be written; an old one stays.
    """
    key = fingerprint([settings, code_version(*code_of(compute))])
    path = RESULTS / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', name)}-{key}.json"
    stored = processes.from_main(lambda: _read(path) if is_fresh(path, fresh_since) else None)
    reused = stored is not None
    if not reused:
        begin = time.perf_counter()
        value = compute().reset_index(drop=True).to_dict(orient="split", index=False)
        seconds = round(time.perf_counter() - begin, 2)
        stored = {"settings": settings, "environment": environment(), "seconds": seconds, "value": value}
        payload = processes.from_main(lambda: json.dumps(stored, default=str))
        write_atomically(path, json.dumps({"checksum": fingerprint(payload), "payload": payload}).encode())
        stored = json.loads(payload)  # so that a computed and a reused result are the same to the last digit
    return Result(pd.DataFrame(**stored.pop("value")), stored, reused)


def _read(path: Path) -> dict | None:
    with suppress(ValueError, KeyError, TypeError):
        content = json.loads(path.read_bytes())
        if fingerprint(content["payload"]) == content["checksum"]:
            return json.loads(content["payload"])
    warnings.warn(f"{path.name} is damaged; computing it again.", stacklevel=4)
    return None


def code_of(compute: Callable) -> set[str]:
    """The modules that a function of `lib` (or a partial of one) comes from, and every object that it is given.

    So an encoder counts with its method and its pooling, of `lib` or one's own; installed packages do not count.
    """
    function = compute.func if isinstance(compute, functools.partial) else compute
    if not function.__module__.startswith("lib."):
        raise ValueError(f"{function!r} is no function of lib, so that nothing would notice a change of its code.")
    found, seen, waiting = set(), set(), [compute]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, functools.partial):
            waiting += [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, types.MethodType):
            waiting += [thing.__func__, thing.__self__]
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple, set, frozenset)):
            waiting += thing
        elif isinstance(thing, types.FunctionType) and _is_own(thing.__module__):
            found.add(thing.__module__)
            waiting += inspect.getclosurevars(thing).nonlocals.values()
        elif _is_own(type(thing).__module__):
            found.add(type(thing).__module__)
            waiting += getattr(thing, "__dict__", {}).values()
    return found


def _is_own(module: str) -> bool:
    """Whether a module is neither of Python nor of an installed package."""
    file = getattr(sys.modules.get(module), "__file__", None) or "-packages"
    installed = "-packages" in file or module.split(".")[0] in sys.stdlib_module_names
    return module.startswith(("lib.", "__main__")) or not installed


def describe(thing):
    """Plain data that stands for an argument of a computation, in its key and in its provenance.

    Evaluation data is its provenance and a fingerprint of its rows; arrays, tables and lists of texts are their size
    and a fingerprint, so that no evaluation data stands in a provenance. `TypeError` for what cannot be described.
    """
    if isinstance(thing, (str, int, float, type(None), EmbeddingStore)):
        return None if isinstance(thing, EmbeddingStore) else thing  # where embeddings are kept decides none of them
    if isinstance(thing, np.generic) or isinstance(thing, np.ndarray) and thing.dtype.hasobject:
        return describe(thing.tolist())
    if isinstance(thing, np.ndarray):
        content = hashlib.sha256(thing.tobytes()).hexdigest()[:16]
        return {"shape": list(thing.shape), "dtype": str(thing.dtype), "content": content}
    if isinstance(thing, (pd.DataFrame, pd.Series)):
        return {"shape": list(thing.shape), "content": fingerprint(thing.to_csv())}
    if isinstance(thing, EvaluationData):
        return {"name": thing.name} | thing.provenance | {"content": fingerprint(thing.rows.to_dict())}
    if hasattr(thing, "describe"):
        own, model = thing.describe(), thing.backbone.describe() if hasattr(thing, "backbone") else {}
        return ({"model": model} if model else {}) | {k: v for k, v in own.items() if k not in model or model[k] != v}
    if isinstance(thing, dict):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, range)):
        items = [describe(item) for item in thing]
        short = len(items) <= 100 and not any(isinstance(item, str) and len(item) > 40 for item in items)
        return items if short else {"count": len(items), "content": fingerprint(items)}
    if isinstance(thing, functools.partial):
        return describe([thing.func, thing.args, thing.keywords])
    if isinstance(thing, types.FunctionType):
        name, held = f"{thing.__module__}.{thing.__qualname__}", inspect.getclosurevars(thing).nonlocals
        text = {"text": inspect.getsource(thing).strip()} if "<lambda>" in name else {}  # which of its module's it is
        return {"function": name} | text | ({"of": describe(held)} if held else {})
    if is_dataclass(thing) and not isinstance(thing, type):
        return {"type": type(thing).__name__} | describe({k: v for k, v in vars(thing).items() if k[0] != "_"})
    raise TypeError(f"{thing!r:.80} has no describe(), so that it cannot be part of a result's key.")


@functools.cache
def environment() -> dict:
    """Versions, commit and machine, for the provenance of a result."""

    def git(*arguments: str) -> str:
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
        return "unknown"

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain", "--", "lib", "configs", "requirements.txt")),
    }
