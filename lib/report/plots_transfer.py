"""What notebook 02 shows: its tables, its figures (each function returns a matplotlib figure) and a sentence from data."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib.report.plots import ABOVE, COLOURS, effect_by_prompt, finished, variant_points
from lib.evaluation.transfer import intervals, transfer_scores


def score_table(runs: dict[tuple[str, str], pd.DataFrame], draws: int = 10_000) -> pd.DataFrame:
    """(prompt, variant) -> predictions of one layer, as one wide table of accuracies x 100 with the average's 95 % interval.

    Returns:
        Columns prompt, variant, layer, a column per task, Avg, low, high, and `"<task> F1"` for tasks of pairs.
    """
    rows = []
    for (prompt, variant), predictions in runs.items():
        scores = transfer_scores(predictions)
        of_pairs = scores[scores["metric"] == "f1_x100"]
        values = intervals(predictions, draws=draws).set_index("task")
        average = values.iloc[-1]
        rows.append(
            {"prompt": prompt, "variant": variant, "layer": predictions["layer"].iloc[0], **values["value"]}
            | {"low": average["low"], "high": average["high"]}
            | {f"{task} F1": value for task, value in zip(of_pairs["task"], of_pairs["value"])}
        )
    return pd.DataFrame(rows)


def accuracy_by_prompt(scores: pd.DataFrame, title: str):
    """Average accuracy with its interval: a row per prompt, a colour per variant.

    Args:
        scores: from `score_table`.
    """
    figure, axis = plt.subplots(figsize=(7.2, 0.62 * scores["prompt"].nunique() + 1.5))
    variant_points(axis, scores, "prompt", "Avg", apart=0.2)
    axis.set_xlabel("accuracy x 100, average over the tasks, with 95 % interval")
    axis.legend(ncol=3, **ABOVE)
    return finished(figure, title)


def accuracy_effects(effects: pd.DataFrame, title: str):
    """`lib.report.plots.effect_by_prompt` for accuracies; columns prompt, task, difference, low, high."""
    return effect_by_prompt(effects, title, "accuracy x 100")


def sweep_table(ends: Sequence[int], scores: np.ndarray, resampled: np.ndarray) -> pd.DataFrame:
    """How each end of TP scores, and how far it is behind the best one.

    Args:
        scores: (ends,). resampled: (draws, ends), scores of all ends on the same resamples.

    Returns:
        Columns end, score, low, high; behind (best score - score), behind_low, behind_high: 95 % intervals, the last two
        paired. An end is worse than the best as far as the data can tell if behind_low is above 0.
    """
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    best = int(np.argmax(scores))
    behind_low, behind_high = np.percentile(resampled[:, [best]] - resampled, [2.5, 97.5], axis=0)
    behind = {"behind": scores[best] - scores, "behind_low": behind_low, "behind_high": behind_high}
    return pd.DataFrame({"end": ends, "score": scores, "low": low, "high": high} | behind)


def describe_sweeps(transfer: pd.DataFrame, sts: pd.DataFrame) -> str:
    """One sentence on whether the best end is deeper for transfer; tables from `sweep_table` over the same ends."""
    tables = {"transfer": transfer.set_index("end"), "STS-B dev": sts.set_index("end")}
    here, there = (int(table["score"].idxmax()) for table in tables.values())
    parts = []
    for (name, table), end in zip(tables.items(), (here, there)):
        score, low, high = table.loc[end, ["score", "low", "high"]]
        parts.append(f"{name} is best at end {end} ({score:.1f}, 95 % interval {low:.1f} to {high:.1f})")
    said = f"Of these ends, {' and '.join(parts)}"
    if here == there:
        return f"{said}: the same end for both."
    # A measure tells the two ends apart if the end that is best for the other one is worse by more than chance.
    apart = [name for (name, table), end in zip(tables.items(), (there, here)) if table.loc[end, "behind_low"] > 0]
    told = f"paired intervals tell them apart on {' and '.join(apart)}" if apart else "no paired interval tells them apart"
    return f"{said}: {'deeper' if here > there else 'less deep'} for transfer, and {told}."


def sweep_figure(tables: dict[str, pd.DataFrame], plain: dict[str, float], title: str):
    """Score against the end of TP, one panel per measure, with intervals; a ring marks the best end.

    Args:
        tables: measure, as the axis names it -> from `sweep_table`. plain: the same measures without TP, dashed.
    """
    figure, axes = plt.subplots(len(tables), 1, figsize=(7.2, 2.5 * len(tables) + 0.6), sharex=True, squeeze=False)
    for axis, (measure, table), colour in zip(axes[:, 0], tables.items(), (COLOURS["vermilion"], COLOURS["blue"])):
        spread = [table["score"] - table["low"], table["high"] - table["score"]]
        axis.errorbar(table["end"], table["score"], yerr=spread, marker="o", lw=1.5, capsize=3, color=colour, label="TP")
        best = table.loc[table["score"].idxmax()]
        axis.scatter(best["end"], best["score"], s=150, facecolor="none", edgecolor="0.2", zorder=4, label="best end")
        axis.axhline(plain[measure], color="0.4", ls="--", lw=1.2, label="without TP")
        axis.set_ylabel(measure)
    axes[-1, 0].set_xticks(table["end"])
    axes[-1, 0].set_xlabel("end of TP (0-based block, not included)")
    axes[0, 0].legend(ncol=3, **ABOVE)
    return finished(figure, title)
