"""Golden tables: what the smoke profile writes in float32 on the sample data, kept in tests/golden/ and compared with.

`python -m tests.golden` runs the profile and writes them anew; look at the difference before it is committed.
"""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

FOLDER = Path(__file__).resolve().parent / "golden"

# Columns that hold measured time or memory, and tables that hold nothing else. Intervals in a table with such a column
# are those of the measurement.
MEASURED = re.compile(r"\btime\b|second|\bms\b|\bMB\b|\bGB\b|peak|speed|^cost$|^front$", re.I)
INTERVAL = re.compile(r"(^|_)(low|high)$|quartile", re.I)
ONLY_MEASURED = ("cost_profile.csv", "cost_beside_paper.csv")

# How far a number may be from the golden one, absolutely and as a share of it. On another processor float32 sums come
# in another order: with AVX2 for AVX512 and two threads for one, all numbers moved by less than 0.0001 of themselves,
# but those that hang on the embedder that is trained here by up to 0.022, because training makes rounding grow.
LIMIT, OF_THE_TRAINED_EMBEDDER = 2e-3, 4e-2
TRAINED = ("alignment_scores", "alignment_embedder", "spectrum_", "retrieval_", "concepts_")


def limit(name: str) -> float:
    """How far numbers of a table may be off."""
    return OF_THE_TRAINED_EMBEDDER if name.startswith(TRAINED) else LIMIT


def comparable(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that are the same in every run."""
    timed = [column for column in table if MEASURED.search(column)]
    timed += [column for column in table if timed and INTERVAL.search(column)]
    return table.drop(columns=timed)


def differences(ours: pd.DataFrame, golden: pd.DataFrame, limit: float = LIMIT) -> list[str]:
    """Where a table differs from the golden one; empty if nowhere.

    Columns and rows must be the same ones in the same order. Text and whole numbers must be equal, other numbers must
    not be further away than the limit, and what is missing in one must be missing in the other.
    """
    ours = comparable(ours)
    if list(ours) != list(golden) or len(ours) != len(golden):
        return [f"{list(ours)} x {len(ours)} rows instead of {list(golden)} x {len(golden)}"]
    found = []
    for column in golden:
        a, b = ours[column], golden[column]
        if pd.api.types.is_float_dtype(a) and pd.api.types.is_float_dtype(b):
            same = np.isclose(a, b, rtol=limit, atol=limit, equal_nan=True)
        else:
            same = (a == b) | (a.isna() & b.isna())
        found += [f"{column}, row {row}: {a[row]!r} instead of {b[row]!r}" for row in np.flatnonzero(~np.asarray(same))]
    return found


def compare(folder: Path, golden: Path = FOLDER) -> list[str]:
    """Differences of all tables in a folder from the golden ones, as lines that name the table."""
    names = {path.name for path in folder.glob("*.csv")} - set(ONLY_MEASURED)
    wanted = {path.name for path in golden.glob("*.csv")}
    lines = [f"{name}: {'not expected' if name in names else 'missing'}" for name in sorted(names ^ wanted)]
    for name in sorted(names & wanted):
        ours, theirs = pd.read_csv(folder / name), pd.read_csv(golden / name)
        lines += [f"{name}: {line}" for line in differences(ours, theirs, limit(name))]
    return lines


def write(folder: Path, golden: Path = FOLDER) -> None:
    """Make the tables of a folder the golden ones."""
    golden.mkdir(exist_ok=True)
    for old in golden.glob("*.csv"):
        old.unlink()
    for path in sorted(folder.glob("*.csv")):
        if path.name not in ONLY_MEASURED:
            comparable(pd.read_csv(path)).to_csv(golden / path.name, index=False, float_format="%.6g")


if __name__ == "__main__":
    sys.path[:0] = [str(FOLDER.parent)]
    from project_copy import Copy

    with tempfile.TemporaryDirectory() as made:
        copy = Copy(Path(made))
        if copy.start("-p", "dtype", "float32").wait():
            sys.exit(copy.log())
        write(copy.folder / "figures" / "smoke")
    print(f"{len(list(FOLDER.glob('*.csv')))} tables in {FOLDER}; see git diff.")
