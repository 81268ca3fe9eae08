"""What each method of the papers costs (notebook 05): how work is counted and time measured, and tables of both."""

import gc
import json
import os
import timeit
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.core.forward import block_input, run_prefix
from lib.core.prompts import PROMPTS
from lib.core.store import ROOT
from lib.data.sources import EvaluationData
from lib.evaluation.intervals import SPEARMAN, compare
from lib.evaluation.sts import sts_pairs
from lib.report.settings import Setting

# torch's profiler writes two lines of its own to the terminal for every run, unless told otherwise before its first.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}  # square matrices large enough to reach the device's peak
GPU_RESULTS = ROOT / "data" / "gpu"
READ_AS = {"mean": replace(PROMPTS["none"], pooling="mean")}  # methods that are no prompt of that name
REFERENCE = "prompteol"  # the method that times are ratios to
BASELINE, LAST, SAME, TP, TP_EXIT = "baseline", "baseline, last layer", "baseline, exit layer", "TP", "TP, exit layer"
QUARTILES = ("lower quartile", "upper quartile")
TIMES = ["time ratio", *QUARTILES]
PYTHON, OTHER = "Python, between operations", "other"
# Where an operation's time is booked; what is not named here is `OTHER`.
OPERATIONS = yaml.safe_load(Path(__file__).with_name("operations.yaml").read_text(encoding="utf-8"))
GROUPS = {f"aten::{name}": group for group, names in OPERATIONS.items() for name in names.split()} | {PYTHON: PYTHON}


def measure(paths: dict[Hashable, Callable[[], object]], rounds: int = 3) -> dict[Hashable, list[float]]:
    """Seconds of each round of several functions, timed in turn, A B C, C B A, ..., so that a machine that slows down
    slows them all. Compare medians as ratios; absolute seconds say little about another machine."""
    seconds = {name: [] for name in paths}
    for i in range(rounds):
        gc.collect()
        for name in list(paths)[:: -1 if i % 2 else 1]:
            seconds[name].append(_seconds(paths[name]))
    return seconds


def _seconds(run: Callable[[], object]) -> float:
    """Seconds of one call, in which the garbage collector does not run."""
    synchronize = (torch.cuda if torch.cuda.is_available() else torch.cpu).synchronize
    return timeit.timeit(lambda: (run(), synchronize()), number=1)


def ratio_quartiles(seconds: Sequence[float], reference: Sequence[float] | float) -> tuple[float, float, float]:
    """Median, lower and upper quartile of seconds / reference, taken round by round."""
    return tuple(np.quantile(np.asarray(seconds) / np.asarray(reference), [0.5, 0.25, 0.75]).tolist())


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention in one call of `run`, as torch counts them: attention
    as every query with every key, on CUDA by torch's own list and here on the CPU too. A causal kernel does half."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    added = {kernel: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=added) as counter:
        run()
    return counter.get_total_flops()


@contextmanager
def count_tokens(backbone: Backbone):
    """Yields a dict; afterwards its `"tokens"` holds how many tokens, padding included, went into the first block."""
    result = Counter(tokens=0)
    with backbone.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: result.update(tokens=block_input(args, kwargs).shape[:2].numel()), with_kwargs=True
    ):
        yield result


@torch.inference_mode()
def matmul_peak(dtype: torch.dtype, device: torch.device, repeats: int = 12) -> float:
    """Operations per second of a square matrix product in `dtype`, best of `repeats`: what this machine can reach."""
    size = PEAK_SIZE.get(device.type, PEAK_SIZE["cpu"])
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: a @ b) for _ in range(repeats))


@contextmanager
def peak_memory(device: torch.device):
    """Yields a dict; afterwards its `"bytes"` holds the peak of torch's memory beyond what was in use at the start."""
    result: dict[str, int] = {}  # from the account of torch's allocator, because the process keeps what is freed
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        yield result
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    result["bytes"] = int(max(np.cumsum([of.nbytes() for of in events if of.name() == "[memory]"]), default=0))


def pareto_front(cost: Sequence[float], quality: Sequence[float]) -> np.ndarray:
    """Which points no other one beats: none is at most as costly and at least as good, and better in one of the two."""
    points = np.column_stack([cost, np.negative(quality)])
    as_good, better = (points <= points[:, None]).all(axis=2), (points < points[:, None]).any(axis=2)
    return ~(as_good & better).any(axis=1)


@dataclass(frozen=True)
class Contender:
    """One row of a cost table: a prompt read in one way. `name` is the paper's name of the method."""

    name: str
    variant: str
    exit_layer: int
    method: object = None
    pooling: object = None

    def encoder(self, backbone: Backbone, store=None) -> SentenceEncoder:
        prompt = READ_AS.get(self.name, self.name)
        return SentenceEncoder(backbone, prompt, self.method, self.exit_layer, self.pooling, store=store)


def contenders(names: Iterable[str], settings: dict[str, Setting], one_by_one: bool) -> list[Contender]:
    """What is compared: one by one, in the paper's protocol, every method, and with TP where there is a setting, all at
    PromptEOL's exit layer; in practice every method at the last layer, and where there is a setting at its exit layer,
    without and with TP. `ValueError` if PromptEOL, to which all times are ratios, is not among the names."""
    if REFERENCE not in (names := list(names)):
        raise ValueError(f"Costs are ratios to {REFERENCE}, which is not among the methods: {', '.join(names)}.")
    rows, layer = [], settings[REFERENCE].exit_layer
    for name in names:
        rows.append(Contender(name, BASELINE, layer) if one_by_one else Contender(name, LAST, -1))
        if own := settings.get(name):
            exit_layer, variants = (layer, (TP,)) if one_by_one else (own.exit_layer, (SAME, TP_EXIT))
            rows += [Contender(name, of, exit_layer, None if of == SAME else own.method) for of in variants]
    return rows


def prepared(encoder: SentenceEncoder, sentences: list[str], one_by_one: bool) -> Callable[[], np.ndarray]:
    """What is timed: a function that embeds the sentences, float32 (sentences, hidden). One by one, token ids and the
    prefix's keys and values are at hand, and it embeds distinct sentences, longest first, template after template."""
    if not one_by_one:
        return lambda: encoder.encode(sentences, show_progress_bar=False)
    work, layer = [], encoder.exit_layer
    for part in encoder.passes(sentences, batch_size=1):
        head = torch.tensor(part.rows.ids[0][: part.rows.prefix], device=encoder.backbone.device)
        prefix = run_prefix(encoder.backbone, head, layer) if len(head) else None
        work += [(encoder.batch(part.rows, indices), [layer], prefix) for indices in sorted(part.batches)]
    return lambda: np.concatenate([encoder.forward(*one)[layer].float().cpu().numpy() for one in work])


def run_methods(backbone: Backbone, rows, sentences, rounds: int, one_by_one: bool, threads: int = 0) -> pd.DataFrame:
    """Time all rows in one interleaved run, each round with the machine's matmul peak beside them: a row per method and
    round, with method, variant, layer, round, seconds, peak (operations/s), and, the same in each round, sentences,
    tokens and flops (of all sentences), memory (bytes). `threads` of torch only makes a stored time this machine's."""
    calls, counted, peaks = {}, {}, []
    for row in rows:
        encoder = row.encoder(backbone)
        calls[row] = run = prepared(encoder, sentences, one_by_one)
        with count_tokens(backbone) as tokens:
            flops = count_flops(run)
        with peak_memory(backbone.device) as memory:
            run()
        counted[row] = {"method": row.name, "variant": row.variant, "layer": encoder.exit_layer,
                        "sentences": len(sentences), **tokens, "flops": flops, "memory": memory["bytes"]}
    calls["peak"] = lambda: peaks.append(matmul_peak(backbone.dtype, backbone.device, repeats=4))
    taken, numbers = measure(calls, rounds), range(rounds)
    tables = [pd.DataFrame(counted[row] | {"round": numbers, "seconds": taken[row], "peak": peaks}) for row in rows]
    return pd.concat(tables, ignore_index=True)


def time_shares(backbone: Backbone, rows: list[Contender], few: list[str], many: list[str], groups=GROUPS):
    """Profile one call of each row, with the sentences `few` one by one and with `many` in batches: columns run (naming
    both), group (of `OPERATIONS`; `PYTHON`, what no operation accounts for; `OTHER`) and share of the CPU time."""
    shares = {}
    for (way, texts), row in product({"one by one": few, "batched": many}.items(), rows):
        run = prepared(row.encoder(backbone), texts, way == "one by one")
        run()  # warm-up
        with profile(activities=[ProfilerActivity.CPU], acc_events=False) as profiler, record_function(PYTHON):
            run()
        events = pd.Series({event.key: event.self_cpu_time_total for event in profiler.key_averages()}, dtype=float)
        times = events.groupby(lambda name: groups.get(name, OTHER)).sum()
        shares[f"{way}, {row.variant}"] = times.reindex([*OPERATIONS, PYTHON, OTHER], fill_value=0.0) / times.sum()
    return pd.concat(shares, names=["run", "group"]).rename("share").reset_index()


def gpu_results() -> list[tuple[dict, dict[str, pd.DataFrame]]]:
    """What `benchmarks/gpu.sh` left in `data/gpu/`: for each file what was measured on what, and tables by name."""
    contents = [json.loads(path.read_text()) for path in sorted(GPU_RESULTS.glob("*.json"))]
    return [(of["about"], {name: pd.DataFrame(**table) for name, table in of["tables"].items()}) for of in contents]


def cost_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method: work per sentence, and time as a ratio to PromptEOL's first variant in the same round, with
    quartiles over the rounds. `share of peak` is the median of operations/s over the matmul peak."""
    runs = runs.assign(**{
        "tokens / sentence": runs["tokens"] / runs["sentences"], "peak MB": runs["memory"] / 1e6,
        "GFLOP / sentence": runs["flops"] / runs["sentences"] / 1e9,
        "share of peak": runs["flops"] / runs["seconds"] / runs["peak"]})
    groups = runs.groupby(["method", "variant"], sort=False)
    reference = next(own["seconds"] for (name, _), own in groups if name == REFERENCE)
    table = groups[["layer", "tokens / sentence", "GFLOP / sentence"]].first()
    table[TIMES] = [ratio_quartiles(own["seconds"], reference) for _, own in groups]
    return table.assign(**groups.agg({"share of peak": "median", "peak MB": "first"})).reset_index()


def overhead(runs: pd.DataFrame, tp: str = TP, base: str = BASELINE) -> pd.DataFrame:
    """TP against the same prompt without it, in the same round: time ratio with quartiles, FLOP ratio, tokens added."""
    groups, rows = dict(list(runs.groupby(["method", "variant"], sort=False))), []
    for name in runs.loc[runs["variant"] == tp, "method"].unique():
        own, other = groups[name, tp], groups[name, base]
        more = (own["tokens"].iloc[0] - other["tokens"].iloc[0]) / own["sentences"].iloc[0]
        ratio = own["flops"].iloc[0] / other["flops"].iloc[0]
        rows.append((name, *ratio_quartiles(own["seconds"], other["seconds"]), ratio, more))
    return pd.DataFrame(rows, columns=["method", *TIMES, "FLOP ratio", "more tokens / sentence"])


def quality(backbone: Backbone, rows: list[Contender], data: EvaluationData, draws: int, store=None) -> pd.DataFrame:
    """Spearman x 100 on an STS set with its 95 % interval: columns method, variant, score, low, high."""
    runs = {(row.name, row.variant): sts_pairs(row.encoder(backbone, store), {data.name: data}) for row in rows}
    scores = compare(runs, SPEARMAN, draws=draws).rename(columns={"value": "score"})
    return pd.DataFrame(list(runs), columns=["method", "variant"]).join(scores[["score", "low", "high"]])
