"""Files of a dataset repository on the Hugging Face hub: checked by hash, and there whole or not at all."""

import os
import shutil
import ssl
import tarfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.utils import WeakFileLock

HUB_TIMEOUT = 8.0  # seconds until a hub that does not answer counts as unreachable
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # of the user; if one is true, the hub is not asked
# Errors of the HTTP library, whichever it is, and of the pool that mean this.
NO_ANSWER = ("ProxyError", "RemoteProtocolError", "TimeoutError")


class DownloadError(OSError):
    """A file could not be had from the hub, or cannot be trusted. The message says what happened and what to do."""


class HubUnreachableError(DownloadError):
    """Nobody answered at the hub's address, or an offline switch is set. Only then may the sample stand in."""


def fetch(repo: str, names: tuple[str, ...], target: Path, unpack: str = "") -> None:
    """Download files of a dataset repository into the folder `target`, which appears only when all of them are right:
    each has the hash that the hub states. What an interrupted download left is used by the next one, and of several
    processes that want the same folder one downloads and the others wait. If `unpack` is given, the only file is a tar
    file, and that folder of it which holds a folder of this name becomes `target`. Raises `DownloadError`."""
    # huggingface_hub reads the variable only when it is imported. An expired token would be refused, so there is none.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    api, partial = HfApi(endpoint=endpoint, token=False), target.parent / f".{target.name}-partial"
    try:
        place = {"repo_type": "dataset", "revision": _ask_hub(api, repo), "local_dir": partial, "token": False}
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


def _ask_hub(api: HfApi, repo: str) -> str:
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


def _is_no_answer(error: BaseException | None) -> bool:
    """Whether nobody answered. An HTTP status, a wrong certificate and text that is no JSON are answers."""
    found = False
    while error is not None:
        if isinstance(error, ssl.SSLError) or getattr(error, "response", None) is not None:
            return False
        found = found or isinstance(error, OSError) or type(error).__name__ in NO_ANSWER
        error = error.__cause__ or error.__context__
    return found


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
