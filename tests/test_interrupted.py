"""A run that is killed, that has company, or that is shared by two processes: its tables stay the same."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from project_copy import Copy
from tiny_models import save_tiny

from lib.core.store import ROOT

MODELS = ROOT / "data" / "cache" / "models"  # where the bundled model lies, once it is read

# A notebook's work on a tiny model: undisturbed; then, for n = 1, 2, ... until it gets through, in a forked process
# that is killed at the n-th moment before or after a file is synced or gets its name, and in another that goes on.
EVERY_MOMENT = """
import contextlib, io, itertools, json, os, shutil, signal
from pathlib import Path
import torch
torch.set_num_threads(1)  # or it could not be forked after a computation
from lib.data.sts import load_sts
from lib.evaluation.intervals import SPEARMAN, compare
from lib.report.session import start

def study():
    run = start("00_tiny", "tiny", "model", "float32", {"hub_unreachable": "not asked"})
    pairs = run.sts(run.encoder("prompteol"), {"sample": load_sts("sample").first(5)}, [2, -1])
    with contextlib.redirect_stdout(io.StringIO()):
        run.show(compare(dict(list(pairs.groupby("layer"))), SPEARMAN, draws=0), "scores", "Scores")

def attempt(last):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    moments = itertools.count(1)

    def moment():
        if next(moments) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(call):
        def made(*arguments, **options):
            moment()
            given = call(*arguments, **options)
            moment()
            return given
        return made

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, watched(getattr(os, name)))
    study()
    os._exit(0)

def tables():
    figures = Path("figures", "tiny")
    provenance = json.loads((figures / "provenance.json").read_text())["00_tiny"]["artefacts"]
    return {path.name: path.read_bytes() for path in figures.glob("scores.*")}, provenance

study()
whole, killed = tables(), 0
for last in itertools.count(1):
    for left in ("figures/tiny", "data/cache/results", "data/cache/embeddings"):
        shutil.rmtree(left)
    status = attempt(last)
    assert status in (0, -signal.SIGKILL), f"moment {last}: status {status}"
    if status == 0:
        break
    killed += 1
    assert attempt(0) == 0 and tables() == whole, f"not the same after a kill at moment {last}"
print("killed", killed, *sorted(whole[0]))
"""


def test_killed_at_any_moment_of_a_write_it_goes_on_and_gives_the_same(tmp_path):
    copy = Copy(tmp_path)
    save_tiny(tmp_path / "model")
    command = [sys.executable, "-c", EVERY_MOMENT]
    environment = {k: v for k, v in os.environ.items() if k != "TP_DATA_DIR"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    killed, *names = done.stdout.split()[-3:]
    assert int(killed) >= 16 and names == ["scores.csv", "scores.md"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, smollm2) -> Copy:
    """A run that nobody disturbed, `--processes 2`: two kernels a notebook, which share the encoding."""
    copy = Copy(tmp_path_factory.mktemp("undisturbed"), MODELS)
    assert copy.start("01", "05", "--processes", "2").wait() == 0, copy.log()[-3000:]
    return copy


@pytest.mark.slow
def test_killed_at_random_it_goes_on_and_two_runs_at_once_wait_for_each_other(undisturbed, tmp_path):
    """Three kills of a notebook, once it stores results, and then two runs to the end, with one process each."""
    assert "05_cost_measurement is left out" in undisturbed.log(), "what measures time is not shared by two processes"
    assert not any(name.startswith("cost") for name in undisturbed.tables())
    copy, moments = Copy(tmp_path, MODELS), random.Random(0)
    log = copy.folder / "runs" / "smoke" / "01_sts_eval.log"
    for _ in range(3):
        before, run = log.stat().st_mtime_ns if log.exists() else 0, copy.start("01")
        while run.poll() is None and not (log.exists() and log.stat().st_mtime_ns > before):
            time.sleep(0.05)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(timeout=moments.uniform(0, 0.5))
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert [run.wait() for run in [copy.start("01"), copy.start("01")]] == [0, 0], copy.log()[-3000:]
    assert "waiting for it" in copy.log()
    done = re.findall(r"^01_sts_eval +\d+ +(\d+) / (\d+)", copy.log(), re.M)
    assert int(done[0][1]) > 0, "what was stored before the kills is used"
    assert done[1][0] == "0", "the one that waited computes nothing again"
    everything = ("csv", "md", "png")
    assert len(copy.tables(everything)) > 10 and copy.tables(everything) == undisturbed.tables(everything)

