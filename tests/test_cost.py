"""Costs: what is counted against torch's own count, what is timed in which order, and the arithmetic of the tables."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import SENTENCES, build_tokenizer, tiny_backbone

from benchmarks import gpu, gpu_cost, gpu_parity
from lib import SentenceEncoder, TokenPrepending
from lib.report.settings import Setting
from lib.studies import cost
from lib.studies.cost import BASELINE, LAST, OPERATIONS, OTHER, PYTHON, QUARTILES, SAME, TP, TP_EXIT

SETTING = Setting(TokenPrepending(1, 2), 3)
SETTINGS = {"prompteol": SETTING, "ck": SETTING}
ENCODERS = [  # prompt, TP, exit layer, pooling
    ("prompteol", None, -1, None), ("echo", None, 4, None), ("none", None, 3, "mean"),
    ("prompteol", TokenPrepending(1, 2), 3, None), ("ck", TokenPrepending(0, 2), 2, None)]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """The machine's true peak is not measured, and what was imported not looked through for garbage again and again."""
    monkeypatch.setitem(cost.PEAK_SIZE, "cpu", 256)
    gc.freeze()
    yield
    gc.unfreeze()


def test_measure_goes_forwards_and_backwards_and_count_flops_knows_products_and_attention():
    order = []
    seconds = cost.measure({name: lambda name=name: order.append(name) for name in "ABC"}, rounds=3)
    assert "".join(order) == "ABCCBAABC" and [len(values) for values in seconds.values()] == [3, 3, 3]
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert cost.count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    query, key = torch.ones(2, 4, 3, 8), torch.ones(2, 4, 6, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert cost.count_flops(lambda: attend(query, key, key)) == 2 * (2 * 2 * 4 * 3 * 6 * 8)


def padded_tokens(encoder: SentenceEncoder, batch_size: int | None, prefixes: bool) -> int:
    """Tokens that a run puts through the first block, from the lengths of its rows."""
    total = 0
    for part in encoder.passes(SENTENCES, batch_size):
        lengths, prefix = [len(row) for row in part.rows.ids], part.rows.prefix
        total += sum(len(batch) * (max(lengths[i] for i in batch) - prefix) for batch in part.batches)
        total += prefix * prefixes
    return total


@pytest.mark.parametrize("choices", ENCODERS)
def test_a_run_does_its_passes_and_a_prepared_one_computes_the_embeddings_without_prefixes(choices):
    backbone = tiny_backbone()
    encoder = SentenceEncoder(backbone, *choices)
    embeddings = encoder.encode(sorted(SENTENCES, key=lambda text: (-len(text), text)))  # longest first
    for batch_size in (None, 1, 3):
        with cost.count_tokens(backbone) as counted:
            encoder.encode(SENTENCES, batch_size)
        assert counted["tokens"] == padded_tokens(encoder, batch_size, prefixes=True)
    run = cost.prepared(encoder, SENTENCES, one_by_one=True)
    with cost.count_tokens(backbone) as counted:
        found = run()
    assert counted["tokens"] == padded_tokens(encoder, 1, prefixes=False)
    by_template = found.reshape(len(encoder.templates), len(SENTENCES), -1).mean(axis=0)
    np.testing.assert_allclose(by_template, embeddings, rtol=0, atol=1e-4)


def test_peak_memory_sees_what_is_alive_at_a_time():
    with cost.peak_memory(torch.device("cpu")) as in_turn:
        for _ in range(3):
            torch.ones(5_000_000).sum()
    with cost.peak_memory(torch.device("cpu")) as together:
        kept = [torch.ones(5_000_000) for _ in range(3)]
    assert [peak["bytes"] for peak in (in_turn, together)] == pytest.approx([20e6, 20e6 * len(kept)], rel=0.01)


def test_time_is_booked_where_it_went(monkeypatch):
    times = {"aten::mm": 30, "aten::addmm": 20, "aten::copy_": 10, PYTHON: 25, "aten::view": 10, "a kernel": 5}
    events = [SimpleNamespace(key=name, self_cpu_time_total=time) for name, time in times.items()]
    rows = cost.contenders(["prompteol"], SETTINGS, True)
    with monkeypatch.context() as patch:
        patch.setattr(cost, "profile", lambda **_: nullcontext(SimpleNamespace(key_averages=lambda: events)))
        found = cost.time_shares(tiny_backbone(), rows[:1], SENTENCES[:1], SENTENCES)
    assert found.query("run == 'one by one, baseline'").set_index("group")["share"].to_dict() == pytest.approx({
        "matrix products": 0.5, "attention": 0, "norms, activations, sums": 0, "copies and indexing": 0.1, PYTHON: 0.25,
        OTHER: 0.15})
    names = [name for operations in OPERATIONS.values() for name in operations.split()]
    assert len(names) == len(set(names)), "no operation is in two groups"
    shares = cost.time_shares(tiny_backbone(), rows, SENTENCES[:1], SENTENCES).pivot(
        index="run", columns="group", values="share")
    assert {*shares.index} == {f"{way}, {variant}" for way in ("one by one", "batched") for variant in (BASELINE, TP)}
    assert shares.sum(axis=1).tolist() == pytest.approx([1] * 4) and (shares[PYTHON] > 0).all()


def test_contenders_of_the_two_protocols():
    settings = {"prompteol": SETTING, "ck": (ck := Setting(TokenPrepending(2, 3), 4))}
    one_by_one, practical = ([(row.variant, row.exit_layer, row.method) for row in rows if row.name == "ck"]
                             for rows in (cost.contenders(["prompteol", "ck"], settings, way) for way in (True, False)))
    assert one_by_one == [(BASELINE, 3, None), (TP, 3, ck.method)], "all at PromptEOL's exit layer"
    assert practical == [(LAST, -1, None), (SAME, 4, None), (TP_EXIT, 4, ck.method)]
    with pytest.raises(ValueError, match="prompteol"):  # to which all times are ratios
        cost.contenders(["ck"], SETTINGS, True)


def test_cost_table_overhead_and_pareto_front_by_hand():
    same = {"layer": 3, "sentences": 2, "memory": 5e6, "round": 0, "peak": 1e9}
    rows = [("prompteol", BASELINE, 20, 4e8, [1.0, 2.0]), ("prompteol", TP, 24, 5e8, [1.5, 2.0]),
            ("echo", BASELINE, 40, 8e8, [3.0, 4.0])]
    runs = pd.DataFrame(rows, columns=["method", "variant", "tokens", "flops", "seconds"])
    runs = runs.explode("seconds", ignore_index=True).astype({"seconds": float}).assign(**same)
    table = cost.cost_table(runs).set_index(["method", "variant"])
    assert table["time ratio"].tolist() == pytest.approx([1, 1.25, 2.5])
    assert table.loc[("echo", BASELINE), list(QUARTILES)].tolist() == pytest.approx([2.25, 2.75])  # round by round
    assert table.loc[("prompteol", BASELINE), "share of peak"] == pytest.approx((0.4 + 0.2) / 2)
    assert table["tokens / sentence"].tolist() == [10, 12, 20] and table["peak MB"].tolist() == [5, 5, 5]
    assert table["GFLOP / sentence"].tolist() == pytest.approx([0.2, 0.25, 0.4])
    [added] = cost.overhead(runs).to_dict("records")  # Echo has no TP
    assert added == pytest.approx({
        "method": "prompteol", "time ratio": 1.25, "lower quartile": 1.125, "upper quartile": 1.375,
        "FLOP ratio": 1.25, "more tokens / sentence": 2})
    # 3 at 55 is beaten by 2 at 60, 1 at 40 by 1 at 50; two equal points do not beat each other.
    front = cost.pareto_front([1, 2, 3, 4, 2, 1], [50, 60, 55, 70, 60, 40])
    assert front.tolist() == [True, True, False, True, True, False]


@pytest.mark.filterwarnings("ignore::lib.data.sources.SampleDataWarning")
def test_the_gpu_script_on_the_cpu(tmp_path, monkeypatch, no_data):
    monkeypatch.setattr(gpu_cost, "METHODS", ("mean", "prompteol", "ke"))
    monkeypatch.setattr(gpu_cost, "WITH_TP", ("prompteol", "ke"))
    families = ("llama", "opt_narrow")
    monkeypatch.setattr(gpu_parity, "FAMILIES", families)
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert gpu.main(["--tiny", f"--tokenizer={tmp_path / 'tokenizer'}", "--models", f"--folder={tmp_path}"]) == 0
    monkeypatch.setattr(cost, "GPU_RESULTS", tmp_path / "none")
    assert cost.gpu_results() == []
    monkeypatch.setattr(cost, "GPU_RESULTS", tmp_path)
    [(about, read)] = cost.gpu_results()
    assert about["trial"] and about["weights"] == "random" and about["scores"].startswith("not run: no bundled model")
    assert about["environment"]["date"] and about["environment"]["packages"]["torch"]
    parity = read["parity"].set_index(["model", "dtype"])
    assert list(parity.index) == [(family, dtype) for family in families for dtype in gpu_parity.FARTHEST]
    assert parity.loc["opt_narrow", "AlignedWVA"].isna().all() and parity.loc["llama"].notna().all(axis=None)
    assert (parity.loc["llama", "TP"][["float16", "bfloat16"]] > 1e-7).all()  # it is another dtype that is compared
    table = cost.cost_table(read["paper"])
    assert list(table["method"].unique()) == ["mean", "prompteol", "ke"]
    assert {"AlignedWVA", "CP"} < set(table["variant"])
    assert cost.overhead(read["practical"], TP_EXIT, LAST)["method"].tolist() == ["prompteol", "ke"]
    paths = read["reference"]
    assert paths["path"].tolist() == ["reference", "ours"] * 2
    assert (paths.groupby("prompt")["TFLOP"].first() > paths.groupby("prompt")["TFLOP"].last()).all()
    # What differs on the device is named.
    rows = [("llama", "float32", 1e-7, 2e-5), ("llama", "bfloat16", 1e-3, None)]
    table = pd.DataFrame(rows, columns=["model", "dtype", "baseline", "TP"])
    assert gpu_parity.too_far(table) == ["llama, float32, TP: 1 - cosine 2.0e-05"]
