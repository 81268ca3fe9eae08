"""What each method costs: work counted, time measured beside the others in one run, and quality."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import pandas as pd
import torch
from datasets import Dataset

from lib.studies.cost import count_flops, count_tokens, matmul_peak, measure, peak_memory, ratio_quartiles
from lib.core.encoder import SentenceEncoder
from lib.core.backbone import Backbone
from lib.report.results import Result, run_or_load
from lib.studies.settings import Setting
from lib.core.store import ROOT, STORE, fingerprint
from lib.evaluation.sts import compare_runs, stored_pairs
from lib.core.token_prepending import TokenPrepending
from lib.studies.workload import PreparedRun, workload

GPU_RESULTS = ROOT / "data" / "gpu"
REFERENCE = "prompteol"
VANILLA, TP = "baseline", "TP"
LAST, SAME, TP_EXIT = "baseline, last layer", "baseline, exit layer", "TP, exit layer"
# Methods that are not called as their prompt is: method -> prompt, pooling.
READ_AS = {"mean": ("none", "mean")}


@dataclass(frozen=True)
class Method:
    """One row of a cost table: a prompt read in one way. `name` is the paper's name of the method."""

    name: str
    variant: str
    exit_layer: int
    tp: TokenPrepending | None = None

    def encoder(self, backbone: Backbone, store=None) -> SentenceEncoder:
        prompt, pooling = READ_AS.get(self.name, (self.name, None))
        return SentenceEncoder(backbone, prompt, self.tp, self.exit_layer, pooling, store=store)


def _checked(names: Iterable[str]) -> list[str]:
    names = list(names)
    if REFERENCE not in names:
        raise ValueError(f"Costs are ratios to {REFERENCE}, which is not among the methods: {', '.join(names)}.")
    return names


def paper_methods(names: Iterable[str], settings: dict[str, Setting]) -> list[Method]:
    """Every method, and with TP where there is a setting for it, all read at PromptEOL's exit layer.

    Raises `ValueError` if PromptEOL, to which all times are ratios, is not among the names.
    """
    methods, exit_layer = [], settings[REFERENCE].exit_layer
    for name in _checked(names):
        methods.append(Method(name, VANILLA, exit_layer))
        if name in settings:
            methods.append(Method(name, TP, exit_layer, settings[name].tp))
    return methods


def practical_methods(names: Iterable[str], settings: dict[str, Setting]) -> list[Method]:
    """Every method at the last layer, and where there is a setting at its own exit layer, without and with TP.

    Raises `ValueError` as `paper_methods` does.
    """
    methods = []
    for name in _checked(names):
        methods.append(Method(name, LAST, -1))
        if name in settings:
            exit_layer = settings[name].exit_layer
            methods += [Method(name, SAME, exit_layer), Method(name, TP_EXIT, exit_layer, settings[name].tp)]
    return methods


def run_methods(
    backbone: Backbone, methods: list[Method], sentences: list[str], rounds: int, one_by_one: bool
) -> pd.DataFrame:
    """Time all methods in one interleaved run, each round with the machine's matmul peak beside them.

    Args:
        one_by_one: the paper's protocol (`PreparedRun`), else `encode` as anyone would call it: tokens, prefixes, batches.

    Returns:
        One row per method and round: method, variant, layer, round, seconds, peak (operations/s), and the same in each
        round: sentences, tokens and flops (all sentences together), memory (bytes).
    """
    calls, counted, peaks = {}, {}, []
    for method in methods:
        encoder = method.encoder(backbone)
        run = PreparedRun(encoder, sentences) if one_by_one else partial(encoder.encode, sentences, show_progress_bar=False)
        work = workload(encoder, sentences, 1 if one_by_one else None, prefix=not one_by_one)
        with peak_memory(backbone.device) as memory:  # also the warm-up
            run()
        calls[method], counted[method] = run, {
            "layer": encoder.exit_layer, "sentences": len(sentences), "tokens": work.tokens, "flops": work.flops,
            "memory": memory["bytes"],
        }
    calls["peak"] = lambda: peaks.append(matmul_peak(backbone.dtype, backbone.device, repeats=4))
    seconds = measure(calls, rounds)
    rows = [
        {"method": m.name, "variant": m.variant, "round": i, "seconds": seconds[m][i], "peak": peaks[i]} | counted[m]
        for m in methods for i in range(rounds)
    ]
    return pd.DataFrame(rows)


def stored_run(
    name: str, backbone: Backbone, methods: list[Method], sentences: list[str], rounds: int, one_by_one: bool, data: dict
) -> Result:
    """`run_methods` through the result store. A stored time is this machine's: device and threads are part of its key.

    Args:
        data: where the sentences come from (`lib.data.sts.provenance`); they themselves do not go into a provenance.
    """
    settings = {
        "methods": [method.encoder(backbone).describe() | {"layer": method.exit_layer} for method in methods],
        "data": data, "sentences": [len(sentences), fingerprint(sentences)], "rounds": rounds, "one_by_one": one_by_one,
        "threads": torch.get_num_threads(),
    }
    code = ("cost", "cost_table", "workload", "forward", "token_prepending")
    return run_or_load(name, settings, lambda: run_methods(backbone, methods, sentences, rounds, one_by_one), code)


def check_workload(backbone: Backbone, methods: list[Method], sentences: list[str]) -> pd.DataFrame:
    """Our counts beside torch's of a real run: method, variant, tokens, tokens counted, GFLOP, GFLOP counted."""
    rows = []
    for method in methods:
        encoder = method.encoder(backbone)
        work = workload(encoder, sentences)
        with count_tokens(backbone) as tokens:
            flops = count_flops(lambda: encoder.encode(sentences))
        rows.append({
            "method": method.name, "variant": method.variant, "tokens": work.tokens, "tokens counted": tokens["tokens"],
            "GFLOP": work.flops / 1e9, "GFLOP counted": flops / 1e9,
        })
    return pd.DataFrame(rows)


def gpu_results() -> list[tuple[dict, dict[str, pd.DataFrame]]]:
    """What `benchmarks.gpu_cost` left in `data/gpu/`: for each file what was measured on what, and its tables by name."""
    contents = [json.loads(path.read_text()) for path in sorted(GPU_RESULTS.glob("*.json"))]
    return [(content["about"], {name: pd.DataFrame(**t) for name, t in content["tables"].items()}) for content in contents]


def _by_method(runs: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    return dict(list(runs.groupby(["method", "variant"], sort=False)))


def _time_ratio(own: pd.DataFrame, reference: pd.DataFrame) -> dict[str, float]:
    return dict(zip(("time ratio", "low", "high"), ratio_quartiles(own["seconds"], reference["seconds"])))


def cost_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method: work per sentence, time as a ratio to PromptEOL's first variant in the same round.

    `low` and `high` are the quartiles over the rounds, `share of peak` the median of operations/s over the matmul peak.
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


def overhead(runs: pd.DataFrame, tp: str = TP, base: str = VANILLA) -> pd.DataFrame:
    """TP against the same prompt without it, in the same round: time ratio with quartiles, FLOP ratio, tokens added."""
    groups, rows = _by_method(runs), []
    for name in [name for name, variant in groups if variant == tp]:
        with_tp, plain = groups[name, tp], groups[name, base]
        first, other = with_tp.iloc[0], plain.iloc[0]
        rows.append({
            "method": name, **_time_ratio(with_tp, plain), "FLOP ratio": first["flops"] / other["flops"],
            "more tokens / sentence": (first["tokens"] - other["tokens"]) / first["sentences"],
        })
    return pd.DataFrame(rows)


def quality(
    backbone: Backbone, methods: list[Method], data: Dataset, task: str, draws: int = 1000
) -> tuple[pd.DataFrame, list[dict]]:
    """Spearman x 100 on an STS set with its interval (method, variant, score, from, to), and the provenance."""
    runs, provenance = {}, []
    for (name, tp), group in groupby(methods, key=lambda m: (m.name, m.tp)):
        variants = {m.variant: backbone.layer_index(m.exit_layer) for m in group}
        result = stored_pairs(Method(name, "", -1, tp).encoder(backbone, STORE), {task: data}, variants.values())
        provenance.append(result.provenance)
        runs |= {(name, variant): result.value[result.value["layer"] == layer] for variant, layer in variants.items()}
    scores = compare_runs(runs, next(iter(runs)), draws).rename(columns={"score_low": "from", "score_high": "to"})
    names = pd.DataFrame(list(runs), columns=["method", "variant"])
    return pd.concat([names, scores[["score", "from", "to"]]], axis=1), provenance
