"""One look for every figure, and the figures of notebooks 00 and 01; each of those functions returns a matplotlib figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "vermilion": "#D55E00",
    "purple": "#CC79A7", "sky": "#56B4E9", "yellow": "#F0E442", "black": "#000000",
}
PROMPT_LABELS = {
    "none": "no prompt", "prompteol": "PromptEOL", "cot": "Pretended CoT", "ke": "KE", "ck": "CK", "metaeol": "MetaEOL",
    "echo": "Echo", "mean": "mean, no prompt", "none, mean": "no prompt, mean",
}
# Variant -> colour, marker.
VARIANT_STYLES = {
    "vanilla": (COLOURS["blue"], "o"), "TP": (COLOURS["vermilion"], "D"), "vanilla, last layer": (COLOURS["sky"], "s"),
    "vanilla, exit layer": (COLOURS["blue"], "o"), "TP, exit layer": (COLOURS["vermilion"], "D"),
}
# Where the legend of a single panel stands.
ABOVE = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}


def set_style() -> None:
    """Call once per notebook."""
    sns.set_theme(context="notebook", style="whitegrid", palette=list(COLOURS.values()), font_scale=0.85)
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 150, "axes.spines.top": False, "axes.spines.right": False,
                         "figure.constrained_layout.use": True})


def finished(figure, title: str, handles: list | None = None):
    """The figure with its title above the panels on the left and, for `handles`, a legend beside it."""
    if handles:
        figure.legend(handles=handles, ncol=len(handles), loc="outside upper right", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def variant_points(axis, table: pd.DataFrame, row: str, value: str, apart: float) -> None:
    """A point for each `value`, with its interval if there are columns low and high: a line per `row`, a colour per variant.

    `apart` is the distance between the variants in one line.
    """
    names, middle = list(table[row].unique()), (table["variant"].nunique() - 1) / 2
    for k, (variant, of) in enumerate(table.groupby("variant", sort=False)):
        colour, marker = VARIANT_STYLES[variant]
        spread = [of[value] - of["low"], of["high"] - of[value]] if "low" in of else None
        y = of[row].map(names.index) + apart * (k - middle)
        axis.errorbar(of[value], y, xerr=spread, fmt=marker, color=colour, ms=6, lw=1.5, capsize=3, label=variant)
    axis.set_yticks(range(len(names)), [PROMPT_LABELS.get(name, name) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)


def difference_points(axis, table: pd.DataFrame, y) -> None:
    """A point and its interval at each `y`, coloured by sign where the interval does not hold 0.

    Columns difference, low, high; `difference_handles` is the legend.
    """
    colours = np.select([table["low"] > 0, table["high"] < 0], [COLOURS["blue"], COLOURS["vermilion"]], "0.5")
    axis.hlines(y, table["low"], table["high"], color=colours, lw=2)
    axis.scatter(table["difference"], y, color=colours, s=20, zorder=3)
    axis.axvline(0, color="0.2", lw=0.8)


def difference_handles(better: str, worse: str) -> list:
    labels = {better: COLOURS["blue"], worse: COLOURS["vermilion"], "interval holds 0": "0.5"}
    return [plt.Line2D([], [], color=colour, marker="o", lw=2, label=label) for label, colour in labels.items()]


def placeholder_diagram(tokens: list[str], placeholder: int, start: int, end: int, blocks: int, exit_layer: int):
    """Which state goes where: blocks from bottom to top, the prompt's tokens from left to right.

    Args:
        tokens: the prompt's tokens as text. placeholder: its position. start, end, exit_layer: the TP setting.
        blocks: how many blocks to draw, from the first.
    """
    last = len(tokens) - 1
    figure, axes = plt.subplots(figsize=(max(9.0, 0.52 * len(tokens)), 0.42 * blocks + 2.2))
    for block in range(blocks):
        written = start <= block < end
        colours = dict.fromkeys(range(len(tokens)), "0.82")
        colours |= {last: COLOURS["blue"], placeholder: COLOURS["vermilion" if written else "orange"]}
        for position, colour in colours.items():
            axes.add_patch(plt.Rectangle((position - 0.4, block - 0.3), 0.8, 0.6, color=colour, linewidth=0))
        if written:
            arrow = {"arrowstyle": "->", "color": COLOURS["vermilion"], "lw": 1.3}
            axes.annotate("", xy=(placeholder + 0.4, block), xytext=(last - 0.4, block), arrowprops=arrow)
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", family="monospace")
    axes.set_yticks(range(blocks), [f"into block {i}" for i in range(blocks)])
    axes.set(xlim=(-0.7, last + 0.7), ylim=(-0.7, blocks - 0.3), xlabel="prompt token")
    axes.grid(False)
    labels = {
        "placeholder, its own state": COLOURS["orange"],
        "placeholder, overwritten by the last token's state": COLOURS["vermilion"],
        f"last token (the embedding is its state {exit_layer})": COLOURS["blue"],
        "other tokens": "0.82",
    }
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=label) for label, colour in labels.items()]
    axes.legend(handles=handles, ncol=2, **ABOVE)
    return figure


def effect_by_prompt(effects: pd.DataFrame, title: str, unit: str = "Spearman x 100"):
    """TP minus vanilla at the same layer: one panel per task, a point and its interval per prompt.

    Args:
        effects: columns prompt, task, difference, low, high.
    """
    tasks, prompts = list(effects["task"].unique()), list(effects["prompt"].unique())
    size = (1.2 * len(tasks) + 2.4, 0.42 * len(prompts) + 1.8)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks):
        rows = effects[effects["task"] == task].set_index("prompt").loc[prompts]
        difference_points(axis, rows, range(len(prompts)))
        axis.set_title(task, fontsize=10)
    axes[0, 0].set_ylim(len(prompts) - 0.5, -0.5)
    axes[0, 0].set_yticks(range(len(prompts)), [PROMPT_LABELS.get(p, p) for p in prompts])
    axes[0, len(tasks) // 2].set_xlabel(f"effect of TP: change of {unit}, with 95 % interval")
    return finished(figure, title, difference_handles("TP better", "TP worse"))


def similarity_against_gold(pairs: dict[str, pd.DataFrame], title: str):
    """Distribution of cosine similarity in each band of gold scores, one panel per method.

    Args:
        pairs: method label -> table with columns gold (0 to 5) and similarity.
    """
    figure, axes = plt.subplots(1, len(pairs), figsize=(3.1 * len(pairs), 3.4), sharex=True, squeeze=False)
    for axis, (label, table) in zip(axes[0], pairs.items()):
        bands = dict(list(table.groupby(table["gold"].round().clip(0, 5).astype(int))["similarity"]))
        axis.boxplot(
            list(bands.values()), positions=list(bands), widths=0.6, showfliers=False, patch_artist=True,
            boxprops={"facecolor": COLOURS["sky"], "edgecolor": "0.3"}, medianprops={"color": "black"},
        )
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("gold similarity (0 to 5, rounded)")
    axes[0, 0].set_ylabel("cosine similarity")
    return finished(figure, title)


def scores_by_prompt(scores: pd.DataFrame, title: str):
    """Average score per prompt: vanilla at the last layer, vanilla at the exit layer, TP.

    Args:
        scores: columns prompt, variant, score.
    """
    ranges = scores.groupby("prompt", sort=False)["score"].agg(["min", "max"])
    figure, axis = plt.subplots(figsize=(7.2, 0.5 * len(ranges) + 1.5))
    axis.hlines(range(len(ranges)), ranges["min"], ranges["max"], color="0.8", lw=2, zorder=1)
    variant_points(axis, scores, "prompt", "score", apart=0)
    axis.set_xlabel("Spearman x 100, average over the data sets")
    axis.legend(ncol=3, **ABOVE)
    return finished(figure, title)
