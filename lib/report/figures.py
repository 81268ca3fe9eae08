"""One kit for the figures of every notebook: each function takes a tidy table and returns a matplotlib figure.

All are 9 inches wide, so that their text has one size on a page. `title` says the finding; it stands left above the
panels, the legend below it. An interval is found by its columns' names (see `interval`). What is NaN is not drawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import cycle, product
from math import ceil
from textwrap import fill, wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

WIDTH = 9.0
# The palette of Okabe and Ito, which colour-blind readers can tell apart; each colour has its own marker and line.
COLOURS = {"blue": "#0072B2", "vermilion": "#D55E00", "green": "#009E73", "orange": "#E69F00", "purple": "#CC79A7",
           "sky": "#56B4E9", "black": "#000000", "yellow": "#F0E442"}
STYLES = {name: {"color": COLOURS[name], "marker": marker, "ls": line}
          for name, marker, line in zip(COLOURS, "oD^vPsX*", ("-", "--", "-.", ":") * 2)}
SIGNS = [COLOURS["blue"], COLOURS["vermilion"], "0.5"]  # better than 0, worse than 0, neither
# Names that look the same in every figure. `palette` shares out the other colours among the other names.
FIXED = {"baseline": "blue", "TP": "vermilion", "baseline, last layer": "sky", "baseline, exit layer": "blue",
         "TP, exit layer": "vermilion", "dense": "blue", "sparse": "vermilion", "fused": "green", "BM25": "orange"}
PROMPT_LABELS = {"none": "no prompt", "prompteol": "PromptEOL", "cot": "Pretended CoT", "ke": "KE", "ck": "CK",
                 "metaeol": "MetaEOL", "echo": "Echo", "mean": "mean, no prompt", "none, mean": "no prompt, mean",
                 "none, weighted_mean": "no prompt, weighted mean"}


def set_style() -> None:
    """The one style of all figures. Call it once in a session."""
    sizes = {"font.": 9, "axes.label": 9, "axes.title": 9.5, "xtick.label": 8.5, "ytick.label": 8.5, "legend.font": 8.5,
             "figure.title": 11, "figure.label": 9}
    sns.set_theme(style="whitegrid", rc={f"{name}size": size for name, size in sizes.items()} | {
        "figure.dpi": 150, "savefig.dpi": 150, "axes.spines.top": False, "axes.spines.right": False,
        "axes.linewidth": 0.8, "axes.edgecolor": "0.6", "grid.linewidth": 0.6, "grid.color": "0.88"})


@cache
def drawable(text: str) -> str:
    """Text as matplotlib can draw it: characters that its fonts lack as escapes, `$` not taken for mathematics."""
    normal, bold = (get_font(findfont(FontProperties(weight=weight))).get_charmap() for weight in ("normal", "bold"))
    known = normal.keys() & bold.keys()
    return "".join(c if ord(c) in known else ascii(c)[1:-1] for c in text).replace("$", r"\$")


def label(name: object, column: str = "prompt") -> str:
    """A value of a table's column as figures write it: the prompt in `prompteol + TP` becomes `PromptEOL`, a number is
    named by its column."""
    if isinstance(name, int | float | np.number):
        return f"{column.replace('_', ' ')} {name:g}"
    prompt, *rest = re.split(r"(?= \+ |: )", str(name), maxsplit=1)
    named = PROMPT_LABELS.get(prompt, prompt) if column in ("prompt", "method", "run") else prompt
    return drawable("".join([named, *rest]))


def palette(names: Sequence) -> dict[object, dict]:
    """Name -> colour, marker and line style; up to eight names differ."""
    free = cycle([colour for colour in COLOURS if colour not in {FIXED.get(name) for name in names}])
    return {name: STYLES[FIXED[name] if name in FIXED else next(free)] for name in dict.fromkeys(names)}


def interval(table: pd.DataFrame, value: str) -> tuple[pd.Series, pd.Series] | None:
    """The interval of the column `value`: its `value_low` and `value_high`, else (not of a difference or a ratio) low
    and high, else the lower and the upper quartile; None if the table has none of these columns."""
    pairs = [(f"{value}_low", f"{value}_high"), ("low", "high"), ("lower quartile", "upper quartile")]
    pairs = pairs[:1 if value in ("difference", "ratio") else 3]
    return next(((table[low], table[high]) for low, high in pairs if {low, high} <= set(table)), None)


def key(text: str, color: str = "0.35", **style):
    """An entry of a legend: a line or a marker, or a patch where no style is given."""
    return Line2D([], [], color=color, label=text, **style) if style else Patch(color=color, label=text)


def panels(table: pd.DataFrame, across: str | None, down: str | None = None, *, height: float, **share):
    """A figure, and for each panel its axis and its part of the table; `height` is that of a row of panels in inches.

    Panels of `across` stand side by side, at most four in a row, those of `down` below each other. If both are given and
    `across` has more than four, they change places.
    """
    if across and down and table[across].nunique() > 4:
        across, down = down, across
    columns, rows = (list(table[by].unique()) if by else [None] for by in (across, down))
    deep = len(rows) if down else ceil(len(columns) / 4)
    wide = ceil(len(columns) * len(rows) / deep)
    figure = plt.figure(figsize=(WIDTH, height * deep), layout="constrained")
    plt.close(figure)  # Pyplot forgets the figure, which lives on.
    axes = figure.subplots(deep, wide, squeeze=False, **{"sharex": True, "sharey": True} | share).flatten()
    parts = []
    for axis, (row, column) in zip(axes, product(rows, columns)):
        part = table if column is None else table[table[across] == column]
        parts.append((axis, part if row is None else part[part[down] == row]))
        if across and row == rows[0]:
            axis.set_title(fill(label(column, across), 80 // wide))
        if down and column == columns[0]:
            axis.set_ylabel(label(row, down))
    for axis in axes[len(parts):]:
        axis.remove()
    for axis in axes[len(parts) - wide:len(parts)]:
        axis.tick_params(labelbottom=True)
    return figure, parts


def finish(figure, title: str, keys: Sequence = (), xlabel: str = "", ylabel: str = ""):
    """The figure, made higher by its title and, below it, the legend `keys`, on the left above the panels."""
    lines, body = wrap(drawable(title), 94), figure.get_figheight()
    widths = [0.65 + 0.068 * len(entry.get_label()) for entry in keys] or [WIDTH]
    columns = len(keys) if sum(widths) < WIDTH else max(1, int(WIDTH / max(widths)))
    above = 0.14 + 0.18 * len(lines)
    height = body + above + (0.06 + 0.18 * ceil(len(keys) / columns) if keys else 0)
    figure.set_size_inches(WIDTH, height)
    figure.suptitle("\n".join(lines), x=0.008, y=1 - 0.06 / height, ha="left", weight="bold")
    figure.legend(handles=keys, ncol=columns, loc="upper left", bbox_to_anchor=(0.003, 1 - above / height),
                  frameon=False, borderpad=0, columnspacing=1.4)
    figure.get_layout_engine().set(rect=(0, 0, 1, body / height), w_pad=0.06, h_pad=0.05)
    figure.supxlabel(xlabel)
    figure.supylabel(ylabel, y=0.5 * body / height)
    return figure


def log_axis(axis, which: str) -> None:
    """A logarithmic axis, with plain numbers if it is short. Call it when everything is drawn."""
    axis.set(**{f"{which}scale": "log"})
    line, (low, high) = getattr(axis, f"{which}axis"), getattr(axis, f"get_{which}lim")()
    if high < 500 * low:
        steps = (1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5)
        line.set_major_locator(LogLocator(subs=steps) if high > 2 * low else MaxNLocator(5))
        line.set_major_formatter("{x:g}")
        line.set_minor_locator(NullLocator())


def dots(table: pd.DataFrame, value: str = "value", row: str = "prompt", hue: str | None = None,
         panel: str | None = None, *, title: str, xlabel: str, zero: float | None = None, log: bool = False,
         signed: bool | tuple[str, str] = False, group: str | None = None, hollow: str | None = None,
         crosses: dict[str, pd.DataFrame] | None = None):
    """Points with intervals: a line for each name in `row`, a colour and marker for each `hue`, panels for `panel`.

    Args:
        zero: where a reference line stands.
        signed: colour by sign where the interval does not hold 0; a pair of texts names the better and the worse.
        group: a column of families, which become headings above their names.
        hollow: a boolean column of what is drawn hollow; the legend calls it by the column's name.
        crosses: legend text -> table with the same columns, whose values are drawn as crosses (the paper's numbers).
    """
    crosses = {text: of[of[row].isin(table[row])].assign(_cross=True) for text, of in (crosses or {}).items()}
    table = pd.concat([table.assign(_cross=False), *crosses.values()], ignore_index=True)
    table["_hue"], table["_hollow"] = table[hue] if hue else "", table[hollow].eq(True) if hollow else False
    names = list(zip(table[group] if group else [""] * len(table), table[row]))
    lines = [line for family in dict.fromkeys(family for family, _ in names) for line in
             [(family, None)] * bool(group) + [name for name in dict.fromkeys(names) if name[0] == family]]
    series = list(zip(table["_hue"], table["_hollow"]))
    if not table[~table["_cross"]].duplicated([by for by in (row, panel, group) if by]).any():
        series = [""] * len(table)  # One point in a line: all stand in its middle.
    styles, kinds = palette(table["_hue"]), list(dict.fromkeys(series))
    shift = {of: min(0.3, 0.8 / len(kinds)) * (place - len(kinds) / 2 + 0.5) for place, of in enumerate(kinds)}
    table["_y"] = [lines.index(name) + shift[of] for name, of in zip(names, series)]
    texts = [label(family, "") if name is None else label(name, row) for family, name in lines]
    figure, parts = panels(table, panel, height=0.5 + len(lines) * max(0.2, 0.14 * len(kinds)))
    for axis, part in parts:
        axis.scatter(value, "_y", data=part[part["_cross"]], marker="x", s=32, lw=1.4, color="0.2", zorder=4)
        for (name, empty), of in part[~part["_cross"]].groupby(["_hue", "_hollow"], sort=False):
            style, bounds, colours = styles[name], interval(of, value), [styles[name]["color"]] * len(of)
            if signed and bounds:
                colours = np.select([bounds[0] > 0, bounds[1] < 0], SIGNS[:2], SIGNS[2])
            if bounds:
                axis.hlines(of["_y"], *bounds, color=colours, lw=1.5)
            axis.scatter(of[value], of["_y"], marker=style["marker"], s=22, zorder=3, edgecolor=colours,
                         facecolor="white" if empty else colours)
        if zero is not None:
            axis.axvline(zero, color="0.2", lw=0.9, zorder=1)
        if log:
            log_axis(axis, "x")
        axis.set(yticks=range(len(lines)), yticklabels=texts, ylim=(len(lines) - 0.5, -0.5))
        axis.grid(axis="y", visible=False)
        for y in [y for y, (_, name) in enumerate(lines) if name is None or y % 2 and not group]:
            axis.axhspan(y - 0.5, y + 0.5, color="0.955", lw=0, zorder=0)
        for text, (_, name) in zip(axis.get_yticklabels(), lines):
            text.set_weight("bold" if name is None else "normal")
    grey = {"ls": "-"} | ({"color": "0.35"} if signed else {})
    keys = [key(label(name, hue), **style | grey) for name, style in styles.items() if hue]
    if signed:
        signs = (*(("better", "worse") if signed is True else signed), "interval holds 0")
        keys += [key(text, colour, marker="o", ls="-") for text, colour in zip(signs, SIGNS)]
    keys += [key(hollow, marker="o", ls="", mfc="white")] if hollow else []
    return finish(figure, title, [*keys, *(key(text, "0.2", marker="x", ls="") for text in crosses)], xlabel)


def bars(table: pd.DataFrame, value: str, row: str, hue: str | None = None, panel: str | None = None, *, title: str,
         xlabel: str, stacked: bool = False, digits: int = 2):
    """Bars with their values written on them: a line for each `row`, a colour for each `hue`. The bars of a line stand
    below each other or, `stacked`, follow one another. For values with intervals see `dots`."""
    table = table.assign(_hue=table[hue] if hue else "")
    styles, names = palette(table["_hue"]), table[row].unique()
    figure, parts = panels(table, panel, height=0.5 + len(names) * (0.27 if stacked else 0.1 + 0.17 * len(styles)))
    for axis, part in parts:
        wide = part.pivot(index=row, columns="_hue", values=value).reindex(index=names, columns=list(styles))
        wide.plot.barh(ax=axis, stacked=stacked, width=0.75, color=[style["color"] for style in styles.values()],
                       lw=0, legend=False, xlabel="", ylabel="")
        least = 0.05 * wide.sum(axis=1).max() if stacked else -np.inf
        for drawn in axis.containers:
            texts = [f"{number:.{digits}f}" if number > least else "" for number in drawn.datavalues]
            axis.bar_label(drawn, texts, label_type="center" if stacked else "edge", padding=3 * (not stacked), size=8)
        axis.margins(x=0 if stacked else 0.15)
        axis.set(yticklabels=[label(name, row) for name in names], ylim=(len(names) - 0.5, -0.5))
        axis.grid(axis="y", visible=False)
    keys = [key(label(name, hue), style["color"]) for name, style in styles.items() if hue]
    return finish(figure, title, keys, xlabel)


def bands(table: pd.DataFrame, x: str, value: str = "value", hue: str | None = None, panel: str | None = None,
          panel_row: str | None = None, *, title: str, xlabel: str, ylabel: str | None = None, log: Sequence[str] = (),
          marks: dict[str, float | dict] | None = None, levels: dict[str, float | dict] | None = None,
          points: bool = False, hollow: str | None = None, ring: str | None = None):
    """A line for each `hue`, with its interval as a band; `panel` side by side, `panel_row` below each other.

    Args:
        ylabel: the unit of all; without it, each panel or row of panels has a y axis of its own and names its unit.
        log: which of "x" and "y" are logarithmic.
        marks, levels: text -> x of a dotted vertical or y of a dashed horizontal line; a dict has it by panel.
        points: markers, and bars instead of bands.
        hollow: a boolean column of what has a hollow marker; the legend calls it by the column's name.
        ring: the legend's text for rings around the highest point of each line; None draws none.
    """
    table = table.assign(_hue=table[hue] if hue else "").reset_index(drop=True)
    styles, dashes = palette(table["_hue"]), dict(zip(levels or {}, ("--", ":", "-.")))
    sharey = bool(ylabel) or ("row" if panel_row else False)
    figure, parts = panels(table, panel, panel_row, height=2.5 if panel_row else 2.9, sharey=sharey)
    for axis, part in parts:
        for name, line in part.sort_values(x).groupby("_hue", sort=False):
            style = styles[name]
            draw_line(axis, line[x], line[value], interval(line, value), style, points)
            if hollow:
                faces = np.where(line[hollow], "white", style["color"])
                axis.scatter(line[x], line[value], s=26, zorder=3, marker=style["marker"], ec=style["color"], c=faces)
            if ring:
                axis.scatter(*line.loc[line[value].idxmax(), [x, value]], s=110, fc="none", ec="0.2", zorder=4)
        here = part.iloc[0]
        for text, at in {**(marks or {}), **(levels or {})}.items():
            at = at.get(here.get(panel), at.get(here.get(panel_row))) if isinstance(at, dict) else at
            if at is not None and text in dashes:
                axis.axhline(at, color="0.35", lw=1.2, ls=dashes[text])
            elif at is not None:
                axis.axvline(at, color="0.35", lw=1, ls=":")
                axis.text(at, 1.01, text, transform=axis.get_xaxis_transform(), ha="center", size=8, color="0.35")
        axis.set_title(axis.get_title(), pad=16 if marks else 6)
        for which in log:
            log_axis(axis, which)
        if "x" in log and table[x].nunique() <= 8:
            axis.set_xticks(table[x].unique())
        elif "x" not in log and (table[x] % 1 == 0).all():
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    plain = {} if points or hollow else {"marker": ""}
    keys = [key(label(name, hue), lw=1.6, **style | plain) for name, style in styles.items() if hue]
    keys += [key(text, ls=dash) for text, dash in dashes.items()]
    rings = {hollow: {"mfc": "white"}, ring: {"mfc": "none", "ms": 9}}
    keys += [key(text, marker="o", ls="", **style) for text, style in rings.items() if text]
    return finish(figure, title, keys, xlabel, ylabel or "")


def draw_line(axis, x, y, bounds: tuple | None, style: dict, points: bool = False) -> None:
    """One line with its interval: a band, or with `points` markers and bars (see `bands`)."""
    axis.plot(x, y, lw=1.6, ms=5, **style | ({} if points else {"marker": ""}))
    if bounds and points:
        axis.vlines(x, *bounds, color=style["color"], lw=1.3)
    elif bounds:
        axis.fill_between(x, *bounds, color=style["color"], alpha=0.18, lw=0)


def heat_maps(table: pd.DataFrame, x: str, y: str, value: str, panel: str | None = None, panel_row: str | None = None,
              *, title: str, xlabel: str, ylabel: str, label: str, star: bool = True):
    """A map of `value` over x and y for each panel; a star marks its highest value, grey is what was not measured.

    Values of both signs share a scale around 0 (blue is above), cut at their 95th percentile. `label` names the value.
    """
    table, xs, ys = table.reset_index(drop=True), sorted(table[x].unique()), sorted(table[y].unique())
    figure, parts = panels(table, panel, panel_row, height=max(2, 0.5 + 0.2 * len(ys)))
    limit, both = float(np.nanpercentile(table[value].abs(), 95)), table[value].min() < 0
    for axis, part in parts:
        cells, best = part.pivot(index=y, columns=x, values=value), part.loc[part[value].idxmax()]
        image = axis.imshow(cells.reindex(index=ys, columns=xs), aspect="auto", cmap="RdBu" if both else "viridis",
                            vmin=-limit if both else 0, vmax=limit)
        if star:
            axis.plot(xs.index(best[x]), ys.index(best[y]), "k*", ms=9, mec="white", mew=0.6)
        axis.set(xticks=range(len(xs)), xticklabels=xs, yticks=range(len(ys)), yticklabels=ys, facecolor="0.9")
        axis.grid(False)
    extend = "both" if both else "max"
    figure.colorbar(image, ax=[axis for axis, _ in parts], label=label, extend=extend, extendfrac=0.04, aspect=30)
    keys = [key("highest of its panel", "black", marker="*", ls="", ms=8)] if star else []
    return finish(figure, title, keys, xlabel, ylabel)
