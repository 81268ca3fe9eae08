"""Figures of notebook 05; each function returns a matplotlib figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from lib.studies.cost import pareto_front
from lib.report.plots import ABOVE, COLOURS, PROMPT_LABELS, VARIANT_STYLES, finished, variant_points

RATIO_TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)


def _ratio_axis(axis) -> None:
    """A logarithmic axis with plain numbers."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in RATIO_TICKS if low <= tick <= high]))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_locator(FixedLocator([]))


def time_ratios(table: pd.DataFrame, title: str, paper: pd.DataFrame | None = None):
    """Time of each method as a ratio to plain PromptEOL, a row per method, with quartiles over the rounds.

    Args:
        table: from `lib.studies.cost_table.cost_table`, of `paper_methods`. paper: columns method, tp, value, drawn as crosses.
    """
    names = list(table["method"].unique())
    figure, axis = plt.subplots(figsize=(8, 0.55 * len(names) + 1.6))
    variant_points(axis, table, "method", "time ratio", apart=0.44)
    if paper is not None:
        shown = paper[paper["method"].isin(names)]
        y = shown["method"].map(names.index) + np.where(shown["tp"], 0.22, -0.22)
        axis.errorbar(shown["value"], y, fmt="x", ms=6.5, mew=1.4, color="0.25", zorder=4, label="the paper, Llama-2-7B")
    axis.axvline(1, color="0.2", lw=0.8)
    _ratio_axis(axis)
    axis.set_xlabel("time, PromptEOL without TP = 1 (logarithmic; bars: quartiles of the rounds)")
    axis.legend(ncol=4, **ABOVE)
    return finished(figure, title)


def quality_against_cost(points: pd.DataFrame, title: str):
    """Every method in all its variants, the Pareto front through the best of them; a line joins what is one method.

    Args:
        points: columns method, variant, time ratio with its quartiles low and high, score with its interval from, to.
    """
    figure, axis = plt.subplots(figsize=(8.4, 5.2))
    best = points[pareto_front(points["time ratio"], points["score"])].sort_values("time ratio")
    axis.step(best["time ratio"], best["score"], where="post", color="0.35", lw=1.4, ls="--", label="Pareto front", zorder=1)
    axis.vlines(best["time ratio"], best["from"], best["to"], color="0.6", lw=1, label="its 95 % intervals", zorder=1)
    for _, rows in points.groupby("method", sort=False):
        axis.plot(rows["time ratio"], rows["score"], color="0.8", lw=1, zorder=1)
    for variant, rows in points.groupby("variant", sort=False):
        (colour, marker), ratio = VARIANT_STYLES[variant], rows["time ratio"]
        spread = [ratio - rows["low"], rows["high"] - ratio]
        axis.errorbar(ratio, rows["score"], xerr=spread, fmt=marker, color=colour, ms=7, capsize=2, lw=1, label=variant)
    axis.set_xlim(points["low"].min() / 1.15, points["high"].max() * 1.8)
    _ratio_axis(axis)
    _name_methods(figure, axis, points)
    axis.set_xlabel("time of the batched encoder, PromptEOL at the last layer = 1 (logarithmic; "
                    "bars: quartiles of the rounds)")
    axis.set_ylabel("Spearman x 100")
    axis.legend(ncol=3, **ABOVE)
    return finished(figure, title)


def _name_methods(figure, axis, points: pd.DataFrame) -> None:
    """A name beside each method's best point, at the nearest height where it hides no other name and no point."""
    figure.canvas.draw()
    best = points.loc[points.groupby("method", sort=False)["score"].idxmax()]

    def in_points(table, column):
        return axis.transData.transform(table[[column, "score"]].to_numpy()) * 72 / figure.dpi

    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in in_points(points, "time ratio")]
    for (_, row), (x, y) in zip(best.iterrows(), in_points(best, "high")):
        name = PROMPT_LABELS.get(row["method"], row["method"])
        for up in sorted(range(-200, 201), key=abs):
            box = Bbox.from_extents(x + 8, y + up - 6, x + 10 + 5.5 * len(name), y + up + 6)
            if not box.count_overlaps(taken):
                break
        taken.append(box)
        axis.annotate(
            name, (row["high"], row["score"]), xytext=(9, up), textcoords="offset points", va="center", fontsize=9,
            zorder=5, bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85},
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkA": 0, "shrinkB": 2},
        )


def time_by_operation(profile: pd.DataFrame, title: str):
    """Where the CPU time goes: one bar per run, its groups side by side.

    Args:
        profile: columns run, group, share (of 1), from `lib.studies.cost.time_by_group`.
    """
    shares = profile.pivot(index="run", columns="group", values="share")
    shares = shares.loc[profile["run"].unique(), profile["group"].unique()]
    figure, axis = plt.subplots(figsize=(8.4, 0.5 * len(shares) + 1.7))
    left = np.zeros(len(shares))
    colours = [COLOURS[name] for name in ("blue", "sky", "orange", "vermilion", "yellow")] + ["0.75"]
    for (group, share), colour in zip(shares.items(), colours):
        width = 100 * share.to_numpy()
        bars = axis.barh(shares.index, width, left=left, color=colour, label=group)
        numbers = [f"{size:.0f}" if size >= 6 else "" for size in width]
        text_colour = "white" if colour == COLOURS["blue"] else "black"
        axis.bar_label(bars, numbers, label_type="center", fontsize=8, color=text_colour)
        left += width
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of CPU time, %")
    axis.legend(ncol=3, fontsize=9, **ABOVE | {"bbox_to_anchor": (0.4, 1.0)})
    return finished(figure, title)
