"""What each method of the papers costs: work counted, time measured beside the others in one run, and quality."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.core.forward import run_prefix
from lib.core.store import ROOT
from lib.core.token_prepending import TokenPrepending
from lib.data.sources import EvaluationData
from lib.evaluation.intervals import SPEARMAN, compare
from lib.evaluation.sts import sts_pairs
from lib.report.settings import Setting
from lib.studies.cost import (
    QUARTILES,
    count_flops,
    count_tokens,
    matmul_peak,
    measure,
    peak_memory,
    ratio_quartiles,
    time_by_group,
)

GPU_RESULTS = ROOT / "data" / "gpu"
REFERENCE = "prompteol"
BASELINE, TP = "baseline", "TP"
LAST, SAME, TP_EXIT = "baseline, last layer", "baseline, exit layer", "TP, exit layer"
# Methods that are not called as their prompt is: method -> prompt, pooling.
READ_AS = {"mean": ("none", "mean")}


@dataclass(frozen=True)
class Contender:
    """One row of a cost table: a prompt read in one way. `name` is the paper's name of the method."""

    name: str
    variant: str
    exit_layer: int
    method: TokenPrepending | None = None

    def encoder(self, backbone: Backbone, store=None) -> SentenceEncoder:
        """The encoder that is measured."""
        prompt, pooling = READ_AS.get(self.name, (self.name, None))
        return SentenceEncoder(backbone, prompt, self.method, self.exit_layer, pooling, store=store)


def contenders(names: Iterable[str], settings: dict[str, Setting], one_by_one: bool) -> list[Contender]:
    """What is compared: in the paper's protocol (one by one) and in practice.

    The paper's has every method, and with TP where there is a setting for it, all read at PromptEOL's exit layer. In
    practice every method is read at the last layer, and where there is a setting at its own exit layer, without and with TP.
    Raises `ValueError` if PromptEOL, to which all times are ratios, is not among the names.
    """
    rows, names = [], list(names)
    if REFERENCE not in names:
        raise ValueError(f"Costs are ratios to {REFERENCE}, which is not among the methods: {', '.join(names)}.")
    for name in names:
        setting = settings.get(name)
        if one_by_one:
            layer = settings[REFERENCE].exit_layer
            rows += [Contender(name, BASELINE, layer), *([Contender(name, TP, layer, setting.method)] if setting else [])]
        else:
            rows.append(Contender(name, LAST, -1))
            for variant, method in ((SAME, None), (TP_EXIT, setting and setting.method)) if setting else ():
                rows.append(Contender(name, variant, setting.exit_layer, method))
    return rows


class PreparedRun:
    """The paper's protocol: one sentence at a time, its token ids and the keys and values of the prompt's prefix at hand."""

    def __init__(self, encoder: SentenceEncoder, sentences: list[str]):
        self.encoder, self.work, device = encoder, [], encoder.backbone.device
        for part in encoder.passes(sentences, batch_size=1):
            head = torch.tensor(part.rows.ids[0][: part.rows.prefix], device=device)
            prefix = run_prefix(encoder.backbone, head, encoder.exit_layer) if len(head) else None
            self.work += [(encoder.batch(part.rows, indices), prefix) for indices in sorted(part.batches)]

    def __call__(self) -> np.ndarray:
        """Embeddings of the distinct sentences, longest first, template after template: float32 (all of them, hidden)."""
        layer = self.encoder.exit_layer
        states = [self.encoder.forward(batch, [layer], prefix)[layer].float().cpu().numpy() for batch, prefix in self.work]
        return np.concatenate(states)


def prepared(encoder: SentenceEncoder, sentences: list[str], one_by_one: bool):
    """What is timed: a function without arguments that embeds the sentences."""
    if one_by_one:
        return PreparedRun(encoder, sentences)
    return partial(encoder.encode, sentences, show_progress_bar=False)


def run_methods(
    backbone: Backbone, rows: list[Contender], sentences: list[str], rounds: int, one_by_one: bool,
    threads: int | None = None,
) -> pd.DataFrame:
    """Time all rows in one interleaved run, each round with the machine's matmul peak beside them.

    Args:
        one_by_one: the paper's protocol (`PreparedRun`), else `encode` as anyone would call it: tokens, prefixes, batches.
        threads: how many torch uses; it changes nothing here, but makes a stored time one of this machine.

    Returns:
        One row per method and round: method, variant, layer, round, seconds, peak (operations/s), and the same in each
        round: sentences, tokens and flops (all sentences together, counted during the warm-up), memory (bytes).
    """
    calls, counted, peaks = {}, {}, []
    for row in rows:
        encoder = row.encoder(backbone)
        calls[row] = run = prepared(encoder, sentences, one_by_one)
        with count_tokens(backbone) as tokens:
            flops = count_flops(run)
        with peak_memory(backbone.device) as memory:
            run()
        counted[row] = {"layer": encoder.exit_layer, "sentences": len(sentences), "tokens": tokens["tokens"], "flops": flops,
                        "memory": memory["bytes"]}
    calls["peak"] = lambda: peaks.append(matmul_peak(backbone.dtype, backbone.device, repeats=4))
    seconds = measure(calls, rounds)
    return pd.DataFrame([
        {"method": r.name, "variant": r.variant, "round": i, "seconds": seconds[r][i], "peak": peaks[i]} | counted[r]
        for r in rows for i in range(rounds)
    ])


def time_shares(backbone: Backbone, rows: list[Contender], few: list[str], many: list[str]) -> pd.DataFrame:
    """`time_by_group` of each row, with the sentences `few` one by one and with `many` in batches; run names both."""
    calls = {f"{way}, {row.variant}": prepared(row.encoder(backbone), texts, way == "one by one")
             for way, texts in (("one by one", few), ("batched", many)) for row in rows}
    return time_by_group(calls)


def gpu_results() -> list[tuple[dict, dict[str, pd.DataFrame]]]:
    """What `benchmarks.gpu_cost` left in `data/gpu/`: for each file what was measured on what, and its tables by name."""
    contents = [json.loads(path.read_text()) for path in sorted(GPU_RESULTS.glob("*.json"))]
    return [(content["about"], {name: pd.DataFrame(**t) for name, t in content["tables"].items()}) for content in contents]


def _by_method(runs: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    return dict(list(runs.groupby(["method", "variant"], sort=False)))


def _time_ratio(own: pd.DataFrame, reference: pd.DataFrame) -> dict[str, float]:
    return dict(zip(("time ratio", *QUARTILES), ratio_quartiles(own["seconds"], reference["seconds"])))


def cost_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method: work per sentence, time as a ratio to PromptEOL's first variant in the same round.

    The quartiles are over the rounds, `share of peak` is the median of operations/s over the matmul peak.
    """
    reference = runs.loc[runs["method"] == REFERENCE, "variant"].iloc[0]
    groups, rows = _by_method(runs), []
    for (name, variant), own in groups.items():
        one = own.iloc[0]
        rows.append({
            "method": name, "variant": variant, "layer": one["layer"], "tokens / sentence": one["tokens"] / one["sentences"],
            "GFLOP / sentence": one["flops"] / one["sentences"] / 1e9, **_time_ratio(own, groups[REFERENCE, reference]),
            "share of peak": (own["flops"] / own["seconds"] / own["peak"]).median(), "peak MB": one["memory"] / 1e6,
        })
    return pd.DataFrame(rows)


def overhead(runs: pd.DataFrame, tp: str = TP, base: str = BASELINE) -> pd.DataFrame:
    """TP against the same prompt without it, in the same round: time ratio with quartiles, FLOP ratio, tokens added."""
    groups, rows = _by_method(runs), []
    for name in [name for name, variant in groups if variant == tp]:
        with_tp, without = groups[name, tp], groups[name, base]
        first, other = with_tp.iloc[0], without.iloc[0]
        rows.append({
            "method": name, **_time_ratio(with_tp, without), "FLOP ratio": first["flops"] / other["flops"],
            "more tokens / sentence": (first["tokens"] - other["tokens"]) / first["sentences"],
        })
    return pd.DataFrame(rows)


def quality(backbone: Backbone, rows: list[Contender], data: EvaluationData, draws: int, store=None) -> pd.DataFrame:
    """Spearman x 100 on an STS set with its 95 % interval: columns method, variant, score, low, high."""
    runs = {(row.name, row.variant): sts_pairs(row.encoder(backbone, store), {data.name: data}) for row in rows}
    scores = compare({" / ".join(key): table for key, table in runs.items()}, SPEARMAN, draws=draws)
    names = pd.DataFrame(list(runs), columns=["method", "variant"])
    return names.assign(score=scores["value"].to_numpy(), low=scores["low"].to_numpy(), high=scores["high"].to_numpy())
