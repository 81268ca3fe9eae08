"""What notebooks 01 and 02 say about TP's effect, from tables of items that `lib.evaluation` made: a prompt's variants
beside each other, and TP's ends beside the best."""

from collections.abc import Callable

import pandas as pd

from lib.evaluation.intervals import compare, wide


def compare_variants(
    runs: dict[str, dict[str, pd.DataFrame]], statistic: Callable, reference: str | None = None, draws: int = 10_000
) -> pd.DataFrame:
    """Every variant (baseline, TP, …) of every prompt, beside the variant `reference` of that prompt where it has it.
    `runs`: prompt -> variant -> table of items at one layer. Columns prompt, variant, layer and those of `compare`."""
    tables = []
    for prompt, variants in runs.items():
        table = compare(variants, statistic, reference if reference in variants else None, draws=draws)
        layers = table["run"].map({variant: of["layer"].iloc[0] for variant, of in variants.items()})
        tables.append(pd.DataFrame({"prompt": prompt, "variant": table.pop("run"), "layer": layers}).join(table))
    return pd.concat(tables, ignore_index=True)


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the average of the tasks or, where there is only one task, of that one."""
    return table[table["task"] == table["task"].iloc[-1]]


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """A table of `compare_variants` with a column per task; low and high are the interval of the average."""
    names = ["prompt", "variant", "layer"]
    return wide(scores, names).merge(overall(scores)[[*names, "low", "high"]], on=names)


def compare_ends(runs: dict[int, pd.DataFrame], statistic: Callable, draws: int = 10_000) -> pd.DataFrame:
    """How each end of TP (end -> table of items) scores over the tasks' average: columns end, value, low, high and,
    against the best end on the same resamples, difference (0 or less), difference_low, difference_high. Where
    difference_high is below 0, the end is worse as far as the data can tell."""
    scores = overall(compare(runs, statistic, draws=0))
    table = overall(compare(runs, statistic, scores.loc[scores["value"].idxmax(), "run"], draws=draws))
    return table.rename(columns={"run": "end"}).drop(columns="task").reset_index(drop=True)


def describe_ends(transfer: pd.DataFrame, sts: pd.DataFrame) -> str:
    """One sentence on whether the best end is deeper for transfer; tables from `compare_ends` over the same ends."""
    tables = {"transfer": transfer.set_index("end"), "STS-B dev": sts.set_index("end")}
    here, there = (table["value"].idxmax() for table in tables.values())
    said = "Of these ends, " + " and ".join(
        "{0} is best at {1} ({value:.1f}, 95 % interval {low:.1f} to {high:.1f})".format(name, end, **table.loc[end])
        for (name, table), end in zip(tables.items(), (here, there), strict=True)
    )
    if here == there:
        return f"{said}: the same end for both."
    # A measure tells the two ends apart if the end that is best for the other one is worse by more than chance.
    apart = " and ".join(name for name, of in tables.items() if of.loc[[here, there], "difference_high"].min() < 0)
    told = f"paired intervals tell them apart on {apart}" if apart else "no paired interval tells them apart"
    return f"{said}: {'deeper' if here > there else 'less deep'} for transfer, and {told}."


def describe_effects(effects: pd.DataFrame, items: str = "pairs") -> str:
    """One sentence about differences with intervals; columns prompt, difference_low, difference_high."""
    better, worse = effects["difference_low"] > 0, effects["difference_high"] < 0
    groups = {"better": better, "worse": worse, f"no different as far as these {items} can tell": ~better & ~worse}
    parts = [f"{label} for {', '.join(effects.loc[rows, 'prompt'])}" for label, rows in groups.items() if rows.any()]
    return f"With TP the average is {'; '.join(parts)}."
