"""The result store: one file a result, computed once, and again exactly when something that decides it has changed."""

import functools
import gc
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
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from dataclasses import is_dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd

from lib.core import processes
from lib.core.code_version import code_version
from lib.core.store import CACHE, ROOT, EmbeddingStore, fingerprint, is_fresh, write_atomically
from lib.data.sources import EvaluationData

RESULTS = CACHE / "results"
HOLDERS = (dict, list, tuple, set, frozenset, functools.partial, types.MethodType, types.CellType)  # of other objects
PACKAGES = ("torch", "transformers", "datasets", "numpy", "scipy", "scikit-learn", "pandas")
# A table, how it came about (settings, environment, seconds), and whether it was read from the store.
Result = namedtuple("Result", ["value", "provenance", "reused"])


def run_or_load(name: str, settings: dict, compute: Callable[[], pd.DataFrame], fresh_since: float = 0.0) -> Result:
    """The stored result for these settings and the present code, or `compute()`, stored. `name` begins the file's name.
    `settings` are all that decides the result, as plain data (see `describe`). `compute` is a function of `lib` or a
    partial of one (else `ValueError`), whose code counts as `code_of` says. A result stored before `fresh_since`, in
    seconds of the epoch, or damaged (a warning) does not count. `OSError` if it cannot be written; an old one stays."""
    key = fingerprint([settings, code_version(*code_of(compute))])
    path = RESULTS / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', name)}-{key}.json"
    stored = processes.from_main(lambda: _read(path) if is_fresh(path, fresh_since) else None)
    if not (reused := stored is not None):
        begin, value = time.perf_counter(), compute().reset_index(drop=True).to_dict(orient="split", index=False)
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
    """The modules of a function of `lib` (or a partial of one) and of every object that it is given, however deep: an
    encoder counts with its method and its pooling, of `lib` or one's own. Installed packages do not count."""
    function = compute.func if isinstance(compute, functools.partial) else compute
    if not function.__module__.startswith("lib."):
        raise ValueError(f"{function!r} is no function of lib, so that nothing would notice a change of its code.")
    found, seen, waiting = set(), set(), [compute]
    while waiting:
        thing = waiting.pop()
        module = (thing if inspect.isfunction(thing) else type(thing)).__module__
        root, file = module.partition(".")[0], getattr(sys.modules.get(module), "__file__", None) or "-packages"
        own = root in ("lib", "__main__") or "-packages" not in file and root not in sys.stdlib_module_names
        if id(thing) not in seen and (own or isinstance(thing, HOLDERS)):
            seen.add(id(thing))
            found |= {module} if own else set()
            waiting += (thing.__closure__ or ()) if inspect.isfunction(thing) else gc.get_referents(thing)
    return found


def describe(thing):
    """Plain data that stands for an argument of a computation, in its key and in its provenance. Evaluation data is its
    provenance and a fingerprint of its rows; arrays, tables and lists of texts are their size and a fingerprint, so no
    evaluation data stands in a provenance. `TypeError` for what cannot be described."""
    if isinstance(thing, (str, int, float, type(None), EmbeddingStore)):
        return None if isinstance(thing, EmbeddingStore) else thing  # where embeddings are kept decides none of them
    if isinstance(thing, np.generic) or isinstance(thing, np.ndarray) and thing.dtype.hasobject:
        return describe(thing.tolist())
    if isinstance(thing, np.ndarray):
        return {"shape": thing.shape, "dtype": str(thing.dtype), "content": sha256(thing.tobytes()).hexdigest()[:16]}
    if isinstance(thing, (pd.DataFrame, pd.Series)):
        return {"shape": thing.shape, "content": fingerprint(thing.to_csv())}
    if isinstance(thing, EvaluationData):
        return {"name": thing.name} | thing.provenance | {"content": fingerprint(thing.rows.to_dict())}
    if hasattr(thing, "describe"):
        model = {"model": thing.backbone.describe()} if hasattr(thing, "backbone") else {}
        return model | {k: v for k, v in thing.describe().items() if (k, v) not in model.get("model", {}).items()}
    if isinstance(thing, dict):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, range)):
        items = [describe(item) for item in thing]
        short = len(items) <= 100 and not any(isinstance(item, str) and len(item) > 40 for item in items)
        return items if short else {"count": len(items), "content": fingerprint(items)}
    if isinstance(thing, functools.partial):
        return describe([thing.func, thing.args, thing.keywords])
    if inspect.isfunction(thing):
        name, held = f"{thing.__module__}.{thing.__qualname__}", inspect.getclosurevars(thing).nonlocals
        text = {"text": inspect.getsource(thing).strip()} if "<lambda>" in name else {}  # which of its module's it is
        return {"function": name} | text | ({"of": describe(held)} if held else {})
    if is_dataclass(thing) and not inspect.isclass(thing):
        return {"type": type(thing).__name__} | describe({k: v for k, v in vars(thing).items() if k[0] != "_"})
    raise TypeError(f"{thing!r:.80} has no describe(), so that it cannot be part of a result's key.")


@functools.cache
def environment() -> dict:
    """Date, versions, machine and commit, for the provenance of a result; git_dirty: whether the code is another."""
    git = functools.partial(subprocess.run, cwd=ROOT, shell=True, capture_output=True, text=True)
    commit = git("git rev-parse HEAD").stdout.strip()
    changes = git("git status --porcelain -- lib configs requirements.txt").stdout
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES}, "machine": platform.platform(),
            "git_commit": commit or "unknown", "git_dirty": not commit or bool(changes)}
