"""One quantity has one value: what several published tables say of one model, prompt, way to read and data set."""

import pandas as pd
import pytest

from benchmarks import claims
from lib.data.sts import STS_TASKS

LAST = {"prompt": "prompteol", "way": "baseline, last layer", "task": "STS-B"}
WAYS = {"last layer": LAST["way"], "exit layer": "baseline, exit layer", "baseline": "baseline, exit layer",
        "TP": "TP, exit layer"}
# Notebook, table, the parameters that hold how many pairs and which seeds it is of, and which of its rows are meant.
TABLES = [
    ("01_sts_eval", "sts_scores", "sts_pairs", "seeds", lambda t: t.rename(columns={"variant": "way"})),
    ("08_beyond_the_papers", "methods_sts_by_set", "sts_pairs", "", lambda t: t.rename(columns={"variant": "way"})),
    ("03_layer_ablation", "ablation_confirmation", "sts_pairs", "seeds",
     lambda t: t.rename(columns={"variant": "way"}).assign(task="STS-B")),
    ("04_alignment_analysis", "alignment_embedder_sts", "test_pairs", "",
     lambda t: t[t["encoder"] == "PromptEOL"].assign(**LAST)),
    ("07_concepts_and_instructions", "concepts_scores", "pairs_each", "", lambda t: t[
        (t["method"] == "PromptEOL") & (t["measure"] == "cosine") & t["task"].str.startswith("STS-B")].assign(**LAST)),
]


def published(model) -> pd.DataFrame:
    """A row for each STS score that is published of a model: prompt, way, task, seeds, pairs, value, low, high."""
    sections, tables = claims.sections(model), []
    for notebook, name, pairs, seeds, rows in TABLES:
        if f"{name}.csv" not in sections.get(notebook, {"artefacts": ()})["artefacts"]:
            continue
        section, table = sections[notebook], rows(pd.read_csv(claims.place(model, f"{name}.csv")))
        given = section["about"]["parameters"]
        given = section["shared"][given] if isinstance(given, str) else given  # which may be the entry's name
        if "STS-B" in table:  # a column for each data set, and the interval of their average
            table = table.melt(["prompt", "way"], STS_TASKS, "task")
        table = table.assign(pairs=given[pairs], seeds=str(given.get(seeds, [3407])), way=table["way"].replace(WAYS))
        table["seeds"] = table["seeds"].where(table["way"].str.contains("TP|unwritten"), "")
        tables.append(table.reindex(columns=["prompt", "way", "task", "seeds", "pairs", "value", "low", "high"]))
    return pd.concat(tables, ignore_index=True).fillna({"pairs": float("inf")})


@pytest.mark.parametrize("model", claims.PROFILES)
def test_one_quantity_has_one_value(model, monkeypatch):
    """In each profile, and in what is published of several."""
    profiles, compared = claims.PROFILES[model], {}
    for chosen in (profiles, *([profile] for profile in profiles)):
        monkeypatch.setitem(claims.PROFILES, model, chosen)
        shown = published(model)
        if shown["task"].isna().any():
            pytest.skip("a run on sample data, which has one set, has written here")
        compared[tuple(chosen)] = 0
        for what, rows in shown.groupby(["prompt", "way", "task", "seeds"]):
            for pairs, same in rows.groupby("pairs"):
                assert same["value"].max() - same["value"].min() < 1e-4, (what, pairs, same["value"].tolist())
                compared[tuple(chosen)] += len(same) > 1
            known = rows.dropna(subset="low")
            assert known["low"].max() <= known["high"].min() or known.empty, f"{what}: intervals that do not meet"
    assert max(compared.values()) > 20, "only few quantities are shown twice: do the tables still have these names?"
