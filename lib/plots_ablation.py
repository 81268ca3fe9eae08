"""Figures of the layer ablation; each function returns a matplotlib figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from lib.plots import COLOURS, PROMPT_LABELS


def grid_heat_maps(effects: pd.DataFrame, title: str):
    """Effect of TP for each start and end: a row of panels per prompt, a column per exit layer.

    Args:
        effects: columns prompt, exit, start, end, effect (TP minus the plain model at the same exit layer).
    """
    prompts, exits = list(effects["prompt"].unique()), sorted(effects["exit"].unique())
    limit = float(np.nanpercentile(effects["effect"].abs(), 95))
    width, height = 0.22 * effects["end"].nunique() * len(exits), 0.3 * effects["start"].nunique() * len(prompts)
    figure, axes = plt.subplots(
        len(prompts), len(exits), squeeze=False, sharex=True, sharey=True, figsize=(max(width, 5) + 2.2, height + 1.9)
    )
    for axis_row, prompt in zip(axes, prompts):
        for axis, layer in zip(axis_row, exits):
            of = effects[(effects["prompt"] == prompt) & (effects["exit"] == layer)]
            table = of.pivot(index="start", columns="end", values="effect")
            image = axis.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            best = of.loc[of["effect"].idxmax()]
            axis.plot(list(table.columns).index(best["end"]), list(table.index).index(best["start"]), "k*", ms=8)
            axis.set_xticks(range(len(table.columns)), table.columns, fontsize=7)
            axis.set_yticks(range(len(table.index)), table.index, fontsize=7)
            axis.grid(False)
            axis.set_title(f"exit {layer}", fontsize=9)
        axis_row[0].set_ylabel(f"{PROMPT_LABELS.get(prompt, prompt)}\nstart block", fontsize=9)
    axes[-1, len(exits) // 2].set_xlabel("end block (not included)", fontsize=9)
    figure.colorbar(image, ax=axes, label="change of Spearman x 100", extend="both", shrink=0.9, aspect=30)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def exit_layer_curves(curves: pd.DataFrame, title: str):
    """Score against the exit layer, plain and with TP, one panel per prompt, with interval bands.

    Args:
        curves: columns prompt, variant, exit, score, low, high.
    """
    prompts, variants = list(curves["prompt"].unique()), list(curves["variant"].unique())
    figure, axes = plt.subplots(1, len(prompts), figsize=(3.4 * len(prompts) + 0.6, 3.5), sharey=True, squeeze=False)
    for axis, prompt in zip(axes[0], prompts):
        for variant, colour, style in zip(variants, (COLOURS["blue"], COLOURS["vermilion"]), ("-", "--")):
            of = curves[(curves["prompt"] == prompt) & (curves["variant"] == variant)]
            axis.plot(of["exit"], of["score"], color=colour, ls=style, lw=1.8, label=variant)
            axis.fill_between(of["exit"], of["low"], of["high"], color=colour, alpha=0.18, lw=0)
        axis.set_title(PROMPT_LABELS.get(prompt, prompt), fontsize=10)
        axis.set_xlabel("exit layer (state number)")
    axes[0, 0].set_ylabel("Spearman x 100 on dev pairs")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncol=len(variants), loc="outside upper right", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def ablation_differences(table: pd.DataFrame, title: str):
    """What each change does to TP's score: a point and its interval per row, one panel per prompt, grouped by family.

    Args:
        table: columns prompt, family, run, difference, low, high.
    """
    prompts = list(table["prompt"].unique())
    names = table[["family", "run"]].drop_duplicates().sort_values("family", kind="stable", key=lambda f: f.map(
        {name: k for k, name in enumerate(table["family"].unique())})).reset_index(drop=True)
    place = {tuple(row): k for k, row in enumerate(names.itertuples(index=False))}
    figure, axes = plt.subplots(1, len(prompts), figsize=(3.4 * len(prompts) + 4.2, 0.24 * len(names) + 1.4), sharey=True, squeeze=False)
    for axis, prompt in zip(axes[0], prompts):
        of = table[table["prompt"] == prompt]
        y = [place[row] for row in zip(of["family"], of["run"])]
        colours = [COLOURS["blue"] if low > 0 else COLOURS["vermilion"] if high < 0 else "0.5" for low, high in zip(of["low"], of["high"])]
        axis.hlines(y, of["low"], of["high"], color=colours, lw=2)
        axis.scatter(of["difference"], y, color=colours, s=18, zorder=3)
        axis.axvline(0, color="0.2", lw=0.8)
        axis.grid(axis="y", visible=False)
        for edge in np.flatnonzero(names["family"].ne(names["family"].shift()).to_numpy())[1:]:
            axis.axhline(edge - 0.5, color="0.75", lw=0.8)
        axis.set_title(PROMPT_LABELS.get(prompt, prompt), fontsize=10)
        axis.set_xlabel("change of Spearman x 100")
        axis.set_ylim(len(names) - 0.5, -0.5)
    axes[0, 0].set_yticks(range(len(names)), [f"{family}: {run}" for family, run in names.itertuples(index=False)], fontsize=8)
    handles = [plt.Line2D([], [], color=c, marker="o", lw=2, label=label) for c, label in (
        (COLOURS["blue"], "better than TP"), (COLOURS["vermilion"], "worse than TP"), ("0.5", "interval holds 0"))]
    figure.legend(handles=handles, ncol=3, loc="outside upper right", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def attention_map(example: pd.DataFrame, by_block: pd.DataFrame, title: str):
    """Attention to the placeholder: for one sentence by token and block, and by block over many sentences.

    Args:
        example: columns block, token, text, share (one sentence). by_block: columns variant, block, share, low, high.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.5, 1))
    table = example.pivot(index="block", columns="token", values="share")
    texts = example.drop_duplicates("token").sort_values("token")["text"]
    sns.heatmap(table.iloc[::-1], ax=left, cmap="viridis", cbar_kws={"label": "share of attention, mean over heads"}, vmin=0)
    left.set_xticks(np.arange(len(texts)) + 0.5, texts, rotation=60, ha="right", fontsize=8)
    left.set_xlabel("token of the sentence")
    left.set_ylabel("block")
    for variant, colour, style in zip(by_block["variant"].unique(), (COLOURS["vermilion"], COLOURS["blue"]), ("--", "-")):
        of = by_block[by_block["variant"] == variant]
        right.plot(of["block"], of["share"], color=colour, ls=style, label=variant)
        right.fill_between(of["block"], of["low"], of["high"], color=colour, alpha=0.2, lw=0)
    right.set_xlabel("block")
    right.set_ylabel("share of attention on the placeholder")
    right.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure
