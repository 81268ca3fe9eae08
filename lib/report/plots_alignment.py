"""Figures of the key-token analysis; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.font_manager import FontProperties, findfont, get_font

from lib.report.plots import COLOURS, PROMPT_LABELS

COLOUR_CYCLE = [COLOURS[name] for name in ("blue", "vermilion", "green", "orange", "purple", "sky", "black")]
STYLES = ("-", "--", "-.", ":")


def method_label(method: str) -> str:
    """How figures and tables name a method: `prompteol + TP` becomes `PromptEOL + TP`."""
    prompt, plus, tp = method.partition(" + ")
    return f"{PROMPT_LABELS.get(prompt, prompt)}{plus}{tp}"


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Tokens as matplotlib can draw them: its font's missing characters as escapes, no `$` taken for mathematics."""
    known = get_font(findfont(FontProperties())).get_charmap()
    drawn = ("".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in token) for token in tokens)
    return [token.replace("$", r"\$") for token in drawn]


def token_bars(tables: dict[str, pd.DataFrame], title: str, columns: int = 4):
    """The tokens that one text aligns to, best first, with their logits: one panel per method.

    `tables`: method label -> rows of one text from `lib.evaluation.alignment.aligned_tokens`, with in_text.
    """
    rows, columns = -(-len(tables) // columns), min(columns, len(tables))
    depth = max(map(len, tables.values()))
    size = (2.7 * columns + 0.4, rows * (0.22 * depth + 0.75) + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(tables):]:
        axis.set_visible(False)
    for axis, (label, table) in zip(axes.flat, tables.items()):
        y, inside = np.arange(len(table)), table["in_text"].to_numpy(bool)
        axis.barh(y, table["logit"], color=np.where(inside, COLOURS["blue"], "0.78"), height=0.72)
        diamonds = {"marker": "D", "s": 22, "color": COLOURS["orange"], "ec": "black", "lw": 0.6}
        axis.scatter(table["logit"][inside], y[inside], zorder=3, **diamonds)
        axis.tick_params(axis="x", labelsize=8)
        _name_rows(axis, label, table["token"], fontsize=8.5)
    for axis in axes.flat[max(0, len(tables) - columns):len(tables)]:
        axis.set_xlabel("logit", fontsize=9)
    diamond = {"marker": "D", "markerfacecolor": COLOURS["orange"], "markeredgecolor": "black", "markersize": 5}
    found = plt.Line2D([], [], color=COLOURS["blue"], lw=6, label="in the text", **diamond)
    _head(figure, title, [found, plt.Line2D([], [], color="0.78", lw=6, label="not in the text")])
    return figure


def scores_by_method(scores: pd.DataFrame, title: str):
    """Each metric of each method, plain and with TP, with 95 % intervals: one panel per metric.

    `scores`: columns method, variant, metric, value, low, high.
    """
    metrics, methods, variants = (list(scores[column].unique()) for column in ("metric", "method", "variant"))
    size = (2.5 * len(metrics) + 1.6, 0.42 * len(methods) + 1.7)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for k, variant in enumerate(variants):
            of = scores[(scores["metric"] == metric) & (scores["variant"] == variant)]
            y = np.array([methods.index(m) for m in of["method"]]) + 0.22 * (k - (len(variants) - 1) / 2)
            axis.hlines(y, of["low"], of["high"], color=COLOUR_CYCLE[k], lw=2)
            axis.scatter(of["value"], y, color=COLOUR_CYCLE[k], marker="oDs^v"[k], s=26, zorder=3, label=variant)
        axis.set_xlabel(metric)
        axis.set_ylim(len(methods) - 0.5, -0.5)
    axes[0, 0].set_yticks(range(len(methods)), [PROMPT_LABELS.get(m, m) for m in methods])
    _head(figure, title)
    return figure


def layer_curves(curves: pd.DataFrame, title: str):
    """Alignment against the layer, plain and with TP, with interval bands: a row of panels per metric, a column per prompt.

    `curves`: columns prompt, variant, layer, metric, value, low, high.
    """
    prompts, metrics = (list(curves[column].unique()) for column in ("prompt", "metric"))
    size = (3.2 * len(prompts) + 0.6, 2.3 * len(metrics) + 1.1)
    figure, axes = plt.subplots(len(metrics), len(prompts), figsize=size, sharex=True, sharey="row", squeeze=False)
    for axis_row, metric in zip(axes, metrics):
        for axis, prompt in zip(axis_row, prompts):
            _bands(axis, curves[(curves["metric"] == metric) & (curves["prompt"] == prompt)], "variant", "layer")
            axis.set_title(PROMPT_LABELS.get(prompt, prompt) if metric == metrics[0] else "", fontsize=10)
        axis_row[0].set_ylabel(metric)
    for axis in axes[-1]:
        axis.set_xlabel("layer (state number; the last is\nafter the final norm)", fontsize=9)
    _head(figure, title)
    return figure


def variation_stems(variations: dict[str, pd.DataFrame], title: str):
    """v_i, the embedder's change along the backbone's first 40 components: one panel per method.

    `variations`: label -> table from `lib.studies.spectrum.component_variation`.
    """
    figure, axes = plt.subplots(1, len(variations), figsize=(3.4 * len(variations) + 0.6, 3.4), sharey=True, squeeze=False)
    for axis, (label, whole) in zip(axes[0], variations.items()):
        table, first = whole.head(40), whole.iloc[0]
        x, v = table["component"], table["variation"]
        colours = [COLOURS["vermilion"], *[COLOURS["blue"]] * (len(table) - 1)]
        axis.vlines(x, 0, v, color=colours, lw=1.8)
        axis.errorbar(x, v, table["deviation"], fmt="none", ecolor="0.65", elinewidth=0.8, zorder=0)
        axis.scatter(x, v, color=colours, s=14, zorder=3)
        axis.axhline(0, color="0.2", lw=0.8)
        axis.set_title(label, fontsize=10)
        shares = f"{first['share']:.0%} of the mean change,\n{first['share_each']:.0%} of the texts' changes"
        y, side = (0.04, "bottom") if first["variation"] < 0 else (0.96, "top")
        axis.text(0.97, y, f"$v_1$ = {first['variation']:.2f}\n{shares}", transform=axis.transAxes, ha="right", va=side,
                  fontsize=8.5, color=COLOURS["vermilion"])
        axis.set_xlabel("component $i$ of the backbone")
    axes[0, 0].set_ylabel("variation $v_i$ (bars: standard\ndeviation over texts)")
    _head(figure, title)
    return figure


def contribution_bars(tables: dict[str, pd.DataFrame], title: str):
    """What the first component and the rest give to the logits of one text's highest tokens: one panel per method.

    `tables`: method label -> table from `lib.studies.spectrum.contributions`.
    """
    depth = max(map(len, tables.values()))
    figure, axes = plt.subplots(1, len(tables), figsize=(3.3 * len(tables) + 0.5, 0.3 * depth + 1.6), squeeze=False)
    for axis, (label, table) in zip(axes[0], tables.items()):
        y = np.arange(len(table))
        axis.barh(y - 0.19, table["along"], height=0.36, color=COLOURS["vermilion"], label="first component")
        axis.barh(y + 0.19, table["rest"], height=0.36, color=COLOURS["blue"], label="rest")
        axis.scatter(table["logit"], y, color="black", marker="D", s=20, zorder=3, label="total")
        axis.axvline(0, color="0.2", lw=0.8)
        axis.set_xlabel("logit")
        _name_rows(axis, label, table["token"], fontsize=9)
    _head(figure, title)
    return figure


def shift_curves(sweep: pd.DataFrame, title: str):
    """Alignment as embeddings are shifted along the first component, with interval bands: one panel per metric.

    `sweep`: columns method, amount (in multiples of the method's v_1), metric, value, low, high.
    """
    metrics = sweep["metric"].unique()
    figure, axes = plt.subplots(1, len(metrics), figsize=(2.9 * len(metrics) + 2.4, 3.4), squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        _bands(axis, sweep[sweep["metric"] == metric], "method", "amount")
        for label, amount in {"as it is": 0, "$v_1$": 1}.items():
            axis.axvline(amount, color="0.35", lw=1, ls=":")
            axis.annotate(label, (amount, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=8.5, color="0.35")
        axis.set_xlabel(r"shift $\lambda$ along $u_1$, in multiples of $v_1$", fontsize=9)
        axis.set_ylabel(metric)
    _head(figure, title)
    return figure


def _bands(axis, table: pd.DataFrame, by: str, x: str) -> None:
    """One curve and its interval band for each value of the column `by`."""
    for k, (label, curve) in enumerate(table.groupby(by, sort=False)):
        style = {"color": COLOUR_CYCLE[k], "ls": STYLES[k % len(STYLES)], "lw": 1.8}
        axis.plot(curve[x], curve["value"], label=PROMPT_LABELS.get(label, label), **style)
        axis.fill_between(curve[x], curve["low"], curve["high"], color=COLOUR_CYCLE[k], alpha=0.18, lw=0)


def _name_rows(axis, title: str, tokens: Sequence[str], fontsize: float) -> None:
    """A panel's title, and a token at each of its rows, from top to bottom."""
    axis.set_yticks(range(len(tokens)), token_labels(tokens), fontsize=fontsize)
    axis.set_ylim(len(tokens) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_title(title, fontsize=10)


def _head(figure, title: str, handles: Sequence | None = None) -> None:
    """The title above the panels; the legend (None: of the first panel) beside it or, if it is long, right of the panels."""
    if handles is None:
        handles, _ = figure.axes[0].get_legend_handles_labels()
    beside = 0 < len(handles) <= 3
    if handles:
        place, columns = ("outside upper right", len(handles)) if beside else ("outside right upper", 1)
        figure.legend(handles=handles, ncol=columns, loc=place, frameon=False, fontsize=9)
    figure.suptitle(fill(title, int((7 if beside else 12) * figure.get_figwidth())), fontsize=10, x=0.01, ha="left")
