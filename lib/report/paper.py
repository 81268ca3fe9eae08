"""What the papers print, beside what was measured here: `python -m lib.report.paper [--measured]` shows every number.
A published number is `reproduced`, `differs`, `explained` (it differs, and `configs/explanations.csv` says why) or
`not run`, with the reason. The exit status is 1 if any number `differs`, else 0."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from lib.core.store import ROOT

PAPER, FIGURES = ROOT / "data" / "paper", ROOT / "figures"
KEYS = ["model", "method", "tp", "task", "metric"]
# The papers' backbones, hub id -> name, their STS tables, and how far a metric's number may be off: see `paper.yaml`.
PAPER_MODELS, STS_TABLES, TOLERANCE = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text("utf-8")).values()


def read_paper(table: str) -> pd.DataFrame:
    """A file of `data/paper/`, value as float64 and tp as bool. Raises `ValueError`, listing what exists."""
    if table not in (names := sorted(file.stem for file in PAPER.glob("*.csv"))):
        raise ValueError(f"No published table {table!r}; there are {', '.join(names)}.")
    return pd.read_csv(PAPER / f"{table}.csv", keep_default_na=False, dtype={"value": float, "tp": bool})


def sts_table(model: str) -> str:
    """The published STS table that a model belongs beside: that of its paper, else Table 1 of arXiv 2412.11556."""
    return STS_TABLES.get(PAPER_MODELS.get(model), "a1_sts_llama2_7b")


def beside_paper(ours: pd.DataFrame, table: str, model: str, sample: bool) -> pd.DataFrame:
    """Every number of a published table beside ours: `KEYS`, paper, ours, difference, status, source, grade. `ours` has
    the columns method, tp (bool), task and value, named as in the published table (main setting only), and metric where
    that has more than one (else `ValueError`). The status tells another `model` and `sample` data."""
    published = read_paper(table).query("variant == ''")
    if "metric" not in ours:
        ours = ours.assign(metric=published["metric"].drop_duplicates().item())
    merged = _differences(published, ours.rename(columns={"value": "ours"}), KEYS[1:])
    cases = {"not run": merged["ours"].isna(), "sample data": merged["ours"].notna() & sample,
             "other model": merged["model"] != PAPER_MODELS.get(model, model), "reproduced": merged["within"]}
    merged["status"] = np.select(list(cases.values()), list(cases), "differs")
    return merged[[*KEYS, "paper", "ours", "difference", "status", "source", "grade"]]


def comparison(measured: pd.DataFrame, explanations: pd.DataFrame) -> pd.DataFrame:
    """Every published number once or, where several profiles measured it, once a profile, with a status and its reason.
    `measured` has the columns `KEYS`, ours, status and profile; other models' numbers and those from sample data do not
    count. `explanations` has table, `KEYS`, variant and explanation, all str; an empty one fits every value."""
    published = pd.concat(read_paper(path.stem).assign(table=path.stem) for path in sorted(PAPER.glob("*.csv")))
    same = measured.loc[~measured["status"].isin(["other model", "sample data"]), [*KEYS, "ours", "profile"]]
    merged = _differences(published, same.assign(variant=""), [*KEYS, "variant"])
    cases = {"reproduced": merged["within"], "differs": merged["ours"].notna(),
             "not run: a variant of the paper's main setting": merged["variant"] != "",
             "not run: no notebook measures this": merged["tolerance"].isna()}
    cases["not run: needs the hub, a GPU and the model; python -m benchmarks.mteb"] = merged["metric"] == "mteb_score"
    cases |= {f"not run: needs the hub and time; ./run_all.sh {n}": merged.model == n for n in PAPER_MODELS.values()}
    merged["status"] = np.select(list(cases.values()), list(cases), "not run: there is no profile for the model")
    for reason in explanations.to_dict("records"):
        fits = merged["status"] == "differs"
        for key in ("table", *KEYS, "variant"):
            fits &= (merged[key].astype(str).str.lower() == reason[key].lower()) | (reason[key] == "")
        merged.loc[fits, "status"] = f"explained: {reason['explanation']}"
    return merged[["table", *KEYS, "variant", "paper", "ours", "difference", "tolerance", "status", "profile"]]


def _differences(published: pd.DataFrame, ours: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Published rows with the columns paper, ours, difference, tolerance and within (the difference is tolerated)."""
    merged = published.drop(columns="paper").rename(columns={"value": "paper"}).merge(ours, on=keys, how="left")
    merged = merged.assign(difference=merged["ours"] - merged["paper"], tolerance=merged["metric"].map(TOLERANCE))
    return merged.assign(within=merged["difference"].abs() <= merged["tolerance"] + 1e-9)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.report.paper", description=__doc__.partition("\n")[0])
    parser.add_argument("--measured", action="store_true", help="only those that were measured here")
    only, columns = parser.parse_args().measured, [*KEYS, "ours", "status", "profile"]
    tables = [pd.read_csv(f).assign(profile=f.parent.name) for f in sorted(FIGURES.glob("*/*_beside_paper.csv"))]
    kept = [table[columns].dropna(subset="ours") for table in tables if {*columns} <= {*table}]
    measured = pd.concat(kept) if kept else pd.DataFrame(columns=columns)
    table = comparison(measured, pd.read_csv(ROOT / "configs" / "explanations.csv", dtype=str, keep_default_na=False))
    print((table.dropna(subset="ours") if only else table).to_markdown(index=False, floatfmt=".2f"))
    counts = table["status"].str.partition(":")[0].value_counts()
    print(f"\n{len(table)} published numbers: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return int((table["status"] == "differs").any())


if __name__ == "__main__":
    sys.exit(main())
