"""What a notebook talks to: stored results, tables, figures, one provenance file, settings, the runner's context."""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from datasets import Dataset
from tiny_models import tiny_backbone

from lib.core import processes
from lib.data import sources
from lib.data.sources import DataSource, EvaluationData
from lib.report import results, session, settings
from lib.report.settings import load_settings, save_settings


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The model is tiny, and everything is written below tmp_path; gives what was displayed."""
    displayed = []
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(session, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(settings, "FOLDER", tmp_path / "configs")
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(session, "load_backbone", lambda model, dtype: tiny_backbone())
    monkeypatch.setattr(sources, "find_source", lambda: DataSource("sample", tmp_path))
    monkeypatch.setattr(session, "display", displayed.append)
    return displayed


def start(notebook="01", model="tiny-llama", **context):
    return session.start(notebook, "smoke", model, "float32", context)


def items(count, **columns):
    texts = [" ".join(["A dog."] * (i % 7 + 1)) for i in range(count)]
    rows = Dataset.from_dict({"sentence1": texts, "sentence2": texts[::-1], **columns})
    files = {f"{number}.txt": "f" * 64 for number in range(4)}
    return EvaluationData("toy", rows, {"split": "test", "source": {"kind": "sample"}, "rows": count, "files": files})


@pytest.fixture
def pairs():
    return {name: items(4, subset=["s"] * 4, score=[1.0, 2.0, 3.0, 4.0]) for name in ("one", "two")}


def provenance(tmp_path):
    return json.loads((tmp_path / "figures" / "smoke" / "provenance.json").read_text())


def test_every_task_is_a_result_and_the_context_reaches_whom_it_concerns(tmp_path, shown, pairs, monkeypatch):
    log, told = tmp_path / "log", []
    monkeypatch.setattr(processes, "join", told.append)
    monkeypatch.setattr(sources, "hub_unreachable", None)
    for context in ({"meeting": "/a/file"}, {"log": str(log)}, {"log": str(log), "fresh_since": 9e9}):
        run = start(**context, hub_unreachable="no route")
        table = run.sts(run.encoder(store=None), pairs, [-1, 4, 0])
        assert table["layer"].unique().tolist() == [0, 4] and len(table) == 16
    assert told == ["/a/file"] and sources.hub_unreachable == "no route" and run.store.fresh_since == 9e9
    data = {"MR": items(40, split=["all"] * 40, label=[0, 1] * 20)}
    assert set(run.transfer(run.encoder(exit_layer=2, store=None), data)["layer"]) == {2}
    logged = [(entry["name"], entry["reused"]) for entry in map(json.loads, log.read_text().splitlines())]
    names = ["sts-one", "sts-two"]
    assert logged == [(name, reused) for reused in (True, False) for name in names] + [("transfer-MR", False)]


def test_a_number_carries_all_that_it_hangs_on(tmp_path, shown, pairs):
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    run = start(model=str(folder), parameters={"draws": 10})
    encoder = run.encoder(store=None)
    run.show(run.sts(encoder, {"one": pairs["one"]}), "scores", "STS")
    run.note("an example", encoder=encoder, texts=["A text."])
    run.show(pd.DataFrame({"a": [1]}), "example", "An example")
    section = provenance(tmp_path)["01"]
    def whole(value):
        if isinstance(value, list):
            return [whole(item) for item in value]
        value = section["shared"].get(value, value) if isinstance(value, str) else value
        return {key: whole(item) for key, item in value.items()} if isinstance(value, dict) else value
    result, example = whole(section["results"])
    own, model = encoder.describe(), run.backbone.describe()
    expected = {"model": model} | {key: value for key, value in own.items() if key not in model}
    assert result["encoder"] == example["encoder"] == expected and model["dtype"] == "float32"
    data = result["data"]["one"]
    assert data["rows"] == 4 and data["files"]["0.txt"] == "f" * 64 and data["source"] == {"kind": "sample"}
    assert result["layers"] == [4] and result["seconds"] >= 0
    assert {"packages", "git_commit", "git_dirty", "python"} <= result["environment"].keys()
    assert whole(section["about"])["parameters"] == {
        "profile": "smoke", "model": "tiny", "dtype": "float32", "draws": 10}
    assert [artefact["results_read"] for artefact in section["artefacts"].values()] == [1, 2]
    assert str(tmp_path) not in json.dumps(section)


def test_a_notebook_replaces_its_own_section_and_no_other(tmp_path, shown):
    for notebook, name in (("01", "a"), ("02", "b"), ("01", "c")):
        start(notebook).show(pd.DataFrame({"a": [1]}), name, "A table.")
    whole = provenance(tmp_path)
    assert [list(whole[notebook]["artefacts"]) for notebook in ("01", "02")] == [["c.csv"], ["b.csv"]]
    caption = "A table. tiny-llama, float32; sample data (written for this project)"
    assert whole["02"]["artefacts"]["b.csv"]["caption"] == caption


def test_a_long_table_is_displayed_as_a_digest(tmp_path, shown):
    run, table = start(), pd.DataFrame({"n": range(100), "third": 1 / 3})
    folder = tmp_path / "figures" / "smoke"
    run.show(table, "long", "Long")
    run.show(table, "part", "Part", 3, "n > 97")
    run.show(table.head(2).set_index("n"), "short", "Short")
    assert len(pd.read_csv(folder / "long.csv")) == 100 and (folder / "long.md").read_text().count("\n|") == 102
    counts = [displayed.data.count("\n|") - 2 for displayed in shown]
    assert counts == [40, 2, 2] and ["csv" in displayed.data for displayed in shown] == [True, True, False]
    assert "|  99 |   0.333 |" in shown[1].data and "|   1 |    0.33 |" in (folder / "short.md").read_text()
    with pytest.raises(TypeError, match="neither"):
        run.show([1], "list", "A list")


def test_a_figure_is_the_same_file_again_and_is_closed(tmp_path, shown):
    run = start()
    for name in ("f", "g"):
        figure, axis = plt.subplots()
        axis.plot([1, 2])
        run.show(figure, name, "Costs $1 and $2, " + 20 * "a long caption ")
        assert not plt.fignum_exists(figure.number)
    first, second = (tmp_path / "figures" / "smoke" / f"{name}.png" for name in ("f", "g"))
    assert first.read_bytes() == second.read_bytes() and len(shown) == 2


def test_settings_from_sample_data_never_leave_the_run(tmp_path, shown):
    chosen = {"start": 1, "end": 2, "exit": 3}
    with pytest.raises(FileNotFoundError, match="python -m lib.studies.layers tiny-llama"):
        start().settings  # noqa: B018
    save_settings("org/model", {"cot": chosen, "ke": chosen}, {"chosen_by": "real data"})
    before = (tmp_path / "configs" / "org--model.yaml").read_bytes()
    path = save_settings("org/model", {"cot": chosen | {"exit": 1}, "new": chosen}, {}, sample=True, profile="smoke")
    assert path == tmp_path / "runs" / "smoke" / "settings" / "org--model.yaml"
    assert (tmp_path / "configs" / "org--model.yaml").read_bytes() == before
    real, sample = load_settings("org/model", False, "smoke"), load_settings("org/model", True, "smoke")
    assert {name: s.exit_layer for name, s in real.items()} == {"cot": 3, "ke": 3}
    assert {name: s.exit_layer for name, s in sample.items()} == {"cot": 1, "ke": 3, "new": 3}
    assert load_settings("org/model", True, "default") == real
    save_settings("tiny-llama", {"ke": chosen}, {}, sample=True, profile="smoke")
    assert list(start().settings) == ["ke"]
