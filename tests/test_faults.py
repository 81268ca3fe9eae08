"""What goes wrong on real machines: no space left, a process that dies while it writes. (Damaged files: test_results.py and
test_encoder.py; hubs and archives: test_data.py; runs that are killed: test_interrupted.py.)"""

import errno
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from tiny_models import build_tokenizer

from lib.report import results
from lib.core import store
from lib.core.bundled import _save, checked
from lib.core.store import ROOT, EmbeddingStore, write_atomically

# Files of more than 4,000 bytes cannot be written here, as on a disk that is nearly full.
SMALL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
sys.path.insert(0, {root!r})
import numpy as np
from lib.core.store import EmbeddingStore
store = EmbeddingStore({folder!r})
store.save("small", np.ones((2, 3)))
try:
    store.save("large", np.ones((100, 300)))
except OSError as error:
    print(type(error).__name__, error.errno, store.load("large") is None, store.load("small").sum())
"""


def run(program: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **kwargs)


def test_a_write_that_does_not_fit_leaves_the_store_whole(tmp_path):
    done = run(SMALL_DISK.format(root=str(ROOT), folder=str(tmp_path)))
    assert done.stdout.split() == ["OSError", str(errno.EFBIG), "True", "6.0"], done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["small.npy"], "nothing half-written is left"


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_no_space_for_a_result_is_raised_and_the_old_file_stays(tmp_path, monkeypatch, step):
    file = tmp_path / "scores.csv"
    write_atomically(file, b"old")
    monkeypatch.setattr(store.os, step, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, b"new and longer")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_result_that_could_not_be_stored_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    calls = []

    def compute():
        calls.append(1)
        return pd.DataFrame({"score": [1.5]})

    with monkeypatch.context() as full:
        full.setattr(store.os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            results.run_or_load("scores", {}, compute)
    assert results.run_or_load("scores", {}, compute).value["score"].tolist() == [1.5] and len(calls) == 2


def test_any_changed_byte_of_stored_embeddings_is_noticed(tmp_path):
    files = EmbeddingStore(tmp_path)
    files.save("key", np.arange(6.0).reshape(2, 3))
    whole = (tmp_path / "key.npy").read_bytes()
    for place in range(len(whole)):
        (tmp_path / "key.npy").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.warns(UserWarning, match="damaged"):
            assert files.load("key") is None, place
    for length in range(len(whole)):
        (tmp_path / "key.npy").write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="damaged"):
            assert files.load("key") is None, length
    (tmp_path / "key.npy").write_bytes(whole)
    assert files.load("key").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_process_that_dies_while_it_writes_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "table.csv", b"old")
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from lib.core import store
store.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
store.write_atomically(store.Path({str(tmp_path / "table.csv")!r}), b"new" * 1000)
"""
    assert run(program).returncode == -9
    assert (tmp_path / "table.csv").read_bytes() == b"old"


def test_a_release_that_misreads_the_tokenizer_is_refused():
    assert checked(build_tokenizer("bytes"))
    with pytest.raises(RuntimeError, match="install transformers>=5.17"):
        checked(build_tokenizer("bytes_bos"))


class Unsaved:
    """A model whose files do not fit."""

    class config:
        pass

    def save_pretrained(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        no_space()


def test_a_copy_of_the_model_that_does_not_fit_is_not_kept(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        _save(Unsaved(), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_of_models_is_removed(tmp_path):
    class Saved(Unsaved):
        def save_pretrained(self, folder):
            (folder / "model.safetensors").write_bytes(b"whole")

    old, new = tmp_path / ".model-old", tmp_path / ".model-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    _save(Saved(), Saved(), tmp_path / "model")
    assert not old.exists() and new.exists(), "another process may still be writing the new one"
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"whole"
