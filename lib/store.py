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

ROOT = Path(__file__).resolve().parent.parent


def fingerprint(description) -> str:
    """16 hex digits that stand for a JSON-serialisable description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_version(*modules: str) -> str:
    """Fingerprint of the source of modules of `lib`: new code never serves old numbers."""
    return fingerprint([(ROOT / "lib" / f"{module}.py").read_text() for module in modules])


def is_fresh(path: Path) -> bool:
    """Whether a stored file may be used: not if it is older than the start of a `--fresh` run."""
    return path.stat().st_mtime >= float(os.environ.get("TP_FRESH_SINCE", 0))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever interrupts us. `OSError` if the disk is full."""
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
    """Embeddings on disk, by content: `folder/<key>/<sha256 of the file>.npz`, each file a chunk of texts.

    The key is the fingerprint of all that decides an embedding besides its text (`SentenceEncoder.key`). A file whose
    content does not match its name is reported, removed and computed again. Several processes may share a folder.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def load(self, key: str) -> _Rows:
        """What is stored under `key`: a mapping from text to its embedding, float32 (hidden,)."""
        rows = _Rows()
        for path in sorted((self.folder / key).glob("*.npz")):
            if not is_fresh(path):
                continue
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:32] != path.stem:
                warnings.warn(f"{path} is damaged; removing it and computing its embeddings again.", stacklevel=2)
                path.unlink(missing_ok=True)
                continue
            with np.load(io.BytesIO(content)) as arrays:
                rows.by_digest.update(zip((d.tobytes() for d in arrays["texts"]), arrays["embeddings"]))
        return rows

    def save(self, key: str, texts: list[str], embeddings: np.ndarray) -> None:
        """Add the embeddings (len(texts), hidden) of `texts`."""
        buffer = io.BytesIO()
        digests = np.stack([np.frombuffer(_digest(text), np.uint8) for text in texts])
        np.savez(buffer, texts=digests, embeddings=embeddings.astype(np.float32))
        content = buffer.getvalue()
        write_atomically(self.folder / key / f"{hashlib.sha256(content).hexdigest()[:32]}.npz", content)


class _Rows:
    """text -> embedding, keyed by the text's digest so that the texts themselves need not be kept."""

    def __init__(self):
        self.by_digest: dict[bytes, np.ndarray] = {}

    def __contains__(self, text: str) -> bool:
        return _digest(text) in self.by_digest

    def __getitem__(self, text: str) -> np.ndarray:
        return self.by_digest[_digest(text)]

    def update(self, items) -> None:
        self.by_digest.update((_digest(text), row) for text, row in items)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


# Where the notebooks keep embeddings.
STORE = EmbeddingStore(ROOT / "data" / "cache" / "embeddings")
