"""The result store, tables and figures with provenance, and the comparison with the papers."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib.report import results
from lib.report.results import compare_with_paper, read_paper, run_or_load, save_figure, save_table


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "FIGURES", tmp_path / "figures")


def counting(value):
    calls = []

    def compute():
        calls.append(1)
        return value

    return compute, calls


TABLE = pd.DataFrame({"task": ["STS12", "2024"], "pair": [0, 1], "score": [1 / 3, np.nan], "ok": [True, False]})


def test_second_call_reuses_and_returns_the_same(tmp_path):
    compute, calls = counting(TABLE)
    first, second = (run_or_load("r", {"seed": 1}, compute) for _ in range(2))
    assert len(calls) == 1 and (first.reused, second.reused) == (False, True)
    pd.testing.assert_frame_equal(first.value, second.value)
    pd.testing.assert_frame_equal(first.value, TABLE, check_dtype=False)
    assert first.value["score"][0] == 1 / 3
    assert second.provenance["settings"] == {"seed": 1}
    assert second.provenance["environment"]["packages"]["torch"]
    assert not list((tmp_path / "results").glob("*.tmp"))


def test_other_settings_or_other_code_are_another_result(monkeypatch):
    compute, calls = counting(TABLE)
    run_or_load("r", {"seed": 1}, compute)
    run_or_load("r", {"seed": 2}, compute)
    run_or_load("r", {"seed": 1}, compute, code=("sts",))
    assert len(calls) == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b.replace(b"0.33", b"0.44"), lambda b: b"", lambda b: b"[]"])
def test_a_damaged_file_is_noticed_and_computed_again(tmp_path, damage):
    compute, calls = counting(TABLE)
    run_or_load("r", {}, compute)
    [path] = (tmp_path / "results").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"):
        again = run_or_load("r", {}, compute)
    assert len(calls) == 2 and again.value["score"][0] == 1 / 3
    assert run_or_load("r", {}, compute).reused


def test_fresh_ignores_what_was_stored_before(monkeypatch):
    compute, calls = counting(TABLE)
    run_or_load("r", {}, compute)
    monkeypatch.setenv("TP_FRESH_SINCE", "9999999999")
    run_or_load("r", {}, compute)
    assert len(calls) == 2


def test_a_failed_computation_stores_nothing(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run_or_load("r", {}, fail)
    assert not (tmp_path / "results").exists()


def test_the_runner_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_RUN_LOG", str(tmp_path / "log"))
    for _ in range(2):
        run_or_load("r", {}, lambda: TABLE)
    assert [json.loads(line)["reused"] for line in (tmp_path / "log").read_text().splitlines()] == [False, True]


def test_tables_and_figures_carry_caption_and_provenance(tmp_path):
    shown = save_table(TABLE, "t", "smoke", "A caption, sample data", [{"seed": 1}])
    folder = tmp_path / "figures" / "smoke"
    assert "A caption, sample data" in shown.data and shown.data == (folder / "t.md").read_text()
    assert len(pd.read_csv(folder / "t.csv")) == 2
    stored = json.loads((folder / "t.json").read_text())
    assert stored == {"caption": "A caption, sample data", "common to all results": {"seed": 1}, "results": [{}]}
    for name in ("f", "g"):
        figure, axis = plt.subplots()
        axis.plot([1, 2])
        save_figure(figure, name, "smoke", "Same caption", [{}])
        plt.close(figure)
    assert (folder / "f.png").read_bytes() == (folder / "g.png").read_bytes()  # nothing in it but the picture


def test_provenance_says_once_what_all_results_share():
    results_ = [{"a": 1, "s": {"x": 1, "y": None, "t": {"z": 1}}, "only": 1}, {"a": 1, "s": {"x": 2, "y": None, "t": {"z": 1}}}]
    common, own = results.split_common(results_)
    assert common == {"a": 1, "s": {"y": None, "t": {"z": 1}}}
    assert own == [{"s": {"x": 1}, "only": 1}, {"s": {"x": 2}}]
    assert results_[0]["s"]["x"] == 1 and results_[1]["s"]["t"] == {"z": 1}  # the argument stays as it was
    assert results.split_common([]) == ({}, [])


@pytest.mark.parametrize("path", sorted(results.PAPER.glob("*.csv")), ids=lambda p: p.stem)
def test_published_tables_are_tidy(path):
    table = read_paper(path.stem)
    columns = ["paper", "model", "method", "tp", "variant", "task", "metric", "value", "source", "grade", "note"]
    assert list(table.columns) == columns
    assert table["value"].map(lambda v: np.isfinite(float(v))).all()
    assert set(table["grade"]) <= {"P", "R", "S"} and (table["source"] != "").all()
    assert not table.duplicated(["model", "method", "tp", "variant", "task", "metric"]).any()


@pytest.mark.parametrize("name", ["a1_sts_llama2_7b", "a2_sts_backbones", "a3_transfer_llama2_7b", "c1_contrastive_prompting"])
def test_published_averages_are_those_of_their_rows(name):
    table = read_paper(name)
    table["value"] = table["value"].astype(float)
    checked = 0
    for _, rows in table.groupby(["model", "method", "tp", "variant", "metric"]):
        scores = rows.set_index("task")["value"]
        if "Avg" in scores and len(scores) == 8:
            assert scores.drop("Avg").mean() == pytest.approx(scores["Avg"], abs=0.011)
            checked += 1
    assert checked >= 6


def test_known_published_numbers():
    table = read_paper("a1_sts_llama2_7b").set_index(["method", "tp", "task"])["value"].astype(float)
    assert table["prompteol", True, "Avg"] == 77.19 and table["cot", False, "STS-B"] == 78.95
    with pytest.raises(ValueError, match="a1_sts_llama2_7b"):
        read_paper("nothing")


def test_comparison_states_what_it_is():
    ours = pd.DataFrame({"method": ["prompteol"] * 2, "tp": [True, False], "task": ["Avg", "Avg"], "value": [77.0, 60.0]})

    def status(model, sample=False):
        table = compare_with_paper(ours, "a1_sts_llama2_7b", model, sample).set_index(["method", "tp", "task"])
        return table

    same = status("meta-llama/Llama-2-7b-hf")
    assert same.loc[("prompteol", True, "Avg"), "status"] == "reproduced"
    assert same.loc[("prompteol", True, "Avg"), "difference"] == pytest.approx(-0.19)
    assert same.loc[("prompteol", False, "Avg"), "status"] == "differs"
    assert same.loc[("ke", True, "STS12"), "status"] == "not run"
    assert len(same) == len(read_paper("a1_sts_llama2_7b"))
    assert status("smollm2").loc[("prompteol", True, "Avg"), "status"] == "other model"
    assert status("meta-llama/Llama-2-7b-hf", sample=True).loc[("prompteol", True, "Avg"), "status"] == "sample data"


def test_each_model_stands_beside_the_table_that_it_is_in():
    for hub, name in results.PAPER_MODELS.items():
        assert name in set(results.read_paper(results.sts_table(hub))["model"])
    assert results.sts_table("smollm2") == "a1_sts_llama2_7b"
