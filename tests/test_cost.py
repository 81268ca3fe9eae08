"""Costs: what is counted against torch's own count, what is timed in which order, and the arithmetic of the tables."""

import gc
import time

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.token_prepending import TokenPrepending
from lib.data.sources import EvaluationData
from lib.evaluation.sts import sts_pairs, sts_scores
from lib.report.settings import Setting
from lib.studies import cost_tables as tables
from lib.studies.cost import (
    OPERATIONS,
    OTHER,
    PEAK_SIZE,
    PYTHON,
    QUARTILES,
    count_flops,
    count_tokens,
    group_shares,
    matmul_peak,
    measure,
    pareto_front,
    peak_memory,
    ratio_quartiles,
    time_by_group,
)
from lib.studies.cost_tables import (
    BASELINE,
    LAST,
    SAME,
    TP,
    TP_EXIT,
    PreparedRun,
    contenders,
    cost_table,
    overhead,
    quality,
    run_methods,
)

SENTENCES = [
    "A man is playing a large flute.", "Three children, who are cold, run across the snowy field on the street.",
    "What does the woman say?", "A dog.",
]
SETTING = Setting(TokenPrepending(1, 2), 3)
SETTINGS = {"prompteol": SETTING, "ck": SETTING}

# prompt, TP, exit layer, pooling
ENCODERS = {
    "baseline, last layer": ("prompteol", None, -1, None),
    "TP": ("prompteol", TokenPrepending(1, 2), 3, None),
    "two templates": ("ck", TokenPrepending(0, 2), 2, None),
    "sentence twice": ("echo", None, 4, None),
    "no prompt": ("none", None, 3, "mean"),
}


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """The machine's true peak takes seconds to measure, and no test needs it."""
    monkeypatch.setitem(PEAK_SIZE, "cpu", 256)


def test_measure_goes_forwards_and_backwards():
    order = []
    seconds = measure({name: lambda name=name: order.append(name) for name in "ABC"}, rounds=3)
    assert "".join(order) == "ABCCBAABC"
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3, "C": 3}


def test_measure_leaves_the_garbage_collector_as_it_was():
    before = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError):
        measure({"fails": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_ratios_are_taken_round_by_round():
    # Ratios 2, 3, 4, 1; the ratio of the medians would be 5 / 2.5 = 2.
    assert ratio_quartiles([2, 6, 12, 4], [1, 2, 3, 4]) == pytest.approx((2.5, 1.75, 3.25))


def test_ratios_ignore_an_index():
    seconds = pd.Series([2.0, 6.0], index=[7, 8])
    assert ratio_quartiles(seconds, pd.Series([1.0, 2.0], index=[0, 1]))[0] == pytest.approx(2.5)


def test_count_flops_knows_products_and_attention():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    query, key = torch.ones(2, 4, 3, 8), torch.ones(2, 4, 6, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, key, key)) == 2 * (2 * 2 * 4 * 3 * 6 * 8)


def padded_tokens(encoder: SentenceEncoder, batch_size: int | None, prefixes: bool) -> int:
    """Tokens that a run puts through the first block, from the lengths of its rows."""
    total = 0
    for part in encoder.passes(SENTENCES, batch_size):
        lengths = [len(row) - part.rows.prefix for row in part.rows.ids]
        total += sum(len(batch) * max(lengths[i] for i in batch) for batch in part.batches)
        total += part.rows.prefix * prefixes
    return total


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_passes_are_what_a_run_does(batch_size, kind):
    backbone = tiny_backbone("gpt_neox")
    encoder = SentenceEncoder(backbone, *ENCODERS[kind])
    encoder.encode(SENTENCES)  # the first call may check whether the model can share a prefix
    with count_tokens(backbone) as counted:
        encoder.encode(SENTENCES, batch_size)
    assert counted["tokens"] == padded_tokens(encoder, batch_size, prefixes=True)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_prepared_run_computes_the_embeddings_and_no_prefix(kind):
    backbone = tiny_backbone()
    encoder = SentenceEncoder(backbone, *ENCODERS[kind])
    run = PreparedRun(encoder, SENTENCES)
    with count_tokens(backbone) as counted:
        found = run()
    assert counted["tokens"] == padded_tokens(encoder, 1, prefixes=False)
    by_template = found.reshape(len(encoder.templates), len(SENTENCES), -1).mean(axis=0)
    longest_first = sorted(SENTENCES, key=lambda text: (-len(text), text))
    np.testing.assert_allclose(by_template, encoder.encode(longest_first), rtol=0, atol=1e-4)


def test_peak_memory_sees_what_is_alive_at_a_time():
    device, million = torch.device("cpu"), 1_000_000
    with peak_memory(device) as one:
        torch.ones(25 * million).sum()
    assert one["bytes"] == pytest.approx(100e6, rel=0.01)
    with peak_memory(device) as in_turn:
        for _ in range(3):
            torch.ones(25 * million).sum()
    assert in_turn["bytes"] == pytest.approx(100e6, rel=0.01)
    with peak_memory(device) as together:
        kept = [torch.ones(25 * million) for _ in range(3)]
    assert together["bytes"] == pytest.approx(sum(t.nbytes for t in kept), rel=0.01)


def test_matmul_peak_is_plausible(one_thread):
    assert 1e8 < matmul_peak(torch.float32, torch.device("cpu"), repeats=3) < 1e15


def test_group_shares():
    events = {"aten::mm": 30.0, "aten::addmm": 20.0, "aten::copy_": 10.0, PYTHON: 25.0, "aten::view": 10.0, "a kernel": 5.0}
    shares = group_shares(events).to_dict()
    assert list(shares) == [*OPERATIONS, PYTHON, OTHER]
    assert shares == pytest.approx({
        "matrix products": 0.5, "attention": 0, "norms, activations, sums": 0, "copies and indexing": 0.1, PYTHON: 0.25,
        OTHER: 0.15,
    })


def test_no_operation_is_in_two_groups():
    names = [name for operations in OPERATIONS.values() for name in operations.split()]
    assert len(names) == len(set(names))


def test_time_by_group_finds_where_the_time_went(one_thread):
    a = torch.ones(700, 700)
    profile = time_by_group({"products": lambda: [a @ a for _ in range(10)], "waiting": lambda: time.sleep(0.05)})
    shares = profile.set_index(["run", "group"])["share"]
    assert shares["products", "matrix products"] > 0.5
    assert shares["waiting", PYTHON] > 0.9
    assert shares.groupby("run").sum().tolist() == pytest.approx([1, 1])


def test_pareto_front():
    cost, quality = [1, 2, 3, 4, 2, 1], [50, 60, 55, 70, 60, 40]
    # 3 at 55 is beaten by 2 at 60, 1 at 40 by 1 at 50; two equal points do not beat each other.
    assert pareto_front(cost, quality).tolist() == [True, True, False, True, True, False]


def test_contenders_of_the_two_protocols():
    settings = {"prompteol": SETTING, "ck": Setting(TokenPrepending(2, 3), 4)}
    names = ["mean", "prompteol", "ck"]
    paper, practical = (contenders(names, settings, one_by_one) for one_by_one in (True, False))
    assert [(row.name, row.variant) for row in paper] == [
        ("mean", BASELINE), ("prompteol", BASELINE), ("prompteol", TP), ("ck", BASELINE), ("ck", TP)]
    assert {row.exit_layer for row in paper} == {3}
    assert [(row.name, row.variant, row.exit_layer) for row in practical] == [
        ("mean", LAST, -1), ("prompteol", LAST, -1), ("prompteol", SAME, 3), ("prompteol", TP_EXIT, 3),
        ("ck", LAST, -1), ("ck", SAME, 4), ("ck", TP_EXIT, 4)]
    assert [row.method for row in paper] == [None, None, SETTING.method, None, settings["ck"].method]
    assert paper[0].encoder(tiny_backbone()).describe()["pooling"] == "mean"
    with pytest.raises(ValueError, match="prompteol"):
        contenders(["ck"], settings, True)


def test_cost_table_and_overhead_by_hand():
    same = {"layer": 3, "sentences": 2, "memory": 5e6, "round": 0, "peak": 1e9}
    rows = []
    for variant, seconds, tokens, flops in ((BASELINE, (1.0, 2.0), 20, 4e8), (TP, (1.5, 2.0), 24, 5e8)):
        own = {"method": "prompteol", "variant": variant, "tokens": tokens, "flops": flops}
        rows += [own | same | {"seconds": s} for s in seconds]
    rows += [{"method": "echo", "variant": BASELINE, "seconds": s, "tokens": 40, "flops": 8e8} | same for s in (3.0, 4.0)]
    runs = pd.DataFrame(rows)
    table = cost_table(runs).set_index(["method", "variant"])
    assert table["time ratio"].tolist() == pytest.approx([1, 1.25, 2.5])
    assert table.loc[("echo", BASELINE), list(QUARTILES)].tolist() == pytest.approx([2.25, 2.75])
    assert table.loc[("prompteol", BASELINE), "share of peak"] == pytest.approx((0.4 + 0.2) / 2)
    assert table["tokens / sentence"].tolist() == [10, 12, 20]
    assert table["GFLOP / sentence"].tolist() == pytest.approx([0.2, 0.25, 0.4])
    assert table["peak MB"].tolist() == [5, 5, 5]
    [added] = overhead(runs).to_dict("records")  # Echo has no TP
    assert added == pytest.approx({
        "method": "prompteol", "time ratio": 1.25, "lower quartile": 1.125, "upper quartile": 1.375, "FLOP ratio": 1.25, "more tokens / sentence": 2,
    })


@pytest.mark.parametrize("one_by_one", [True, False])
def test_run_methods(one_by_one, one_thread):
    backbone, names = tiny_backbone(), ["mean", "prompteol", "ck"]
    methods = contenders(names, SETTINGS, one_by_one)
    runs = run_methods(backbone, methods, SENTENCES, rounds=2, one_by_one=one_by_one)
    assert len(runs) == 2 * len(methods) and (runs["seconds"] > 0).all() and (runs["memory"] > 0).all()
    assert runs.groupby("round")["peak"].nunique().tolist() == [1, 1]  # one peak per round, the same for all
    table = cost_table(runs)
    assert table.loc[table["method"] == "prompteol", ["time ratio", *QUARTILES]].iloc[0].tolist() == [1, 1, 1]
    tp, base = (TP, BASELINE) if one_by_one else (TP_EXIT, LAST)
    added = overhead(runs, tp, base).set_index("method")
    assert list(added.index) == ["prompteol", "ck"]
    assert added.loc["ck", "more tokens / sentence"] > added.loc["prompteol", "more tokens / sentence"] > 0
    assert (added["FLOP ratio"] > 1).all() if one_by_one else (added["FLOP ratio"] < 1).all()  # three of four blocks


def test_quality_is_the_sts_score_with_an_interval_around_it():
    generator, words = np.random.default_rng(0), "man flute street dog snow plane woman house bone market".split()
    rows = [{"subset": "s", "score": float(generator.integers(0, 6)), "sentence1": " ".join(generator.choice(words, 4)),
             "sentence2": " ".join(generator.choice(words, 4))} for _ in range(12)]
    data = EvaluationData("T", Dataset.from_list(rows), {"task": "T"})
    backbone, methods = tiny_backbone(), contenders(["prompteol"], SETTINGS, False)
    scores = quality(backbone, methods, data, draws=200)
    expected = [sts_scores(sts_pairs(row.encoder(backbone), {"T": data}))["score"].iloc[0] for row in methods]
    assert scores["score"].tolist() == pytest.approx(expected)
    assert scores["variant"].tolist() == [LAST, SAME, TP_EXIT]
    assert (scores["low"] < scores["score"]).all() and (scores["score"] < scores["high"]).all()


def test_the_gpu_benchmark_on_a_tiny_model(tmp_path, monkeypatch, no_data, smollm2, one_thread):
    from benchmarks import gpu_cost

    monkeypatch.setattr(gpu_cost, "METHODS", ("mean", "prompteol", "ke"))
    monkeypatch.setattr(gpu_cost, "WITH_TP", ("prompteol", "ke"))
    shape = "--layers 8 --hidden 32 --heads 4 --intermediate 48 --exit 7 --sentences 2 --practical-sentences 3 --rounds 1"
    path = gpu_cost.main([*shape.split(), "--device", "cpu", "--folder", str(tmp_path)])
    monkeypatch.setattr(tables, "GPU_RESULTS", tmp_path)
    [(about, read)] = tables.gpu_results()
    assert path.parent == tmp_path and about["weights"] == "random" and about["dtype"] == "bfloat16"
    assert about["device"] and about["environment"]["date"] and about["environment"]["packages"]["torch"]
    assert list(cost_table(read["paper"])["method"].unique()) == ["mean", "prompteol", "ke"]
    assert overhead(read["practical"], TP_EXIT, LAST)["method"].tolist() == ["prompteol", "ke"]
    path = read["reference"]
    assert path["path"].tolist() == ["reference", "ours"] * 2
    assert (path.groupby("prompt")["TFLOP"].first() > path.groupby("prompt")["TFLOP"].last()).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so the benchmark would run")
def test_the_gpu_benchmark_says_when_there_is_no_gpu(capsys):
    from benchmarks import gpu_cost

    with pytest.raises(SystemExit):
        gpu_cost.main([])
    assert "nothing was measured" in capsys.readouterr().err


def test_no_gpu_results_is_an_empty_list(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "GPU_RESULTS", tmp_path / "none")
    assert tables.gpu_results() == []
