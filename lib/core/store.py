"""Files that can be trusted: written whole or not at all, named by their content, checked when read."""

import hashlib
import io
import json
import os
import warnings
from pathlib import Path
from uuid import uuid4

import numpy as np

from lib.core import processes

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "data" / "cache"


def fingerprint(description) -> str:
    """16 hex digits that stand for a JSON-serialisable description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_fresh(path: Path, since: float) -> bool:
    """Whether a stored file exists and is not older than `since`, in seconds of the epoch (a fresh run's start)."""
    return path.exists() and path.stat().st_mtime >= since


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, in the main process alone, whole or not at all. `OSError` if the disk is full."""
    if not processes.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:32]}-{uuid4().hex}.tmp"  # its mode is what the umask says
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Give files that a library wrote for its user alone the modes that the folder, made by `mkdir`, says."""
    for path in folder.rglob("*"):
        path.chmod(folder.stat().st_mode & (0o777 if path.is_dir() else 0o666))


class EmbeddingStore:
    """Embeddings on disk, a file `folder/<key>.npy` a chunk of texts, with the SHA-256 of its content at the end,
    where `numpy.load` does not look. Files older than `fresh_since`, in seconds of the epoch, do not count."""

    def __init__(self, folder: Path | str = CACHE / "embeddings", fresh_since: float = 0.0):
        self.folder, self.fresh_since = Path(folder), fresh_since

    def load(self, key: str) -> np.ndarray | None:
        """The embeddings stored under `key`, float32 (texts, hidden); None, with a warning if a file is damaged."""
        path = self.folder / f"{key}.npy"
        if not is_fresh(path, self.fresh_since):
            return None
        content = path.read_bytes()
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            return np.load(io.BytesIO(content))
        warnings.warn(f"{path.name} is damaged; computing its embeddings again.", stacklevel=2)
        return None

    def save(self, key: str, embeddings: np.ndarray) -> None:
        """Store embeddings (texts, hidden) under `key`."""
        buffer = io.BytesIO()
        np.save(buffer, embeddings.astype(np.float32))
        content = buffer.getvalue()
        write_atomically(self.folder / f"{key}.npy", content + hashlib.sha256(content).digest())
