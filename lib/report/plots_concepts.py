"""Figures of the notebook on concepts and instructions; each function returns a matplotlib figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib.report.plots import COLOURS

INSTRUCTION_STYLES = {"fitting": ("vermilion", "D"), "wrong": ("blue", "s"), "none": ("black", "o")}


def similarity_by_kind(pairs: pd.DataFrame, title: str):
    """A dot a pair and a bar at the mean, by kind of pair: a column of panels per method, a row per measure.

    Args:
        pairs: columns method, kind, cosine, overlap.
    """
    methods, kinds = list(pairs["method"].unique()), list(pairs["kind"].unique())
    size, generator = (2.6 * len(methods) + 1.6, 5.2), np.random.default_rng(0)
    colours = {"paraphrase": COLOURS["vermilion"], "topic shift": "0.35"}
    figure, axes = plt.subplots(2, len(methods), figsize=size, sharey=True, squeeze=False)
    for axis_row, measure in zip(axes, ("cosine", "overlap")):
        for axis, method in zip(axis_row, methods):
            for y, kind in enumerate(kinds):
                values = pairs.query("method == @method and kind == @kind")[measure]
                axis.scatter(values, y + generator.uniform(-0.22, 0.22, len(values)), s=14, alpha=0.6, lw=0,
                             color=colours.get(kind, COLOURS["blue"]))
                axis.plot([values.mean()] * 2, [y - 0.36, y + 0.36], color="black", lw=2.2)
            axis.set_xlabel({"cosine": "cosine similarity", "overlap": "overlap of aligned tokens"}[measure])
            axis.grid(axis="y", visible=False)
    for axis, method in zip(axes[0], methods):
        axis.set_title(method, fontsize=10)
    axes[0, 0].set_yticks(range(len(kinds)), kinds)
    axes[0, 0].set_ylim(len(kinds) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def accuracy_by_instruction(accuracy: pd.DataFrame, title: str):
    """Accuracy with its interval for each instruction, plain (filled) and with TP (hollow): a panel per measure.

    Args:
        accuracy: columns measure, task, instruction (of `INSTRUCTION_STYLES`), TP (bool), accuracy, low, high.
    """
    measures, tasks = list(accuracy["measure"].unique()), list(accuracy["task"].unique())
    size = (3.1 * len(measures) + 2.4, 0.85 * len(tasks) + 1.6)
    figure, axes = plt.subplots(1, len(measures), figsize=size, sharey=True, squeeze=False)
    for axis, measure in zip(axes[0], measures):
        for i, (instruction, (colour, marker)) in enumerate(INSTRUCTION_STYLES.items()):
            for tp in (False, True):
                of = accuracy.query("measure == @measure and instruction == @instruction and TP == @tp")
                y = of["task"].map(tasks.index) + 0.26 * (i - 1) + 0.1 * (tp - 0.5)
                axis.hlines(y, of["low"], of["high"], color=COLOURS[colour], lw=1.4)
                axis.scatter(of["accuracy"], y, marker=marker, s=26, zorder=3, edgecolor=COLOURS[colour],
                             facecolor="white" if tp else COLOURS[colour], label=f"{instruction}{' + TP' if tp else ''}")
        axis.set_title(measure, fontsize=10)
        axis.set_xlabel("accuracy x 100")
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(tasks)), tasks)
    axes[0, 0].set_ylim(len(tasks) - 0.5, -0.5)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure
