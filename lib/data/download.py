"""Files of a dataset repository on the Hugging Face hub: asked for once, checked by hash, and whole or not at all.

An archive is unpacked safely.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import HfFileMetadata, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import WeakFileLock

# Seconds until a hub that does not answer counts as unreachable.
HUB_TIMEOUT = 8.0

# Any of these set to a true value means that the hub is not asked; the last one is set by the runner (see `find_source`).
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TP_HUB_UNREACHABLE")

# Endpoints that did not answer, and how: each is asked once per process, whatever is wanted from it.
_unreachable: dict[str, str] = {}


class DownloadError(OSError):
    """A file could not be had from the hub, or not be trusted; the message says why, in one line."""


def fetch_archive(repo: str, filename: str, target: Path, holds: str) -> None:
    """Download a tar file of a dataset repository and unpack it, so that `target` holds the folder `holds`.

    The tar file is kept beside `target` until it is unpacked. Raises `DownloadError`, whatever went wrong.
    """
    stated = ask_hub(repo, filename)
    if len(stated.etag or "") != 64:
        raise DownloadError(f"the hub states no SHA-256 for {filename}")
    with _alone(target, f"{repo}/{filename}"):
        if not target.is_dir():
            archive = _download(repo, filename, target.parent, stated)
            _unpack(archive, target, holds)
            archive.unlink()


def fetch_files(repo: str, names: Sequence[str], target: Path) -> None:
    """Download files of a dataset repository into the folder `target`, which appears only when all of them are what the
    hub states. What an interrupted download left is used by the next one. Raises `DownloadError`, whatever went wrong.
    """
    stated = {name: ask_hub(repo, name) for name in names}
    partial = target.parent / f".{target.name}-partial"
    with _alone(target, repo):
        if not target.is_dir():
            for name in names:
                _download(repo, name, partial, stated[name])
            shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub client's own bookkeeping
            partial.rename(target)


@contextmanager
def _alone(target: Path, wanted: str) -> Iterator[None]:
    """Other processes that want `target` wait meanwhile. Any error becomes a `DownloadError`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(target.parent / f".{target.name}.lock"):
            yield
    except DownloadError:
        raise
    except Exception as error:  # network, disk, archive: a reason to state, none to stop a notebook
        raise DownloadError(_reason(error, wanted)) from error


def ask_hub(repo: str, filename: str) -> HfFileMetadata:
    """What the hub states about a file (`etag`: the SHA-256 of a large one, git's SHA-1 of a small one).

    Raises `DownloadError`, within `HUB_TIMEOUT` seconds if nobody answers.
    """
    for switch in OFFLINE_SWITCHES:
        if os.environ.get(switch, "").upper() in ("1", "ON", "YES", "TRUE"):  # what huggingface_hub takes for true
            raise DownloadError(f"not asked, because {switch} is set")
    endpoint = _endpoint()
    if endpoint in _unreachable:
        raise DownloadError(_unreachable[endpoint])
    url = hf_hub_url(repo, filename, repo_type="dataset", endpoint=endpoint)
    try:
        # No token: the file is public, and an expired one would be refused.
        options = {"token": False, "timeout": HUB_TIMEOUT + 1, "endpoint": endpoint}
        return _within(HUB_TIMEOUT, lambda: get_hf_file_metadata(url, **options))
    except Exception as error:
        reason = _reason(error, f"{repo}/{filename}")
        if not hasattr(error, "response"):
            _unreachable[endpoint] = reason
        raise DownloadError(reason) from error


def forget_hub() -> None:
    """Forget which endpoints did not answer, so that they are asked again."""
    _unreachable.clear()


def _download(repo: str, name: str, folder: Path, stated: HfFileMetadata) -> Path:
    """The file in `folder`. It is deleted if its hash, SHA-256 or git's SHA-1, is not the stated one."""
    path = Path(
        hf_hub_download(
            repo, name, repo_type="dataset", revision=stated.commit_hash, local_dir=folder, token=False,
            endpoint=_endpoint(), etag_timeout=HUB_TIMEOUT,
        )
    )
    # Git hashes a header before the content.
    digest = hashlib.sha256() if len(stated.etag or "") == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: digest).hexdigest()
    if found != stated.etag:
        path.unlink()
        raise DownloadError(f"{name} was damaged on the way and deleted: its hash is not {stated.etag}, as the hub states")
    return path


def _unpack(archive: Path, target: Path, holds: str) -> None:
    """Unpack a tar file; what contains its folder `holds` becomes `target`, which appears only when it is complete.

    Raises `DownloadError` before anything is written if a member is absolute, climbs out (`..`), or is not a plain file
    or folder; also if there is no folder `holds`.
    """
    for leftover in target.parent.glob(f".{target.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            for member in members:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise DownloadError(f"{archive.name} holds the unsafe member {member.name!r}; nothing was unpacked")
            tar.extractall(temporary, members, filter="data")
        folder = next((path.parent for path in sorted(temporary.rglob(holds)) if path.is_dir()), None)
        if folder is None:
            raise DownloadError(f"{archive.name} has no folder {holds!r}")
        folder.chmod(0o755)  # a temporary folder is its owner's alone
        folder.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _within(seconds: float, call: Callable):
    """`call()`, or `TimeoutError` after so many seconds.

    A thread, because the timeout of a connection holds for each address of a host anew, and for none of the name look-up.
    """
    future: Future = Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def _reason(error: Exception, wanted: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"{_endpoint()} answered HTTP {status} for {wanted}"
    if isinstance(error, TimeoutError):
        return f"{_endpoint()} did not answer within {HUB_TIMEOUT:g} seconds"
    line = str(error).partition("\n")[0]
    return f"{wanted} could not be fetched from {_endpoint()}: {type(error).__name__}: {line}"


def _endpoint() -> str:
    """Read at every call: huggingface_hub itself reads HF_ENDPOINT only when it is imported."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
