"""Figures that the kit in `figures` has no general form for; each function returns a matplotlib figure."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lib.report.figures import COLOURS, draw_line, drawable, finish, interval, key, label, log_axis, palette, panels

BLUE, VERMILION = COLOURS["blue"], COLOURS["vermilion"]
SLANTED = {"rotation": 55, "ha": "right", "rotation_mode": "anchor"}


def placeholder_diagram(tokens: list[str], placeholder: int, start: int, end: int, blocks: int, exit_layer: int):
    """Which state goes where: the first `blocks` blocks from bottom to top, the prompt's tokens from left to right.

    `placeholder` is a place among the tokens; start, end and exit_layer are the TP setting.
    """
    kinds = {"other tokens": "0.85", "placeholder, its own state": COLOURS["orange"],
             "placeholder, overwritten by the last token's state": VERMILION,
             f"last token (the embedding is its state {exit_layer})": BLUE}
    figure, [(axis, _)] = panels(pd.DataFrame(), None, height=0.28 * blocks + 1.1)
    cells = np.zeros((blocks, len(tokens)))
    cells[:, placeholder], cells[start:end, placeholder], cells[:, -1] = 1, 2, 3
    axis.pcolormesh(cells, cmap=ListedColormap(list(kinds.values())), edgecolor="white", linewidth=5, vmin=0, vmax=3)
    for y in np.arange(start, min(end, blocks)) + 0.5:
        arrow = {"arrowstyle": "->", "color": VERMILION, "lw": 1.2}
        axis.annotate("", (placeholder + 0.95, y), (len(tokens) - 0.95, y), arrowprops=arrow)
    axis.set_xticks(np.arange(len(tokens)) + 0.5, map(drawable, tokens), **SLANTED)
    axis.set_yticks(np.arange(blocks) + 0.5, [f"into block {block}" for block in range(blocks)])
    axis.grid(False)
    title = f"Before blocks {start} to {end - 1}, the last token's state is written over the placeholder's"
    return finish(figure, title, [key(text, colour) for text, colour in kinds.items()], "token of the prompt")


def token_bars(tables: dict[str, pd.DataFrame], title: str):
    """The tokens that one text aligns to, best first, with their logits: a panel for each method.

    `tables`: method -> columns token, logit and either in_text, whether the token is in the text, or along and rest,
    the parts of the logit that the first component and all others give.
    """
    whole = pd.concat(table.assign(method=method) for method, table in tables.items())
    split, deepest = "along" in whole, max(map(len, tables.values()))
    height = 0.5 + (0.28 if split else 0.19) * deepest
    figure, parts = panels(whole, "method", height=height, sharex=False, sharey=False)
    for axis, table in parts:
        y = np.arange(len(table))
        axis.set_yticks(y, map(drawable, table["token"]))
        if split:
            axis.barh(y - 0.19, table["along"], 0.36, color=VERMILION, lw=0)
            axis.barh(y + 0.19, table["rest"], 0.36, color=BLUE, lw=0)
            axis.scatter(table["logit"], y, color="black", marker="D", s=16, zorder=3)
            axis.axvline(0, color="0.2", lw=0.8)
        else:
            axis.barh(y, table["logit"], 0.74, color=np.where(table["in_text"], BLUE, "0.78"), lw=0)
            for text, inside in zip(axis.get_yticklabels(), table["in_text"]):
                text.set_weight("bold" if inside else "normal")
        axis.set_ylim(deepest - 0.5, -0.6)
        axis.grid(axis="y", visible=False)
    keys = [key("in the text", BLUE), key("not in the text", "0.78")]
    if split:
        keys = [key("first component", VERMILION), key("rest", BLUE), key("sum", "black", marker="D", ls="", ms=4)]
    return finish(figure, title, keys, "logit")


def similarity_against_gold(pairs: dict[str, pd.DataFrame], title: str):
    """Cosine similarity in each band of human scores: a panel for each method; columns gold (0 to 5) and similarity."""
    whole = pd.concat(table.assign(method=method) for method, table in pairs.items())
    figure, parts = panels(whole, "method", height=2.6)
    for axis, table in parts:
        bands = dict(list(table.groupby(table["gold"].round().astype(int))["similarity"]))
        axis.boxplot(list(bands.values()), positions=list(bands), widths=0.7, showfliers=False, patch_artist=True,
                     boxprops={"facecolor": COLOURS["sky"]}, medianprops={"color": "black"})
        axis.grid(axis="x", visible=False)
    keys = [key("median and quartiles; whiskers: to 1.5 times the quartiles' distance", COLOURS["sky"])]
    return finish(figure, title, keys, "human score (0 to 5, rounded)", "cosine similarity")


def similarity_by_kind(pairs: pd.DataFrame, title: str):
    """A dot for each pair and a bar at the mean, by kind of pair: a column of panels for each method, a row for each of
    the two measures. `pairs`: columns method, kind, cosine and overlap (of the aligned tokens)."""
    names = {"cosine": "cosine similarity", "overlap": "overlap of tokens"}
    long = pairs.rename(columns=names).melt(["method", "kind"], list(names.values()), "measure")
    colours = dict.fromkeys(long["kind"], BLUE) | {"paraphrase": VERMILION, "topic shift": "0.4"}
    figure, parts = panels(long, "method", "measure", height=0.5 + 0.3 * long["kind"].nunique(), sharex=False)
    for axis, table in parts:
        means = table.groupby("kind", sort=False)["value"].mean()
        jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(table))  # seaborn's strip plot takes no generator
        rows = means.index.get_indexer(table["kind"]) + jitter
        axis.scatter(table["value"], rows, s=11, alpha=0.6, linewidths=0, c=table["kind"].map(colours))
        axis.scatter(means, range(len(means)), marker="|", s=260, lw=2, color="black", zorder=3)
        axis.set(xlabel=table["measure"].iloc[0], ylabel="", yticks=range(len(means)), yticklabels=means.index)
        axis.set_ylim(len(means) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
    keys = [key("a pair", marker="o", ls="", ms=4), key("mean", "black", marker="|", ls="", ms=12, mew=2)]
    return finish(figure, title, keys)


def variation_stems(variations: dict[str, pd.DataFrame], title: str):
    """v_i, an embedder's change along the backbone's first 40 components: a panel for each method.

    `variations`: method -> columns component, variation, deviation, share and share_each, a row for each component.
    """
    whole = pd.concat(table.head(40).assign(method=method) for method, table in variations.items())
    figure, parts = panels(whole, "method", height=2.9)
    for axis, table in parts:
        x, v, first = table["component"], table["variation"], table.iloc[0]
        colours = [VERMILION] + [BLUE] * (len(table) - 1)
        axis.vlines(x, v - table["deviation"], v + table["deviation"], color="0.65", lw=0.8)
        axis.vlines(x, 0, v, color=colours, lw=1.6)
        axis.scatter(x, v, color=colours, s=10, zorder=3)
        axis.axhline(0, color="0.2", lw=0.8)
        text = (f"$v_1$ = {first['variation']:.1f}\n{100 * first['share']:.0f} % of the mean change,\n"
                f"{100 * first['share_each']:.0f} % of the texts' changes")
        y, side = (0.04, "bottom") if first["variation"] < 0 else (0.96, "top")
        axis.text(0.97, y, text, transform=axis.transAxes, ha="right", va=side, size=8, color=VERMILION)
    keys = [key("first component", VERMILION, marker="o", ms=4), key("others", BLUE, marker="o", ms=4),
            key("standard deviation over texts", "0.65", lw=0.8)]
    return finish(figure, title, keys, "component $i$ of the backbone", "variation $v_i$")


def attention_map(example: pd.DataFrame, by_block: pd.DataFrame, title: str):
    """Attention to the placeholder: in one sentence by token and block, and in many by block.

    `example`: columns block, token (place), text, share. `by_block`: columns variant, block, share, low, high.
    """
    both = pd.DataFrame({"panel": ["one sentence", "mean over sentences"]})
    figure, [(left, _), (right, _)] = panels(both, "panel", height=3.9, sharex=False, sharey=False)
    cells = example.pivot(index="block", columns="token", values="share")
    texts = example.groupby("token")["text"].first()
    image = left.imshow(cells, cmap="viridis", vmin=0, aspect="auto", origin="lower")
    left.set_xticks(range(len(texts)), map(drawable, texts), **SLANTED)
    left.set(xlabel="token of the sentence", ylabel="block")
    left.grid(False)
    figure.colorbar(image, ax=left, label="share of attention, mean over heads", aspect=30)
    styles = palette(by_block["variant"])
    for variant, table in by_block.groupby("variant", sort=False):
        draw_line(right, table["block"], table["share"], interval(table, "share"), styles[variant])
    right.set(xlabel="block", ylabel="share of attention on the placeholder")
    return finish(figure, title, [key(label(name), **style | {"marker": ""}) for name, style in styles.items()])


def pareto(points: pd.DataFrame, *, title: str, xlabel: str, ylabel: str):
    """Every method in all its variants, named at its best; a thin line joins a method, a dashed one the front.

    `points`: columns method, variant, cost, lower quartile, upper quartile, score, low, high and front (whether no
    other point is as cheap and as good).
    """
    figure, [(axis, _)] = panels(points, None, height=4.2)
    front, styles = points[points["front"]].sort_values("cost"), palette(points["variant"])
    axis.step(front["cost"], front["score"], where="post", color="0.35", lw=1.3, ls="--", zorder=1)
    axis.vlines(front["cost"], front["low"], front["high"], color="0.6", lw=1, zorder=1)
    for _, table in points.groupby("method", sort=False):
        axis.plot(table["cost"], table["score"], color="0.8", lw=1, zorder=1)
    for variant, table in points.groupby("variant", sort=False):
        colour, marker, _ = styles[variant].values()
        axis.hlines(table["score"], table["lower quartile"], table["upper quartile"], color=colour, lw=1.2)
        axis.scatter(table["cost"], table["score"], color=colour, marker=marker, s=34, zorder=3)
    log_axis(axis, "x")
    keys = [key(label(variant), **style | {"ls": ""}) for variant, style in styles.items()]
    keys += [key("Pareto front", ls="--"), key("its 95 % intervals", "0.6", lw=1)]
    finish(figure, title, keys, xlabel, ylabel)
    figure.draw_without_rendering()  # Now the places of the points are known in pixels.
    unit, points = figure.dpi / 72, points.reset_index(drop=True)
    at, left, right, low, high = (axis.transData.transform(points[list(columns)]) for columns in (
        ("cost", "score"), ("lower quartile", "score"), ("upper quartile", "score"), ("cost", "low"), ("cost", "high")))
    taken = [Bbox([start - 5 * unit, end + 5 * unit]) for start, end in zip(left, right)]
    taken += [Bbox([low[i] - unit, high[i] + unit]) for i in np.flatnonzero(points["front"])]
    offsets = np.array(sorted(product(range(-150, 151, 4), range(-90, 91, 4)), key=lambda x: np.hypot(x[0] / 2, x[1])))
    for i in points.groupby("method", sort=False)["score"].idxmax():
        place = {"textcoords": "offset points", "ha": "center", "va": "center", "in_layout": False, "zorder": 5}
        name = axis.annotate(label(points["method"][i]), points.loc[i, ["cost", "score"]], (0, 0), **place,
                             arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.7, "shrinkA": 0, "shrinkB": 4},
                             bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5})
        half = np.array(Text.get_window_extent(name).size) / 2
        for offset in offsets:  # the nearest first
            box = Bbox([at[i] + offset * unit - half, at[i] + offset * unit + half])
            if not box.count_overlaps(taken) and axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max):
                break
        name.set_position(offset)
        taken.append(box)
    return figure
