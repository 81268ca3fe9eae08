"""The result store: one file a result, with its provenance, computed once. Also tables, figures and the papers' numbers."""

from __future__ import annotations

import atexit
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Markdown

from lib.core import processes
from lib.core.store import ROOT, code_version, fingerprint, is_fresh, write_atomically

RESULTS = ROOT / "data" / "cache" / "results"
FIGURES = ROOT / "figures"
PAPER = ROOT / "data" / "paper"
PACKAGES = ("torch", "transformers", "datasets", "numpy", "scipy", "scikit-learn", "pandas")

# Backbones that the papers report, by hub id.
PAPER_MODELS = {
    "meta-llama/Llama-2-7b-hf": "llama2-7b",
    "meta-llama/Llama-2-13b-hf": "llama2-13b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
    "Qwen/Qwen2-7B": "qwen2-7b",
    "google/gemma-2-9b": "gemma2-9b",
}


@dataclass(frozen=True)
class Result:
    """A table and how it came about; `reused` says whether it was read from the store."""

    value: pd.DataFrame
    provenance: dict
    reused: bool


def run_or_load(name: str, settings: dict, compute: Callable[[], pd.DataFrame], code: tuple[str, ...] = ()) -> Result:
    """The stored result for these settings, or `compute()`, stored.

    Args:
        name: a readable beginning of the file name.
        settings: all that decides the result, as plain data (`SentenceEncoder.describe`, `lib.data.sts.provenance`, seeds).
        code: modules of `lib` that the computation uses besides the encoder; a change in them makes a new result.

    A stored file that does not match its checksum is reported and computed again.
    """
    version = code_version("encoder", "sources", "data", "transfer_data", *code)
    path = RESULTS / f"{name}-{fingerprint([settings, version])}.json"
    stored = processes.from_main(lambda: _read(path))
    if stored is None:
        begin = time.perf_counter()
        value = compute()
        stored = {
            "settings": settings,
            "environment": environment(),
            "seconds": round(time.perf_counter() - begin, 2),
            "value": value.reset_index(drop=True).to_dict(orient="split", index=False),
        }
        payload = processes.from_main(lambda: json.dumps(stored, default=str))
        stored = json.loads(payload)  # so that a computed and a reused result are the same to the last digit
        content = {"sha256": hashlib.sha256(payload.encode()).hexdigest(), "payload": payload}
        write_atomically(path, json.dumps(content).encode())
        reused = False
    else:
        reused = True
    _log(name=name, reused=reused)
    return Result(pd.DataFrame(**stored["value"]), {key: stored[key] for key in ("settings", "environment", "seconds")}, reused)


def stated(settings: dict) -> dict:
    """The provenance of what is computed anew in every run, from stored embeddings and with nothing stored itself."""
    return {"settings": settings, "environment": environment(), "seconds": None}


def _read(path: Path) -> dict | None:
    if not path.exists() or not is_fresh(path):
        return None
    try:
        content = json.loads(path.read_bytes())
        intact = hashlib.sha256(content["payload"].encode()).hexdigest() == content["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        warnings.warn(f"{path.name} is damaged; computing it again.", stacklevel=3)
        return None
    return json.loads(content["payload"])


def _log(**entry) -> None:
    """Tell the runner, for its summary, what was computed and reused, and how much memory that took."""
    log = os.environ.get("TP_RUN_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@atexit.register
def _log_memory() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peak = max(peak, torch.cuda.max_memory_allocated())
    _log(peak_gb=round(peak / 1e9, 1))


@cache
def environment() -> dict:
    """Versions, commit and machine, for the provenance of a result."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--", "lib", "configs", "requirements.txt")),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.strip()


def save_table(table: pd.DataFrame, name: str, profile: str, caption: str, provenance: list[dict], digits: int = 2) -> Markdown:
    """Write `figures/<profile>/<name>.csv`, `.md` and `.json` (provenance); returns the table for display in a notebook."""
    folder = FIGURES / profile
    text = f"**{caption}**\n\n{table.to_markdown(index=False, floatfmt=f'.{digits}f')}\n"
    write_atomically(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6f", lineterminator="\n").encode())
    write_atomically(folder / f"{name}.md", text.encode())
    _save_provenance(folder / f"{name}.json", caption, provenance)
    return Markdown(text)


def save_figure(figure, name: str, profile: str, caption: str, provenance: list[dict]) -> None:
    """Write `figures/<profile>/<name>.png` at 150 dpi, the caption under it, and `.json` (provenance)."""
    figure.supxlabel(caption, fontsize=8, color="0.3", wrap=True)
    path, picture = FIGURES / profile / f"{name}.png", io.BytesIO()
    # No software version or date inside, so that the same picture is the same file.
    figure.savefig(picture, dpi=150, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, picture.getvalue())
    _save_provenance(path.with_suffix(".json"), caption, provenance)


def _save_provenance(path: Path, caption: str, provenance: list[dict]) -> None:
    common, own = split_common(json.loads(json.dumps(provenance, default=str)))
    content = {"caption": caption, "common to all results": common, "results": own}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def split_common(results: list[dict]) -> tuple[dict, list[dict]]:
    """What all of these (nested) dicts have in common, and what is left of each."""
    common, own = {}, [dict(result) for result in results]
    for key, value in (results[0] if results else {}).items():
        if not all(key in result for result in results):
            continue
        values = [result[key] for result in results]
        if all(v == value for v in values):
            common[key] = value
            rests = [None] * len(results)
        elif all(isinstance(v, dict) for v in values):
            common[key], rests = split_common(values)
        else:
            continue
        for result, rest in zip(own, rests):
            if rest:
                result[key] = rest
            else:
                del result[key]
    return common, own


def read_paper(table: str) -> pd.DataFrame:
    """A published table from `data/paper/`, by file name without ending. Raises `ValueError`, listing what exists."""
    path = PAPER / f"{table}.csv"
    if not path.exists():
        raise ValueError(f"No published table {table!r}; there are {', '.join(sorted(p.stem for p in PAPER.glob('*.csv')))}.")
    return pd.read_csv(path, keep_default_na=False)


def sts_table(model: str) -> str:
    """The published STS table that a model belongs beside: Table 2 for the paper's other backbones, else Table 1."""
    return "a2_sts_backbones" if PAPER_MODELS.get(model, "llama2-7b") != "llama2-7b" else "a1_sts_llama2_7b"


def compare_with_paper(ours: pd.DataFrame, table: str, model: str, sample: bool, tolerance: float = 0.5) -> pd.DataFrame:
    """Every published number of a table beside ours: paper | ours | difference | status.

    Args:
        ours: columns method, tp (bool), task, value, named as in the published table (main setting only).
        table: file name in `data/paper/` without ending.
        model: name of the model behind `ours`; another model's numbers are shown, but not called a reproduction.
        sample: whether `ours` comes from sample data.
        tolerance: how far a reproduced number may be off, in the metric's unit.

    Returns:
        Columns model, method, tp, task, metric, paper, ours, difference, status, source, grade. Status is `reproduced`,
        `differs`, `other model`, `sample data` or `not run`.
    """
    published = read_paper(table)
    published = published.assign(tp=published["tp"].astype(str).str.lower() == "true")
    published = published[published["variant"] == ""].drop(columns="paper").rename(columns={"value": "paper"})
    merged = published.merge(ours.rename(columns={"value": "ours"}), on=["method", "tp", "task"], how="left")
    merged["difference"] = merged["ours"] - merged["paper"]

    def status(row) -> str:
        if pd.isna(row["ours"]):
            return "not run"
        if sample:
            return "sample data"
        if PAPER_MODELS.get(model, model) != row["model"]:
            return "other model"
        return "reproduced" if abs(row["difference"]) <= tolerance else "differs"

    merged["status"] = merged.apply(status, axis=1)
    columns = ["model", "method", "tp", "task", "metric", "paper", "ours", "difference", "status", "source", "grade"]
    return merged[columns]
