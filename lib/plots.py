"""One look for every figure, and the figures themselves; each function returns a matplotlib figure."""

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
    "echo": "Echo",
}


def set_style() -> None:
    """Call once per notebook."""
    sns.set_theme(context="notebook", style="whitegrid", palette=list(COLOURS.values()), font_scale=0.85)
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 150, "axes.spines.top": False, "axes.spines.right": False,
                         "figure.constrained_layout.use": True})


def placeholder_diagram(tokens: list[str], placeholder: int, start: int, end: int, blocks: int, exit_layer: int):
    """Which state goes where: blocks from bottom to top, the prompt's tokens from left to right.

    Args:
        tokens: the prompt's tokens as text. placeholder: its position. start, end, exit_layer: the TP setting.
        blocks: how many blocks to draw, from the first.
    """
    last, width = len(tokens) - 1, max(9.0, 0.52 * len(tokens))
    figure, axes = plt.subplots(figsize=(width, 0.42 * blocks + 2.2))
    for block in range(blocks):
        for position in range(len(tokens)):
            if position == placeholder:
                colour = COLOURS["vermilion"] if start <= block < end else COLOURS["orange"]
            else:
                colour = COLOURS["blue"] if position == last else "0.82"
            axes.add_patch(plt.Rectangle((position - 0.4, block - 0.3), 0.8, 0.6, color=colour, linewidth=0))
        if start <= block < end:
            axes.annotate(
                "", xy=(placeholder + 0.4, block), xytext=(last - 0.4, block),
                arrowprops={"arrowstyle": "->", "color": COLOURS["vermilion"], "lw": 1.3},
            )
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", family="monospace")
    axes.set_yticks(range(blocks), [f"into block {i}" for i in range(blocks)])
    axes.set_xlim(-0.7, last + 0.7)
    axes.set_ylim(-0.7, blocks - 0.3)
    axes.grid(False)
    axes.set_xlabel("prompt token")
    patches = [
        (COLOURS["orange"], "placeholder, its own state"), (COLOURS["vermilion"], "placeholder, overwritten by the last token's state"),
        (COLOURS["blue"], f"last token (the embedding is its state {exit_layer})"), ("0.82", "other tokens"),
    ]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=label) for colour, label in patches]
    axes.legend(handles=handles, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def effect_by_prompt(effects: pd.DataFrame, title: str):
    """TP minus vanilla at the same layer: one panel per task, a point and its interval per prompt.

    Args:
        effects: columns prompt, task, difference, low, high.
    """
    tasks, prompts = list(effects["task"].unique()), list(effects["prompt"].unique())
    figure, axes = plt.subplots(1, len(tasks), figsize=(1.2 * len(tasks) + 2.4, 0.42 * len(prompts) + 1.8), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks):
        rows = effects[effects["task"] == task].set_index("prompt").loc[prompts]
        y = np.arange(len(prompts))
        colours = [COLOURS["blue"] if low > 0 else COLOURS["vermilion"] if high < 0 else "0.5"
                   for low, high in zip(rows["low"], rows["high"])]
        axis.hlines(y, rows["low"], rows["high"], color=colours, lw=2)
        axis.scatter(rows["difference"], y, color=colours, s=22, zorder=3)
        axis.axvline(0, color="0.2", lw=0.8)
        axis.set_title(task, fontsize=10)
        axis.set_ylim(len(prompts) - 0.5, -0.5)
    axes[0, 0].set_yticks(range(len(prompts)), [PROMPT_LABELS.get(p, p) for p in prompts])
    figure.supylabel("")
    axes[0, len(tasks) // 2].set_xlabel("effect of TP: change of Spearman x 100, with 95 % interval")
    handles = [plt.Line2D([], [], color=c, marker="o", lw=2, label=label) for c, label in (
        (COLOURS["blue"], "TP better"), (COLOURS["vermilion"], "TP worse"), ("0.5", "interval holds 0"))]
    figure.legend(handles=handles, ncol=3, loc="outside upper right", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def similarity_against_gold(pairs: dict[str, pd.DataFrame], title: str):
    """Distribution of cosine similarity in each band of gold scores, one panel per method.

    Args:
        pairs: method label -> table with columns gold (0 to 5) and similarity.
    """
    figure, axes = plt.subplots(1, len(pairs), figsize=(3.1 * len(pairs), 3.4), sharex=True, squeeze=False)
    for axis, (label, table) in zip(axes[0], pairs.items()):
        bands = np.clip(table["gold"].round(), 0, 5).astype(int)
        groups = [table["similarity"][bands == band] for band in range(6)]
        shown = [(band, group) for band, group in enumerate(groups) if len(group)]
        boxes = axis.boxplot(
            [group for _, group in shown], positions=[band for band, _ in shown], widths=0.6, showfliers=False,
            patch_artist=True, medianprops={"color": "black"},
        )
        for patch in boxes["boxes"]:
            patch.set(facecolor=COLOURS["sky"], edgecolor="0.3")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("gold similarity (0 to 5, rounded)")
    axes[0, 0].set_ylabel("cosine similarity")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def scores_by_prompt(scores: pd.DataFrame, title: str):
    """Average score per prompt: vanilla at the last layer, vanilla at the exit layer, TP.

    Args:
        scores: columns prompt, variant, score.
    """
    variants = list(scores["variant"].unique())
    prompts = list(scores["prompt"].unique())
    colours = dict(zip(variants, (COLOURS["sky"], COLOURS["blue"], COLOURS["vermilion"])))
    markers = dict(zip(variants, ("s", "o", "D")))
    figure, axis = plt.subplots(figsize=(7.2, 0.5 * len(prompts) + 1.5))
    for y, prompt in enumerate(prompts):
        rows = scores[scores["prompt"] == prompt]
        axis.plot([rows["score"].min(), rows["score"].max()], [y, y], color="0.8", lw=2, zorder=1)
        for _, row in rows.iterrows():
            axis.scatter(row["score"], y, color=colours[row["variant"]], marker=markers[row["variant"]], s=46, zorder=2,
                         label=row["variant"] if y == 0 else None)
    axis.set_yticks(range(len(prompts)), [PROMPT_LABELS.get(p, p) for p in prompts])
    axis.invert_yaxis()
    axis.set_xlabel("Spearman x 100, average over the data sets")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure
