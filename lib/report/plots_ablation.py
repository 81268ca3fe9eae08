"""Figures of the layer ablation; each function returns a matplotlib figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from lib.report.plots import COLOURS, PROMPT_LABELS, difference_handles, difference_points, finished

LINES = {"plain model": (COLOURS["blue"], "-"), "never written": (COLOURS["blue"], "-"), "TP": (COLOURS["vermilion"], "--")}


def _curves(axis, table: pd.DataFrame, x: str, y: str) -> None:
    """A line and its band (columns low, high) for each variant."""
    for variant, of in table.groupby("variant", sort=False):
        colour, style = LINES[variant]
        axis.plot(of[x], of[y], color=colour, ls=style, lw=1.8, label=variant)
        axis.fill_between(of[x], of["low"], of["high"], color=colour, alpha=0.18, lw=0)


def grid_heat_maps(effects: pd.DataFrame, title: str):
    """Effect of TP for each start and end: a row of panels per prompt, a column per exit layer; a star marks the best.

    Args:
        effects: columns prompt, exit, start, end, effect (TP minus the plain model at the same exit layer).
    """
    prompts, exits = list(effects["prompt"].unique()), sorted(effects["exit"].unique())
    limit = float(np.nanpercentile(effects["effect"].abs(), 95))
    width, height = 0.22 * effects["end"].nunique() * len(exits), 0.3 * effects["start"].nunique() * len(prompts)
    size = (max(width, 5) + 2.2, height + 1.9)
    figure, axes = plt.subplots(len(prompts), len(exits), squeeze=False, sharex=True, sharey=True, figsize=size)
    for axis_row, prompt in zip(axes, prompts):
        for axis, layer in zip(axis_row, exits):
            of = effects[(effects["prompt"] == prompt) & (effects["exit"] == layer)]
            table = of.pivot(index="start", columns="end", values="effect")
            image = axis.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            best = of.loc[of["effect"].idxmax()]
            axis.plot(table.columns.get_loc(best["end"]), table.index.get_loc(best["start"]), "k*", ms=8)
            axis.set_xticks(range(len(table.columns)), table.columns, fontsize=7)
            axis.set_yticks(range(len(table.index)), table.index, fontsize=7)
            axis.grid(False)
            axis.set_title(f"exit {layer}", fontsize=9)
        axis_row[0].set_ylabel(f"{PROMPT_LABELS.get(prompt, prompt)}\nstart block", fontsize=9)
    axes[-1, len(exits) // 2].set_xlabel("end block (not included)", fontsize=9)
    figure.colorbar(image, ax=axes, label="change of Spearman x 100", extend="both", shrink=0.9, aspect=30)
    return finished(figure, title)


def exit_layer_curves(curves: pd.DataFrame, title: str):
    """Score against the exit layer, plain and with TP, one panel per prompt, with interval bands.

    Args:
        curves: columns prompt, variant (of `LINES`), exit, score, low, high.
    """
    prompts = curves["prompt"].unique()
    figure, axes = plt.subplots(1, len(prompts), figsize=(3.4 * len(prompts) + 0.6, 3.5), sharey=True, squeeze=False)
    for axis, prompt in zip(axes[0], prompts):
        _curves(axis, curves[curves["prompt"] == prompt], "exit", "score")
        axis.set_title(PROMPT_LABELS.get(prompt, prompt), fontsize=10)
        axis.set_xlabel("exit layer (state number)")
    axes[0, 0].set_ylabel("Spearman x 100 on dev pairs")
    return finished(figure, title, axes[0, 0].get_legend_handles_labels()[0])


def ablation_differences(table: pd.DataFrame, title: str):
    """What each change does to TP's score: a point and its interval per row, one panel per prompt, grouped by family.

    Args:
        table: columns prompt, family, run, difference, low, high.
    """
    prompts = table["prompt"].unique()
    families = {family: of["run"].unique() for family, of in table.groupby("family", sort=False)}
    names = [f"{family}: {run}" for family, runs in families.items() for run in runs]
    edges = np.cumsum([len(runs) for runs in families.values()])[:-1]
    size = (3.4 * len(prompts) + 4.2, 0.24 * len(names) + 1.4)
    figure, axes = plt.subplots(1, len(prompts), figsize=size, sharey=True, squeeze=False)
    for axis, prompt in zip(axes[0], prompts):
        of = table[table["prompt"] == prompt]
        difference_points(axis, of, (of["family"] + ": " + of["run"]).map(names.index))
        axis.grid(axis="y", visible=False)
        for edge in edges:
            axis.axhline(edge - 0.5, color="0.75", lw=0.8)
        axis.set_title(PROMPT_LABELS.get(prompt, prompt), fontsize=10)
        axis.set_xlabel("change of Spearman x 100")
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    return finished(figure, title, difference_handles("better than TP", "worse than TP"))


def attention_map(example: pd.DataFrame, by_block: pd.DataFrame, title: str):
    """Attention to the placeholder: for one sentence by token and block, and by block over many sentences.

    Args:
        example: columns block, token, text, share (one sentence).
        by_block: columns variant (of `LINES`), block, share, low, high.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.5, 1))
    table = example.pivot(index="block", columns="token", values="share")
    texts = example.drop_duplicates("token").sort_values("token")["text"]
    sns.heatmap(table.iloc[::-1], ax=left, cmap="viridis", cbar_kws={"label": "share of attention, mean over heads"}, vmin=0)
    left.set_xticks(np.arange(len(texts)) + 0.5, texts, rotation=60, ha="right", fontsize=8)
    left.set(xlabel="token of the sentence", ylabel="block")
    _curves(right, by_block, "block", "share")
    right.set(xlabel="block", ylabel="share of attention on the placeholder")
    right.legend(frameon=False, fontsize=9)
    return finished(figure, title)
