"""Figures that the kit in `figures` has no general form for; each function returns a matplotlib figure."""

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap

from lib.report.figures import COLOURS, bands, drawable, key, label, palette, panels

BLUE, VERMILION, SKY = COLOURS["blue"], COLOURS["vermilion"], COLOURS["sky"]


def placeholder_diagram(tokens: list[str], placeholder: int, start: int, end: int, blocks: int, exit_layer: int):
    """Which state goes where: the first `blocks` blocks from bottom to top, the prompt's tokens from left to right.
    `placeholder` is a place among the tokens; start, end and exit_layer are the TP setting."""
    colours = {"other tokens": "0.85", "placeholder, its own state": COLOURS["orange"],
               "placeholder, overwritten by the last token's state": VERMILION,
               f"last token (the embedding is its state {exit_layer})": BLUE}
    title = f"Before blocks {start} to {end - 1}, the last token's state is written over the placeholder's"
    figure, [(axis, _)] = panels(pd.DataFrame(), title=title, keys=[key(*entry) for entry in colours.items()],
                                 xlabel="token of the prompt", height=0.28 * blocks + 1.1)
    cells = np.zeros((blocks, len(tokens)))
    cells[:, placeholder], cells[start:end, placeholder], cells[:, -1] = 1, 2, 3
    axis.pcolormesh(cells, cmap=ListedColormap(list(colours.values())), edgecolor="white", linewidth=5)
    for y in np.arange(start, min(end, blocks)) + 0.5:
        arrow = {"arrowstyle": "->", "color": VERMILION}
        axis.annotate("", (placeholder + 0.95, y), (len(tokens) - 0.95, y), arrowprops=arrow)
    axis.set_xticks(np.arange(0.5, len(tokens)), map(drawable, tokens), rotation=55, ha="right", rotation_mode="anchor")
    axis.set_yticks(np.arange(0.5, blocks), [f"into block {block}" for block in range(blocks)])
    return figure


def token_bars(tables: dict[str, pd.DataFrame], title: str):
    """The tokens that one text aligns to, best first: a panel for each method. `tables`: method -> columns token, logit
    and either in_text (bool), or along and rest, the parts of the logit by the first component and all others."""
    whole = pd.concat(tables, names=["method"]).reset_index("method")
    split, deepest = "along" in whole, whole["method"].value_counts().max()
    fills = {"first component": VERMILION, "rest": BLUE} if split else {"in the text": BLUE, "not in the text": "0.78"}
    if not split:
        whole = whole.assign(along=whole["logit"].where(whole["in_text"]), rest=whole["logit"].mask(whole["in_text"]))
    keys = [key(*entry) for entry in fills.items()] + [key("sum", "black", marker="D", ls="", ms=4)] * split
    figure, parts = panels(whole, "method", title=title, keys=keys, xlabel="logit", sharey=False,
                           height=0.5 + (0.28 if split else 0.19) * deepest)
    for axis, table in parts:
        table.plot.barh(y=["along", "rest"], color=fills.values(), stacked=not split, width=0.75, lw=0, legend=False,
                        ylabel="", ax=axis)
        axis.set(yticks=range(len(table)), yticklabels=map(drawable, table["token"]), ylim=(deepest - 0.5, -0.6))
        if split:
            axis.plot(table["logit"], range(len(table)), "D", color="black", ms=4)
        axis.axvline(0, color="0.2", lw=0.8)
        axis.grid(axis="y", visible=False)
    return figure


def similarity_against_gold(pairs: dict[str, pd.DataFrame], title: str):
    """Cosine similarity in each band of human scores: a panel for each method; columns gold (0 to 5) and similarity."""
    whole = pd.concat(pairs, names=["method"]).reset_index("method").round({"gold": 0})
    keys = [key("median and quartiles; whiskers: to 1.5 times their distance (pairs beyond: not drawn)", SKY)]
    figure, parts = panels(whole, "method", title=title, keys=keys, xlabel="human score (0 to 5, rounded)",
                           ylabel="cosine similarity", height=2.6)
    for axis, table in parts:
        groups = dict(list(table.groupby("gold")["similarity"]))
        axis.boxplot(groups.values(), positions=list(groups), widths=0.7, boxprops={"facecolor": SKY})
        axis.set_xticks(range(6), range(6))
    return figure


def similarity_by_kind(pairs: pd.DataFrame, title: str):
    """A dot for each pair and a bar at the mean, by kind of pair: a column of panels for each method, a row for each of
    the two measures. `pairs`: columns method, kind, cosine and overlap (of the aligned tokens)."""
    pairs = pairs.rename(columns={"cosine": "cosine similarity", "overlap": "overlap of tokens"})
    long = pairs.melt(["method", "kind"], ["cosine similarity", "overlap of tokens"], "measure")
    colours = dict.fromkeys(long["kind"], BLUE) | {"paraphrase": VERMILION, "topic shift": "0.4"}
    keys = [key("a pair", marker="o", ls="", ms=4), key("mean", "black", marker="|", ls="", ms=12, mew=2)]
    figure, parts = panels(long, "method", "measure", title=title, keys=keys, sharex=False, height=2.2)
    for axis, table in parts:
        means = table.groupby("kind", sort=False)["value"].mean()
        y = means.index.get_indexer(table["kind"]) + np.random.default_rng(0).uniform(-0.2, 0.2, len(table))
        axis.scatter(table["value"], y, s=11, alpha=0.6, lw=0, c=table["kind"].map(colours))
        axis.plot(means, means.index, "|", color="black", ms=16, mew=2)
        axis.set(xlabel=table["measure"].iloc[0], ylabel="", ylim=(len(means) - 0.5, -0.5))
        axis.grid(axis="y", visible=False)
    return figure


def variation_stems(variations: dict[str, pd.DataFrame], title: str):
    """v_i, a change along the first 40 components of what changes: a panel for each change. `variations`: its name
    -> columns component, variation, deviation, of mean change, of texts' changes; a row for each component."""
    whole = pd.concat(variations, names=["method"]).reset_index("method").query("component <= 40")
    text = "$v_1$ = {variation:.1f}\n{of mean change:.0%} of mean change,\n{of texts' changes:.0%} of texts' changes"
    keys = [key("first component", VERMILION), key("others", BLUE), key("standard deviation of texts", "0.65", lw=0.8)]
    figure, parts = panels(whole, "method", title=title, keys=keys, xlabel="component $i$ of what changes",
                           ylabel="variation $v_i$", height=2.9)
    for axis, table in parts:
        first, colours = text.format_map(table.iloc[0]), [VERMILION] + [BLUE] * (len(table) - 1)
        axis.bar("component", "variation", 0.7, yerr="deviation", data=table, color=colours, lw=0,
                 error_kw={"ecolor": "0.65", "elinewidth": 0.8})
        axis.axhline(0, color="0.2", lw=0.8)
        axis.text(0.97, 0.03, first, transform=axis.transAxes, ha="right", va="bottom", size=8, color=VERMILION)
    return figure


def attention_map(example: pd.DataFrame, by_block: pd.DataFrame, title: str):
    """Attention to the placeholder by block: above, of one sentence's tokens; below, the mean over sentences.
    `example`: columns block, token (place), text, share. `by_block`: columns variant, block, share, low, high."""
    above = by_block[["variant", "block"]].assign(panel="token of the sentence")  # Its panel is kept free of lines.
    both = pd.concat([above, by_block.assign(panel="share of attention")])
    figure = bands(both, "block", "share", "variant", panel_row="panel", title=title, xlabel="block")
    axis, texts = figure.axes[0], example.groupby("token")["text"].first()
    cells = example.pivot(index="token", columns="block", values="share")
    image = axis.imshow(cells, cmap="viridis", vmin=0, aspect="auto")
    axis.set_yticks(range(len(texts)), map(drawable, texts))
    axis.grid(False)
    figure.colorbar(image, ax=axis, label="share, mean over heads", aspect=30)
    return figure


def pareto(points: pd.DataFrame, **texts: str):
    """All points, a colour a method, a marker a variant; beside them, if costs differ over twofold, those around the
    middle of the front. `points`: method, variant, cost, lower quartile, upper quartile, score, low, high, front."""
    front, markers = points[points["front"]].sort_values("cost"), dict(zip(points["variant"].unique(), "soDv"))
    colours = {method: style["color"] for method, style in palette(points["method"]).items()}
    keys = [key(label(method), color) for method, color in colours.items()]
    keys += [key(label(variant), marker=marker, ls="") for variant, marker in markers.items()]
    keys += [key("Pareto front", "0.2", ls="--"), key("95 % interval", "0.8", lw=1)]
    wide = bool(points["cost"].max() > 2 * points["cost"].min())
    near = points[points["cost"].div(front["cost"].median()).between(0.67, 1.5)] if wide else points
    both = pd.concat([points.assign(part="all")] * wide + [near.assign(part="around the middle of the front" * wide)])
    figure, parts = panels(both, "part", keys=keys, height=4.2, log=wide, sharex=False, sharey=False, **texts)
    for axis, part in parts:
        axis.vlines("cost", "low", "high", data=part, color="0.8", lw=1, zorder=1)
        axis.step("cost", "score", data=front, where="post", color="0.2", ls="--")
        for (method, variant), table in part.groupby(["method", "variant"], sort=False):
            axis.plot("cost", "score", markers[variant], data=table, color=colours[method], ms=6)
            axis.hlines("score", "lower quartile", "upper quartile", data=table, color=colours[method])
    low, high = near["cost"].min(), near["cost"].max()
    axis.set(xscale="linear", xlim=(low - 0.03, high + 0.03), ylim=(near["low"].min() - 0.5, near["high"].max() + 0.5))
    listed = "Pareto front"
    for number, at in enumerate(front.itertuples(), 1):
        listed += f"\n{number}  {label(at.method)}, {label(at.variant)}"
        parts[-1 if low <= at.cost <= high else 0][0].annotate(number, (at.cost, at.score), (0, 5), ha="center",
                                                               weight="bold", textcoords="offset points", zorder=4)
    axis.text(1.03, 0.98, listed, va="top", size=8, transform=axis.transAxes)
    return figure
