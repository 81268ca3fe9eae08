"""Every number that the papers print, beside ours: `python -m lib.report.compare`.

Ours come from the tables that the notebooks wrote to `figures/*/` (`compare_with_paper` in `lib.report.results`). The status of a
published number is `reproduced`, `differs`, `explained` (it differs, and `configs/explanations.csv` says why) or
`not run: reason`. The exit status is 1 if any number `differs`, else 0.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd

from lib.report.results import FIGURES, PAPER, PAPER_MODELS, read_paper
from lib.core.store import ROOT

# How far a reproduced number may be off, in its own unit. What has no entry is compared in none of the notebooks.
TOLERANCE = {"spearman_x100": 0.5, "accuracy_x100": 0.7, "time_ratio": 0.05, "ndcg@10": 0.01}
EXPLANATIONS = ROOT / "configs" / "explanations.csv"
KEYS = ["model", "method", "tp", "task", "metric"]


def published() -> pd.DataFrame:
    """All of `data/paper/`: the columns of its files (value as float64, tp as bool) and table."""
    names = sorted(path.stem for path in PAPER.glob("*.csv"))
    whole = pd.concat(read_paper(name).assign(table=name) for name in names)
    return whole.assign(value=whole["value"].astype(float), tp=whole["tp"].astype(str).str.lower() == "true")


def ours() -> pd.DataFrame:
    """What the notebooks measured of it: the columns `KEYS`, ours, status and profile."""
    tables = [pd.read_csv(path).assign(profile=path.parent.name) for path in sorted(FIGURES.glob("*/*_beside_paper.csv"))]
    columns = [*KEYS, "ours", "status", "profile"]
    kept = [table.dropna(subset="ours")[columns] for table in tables if {*KEYS, "ours"} <= {*table}]
    return pd.concat(kept) if kept else pd.DataFrame(columns=[*KEYS, "ours", "status", "profile"])


def comparison(measured: pd.DataFrame, explanations: pd.DataFrame) -> pd.DataFrame:
    """Every published number once or, where several profiles measured it, once a profile.

    Args:
        measured: from `ours`. Numbers of another model than the published one do not count.
        explanations: columns table, *`KEYS`, variant and explanation, all str; an empty one fits every value.

    Returns:
        Columns table, model, method, tp, variant, task, metric, paper, ours, difference, tolerance, status, profile.
    """
    same = measured[~measured["status"].isin(["other model", "sample data"])]
    everything = published().drop(columns="paper").rename(columns={"value": "paper"})
    main = everything["variant"] == ""
    merged = pd.concat([everything[main].merge(same.drop(columns="status"), on=KEYS, how="left"), everything[~main]])
    merged["tolerance"] = merged["metric"].map(TOLERANCE)
    merged["difference"] = merged["ours"] - merged["paper"]
    merged["status"] = [_status(row, explanations) for row in merged.itertuples()]
    numbers = ["paper", "ours", "difference", "tolerance", "status", "profile"]
    return merged[["table", *KEYS, "variant", "metric", *numbers]].sort_values("table", kind="stable", ignore_index=True)


def _status(row, explanations: pd.DataFrame) -> str:
    if pd.isna(row.ours):
        if row.variant:
            return "not run: a variant of the paper's main setting"
        if pd.isna(row.tolerance):
            return "not run: no notebook measures this"
        if row.model in PAPER_MODELS.values():
            return f"not run: needs a GPU and the model; ./run_all.sh {row.model}"
        return "not run: a model that this project has no profile for"
    if abs(row.difference) <= row.tolerance:
        return "reproduced"
    for reason in explanations.itertuples():
        wanted = ((getattr(reason, key), str(getattr(row, key)).lower()) for key in ("table", *KEYS, "variant"))
        if all(text.lower() in ("", found) for text, found in wanted):
            return f"explained: {reason.explanation}"
    return "differs"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.report.compare", description="Every published number beside ours.")
    parser.add_argument("--measured", action="store_true", help="only those that were measured here")
    only = parser.parse_args().measured
    table = comparison(ours(), pd.read_csv(EXPLANATIONS, dtype=str, keep_default_na=False))
    shown = table.dropna(subset="ours") if only else table
    if len(shown):
        print(shown.to_markdown(index=False, floatfmt=".2f"))
    counts = table["status"].str.partition(":")[0].value_counts()
    print(f"\n{len(table)} published numbers: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return int((table["status"] == "differs").any())


if __name__ == "__main__":
    sys.exit(main())
