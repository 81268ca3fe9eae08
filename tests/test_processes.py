"""Several processes share the encoding and get what one process gets: `accelerate launch` over gloo."""

import os
import socket
import subprocess
import sys

import numpy as np
from tiny_models import tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.store import ROOT, EmbeddingStore, write_atomically
from lib.core.token_prepending import TokenPrepending

SENTENCES = [f"{'The plane takes off, ' * (i % 5)}number {i}." for i in range(40)]

# What each process runs; it knows from its environment which one it is.
PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
from test_processes import SENTENCES, encoder
from lib.core import processes
own, ran = encoder("{folder}/store"), []
run = own.forward
own.forward = lambda batch, *rest: ran.append(len(batch.ids)) or run(batch, *rest)
first = own.encode(SENTENCES, batch_size=3)
shares = processes.gather([sum(ran)])  # a batch more or less is no matter
assert sum(shares) == len(SENTENCES) and abs(shares[0] - shares[1]) <= 3, shares
again = encoder("{folder}/store").encode(SENTENCES[::-1], batch_size=3)[::-1]
assert np.array_equal(first, again)
assert processes.gather([processes.index()]) == [0, 1]
assert processes.from_main(lambda: processes.index()) == 0
np.save(f"{folder}/{{processes.index()}}-of-{{processes.count()}}.npy", first)
"""


def encoder(store=None) -> SentenceEncoder:
    store = EmbeddingStore(store) if store else None
    return SentenceEncoder(tiny_backbone(), method=TokenPrepending(1, 3), store=store)


def test_two_processes_share_the_batches_and_give_the_embeddings_of_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([*command, program], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = encoder().encode(SENTENCES, batch_size=3)
    for index in range(2):
        assert np.array_equal(np.load(tmp_path / f"{index}-of-2.npy"), expected)


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write_atomically(tmp_path / "a", b"x")
    assert not (tmp_path / "a").exists()
