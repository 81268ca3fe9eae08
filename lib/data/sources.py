"""Where evaluation data is found, and the one form in which it is handed on. The order is: the folder `$TP_DATA_DIR`,
`data/downloads/`, the Hugging Face hub, and last the sample sets written for this project. See `data/README.md`."""

import functools
import hashlib
import os
import shutil
import ssl
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.utils import WeakFileLock

from lib.core.store import ROOT

DATA = ROOT / "data"
# SentEval's data on the hub: the dataset repository, its archive, and a folder that the data must hold.
SENTEVAL = ("princeton-nlp/datasets-for-simcse", ("senteval.tar",), "STS")
HUB_TIMEOUT = 8.0  # seconds until a hub that does not answer counts as unreachable
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # of the user; if one is true, the hub is not asked
NO_ANSWER = ("ProxyError", "RemoteProtocolError", "TimeoutError")  # as the HTTP library and the pool name it
hub_unreachable: str | None = None  # why this process does not ask the hub any more; whoever knows may say so here


class DataError(ValueError):
    """A data file is missing, short or malformed. The message names the file, the line and what was expected."""


class MissingDataError(DataError):
    """Data is in none of the places, and the hub does not have it or cannot be reached. The message says what to do."""


class DownloadError(OSError):
    """A file could not be had from the hub, or cannot be trusted. The message says what happened and what to do."""


class HubUnreachableError(DownloadError):
    """Nobody answered at the hub's address, or an offline switch is set. Only then may the sample stand in."""


class SampleDataWarning(UserWarning):
    """No real data was found, so the sample stands in for it."""


@dataclass(frozen=True)
class DataSource:
    """Where data was found: `kind` is folder ($TP_DATA_DIR), downloads or sample, `path` the folder with the files."""

    kind: str
    path: Path

    @property
    def is_sample(self) -> bool:
        return self.kind == "sample"

    @property
    def label(self) -> str:
        return "sample data (written for this project)" if self.is_sample else "real data"

    def describe(self) -> dict:
        """For provenance: what kind of place it is, not where it lies on this machine."""
        return {"kind": self.kind, "label": self.label}


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """A data set, or a part of one, with its provenance; `rows`, a `datasets.Dataset`, are in the order of the files.
    A sample of it is the beginning of one fixed permutation of the whole data set, so that samples are nested. It sorts
    the rows by `places`, int64 (rows,), hashes of the data set's name, its length and the row's number, which hang on
    no seed or library, and which a part keeps. `provenance` has the keys task, split (or splits, or part), source,
    rows, rows_total (before anything was left out), caps (what was left out, step by step) and files (-> SHA-256)."""

    name: str
    rows: object
    provenance: dict
    places: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.places is None:
            texts = (f"{self.name} {len(self.rows)} {row}".encode() for row in range(len(self.rows)))
            keys = (int.from_bytes(hashlib.sha256(text).digest()[:7], "big") for text in texts)
            object.__setattr__(self, "places", np.fromiter(keys, np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list:
        return self.rows[column][:]

    @property
    def texts(self) -> list[str]:
        """The distinct texts, none of them empty, of the columns that hold sentences, documents or queries."""
        columns = [name for name in ("sentence1", "sentence2", "text") if name in self.rows.column_names]
        return list(dict.fromkeys(text for column in columns for text in self[column] if text))

    def to_pandas(self) -> pd.DataFrame:
        return self.rows.to_pandas()

    def first(self, count: int | None, within: str | None = None) -> Self:
        """The first `count` rows (None: all) of the fixed permutation, in the order of the files; with `within`, those
        for each value of that column. Raises `ValueError` if `count` is below 1."""
        if count is None:
            return self
        if count < 1:
            raise ValueError(f"A data set needs at least one row, got count={count}.")
        groups = np.asarray(self[within]) if within else np.zeros(len(self))
        kept = pd.Series(self.places).groupby(groups).rank(method="first") <= count
        cap = {"first": count} | ({"within": within} if within else {})
        return self if kept.all() else self._select(np.flatnonzero(kept), cap)

    def where(self, rows: Sequence[bool], note: str) -> Self:
        """The rows that a mask marks. The note says in the provenance which these are."""
        if len(rows) != len(self):
            raise ValueError(f"The mask has {len(rows)} values, {self.name} has {len(self)} rows.")
        return self._select(np.flatnonzero(rows), {"where": note})

    def _select(self, indices: np.ndarray, cap: dict) -> Self:
        caps = list(self.provenance.get("caps", ()))
        if "first" in cap and caps and cap == caps[-1] | {"first": cap["first"]}:
            caps.pop()  # the first of the first rows are the first
        about = self.provenance | {"rows": len(indices), "caps": [*caps, cap]}
        return replace(self, rows=self.rows.select(indices), provenance=about, places=self.places[indices])


def find_source() -> DataSource:
    """Where SentEval's data is, searched once per process; if it is nowhere and the hub cannot be reached, the sample,
    with a `SampleDataWarning`. `DataError` if `$TP_DATA_DIR` does not hold it; `DownloadError` as `find_folder`."""
    return _search(os.environ.get("TP_DATA_DIR", ""))


@functools.cache
def _search(folder: str) -> DataSource:
    path = Path(folder).expanduser() / "senteval"
    if folder and not path.is_dir():
        raise DataError(f"TP_DATA_DIR is {folder!r}, so SentEval's data was expected in the folder {path}; not found.")
    try:
        return find_folder("SentEval's data", "senteval", *SENTEVAL)
    except MissingDataError as error:
        text = f"{error} Until then the sample stands in, and its scores compare with no paper."
        warnings.warn(text, SampleDataWarning, stacklevel=3)
        return DataSource("sample", DATA / "sample")


def find_folder(what: str, place: str, repo: str = "", files: tuple[str, ...] = (), unpack: str = "") -> DataSource:
    """The folder `place` of `$TP_DATA_DIR` or of `data/downloads`, to which `files` of a `repo` are downloaded. Raises
    `DownloadError` if the hub answered and did not give them, `MissingDataError`, which names `what`, if nobody did."""
    global hub_unreachable
    folder = os.environ.get("TP_DATA_DIR", "")
    own, path = Path(folder).expanduser() / place, DATA / "downloads" / place
    if folder and own.is_dir():
        return DataSource("folder", own)
    if repo and not hub_unreachable and not path.is_dir():
        try:
            fetch(repo, files, path, unpack)
        except HubUnreachableError as error:
            hub_unreachable = str(error)
    if path.is_dir():
        return DataSource("downloads", path)
    hub, online = (hub_unreachable, "go online and start again, or ") if repo else ("not there", "")
    raise MissingDataError(
        f"{what} cannot be found. Tried: $TP_DATA_DIR/{place} ({'not there' if folder else 'not set'}), data/downloads/"
        f"{place} (not there), the hub ({hub}). To get it, {online}put its files into such a folder (data/README.md).")


def fetch(repo: str, names: tuple[str, ...], target: Path, unpack: str = "") -> None:
    """Download files of a dataset repository into the folder `target`, which appears only when all of them are right:
    each has the hash that the hub states. What an interrupted download left is used by the next one, and of several
    processes that want the same folder one downloads and the others wait. If `unpack` is given, the only file is a tar
    file, and that folder of it which holds a folder of this name becomes `target`. Raises `DownloadError`."""
    # huggingface_hub reads the variable only when it is imported. An expired token would be refused, so there is none.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    api, partial = HfApi(endpoint=endpoint, token=False), target.parent / f".{target.name}-partial"
    try:
        place = {"repo_type": "dataset", "revision": ask_hub(api, repo), "local_dir": partial, "token": False}
        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(target.parent / f".{target.name}.lock"):
            if target.is_dir():
                return
            for name in names:
                hf_hub_download(repo, name, **place, endpoint=endpoint, etag_timeout=HUB_TIMEOUT)
            wrong = [file["path"] for file in api.verify_repo_checksums(repo, **place).mismatches]
            if wrong:  # hf_hub_download compares only the sizes
                shutil.rmtree(partial)
                raise DownloadError(f"the hash of {wrong[0]} was not what the hub states, so the download was deleted")
            complete = _unpack(partial / names[0], unpack) if unpack else partial
            shutil.rmtree(complete / ".cache", ignore_errors=True)  # notes of hf_hub_download
            complete.rename(target)
            shutil.rmtree(partial, ignore_errors=True)
    except HubUnreachableError:
        raise
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise DownloadError(
            f"{repo} could not be downloaded from {endpoint} to {target}: {reason}. Start again to go on from there, "
            "put the files there by hand (see data/README.md), or set HF_HUB_OFFLINE=1 to go on without them."
        ) from error


def ask_hub(api: HfApi, repo: str) -> str:
    """The commit that a dataset repository is at. Raises `HubUnreachableError`, or what the hub client raises."""
    for switch in OFFLINE_SWITCHES:
        if os.environ.get(switch, "").upper() in constants.ENV_VARS_TRUE_VALUES:
            raise HubUnreachableError(f"not asked, because {switch} is set")
    try:
        # A connection's own time limit holds anew for each address of a host, and not at all for the name look-up.
        with ThreadPool(1) as pool:  # which waits for nothing when it is left, nor keeps the process from ending
            return pool.apply_async(api.dataset_info, [repo], {"timeout": HUB_TIMEOUT + 1}).get(HUB_TIMEOUT).sha
    except Exception as error:
        if not _is_no_answer(error):
            raise
        raise HubUnreachableError(f"{api.endpoint} cannot be reached: {str(error) or 'it did not answer'}") from error


def _is_no_answer(error: BaseException) -> bool:
    """Whether nobody answered. An HTTP status, a wrong certificate and text that is no JSON are answers."""
    chain = [error]
    while error := error.__cause__ or error.__context__:
        chain.append(error)
    answered = any(isinstance(e, ssl.SSLError) or getattr(e, "response", None) is not None for e in chain)
    return not answered and any(isinstance(e, OSError) or type(e).__name__ in NO_ANSWER for e in chain)


def _unpack(archive: Path, holds: str) -> Path:
    """Unpack a tar file beside itself, and return the folder in which the folder `holds` is."""
    unpacked = archive.parent / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)  # of a process that was killed
    with tarfile.open(archive) as tar:
        # The filter refuses what would land outside the folder. In some versions of Python, links can get round it.
        for member in tar:
            if not (member.isfile() or member.isdir()):
                raise DownloadError(f"{archive.name} holds {member.name!r}, which is neither a plain file nor a folder")
        tar.extractall(unpacked, filter="data")
    for path in filter(Path.is_dir, sorted(unpacked.rglob(holds))):
        return path.parent
    raise DownloadError(f"{archive.name} has no folder {holds!r}")
