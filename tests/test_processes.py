"""Several processes share the encoding and get what one process gets: `accelerate launch` over gloo, and `--processes`."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import tiny_backbone

from lib.core import processes
from lib.core.encoder import SentenceEncoder
from lib.core.store import ROOT, EmbeddingStore, write_atomically
from lib.core.token_prepending import TokenPrepending

SENTENCES = [f"{'The plane takes off, ' * (i % 5)}number {i}." for i in range(40)]

# What each process runs; it knows from its environment which one it is.
PROGRAM = """
import functools
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
import pandas as pd
from test_processes import SENTENCES, encoder
from lib.core import processes
from lib.evaluation.sts import sts_scores
from lib.report import results
folder = Path({folder!r})
results.RESULTS = folder / "results"
first = encoder(folder / "store").encode(SENTENCES, batch_size=3)
again = encoder(folder / "store").encode(SENTENCES[::-1], batch_size=3)[::-1]
assert np.array_equal(first, again)
pairs = pd.DataFrame({{"layer": 1, "task": "t", "subset": "s", "item": range(4), "gold": range(4), "similarity": first[:4, 0]}})
scores = results.run_or_load("scores", {{"seed": 1}}, functools.partial(sts_scores, pairs))
computed = processes.gather([(processes.index(), scores.reused, scores.value["score"][0])])
np.save(folder / f"{{processes.index()}}-of-{{processes.count()}}.npy", first)
if processes.is_main():
    print("gathered", computed)
"""


def encoder(store=None) -> SentenceEncoder:
    return SentenceEncoder(tiny_backbone(), method=TokenPrepending(1, 3), store=EmbeddingStore(store) if store else None)


def launch(folder, count: int) -> subprocess.CompletedProcess:
    (folder / "program.py").write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port), str(folder / "program.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_two_processes_give_the_embeddings_of_one(tmp_path):
    done = launch(tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = encoder().encode(SENTENCES, batch_size=3)
    for index in range(2):
        assert np.array_equal(np.load(tmp_path / f"{index}-of-2.npy"), expected)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("gathered")]
    assert [part[0] for part in eval(line.removeprefix("gathered"))] == [0, 1]
    assert len(list((tmp_path / "store").glob("*.npy"))) == 1, "one process writes"
    assert len(list((tmp_path / "results").glob("*.json"))) == 1


def test_each_process_runs_its_share_of_the_batches(monkeypatch):
    ran = {}

    def gather(parts):
        ran[processes.index()] = parts
        raise InterruptedError  # there are no others whose parts would complete the embeddings

    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "gather", gather)
    for index in range(3):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        with pytest.raises(InterruptedError):
            encoder().encode(SENTENCES, batch_size=3)
    rows = [row for parts in ran.values() for batch, _ in parts for row in batch]
    assert sorted(rows) == list(range(len(SENTENCES)))
    assert max(map(len, ran.values())) - min(map(len, ran.values())) <= 1


def test_alone_nothing_is_different(tmp_path):
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    assert processes.from_main(lambda: 5) == 5 and processes.gather(iter([1, 2])) == [1, 2]


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write_atomically(tmp_path / "a", b"x")
    assert not (tmp_path / "a").exists()
