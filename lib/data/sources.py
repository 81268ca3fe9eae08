"""Where evaluation data is found, and how a file of it becomes lines and lines become a data set.

All data is found in one place, in one order: the folder in `$TP_DATA_DIR`, `data/downloads/`, the Hugging Face hub, and
last the small sample sets that were written for this project. See `data/README.md`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetInfo, Features

from lib.data.download import DownloadError, fetch_archive, forget_hub
from lib.core.store import ROOT

DATA = ROOT / "data"

# dataset repository and archive on the hub, and a folder that the data must hold
SENTEVAL = ("princeton-nlp/datasets-for-simcse", "senteval.tar", "STS")

# kind of source -> what a caption and a provenance call it
SOURCES = {
    "folder": ("real data", "the folder in $TP_DATA_DIR"),
    "downloads": ("real data", "data/downloads"),
    "sample": ("sample data (written for this project)", "data/sample"),
}


class DataError(ValueError):
    """A data file is missing, short or malformed; the message names the file, the line and what was expected."""


class SampleDataWarning(UserWarning):
    """No real data was found, so the sample stands in for it."""


@dataclass(frozen=True)
class DataSource:
    """Where data was found: `kind` is a key of `SOURCES`, `path` the folder that holds the files."""

    kind: str
    path: Path

    @property
    def is_sample(self) -> bool:
        return self.kind == "sample"

    @property
    def label(self) -> str:
        """For the captions of tables and figures."""
        return SOURCES[self.kind][0]

    def describe(self) -> dict:
        """For provenance: what kind of place it is, not where it lies on this machine."""
        return {"kind": self.kind, "label": self.label, "where": SOURCES[self.kind][1]}


def find_source() -> DataSource:
    """Where SentEval's data comes from; searched once per process (see `forget_sources`).

    Falls back to the sample with a `SampleDataWarning`. A program that starts several processes can call this first
    and, where it got the sample, set TP_HUB_UNREACHABLE=1 for them, so that they don't each wait for the hub.
    Raises `DataError` if `$TP_DATA_DIR` is set and does not hold the data; nothing else is tried then.
    """
    return _search(os.environ.get("TP_DATA_DIR", ""))


def forget_sources() -> None:
    """Search again at the next call, and ask the hub again."""
    _search.cache_clear()
    forget_hub()


@functools.cache
def _search(folder: str) -> DataSource:
    repo, archive, holds = SENTEVAL
    if folder:
        path = Path(folder).expanduser() / "senteval"
        if not path.is_dir():
            raise DataError(f"TP_DATA_DIR is {folder!r}, so the folder {path} was expected, with {holds}/ in it; not found.")
        return DataSource("folder", path)
    path = DATA / "downloads" / "senteval"
    try:
        if not path.is_dir():
            fetch_archive(repo, archive, path, holds)
        return DataSource("downloads", path)
    except DownloadError as error:
        warnings.warn(
            "No real evaluation data (senteval): the sample written for this project stands in for it, and its scores "
            "compare with no paper. Tried: TP_DATA_DIR (not set), data/downloads/senteval (not there), the Hugging Face hub "
            f"({error}). To get the real data, go online and start again, or see data/README.md.",
            SampleDataWarning,
            stacklevel=3,
        )
    return DataSource("sample", DATA / "sample")


def read_lines(folder: Path, name: str, hashes: dict[str, str], encoding: str = "utf-8-sig") -> list[str]:
    """The lines of the file `name` in `folder`; adds its SHA-256 to `hashes`.

    Only a line feed ends a line: `str.splitlines` would also cut at U+0085 and others. A carriage return before it is
    dropped. Raises `DataError` if the file is not there or not in this encoding.
    """
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path}: expected this file, and it is not there.")
    content = path.read_bytes()
    hashes[name] = hashlib.sha256(content).hexdigest()
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1  # of the object, for there a byte-order mark is gone already
        byte = error.object[error.start]
        raise DataError(f"{path}, line {line}: expected {error.encoding.upper()}, found the byte 0x{byte:02x}.") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def read_numbered(
    folder: Path, name: str, hashes: dict[str, str], header: str = "", encoding: str = "utf-8-sig"
) -> list[tuple[str, str]]:
    """As `read_lines`, each line after where it stands, for error messages. The header must be there, and is left out."""
    path, lines = folder / name, read_lines(folder, name, hashes, encoding)
    if header and lines[:1] != [header]:
        raise DataError(f"{path}, line 1: expected the header {header!r}.")
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)][bool(header) :]


def make_dataset(rows: list[dict], features: Features, source: DataSource, hashes: dict[str, str], **about) -> Dataset:
    """A data set with a column for each feature, taken from the rows, and with its provenance, to which `about` adds."""
    about |= {"source": source.describe(), "rows_total": len(rows), "files": hashes, "caps": []}
    columns = {key: [row[key] for row in rows] for key in features}
    return Dataset.from_dict(columns, info=DatasetInfo(description=json.dumps(about), features=features))
