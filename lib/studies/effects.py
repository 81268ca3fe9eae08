"""TP's effect (notebooks 01, 02): a prompt's variants, TP's ends beside the best; and what many intervals tell."""

import pandas as pd

from lib.evaluation.intervals import Statistic, compare


def compare_variants(runs: dict[str, dict], statistic: Statistic, reference=None, draws=10_000) -> pd.DataFrame:
    """Every variant (baseline, TP, …) of every prompt, beside the variant `reference` of that prompt where it has it.
    `runs`: prompt -> variant -> table (or tables) of a layer's items. Columns prompt, variant, layer, `compare`'s."""
    tables = []
    for prompt, variants in runs.items():
        table = compare(variants, statistic, reference if reference in variants else None, draws=draws)
        first = {variant: of if isinstance(of, pd.DataFrame) else of[0] for variant, of in variants.items()}
        layers = table["run"].map({variant: of["layer"].iloc[0] for variant, of in first.items()})
        tables.append(pd.DataFrame({"prompt": prompt, "variant": table.pop("run"), "layer": layers}).join(table))
    return pd.concat(tables, ignore_index=True)


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the average of the tasks or, where there is only one task, of that one."""
    return table[table["task"] == table["task"].iloc[-1]]


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """A table of `compare_variants` with a column per task; low and high are the interval of the average."""
    names = ["prompt", "variant", "layer"]
    wide = scores.set_index([*names, "task"])["value"].unstack(sort=False)[scores["task"].unique()]
    return wide.reset_index().rename_axis(columns=None).merge(overall(scores)[[*names, "low", "high"]], on=names)


def seed_table(runs: dict[str, dict[str, list[pd.DataFrame]]], statistic: Statistic) -> pd.DataFrame:
    """The average over the tasks by the placeholder's seed, summed up: prompt, variant, count, mean, std (nan of one
    seed), min, max. `runs` are prompt -> variant -> a table of items for each seed."""
    scores = {(prompt, variant): overall(compare(dict(enumerate(tables)), statistic, draws=0))["value"]
              for prompt, variants in runs.items() for variant, tables in variants.items()}
    groups = pd.concat(scores, names=["prompt", "variant"]).groupby(["prompt", "variant"], sort=False)
    return groups.agg(["count", "mean", "std", "min", "max"]).reset_index()


def compare_ends(runs: dict[int, pd.DataFrame], statistic: Statistic, draws: int = 10_000) -> pd.DataFrame:
    """How each end of TP (end -> table of items) scores over the tasks' average: columns end, value, low, high and,
    against the best end on the same resamples, difference (0 or less), difference_low, difference_high."""
    scores = overall(compare(runs, statistic, draws=0))
    table = overall(compare(runs, statistic, scores.loc[scores["value"].idxmax(), "run"], draws=draws))
    return table.rename(columns={"run": "end"}).drop(columns="task").reset_index(drop=True)


def by_chance(table: pd.DataFrame) -> str:
    """One sentence on many comparisons: how many of a table's 95 % intervals (difference_low to difference_high, else
    low to high) leave 0 out, and how many would by chance. What is compared with itself or has none does not count."""
    start = "difference_" * ("difference_low" in table)
    ends = table[[f"{start}low", f"{start}high"]].dropna()
    low, high = ends[(ends != 0).any(axis=1)].to_numpy().T
    found = f"{((low > 0) | (high < 0)).sum()} of {len(low)} intervals leave 0 out"
    return f"{found}; if nothing differed, 5 % would by chance, about {0.05 * len(low):.1f}."


def items_needed(effects: pd.DataFrame, items: int, wanted: float = 2.0) -> str:
    """One sentence on how many items show a difference of `wanted` points, from the width of the 95 % intervals of
    `effects` (difference_low, difference_high, in points), which shrinks with the root of the number; now `items`."""
    widths = effects["difference_high"] - effects["difference_low"]
    few, many = (items * (widths / 2 / wanted) ** 2 + 1).agg(["min", "max"]).astype(int)
    return (f"At the measured spread it takes {few:,} to {many:,} texts of each task, by the row, until a difference "
            f"of {wanted:g} points leaves 0 out of its 95 % interval; here are {items}. So many find a true difference "
            "of that size every second time, twice as many four times out of five.")


def describe_below(scores: pd.DataFrame, trivial: str) -> str:
    """One sentence that names what scores below the prompt `trivial`, by task; columns prompt, variant, task, value."""
    floor, parts = scores[scores["prompt"] == trivial].set_index("task")["value"], []
    for task, of in scores[scores["value"] < scores["task"].map(floor)].groupby("task", sort=False):
        every, names = len(of) == (scores["task"] == task).sum() - 1, of["prompt"] + " (" + of["variant"] + ")"
        parts.append(f"on {task} ({floor[task]:.1f}) {'every row' if every else ', '.join(names)}")
    return f"Below the {trivial}: {'; '.join(parts) or 'no row on any task'}."
