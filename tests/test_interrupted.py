"""What becomes of a run that is killed, that has company, or that is shared by two processes: the tables stay the same."""

import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from project_copy import Copy

from lib.core.store import ROOT

KILLS = 20


@pytest.fixture(scope="module")
def models(smollm2) -> Path:
    """Where the embedded model lies, read already."""
    return ROOT / "data" / "cache" / "models"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, models) -> Copy:
    """A run that nobody disturbed, `--processes 2`: two kernels a notebook, which share the encoding."""
    copy = Copy(tmp_path_factory.mktemp("undisturbed"), models)
    assert copy.start("01", "05", "--processes", "2").wait() == 0, copy.log()[-3000:]
    return copy


def wait_for_results(run: subprocess.Popen, copy: Copy) -> None:
    """Until the notebook has told the runner of a first result, or the run has ended."""
    log = copy.folder / "runs" / "smoke" / "01_sts_eval.log"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while run.poll() is None and not (log.exists() and log.stat().st_mtime_ns > before):
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_goes_on_and_gives_the_same(undisturbed, models, tmp_path):
    """SIGKILL at random moments, some of them while results are stored, then two runs at once to the end.

    Each of them has one process: what two processes computed together is the same, too.
    """
    copy, moments, killed = Copy(tmp_path, models), random.Random(0), 0
    while killed < KILLS:
        run = copy.start("01")
        if killed % 5 == 4:
            wait_for_results(run, copy)
        try:
            run.wait(timeout=moments.uniform(0, 3 if killed % 5 == 4 else 6))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
        else:  # it came to its end before; the next one computes its results anew
            assert run.returncode == 0, copy.log()[-3000:]
            shutil.rmtree(copy.folder / "data" / "cache" / "results")
    time.sleep(2)  # a kernel notices within a second that its runner is gone
    stored = [path for path in (copy.folder / "data" / "cache").glob("*/*") if path.suffix in (".json", ".npy")]
    assert len(stored) > 1, "the kills came too early to test anything"
    runs = [copy.start("01"), copy.start("01")]
    assert [run.wait() for run in runs] == [0, 0], copy.log()[-3000:]
    assert "waiting for it" in copy.log()
    assert re.search(r"^01_sts_eval +\d+  0 / [1-9]", copy.log(), re.M), "the one that waited computes nothing again"
    everything = ("csv", "md", "png")
    assert len(copy.tables(everything)) > 10 and copy.tables(everything) == undisturbed.tables(everything)


@pytest.mark.slow
def test_processes_leave_out_the_notebook_that_measures_time(undisturbed):
    assert "05_cost_measurement is left out" in undisturbed.log()
    assert undisturbed.tables() and not any(name.startswith("cost") for name in undisturbed.tables())
