"""Costs: what is counted against torch's own count, what is timed in which order, and the arithmetic of the tables."""

import gc
import time

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_backbone

from lib.studies import cost_table as tables
from lib.studies.cost import (
    OPERATIONS,
    OTHER,
    PEAK_SIZE,
    PYTHON,
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
from lib.studies.cost_table import (
    LAST,
    SAME,
    TP,
    TP_EXIT,
    VANILLA,
    cost_table,
    overhead,
    paper_methods,
    practical_methods,
    run_methods,
)
from lib.data.sts import forget_sources
from lib.core.encoder import SentenceEncoder
from lib.report.plots_cost import quality_against_cost, time_ratios
from lib.studies.settings import Setting
from lib.evaluation.sts import sts_pairs, sts_scores
from lib.core.token_prepending import TokenPrepending
from lib.studies.workload import PreparedRun, workload

SENTENCES = [
    "A man is playing a large flute.", "Three children, who are cold, run across the snowy field on the street.",
    "What does the woman say?", "A dog.",
]
SETTING = Setting(TokenPrepending(1, 2), 3)
SETTINGS = {"prompteol": SETTING, "ck": SETTING}

# prompt, TP, exit layer, pooling
ENCODERS = {
    "vanilla, last layer": ("prompteol", None, -1, None),
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


def test_measure_tells_slow_from_fast():
    seconds = measure({"slow": lambda: time.sleep(0.05), "fast": lambda: None}, rounds=2)
    assert min(seconds["slow"]) >= 0.05 > max(seconds["fast"])


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("kind", ENCODERS)
def test_workload_equals_what_a_run_does(family, batch_size, kind):
    backbone = tiny_backbone(family)
    encoder = SentenceEncoder(backbone, *ENCODERS[kind])
    ours = workload(encoder, SENTENCES, batch_size)
    with count_tokens(backbone) as counted:
        flops = count_flops(lambda: encoder.encode(SENTENCES, batch_size))
    assert ours.tokens == counted["tokens"]
    assert ours.flops == pytest.approx(flops, rel=0.01)


def test_workload_without_sharing_counts_whole_prompts():
    backbone = tiny_backbone()
    shared, whole = (SentenceEncoder(backbone, "prompteol", share_prefix=share) for share in (True, False))
    bare = workload(shared, SENTENCES, 1, prefix=False).tokens
    assert workload(whole, SENTENCES, 1).tokens > workload(shared, SENTENCES, 1).tokens > bare
    with count_tokens(backbone) as counted:
        whole.encode(SENTENCES, batch_size=1)
    assert workload(whole, SENTENCES, 1).tokens == counted["tokens"]


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_prepared_run_computes_the_embeddings_and_no_prefix(kind):
    backbone = tiny_backbone()
    encoder = SentenceEncoder(backbone, *ENCODERS[kind])
    run = PreparedRun(encoder, [SENTENCES[1], SENTENCES[0]])
    with count_tokens(backbone) as counted:
        flops = count_flops(run)
    expected = workload(encoder, SENTENCES[:2], batch_size=1, prefix=False)
    assert counted["tokens"] == expected.tokens and flops == pytest.approx(expected.flops, rel=0.01)
    by_template = run().reshape(len(encoder.prompt.templates), 2, -1)
    np.testing.assert_allclose(by_template.mean(axis=0), encoder.encode([SENTENCES[1], SENTENCES[0]]), rtol=0, atol=1e-4)


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
    names = [name for operations in OPERATIONS.values() for name in operations]
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


def test_methods_of_the_two_protocols():
    settings = {"prompteol": Setting(TokenPrepending(1, 2), 3), "ck": Setting(TokenPrepending(2, 3), 4)}
    names = ["mean", "prompteol", "ck"]
    paper = paper_methods(names, settings)
    assert [(m.name, m.variant) for m in paper] == [
        ("mean", VANILLA), ("prompteol", VANILLA), ("prompteol", TP), ("ck", VANILLA), ("ck", TP)]
    assert {m.exit_layer for m in paper} == {3}
    assert [(m.name, m.variant, m.exit_layer) for m in practical_methods(names, settings)] == [
        ("mean", LAST, -1), ("prompteol", LAST, -1), ("prompteol", SAME, 3), ("prompteol", TP_EXIT, 3),
        ("ck", LAST, -1), ("ck", SAME, 4), ("ck", TP_EXIT, 4)]
    assert [m.tp for m in paper] == [None, None, settings["prompteol"].tp, None, settings["ck"].tp]
    assert paper[0].encoder(tiny_backbone()).pooling == "mean"
    for methods in (paper_methods, practical_methods):
        with pytest.raises(ValueError, match="prompteol, which is not among the methods: ck"):
            methods(["ck"], settings)


def test_cost_table_and_overhead_by_hand():
    same = {"layer": 3, "sentences": 2, "memory": 5e6, "round": 0, "peak": 1e9}
    rows = []
    for variant, seconds, tokens, flops in ((VANILLA, (1.0, 2.0), 20, 4e8), (TP, (1.5, 2.0), 24, 5e8)):
        own = {"method": "prompteol", "variant": variant, "tokens": tokens, "flops": flops}
        rows += [own | same | {"seconds": s} for s in seconds]
    rows += [{"method": "echo", "variant": VANILLA, "seconds": s, "tokens": 40, "flops": 8e8} | same for s in (3.0, 4.0)]
    runs = pd.DataFrame(rows)
    table = cost_table(runs).set_index(["method", "variant"])
    assert table["time ratio"].tolist() == pytest.approx([1, 1.25, 2.5])
    assert table.loc[("echo", VANILLA), ["low", "high"]].tolist() == pytest.approx([2.25, 2.75])
    assert table.loc[("prompteol", VANILLA), "share of peak"] == pytest.approx((0.4 + 0.2) / 2)
    assert table["tokens / sentence"].tolist() == [10, 12, 20]
    assert table["GFLOP / sentence"].tolist() == pytest.approx([0.2, 0.25, 0.4])
    assert table["peak MB"].tolist() == [5, 5, 5]
    [added] = overhead(runs).to_dict("records")  # Echo has no TP
    assert added == pytest.approx({
        "method": "prompteol", "time ratio": 1.25, "low": 1.125, "high": 1.375, "FLOP ratio": 1.25, "more tokens / sentence": 2,
    })


@pytest.mark.parametrize("one_by_one", [True, False])
def test_run_methods(one_by_one, one_thread):
    backbone, names = tiny_backbone(), ["mean", "prompteol", "ck"]
    methods = (paper_methods if one_by_one else practical_methods)(names, SETTINGS)
    runs = run_methods(backbone, methods, SENTENCES, rounds=2, one_by_one=one_by_one)
    assert len(runs) == 2 * len(methods) and (runs["seconds"] > 0).all() and (runs["memory"] > 0).all()
    assert runs.groupby("round")["peak"].nunique().tolist() == [1, 1]  # one peak per round, the same for all
    table = cost_table(runs)
    assert table.loc[table["method"] == "prompteol", ["time ratio", "low", "high"]].iloc[0].tolist() == [1, 1, 1]
    tp, base = (TP, VANILLA) if one_by_one else (TP_EXIT, LAST)
    added = overhead(runs, tp, base).set_index("method")
    assert list(added.index) == ["prompteol", "ck"]
    assert added.loc["ck", "more tokens / sentence"] > added.loc["prompteol", "more tokens / sentence"] > 0
    assert (added["FLOP ratio"] > 1).all() if one_by_one else (added["FLOP ratio"] < 1).all()  # three of four blocks


def test_check_workload_agrees():
    checked = tables.check_workload(tiny_backbone(), paper_methods(["mean", "prompteol"], SETTINGS), SENTENCES)
    assert (checked["tokens"] == checked["tokens counted"]).all()
    np.testing.assert_allclose(checked["GFLOP"], checked["GFLOP counted"], rtol=0.01)


def test_quality_is_the_sts_score_with_an_interval_around_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.report.results.RESULTS", tmp_path)
    monkeypatch.setattr(tables, "STORE", None)
    generator = np.random.default_rng(0)
    words = ["man", "flute", "street", "dog", "snow", "plane", "woman", "house", "bone", "market"]
    rows = [{
        "subset": "s", "score": float(generator.integers(0, 6)),
        "sentence1": " ".join(generator.choice(words, 4)), "sentence2": " ".join(generator.choice(words, 4)),
    } for _ in range(12)]
    data = Dataset.from_list(rows)
    monkeypatch.setattr("lib.evaluation.sts.provenance", lambda dataset: {"rows": len(dataset)})
    backbone, methods = tiny_backbone(), practical_methods(["prompteol"], SETTINGS)
    scores, provenance = tables.quality(backbone, methods, data, "T", draws=200)
    expected = [sts_scores(sts_pairs(method.encoder(backbone), {"T": data}))["score"].iloc[0] for method in methods]
    assert scores["score"].tolist() == pytest.approx(expected)
    assert scores["variant"].tolist() == [LAST, SAME, TP_EXIT] and len(provenance) == 2  # both vanilla layers from one pass
    assert (scores["from"] < scores["score"]).all() and (scores["score"] < scores["to"]).all()


def crowded_points():
    rows = []
    for k, method in enumerate(("mean", "prompteol", "cot", "ke", "echo")):
        for variant, ratio, score in ((LAST, 1.02, 70), (SAME, 0.97, 70.5 + 0.1 * k), (TP_EXIT, 1.0, 71 + 0.1 * k)):
            spread = {"low": ratio * 0.97, "high": ratio * 1.03, "from": score - 5, "to": score + 5}
            rows.append({"method": method, "variant": variant, "time ratio": ratio, "score": score} | spread)
    return pd.DataFrame(rows)


def test_names_in_the_pareto_figure_do_not_overlap():
    figure = quality_against_cost(crowded_points(), "Title")
    figure.canvas.draw()
    boxes = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_ratios_of_the_paper_stand_beside_ours():
    ours = {"time ratio": 1.2, "low": 1.1, "high": 1.3}
    table = pd.DataFrame([{"method": m, "variant": v} | ours for m in ("prompteol", "ke") for v in (VANILLA, TP)])
    paper = [("prompteol", True, 1.04), ("ke", False, 1.17), ("metaeol", True, 8.29)]
    paper = pd.DataFrame(paper, columns=["method", "tp", "value"])
    axis = time_ratios(table, "Title", paper).axes[0]
    [crosses] = [c for c in axis.containers if c.get_label() == "the paper, Llama-2-7B"]
    assert crosses.lines[0].get_xdata().tolist() == [1.04, 1.17]  # not MetaEOL, which is not in our table
    assert [label.get_text() for label in axis.get_legend().get_texts()] == [VANILLA, TP, "the paper, Llama-2-7B"]


@pytest.fixture
def sample_data(monkeypatch):
    monkeypatch.delenv("TP_DATA_DIR", raising=False)
    monkeypatch.setenv("TP_HUB_UNREACHABLE", "1")
    forget_sources()
    yield
    forget_sources()


@pytest.mark.filterwarnings("ignore::lib.data.sts.SampleDataWarning")
def test_the_gpu_benchmark_on_a_tiny_model(tmp_path, monkeypatch, sample_data, smollm2, one_thread):
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
    assert read["plain"]["path"].tolist() == ["plain", "ours"] * 2
    assert (read["plain"].groupby("prompt")["TFLOP"].first() > read["plain"].groupby("prompt")["TFLOP"].last()).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so the benchmark would run")
def test_the_gpu_benchmark_says_when_there_is_no_gpu(capsys):
    from benchmarks import gpu_cost

    with pytest.raises(SystemExit):
        gpu_cost.main([])
    assert "nothing was measured" in capsys.readouterr().err


def test_no_gpu_results_is_an_empty_list(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "GPU_RESULTS", tmp_path / "none")
    assert tables.gpu_results() == []
