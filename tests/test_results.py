"""Stores on disk: one result a file, embeddings, and what a full disk, damage or a dying process does to them."""

import errno
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from lib.core import processes, store
from lib.core.store import ROOT, EmbeddingStore, write_atomically
from lib.data.sources import EvaluationData
from lib.evaluation.intervals import SPEARMAN, mean_of
from lib.report import results
from lib.report.results import describe, run_or_load
from lib.report.settings import Setting

TABLE = pd.DataFrame({"task": ["STS12", "2024"], "pair": [0, 1], "score": [1 / 3, np.nan], "ok": [True, False]})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


class Counting:
    """A computation that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return TABLE

    @property
    def of_lib(self):
        """The same as a partial of a function of lib, which calls what it is given."""
        return partial(processes.from_main, self)


def test_second_call_reuses_and_returns_the_same(folder):
    counting = Counting()
    first, second = (run_or_load("a name/with: signs", {"seed": 1}, counting.of_lib) for _ in range(2))
    assert counting.calls == 1 and (first.reused, second.reused) == (False, True)
    pd.testing.assert_frame_equal(first.value, second.value)
    pd.testing.assert_frame_equal(first.value, TABLE, check_dtype=False)
    assert first.value["score"][0] == 1 / 3
    assert first.provenance == second.provenance and second.provenance["settings"] == {"seed": 1}
    assert second.provenance["environment"]["packages"]["torch"] and second.provenance["seconds"] >= 0
    assert len(list(folder.iterdir())) == 1


def test_other_settings_or_other_code_are_another_result(monkeypatch):
    counting = Counting()
    for seed in (1, 2):
        run_or_load("r", {"seed": seed}, counting.of_lib)
    assert counting.calls == 2
    monkeypatch.setattr(results, "code_version", lambda *modules: f"another version of {modules}")
    run_or_load("r", {"seed": 1}, counting.of_lib)
    assert counting.calls == 3


def test_a_function_whose_code_nobody_watches_is_refused(folder):
    for outside in (lambda: TABLE, Counting().__call__, partial(pd.DataFrame, {})):
        with pytest.raises(ValueError, match="no function of lib"):
            run_or_load("r", {}, outside)
    assert not folder.exists()


@pytest.mark.parametrize("damage", [
    lambda b: b[:-20], lambda b: b.replace(b"0.33", b"0.44"), lambda b: b"", lambda b: b"[]", lambda b: b"\xff" + b,
])
def test_a_damaged_file_is_noticed_and_computed_again(folder, damage):
    counting = Counting()
    run_or_load("r", {}, counting.of_lib)
    [path] = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"):
        again = run_or_load("r", {}, counting.of_lib)
    assert counting.calls == 2 and again.value["score"][0] == 1 / 3
    assert run_or_load("r", {}, counting.of_lib).reused


def test_a_fresh_run_ignores_what_was_stored_before(folder):
    counting = Counting()
    run_or_load("r", {}, counting.of_lib)
    [path] = folder.iterdir()
    stored = path.stat().st_mtime
    assert run_or_load("r", {}, counting.of_lib, fresh_since=stored - 1).reused
    assert not run_or_load("r", {}, counting.of_lib, fresh_since=stored + 1).reused and counting.calls == 2


def test_a_failed_computation_stores_nothing(folder):
    with pytest.raises(AttributeError):
        run_or_load("r", {}, partial(processes.from_main, Exception))
    assert not folder.exists()


def pairs(*sentences, name="STS-B"):
    return EvaluationData(name, Dataset.from_dict({"sentence1": sentences}), {"split": "test"})


def test_a_description_tells_arguments_apart_and_holds_no_texts():
    sentence = "A sentence of a data set whose licence does not let us copy it."
    ragged = np.array([np.zeros(2), np.ones(1)], dtype=object)
    different = [
        None, 1, "a", ["a", "b"], {"a": 1}, [sentence], [sentence, sentence], list(range(200)), np.int64(2),
        np.zeros(3), np.zeros((3, 1)), np.ones(3), np.zeros(3, int), ragged, ragged * 2,
        TABLE, TABLE.assign(score=1 / 3 + 1e-16), pairs(sentence), pairs(sentence, sentence), pairs("Another."),
        SPEARMAN, mean_of("a"), mean_of("b"), pairs, partial(pairs, 1), partial(pairs, 2),
    ]
    described = [repr(describe(thing)) for thing in different]
    assert len(set(described)) == len(different)
    assert described == [repr(describe(thing)) for thing in different]
    assert not any(sentence in text for text in described)
    with pytest.raises(TypeError, match="describe"):
        describe(object())


def test_encoders_say_the_model_once_and_the_store_does_not_count(tmp_path):
    class Model:
        def describe(self):
            return {"model": "tiny", "dtype": "float32"}

    class Encoder:
        backbone = Model()

        def describe(self):
            return self.backbone.describe() | {"prompt": "prompteol", "exit_layer": 3}

    expected = {"model": {"model": "tiny", "dtype": "float32"}, "prompt": "prompteol", "exit_layer": 3}
    described = describe({"encoder": Encoder(), "store": EmbeddingStore(tmp_path), "setting": Setting(Encoder(), 3)})
    assert described["setting"] == {"type": "Setting", "method": expected, "exit_layer": 3}
    assert described["encoder"] == expected and described["store"] is None


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


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_a_write_that_does_not_fit_leaves_the_store_whole(tmp_path):
    done = run(SMALL_DISK.format(root=str(ROOT), folder=str(tmp_path)))
    assert done.stdout.split() == ["OSError", str(errno.EFBIG), "True", "6.0"], done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["small.npy"], "nothing half-written is left"


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_no_space_for_a_file_is_raised_and_the_old_file_stays(tmp_path, monkeypatch, step):
    file = tmp_path / "scores.csv"
    write_atomically(file, b"old")
    monkeypatch.setattr(store.os, step, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, b"new and longer")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_result_that_could_not_be_stored_is_computed_again(monkeypatch, folder):
    counting = Counting()
    run_or_load("scores", {}, counting.of_lib)
    [path] = folder.iterdir()
    old = path.read_bytes()
    with monkeypatch.context() as full:
        full.setattr(store.os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            run_or_load("scores", {}, counting.of_lib, fresh_since=path.stat().st_mtime + 1)
    assert [path] == list(folder.iterdir()) and path.read_bytes() == old
    assert run_or_load("scores", {}, counting.of_lib).reused and counting.calls == 2


def test_any_changed_byte_of_stored_embeddings_is_noticed(tmp_path):
    files = EmbeddingStore(tmp_path)
    files.save("key", np.arange(6.0).reshape(2, 3))
    whole = (tmp_path / "key.npy").read_bytes()
    changed = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for content in changed + [whole[:length] for length in range(len(whole))]:
        (tmp_path / "key.npy").write_bytes(content)
        with pytest.warns(UserWarning, match="damaged"):
            assert files.load("key") is None
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
