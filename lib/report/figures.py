"""One kit for the figures of every notebook: each function takes a tidy table and returns a matplotlib figure.
All are 9 inches wide, so that their text has one size on a page. The keyword arguments `texts` are title (the finding,
left above the legend and the panels), xlabel and, but for dots and bars, ylabel. Of a table's columns, `hue` decides
colour, marker and line, and `panel` makes panels. An interval is found by its columns' names (see `interval`). What is
NaN is not drawn. How all this looks stands in `figures.yaml`."""

import re
from collections.abc import Sequence
from functools import cache
from itertools import cycle, product
from math import ceil
from pathlib import Path
from textwrap import fill, wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH = 9.0
LOOK = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
COLOURS = {name: style["color"] for name, style in LOOK["styles"].items()}
SIGNS = [COLOURS["blue"], COLOURS["vermilion"], "0.5"]  # better than 0, worse than 0, neither


def set_style() -> None:
    """The one style of all figures. Call it once in a session."""
    sns.set_theme("paper", "whitegrid", font_scale=0.95, rc=LOOK["matplotlib"])


@cache
def drawable(text: str) -> str:
    """Text as matplotlib can draw it: characters that its fonts lack as escapes, `$` not taken for mathematics."""
    normal, bold = (get_font(findfont(FontProperties(weight=weight))).get_charmap() for weight in ("normal", "bold"))
    return "".join(c if ord(c) in normal.keys() & bold else ascii(c)[1:-1] for c in text).replace("$", r"\$")


def label(name: object, column: str = "prompt") -> str:
    """A value of a column as figures write it: prompteol + TP as PromptEOL + TP, 3 in exit_layer as exit layer 3."""
    if isinstance(name, int | float | np.number):
        return f"{column.replace('_', ' ')} {name:g}"
    prompt, *rest = re.split(r"(?= \+ |: )", str(name), maxsplit=1)
    named = LOOK["labels"].get(prompt, prompt) if column in ("prompt", "method", "run") else prompt
    return drawable("".join([named, *rest]))


def palette(names: Sequence) -> dict[object, dict]:
    """Name -> colour, marker and line style; up to eight names differ."""
    fixed = {name: LOOK["fixed"][name] for name in names if name in LOOK["fixed"]}
    free = cycle([colour for colour in COLOURS if colour not in fixed.values()])
    return {name: LOOK["styles"][fixed.get(name) or next(free)] for name in dict.fromkeys(names)}


def interval(table: pd.DataFrame, value: str) -> tuple[pd.Series, pd.Series]:
    """Its ends: `value_low` and `value_high`, else (not of differences) low and high, the quartiles, or no interval."""
    pairs = [(f"{value}_low", f"{value}_high"), ("low", "high"), ("lower quartile", "upper quartile"), (value, value)]
    step = 3 if value in ("difference", "ratio") else 1
    return next((table[low], table[high]) for low, high in pairs[::step] if {low, high} <= set(table))


def key(text: str, color: str = "0.35", **style):
    """An entry of a legend: a line or a marker, or a square where no style is given."""
    return Line2D([], [], color=color, label=text, **style or {"marker": "s", "ls": "", "ms": 8})


def panels(table: pd.DataFrame, across: str | None = None, down: str | None = None, *, title: str, xlabel: str = "",
           ylabel: str = "", keys: Sequence = (), height: float, log: bool = False, **share):
    """A figure with its title and the legend `keys`, and for each panel its axis and its part of the table. Panels of
    `across` stand side by side, at most four in a row, those of `down` below each other; with over four of `across`,
    the two change places. `height` is a row's in inches, `log` makes x logarithmic, `share` is as of pyplot."""
    if across and down and table[across].nunique() > 4:
        across, down = down, across
    columns, rows = (table[by].unique() if by else [""] for by in (across, down))
    deep = len(rows) if down else ceil(len(columns) / 4)
    wide, lines = ceil(len(columns) * len(rows) / deep), wrap(drawable(title), 94)
    in_row = max(1, int(WIDTH / (0.65 + 0.068 * max((len(entry.get_label()) for entry in keys), default=0))))
    above, inner = 0.14 + 0.18 * len(lines), height * deep
    full = inner + above + (0.06 + 0.18 * ceil(len(keys) / in_row) if keys else 0)
    figure = plt.figure(figsize=(WIDTH, full), layout="constrained")
    plt.close(figure)  # Pyplot, which tells a notebook how to show figures, forgets it; the figure lives on.
    figure.get_layout_engine().set(rect=(0, 0, 1, inner / full), w_pad=0.06, h_pad=0.05)
    figure.suptitle("\n".join(lines), x=0.008, y=1 - 0.06 / full, ha="left")
    figure.legend(handles=keys, ncol=in_row, loc="upper left", bbox_to_anchor=(0.003, 1 - above / full))
    figure.supxlabel(xlabel)
    figure.supylabel(ylabel, y=inner / full / 2)
    axes, parts = figure.subplots(deep, wide, squeeze=False, **{"sharex": True, "sharey": True} | share).flatten(), []
    for axis, (row, column) in zip(axes, product(rows, columns)):
        part = table[table[across] == column] if across else table
        parts.append((axis, part[part[down] == row] if down else part))
        axis.set_title(fill(label(column, across), 80 // wide) if row == rows[0] else "")
        axis.set_ylabel(label(row, down) if column == columns[0] else "")
    for axis in axes if log else []:
        axis.set_xscale("log", subs=[])
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)), major_formatter="{x:g}")
    for axis in axes[len(parts):]:
        axis.remove()
    for axis in axes[len(parts) - wide:len(parts)]:
        axis.tick_params(labelbottom=True)
    return figure, parts


def dots(table: pd.DataFrame, value="value", row="prompt", hue=None, panel=None, *, zero=np.nan, log=False, signed=(),
         group=None, crosses: dict[str, pd.DataFrame] | None = None, **texts: str):
    """Points with intervals: a line for each name in `row`, in which the points of all `hue` stand; a reference line at
    `zero`. With `signed`, what to call better and worse, colours tell the sign where the interval excludes 0.
    Names in `group` become headings. `crosses`: legend text -> table with the same columns, drawn as crosses."""
    others = [of[of[row].isin(table[row])].assign(_cross=True) for of in (crosses or {}).values()]
    table = pd.concat([table.assign(_cross=False), *others], ignore_index=True)
    table["_hue"], table["_group"] = table[hue] if hue else "", table[group] if group else ""
    lines, styles = [], palette(table["_hue"])
    for family, of in table.groupby("_group", sort=False):
        lines += [(family, None)] * bool(group) + [(family, name) for name in of[row].unique()]
    rank = table["_hue"].map([*styles].index).groupby(by := [table["_group"], table[row]]).rank("dense")  # in its line
    shift = min(0.3, 0.8 / rank.max()) * (rank - (1 + rank.groupby(by).transform("max")) / 2)
    table["_y"] = shift + [lines.index(name) for name in zip(table["_group"], table[row])]
    low, high = interval(table, value)
    signs, grey = np.select([low > 0, high < 0], SIGNS[:2], SIGNS[2]), {"color": "0.35"} if signed else {}
    table["_tone"] = signs if signed else [styles[name]["color"] for name in table["_hue"]]
    keys = [key(label(name, hue), **style | {"ls": "-"} | grey) for name, style in styles.items() if hue]
    keys += [key(text, tone) for tone, text in zip(SIGNS, [*signed, "interval includes 0"]) if signed and tone in signs]
    keys += [key(text, "0.2", marker="x", ls="") for text in crosses or {}]
    height = 0.5 + len(lines) * max(0.2, 0.14 * rank.max())
    figure, parts = panels(table, panel, keys=keys, height=height, log=log, **texts)
    for axis, part in parts:
        axis.scatter(value, "_y", data=part[part["_cross"]], marker="x", s=32, lw=1.4, color="0.2", zorder=4)
        for name, of in part[~part["_cross"]].groupby("_hue", sort=False):
            axis.hlines(of["_y"], *interval(of, value), color=of["_tone"], lw=1.5)
            axis.scatter(of[value], of["_y"], marker=styles[name]["marker"], s=22, zorder=3, color=of["_tone"])
        axis.axvline(zero, color="0.2", lw=0.9, zorder=1)
        axis.set(yticks=range(len(lines)), ylim=(len(lines) - 0.5, -0.5),
                 yticklabels=[label(family, "") if name is None else label(name, row) for family, name in lines])
        axis.grid(axis="y", visible=False)
        for y in [y for y, (_, name) in enumerate(lines) if name is None or y % 2 and not group]:
            axis.axhspan(y - 0.5, y + 0.5, color="0.955", lw=0, zorder=0)
        for text, (_, name) in zip(axis.get_yticklabels(), lines):
            text.set_weight("bold" if name is None else "normal")
    return figure


def bars(table: pd.DataFrame, value: str, row: str, hue: str, *, stacked=False, digits=2, **texts: str):
    """Bars with their values: a line for each `row`, whose bars stand below or, `stacked`, follow one another."""
    colours = {name: style["color"] for name, style in palette(table[hue]).items()}
    wide = table.pivot(index=row, columns=hue, values=value).loc[table[row].unique(), list(colours)]
    keys = [key(label(name, hue), color) for name, color in colours.items()]
    height = 0.5 + len(wide) * (0.27 if stacked else 0.2 * len(colours))
    figure, [(axis, _)] = panels(table, keys=keys, height=height, **texts)
    wide.plot.barh(ax=axis, stacked=stacked, width=0.75, lw=0, legend=False, color=colours, ylabel="")
    for drawn in axis.containers:
        axis.bar_label(drawn, [f"{n:.{digits}f}" if n > axis.dataLim.x1 / 40 else "" for n in drawn.datavalues],
                       label_type="center", size=8, color=str(float(sum(drawn[0].get_facecolor()[:3]) < 1.5)))
    axis.set(xmargin=0, ylim=(len(wide) - 0.5, -0.5))
    axis.grid(axis="y", visible=False)
    return figure


def bands(table: pd.DataFrame, x: str, value="value", hue=None, panel=None, panel_row=None, *, log: Sequence[str] = (),
          marks: dict[str, float] | None = None, levels: dict[str, dict[str, float]] | None = None, points=False,
          hollow=None, ring="", **texts: str):
    """A line for each `hue` with its interval as a band or, with `points`, with markers and bars; `panel` side by side,
    `panel_row` below each other. Without ylabel, the unit of all, each row or panel has a y axis and unit of its own.
    `log`: which of "x" and "y" are logarithmic. `marks`, text -> x, are dotted vertical lines, `levels`, legend text ->
    panel -> y, dashed horizontal ones. What is true in `hollow` has a hollow marker; `ring` names the rings around the
    highest point of each line."""
    table, marks, levels = table.assign(_hue=table[hue] if hue else ""), marks or {}, levels or {}
    styles = {name: style | ({} if points else {"marker": ""}) for name, style in palette(table["_hue"]).items()}
    keys = [key(label(name, hue), lw=1.6, **style) for name, style in styles.items() if hue]
    keys += [key(text, ls="--") for text in levels]
    keys += [key(hollow, marker="o", ls="", mfc="white")] if hollow else []
    keys += [key(ring, marker="o", ls="", mfc="none", ms=9)] if ring else []
    sharey = "ylabel" in texts or ("row" if panel_row else False)
    figure, parts = panels(table, panel, panel_row, keys=keys, height=2.5 if panel_row else 2.9, sharey=sharey, **texts)
    for axis, part in parts:
        for name, line in part.sort_values(x).groupby("_hue", sort=False):
            bounds, color = interval(line, value), styles[name]["color"]
            axis.plot(line[x], line[value], lw=1.6, ms=5, **styles[name])
            draw, style = (axis.vlines, {"lw": 1.3}) if points else (axis.fill_between, {"alpha": 0.18, "lw": 0})
            draw(line[x], *bounds, color=color, **style)
            if hollow:
                axis.plot(x, value, data=line[line[hollow]], ms=5, mfc="white", **styles[name] | {"ls": ""})
            if ring:
                axis.scatter(x, value, data=line.nlargest(1, value), s=110, fc="none", ec="0.2", zorder=4)
        for text, at in marks.items():
            axis.axvline(at, color="0.35", lw=1, ls=":")
            axis.text(at, 1.01, text, transform=axis.get_xaxis_transform(), ha="center", size=8, color="0.35")
        for at in levels.values():
            axis.axhline(at.get(part[panel or panel_row].iloc[0], np.nan), color="0.35", lw=1.2, ls="--")
        axis.set_title(axis.get_title(), pad=16 if marks else 6)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set(**{f"{which}scale": "log" for which in log})
        if table[x].nunique() < 9:  # all that were measured
            axis.set_xticks(table[x].unique(), [f"{tick:,}" for tick in table[x].unique()])
    return figure


def heat_maps(table: pd.DataFrame, x: str, y: str, value: str, panel=None, panel_row=None, *, label: str, digits=0,
              signed=True, **texts: str):
    """A map of `value`, named `label`, over x and y in the table's order for each panel, with its number in each cell,
    all on one scale. `signed`: that is cut at the 95th percentile, blue is above 0, a frame marks a panel's highest."""
    xs, ys, values = table[x].unique(), table[y].unique(), table[value].dropna()
    ends = np.array([-1, 1]) * np.percentile(values.abs(), 95) if signed else (values.min(), values.max())
    keys = [key("highest of its panel", "black", marker="s", ls="", mfc="none", ms=8)] * signed
    figure, parts = panels(table, panel, panel_row, keys=keys, height=max(2, 0.5 + 0.25 * len(ys)), **texts)
    for axis, part in parts:
        cells, name = part.pivot(index=y, columns=x, values=value).reindex(index=ys, columns=xs), axis.get_ylabel()
        sns.heatmap(cells, vmin=ends[0], vmax=ends[1], cmap="RdBu" if signed else "Blues", annot=True, ax=axis,
                    fmt=f"z.{digits}f", annot_kws={"size": 8}, cbar=False)
        top, left = np.unravel_index(np.nanargmax(cells), cells.shape)
        for tone, wide in {"white": 4, "black": 1.8}.items() if signed else ():  # one of them can be seen on any colour
            axis.add_patch(plt.Rectangle((left, top), 1, 1, fill=False, ec=tone, lw=wide, zorder=3, clip_on=False))
        axis.set(xlabel="", ylabel=name, facecolor="0.9")
        axis.tick_params(rotation=0)
    figure.colorbar(axis.collections[0], ax=[axis for axis, _ in parts], label=label, aspect=30)
    return figure
