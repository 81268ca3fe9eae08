"""Figures of the retrieval notebook; each function returns a matplotlib figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib.report.plots import COLOURS

KINDS = {"dense": COLOURS["blue"], "sparse": COLOURS["vermilion"], "BM25": COLOURS["yellow"], "fused": COLOURS["green"]}
LINES = (("vermilion", "o"), ("blue", "s"), ("green", "D"), ("orange", "^"), ("purple", "v"))
STYLES = {"sparse": (COLOURS["vermilion"], "D", "-"), "dense": (COLOURS["blue"], "o", "--")}


def effectiveness_bars(table: pd.DataFrame, metric: str, title: str):
    """How well each run ranks: a panel per retrieval set, a bar with its interval per run.

    Args:
        table: columns set, run, kind (of `KINDS`), score, score_low, score_high, 0 to 1; every run in every set.
        metric: what the scores are, for the axis.
    """
    sets, runs = list(table["set"].unique()), list(table["run"].unique())
    size, y = (3.2 * len(sets) + 2.2, 0.34 * len(runs) + 1.6), np.arange(len(runs))
    figure, axes = plt.subplots(1, len(sets), figsize=size, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], sets):
        rows = table[table["set"] == name].set_index("run").loc[runs]
        axis.barh(y, rows["score"], color=rows["kind"].map(KINDS), height=0.7)
        axis.hlines(y, rows["score_low"], rows["score_high"], color="0.15", lw=1.4)
        for place, score, high in zip(y, rows["score"], rows["score_high"]):
            axis.text(high, place, f"  {score:.3f}", va="center", fontsize=8, color="0.2")
        axis.set_title(name, fontsize=10)
        axis.set_xlim(0, 1.22 * rows["score_high"].max())
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(y, runs)
    axes[0, 0].set_ylim(len(runs) - 0.4, -0.6)
    axes[0, len(sets) // 2].set_xlabel(f"{metric}, with 95 % interval over queries")
    shown = table["kind"].unique()
    handles = [plt.Rectangle((0, 0), 1, 1, color=KINDS[kind], label=kind) for kind in KINDS if kind in shown]
    return _finish(figure, title, handles)


def setting_curves(study: pd.DataFrame, metric: str, title: str):
    """What the choices of sparse retrieval do: score against K, a line per way of weighting, a panel per M.

    Args:
        study: columns k, m, weighting (a label), score, 0 to 1.
    """
    panels, ks = study.sort_values("k", kind="stable").groupby("m"), sorted(study["k"].unique())
    size = (2.8 * len(panels) + 2.2, 3.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (m, of_m) in zip(axes[0], panels):
        for (label, of), (colour, marker) in zip(of_m.groupby("weighting", sort=False), LINES):
            axis.plot(of["k"], of["score"], color=COLOURS[colour], marker=marker, ms=5, lw=1.5, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set_title("query: its own tokens" + (f" + {m} aligned" if m else ""), fontsize=9)
        axis.set_xlabel("K, aligned tokens of a document")
    axes[0, 0].set(ylabel=metric, ylim=(0, None))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def cost_curves(growth: pd.DataFrame, title: str, unembedding: int | None = None):
    """What a search costs as the collection grows: time, operations, index; hollow points are synthetic collections.

    Args:
        growth: from `lib.evaluation.retrieval.cost_growth`.
        unembedding: hidden x vocabulary, the multiply-adds that put one query through the unembedding, drawn as a line.
    """
    growth = growth.assign(megabytes=growth["documents"] * growth["bytes"] / 1e6)
    panels = {"ms": "time of a search, ms", "operations": "operations of a search", "megabytes": "index, MB"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
    figure.set_layout_engine("constrained", wspace=0.08)
    for method, of in growth.groupby("method", sort=False):
        colour, marker, line = STYLES[method]
        for axis, column in zip(axes, panels):
            axis.plot(of["documents"], of[column], color=colour, ls=line, lw=1.6)
            for synthetic, points in of.groupby("synthetic"):
                axis.scatter(points["documents"], points[column], marker=marker, s=34, zorder=3, edgecolor=colour,
                             facecolor="white" if synthetic else colour)
        axes[0].fill_between(of["documents"], of["low"], of["high"], color=colour, alpha=0.25, lw=0)
    for axis, label in zip(axes, panels.values()):
        axis.set(xscale="log", yscale="log", ylabel=label)
    axes[1].set_xlabel("documents in the collection")
    handles = [plt.Line2D([], [], color=c, marker=m, ls=s, label=name) for name, (c, m, s) in STYLES.items()]
    handles.append(plt.Line2D([], [], color="0.4", marker="o", markerfacecolor="white", ls="", label="synthetic collection"))
    if unembedding:
        axes[1].axhline(unembedding, color="0.4", lw=1.2, ls=":")
        handles.append(plt.Line2D([], [], color="0.4", ls=":", label="one query through the unembedding"))
    return _finish(figure, title, handles)


def _finish(figure, title: str, handles: list):
    figure.legend(handles=handles, ncol=len(handles), loc="outside upper right", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure
