"""Files that can be trusted: written whole or not at all, named by their content, checked when read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np

from lib.core import processes

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "data" / "cache"


def fingerprint(description) -> str:
    """16 hex digits that stand for a JSON-serialisable description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_fresh(path: Path, since: float) -> bool:
    """Whether a stored file exists and is not older than `since`, in seconds of the epoch (the start of a fresh run)."""
    return path.exists() and path.stat().st_mtime >= since


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever interrupts us. `OSError` if the disk is full.

    Of several processes that run one program, only the main one writes.
    """
    if not processes.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:32]}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class EmbeddingStore:
    """Embeddings on disk, one file for each chunk of texts that was computed together: `folder/<key>.npy`.

    The key is the fingerprint of the texts and of all else that decides their embeddings (`SentenceEncoder.key`). The
    SHA-256 of a file's content stands at its end, where `numpy.load` does not look; a file that does not match it is
    reported and computed again. Several processes may share a folder.

    Args:
        folder: by default the one under `data/cache/`.
        fresh_since: files older than this, in seconds of the epoch, do not count.
    """

    def __init__(self, folder: Path | str = CACHE / "embeddings", fresh_since: float = 0.0):
        self.folder, self.fresh_since = Path(folder), fresh_since

    def load(self, key: str) -> np.ndarray | None:
        """The embeddings stored under `key`, float32 (texts, hidden); None if there are none that can be trusted."""
        path = self.folder / f"{key}.npy"
        if not is_fresh(path, self.fresh_since):
            return None
        whole = path.read_bytes()
        content, checksum = whole[:-32], whole[-32:]
        if hashlib.sha256(content).digest() != checksum:
            warnings.warn(f"{path.name} is damaged; computing its embeddings again.", stacklevel=2)
            return None
        return np.load(io.BytesIO(content))

    def save(self, key: str, embeddings: np.ndarray) -> None:
        """Store embeddings (texts, hidden) under `key`."""
        buffer = io.BytesIO()
        np.save(buffer, embeddings.astype(np.float32))
        content = buffer.getvalue()
        write_atomically(self.folder / f"{key}.npy", content + hashlib.sha256(content).digest())
