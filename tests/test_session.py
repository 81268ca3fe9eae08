"""What a notebook talks to: stored results, tables, figures, one provenance file, settings, the runner's context."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from lib.core import processes
from lib.data import sources
from lib.data.sources import DataSource, EvaluationData
from lib.report import results, session, settings
from lib.report.session import start
from lib.report.settings import load_settings, save_settings


class Backbone:
    title, num_layers = "Tiny (Q4_1)", 3

    def __init__(self, name, dtype):
        self.name, self.dtype = name, dtype

    def describe(self):
        return {"model": self.name, "model_revision": "1", "quantisation": "Q4_1", "device": "CPU", "dtype": self.dtype}

    def layer_index(self, layer):
        return layer % (self.num_layers + 1)


class Encoder:
    """Embeds a text by its length and its first letter."""

    exit_layer = 3

    def __init__(self, backbone):
        self.backbone = backbone

    def describe(self):
        return self.backbone.describe() | {"prompt": "prompteol", "templates": ["{}"], "method": None, "exit_layer": 3}

    def encode_layers(self, sentences, layers):
        return {n: np.array([[len(s), ord(s[0]), n + 1] for s in sentences], np.float32) for n in layers}


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Everything is written below tmp_path; gives what was displayed."""
    displayed = []
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(session, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(settings, "FOLDER", tmp_path / "configs")
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(session, "load_backbone", Backbone)
    monkeypatch.setattr(sources, "find_source", lambda: DataSource("sample", tmp_path))
    monkeypatch.setattr(session, "display", displayed.append)
    return displayed


def items(count, **columns):
    rows = Dataset.from_dict({"sentence1": ["abcdefgh"[i % 8] * (i + 1) for i in range(count)], **columns})
    files = {f"{number}.txt": "f" * 64 for number in range(4)}
    return EvaluationData("toy", rows, {"split": "test", "source": {"kind": "sample"}, "rows": count, "files": files})


@pytest.fixture
def pairs():
    return {"toy": items(4, sentence2=["a", "xx", "abc", "z"], subset=["s"] * 4, score=[1.0, 2.0, 3.0, 4.0])}


def provenance(tmp_path):
    return json.loads((tmp_path / "figures" / "smoke" / "provenance.json").read_text())


def test_an_evaluation_is_stored_and_the_runner_is_told(tmp_path, shown, pairs):
    log = tmp_path / "log"
    for context in ({}, {"log": str(log)}, {"log": str(log), "fresh_since": 9e9}):
        run = start("01", "smoke", "tiny", "float32", context)
        table = run.sts(Encoder(run.backbone), pairs, [-1, 3, 0])
        assert table["layer"].unique().tolist() == [0, 3] and len(table) == 8
    expected = [{"name": "sts-toy", "reused": reused} for reused in (True, False)]
    assert [json.loads(line) for line in log.read_text().splitlines()] == expected
    assert run.store.fresh_since == 9e9


def test_every_transfer_task_is_a_result(tmp_path, shown):
    run = start("02", "smoke", "tiny", "float32", {"log": str(tmp_path / "log")})
    data = {task: items(40, split=["all"] * 40, label=[0, 1] * 20) for task in ("MR", "CR")}
    assert run.transfer(Encoder(run.backbone), data)["task"].unique().tolist() == ["MR", "CR"]
    names = [json.loads(line)["name"] for line in (tmp_path / "log").read_text().splitlines()]
    assert names == ["transfer-MR", "transfer-CR"]


def test_a_number_carries_all_that_it_hangs_on(tmp_path, shown, pairs):
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    run = start("01", "smoke", str(model), "float32", {"parameters": {"draws": 10}})
    run.show(run.sts(Encoder(run.backbone), pairs), "scores", "STS")
    run.note("an example", encoder=Encoder(run.backbone), texts=["A text."])
    run.show(pd.DataFrame({"a": [1]}), "example", "An example")
    section = provenance(tmp_path)["01"]

    def whole(value):
        if isinstance(value, list):
            return [whole(item) for item in value]
        value = section["shared"].get(value, value) if isinstance(value, str) else value
        return {key: whole(item) for key, item in value.items()} if isinstance(value, dict) else value

    result, example = whole(section["results"])
    encoder, data = result["encoder"], result["data"]["toy"]
    model = {"model": "tiny", "model_revision": "1", "quantisation": "Q4_1", "device": "CPU", "dtype": "float32"}
    assert encoder == {"model": model, "prompt": "prompteol", "templates": ["{}"], "method": None, "exit_layer": 3}
    assert data["rows"] == 4 and data["files"]["0.txt"] == "f" * 64 and data["source"] == {"kind": "sample"}
    assert result["layers"] == [3] and result["seconds"] >= 0 and example["encoder"] == encoder
    assert {"packages", "git_commit", "git_dirty", "python"} <= result["environment"].keys()
    assert whole(section["about"])["parameters"]["draws"] == 10
    assert [artefact["results_read"] for artefact in section["artefacts"].values()] == [1, 2]
    assert str(tmp_path) not in json.dumps(section)


def test_a_notebook_replaces_its_own_section_and_no_other(tmp_path, shown):
    for notebook, name in (("01", "a"), ("02", "b"), ("01", "c")):
        start(notebook, "smoke", "tiny").show(pd.DataFrame({"a": [1]}), name, "A table.")
    whole = provenance(tmp_path)
    assert [list(whole[notebook]["artefacts"]) for notebook in ("01", "02")] == [["c.csv"], ["b.csv"]]
    caption = "A table. Tiny (Q4_1), auto; sample data (written for this project)"
    assert whole["02"]["artefacts"]["b.csv"]["caption"] == caption


def test_a_long_table_is_displayed_as_a_digest(tmp_path, shown):
    run, table = start("01", "smoke", "tiny"), pd.DataFrame({"n": range(100), "third": 1 / 3})
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
    run = start("01", "smoke", "tiny")
    for name in ("f", "g"):
        figure, axis = plt.subplots()
        axis.plot([1, 2])
        run.show(figure, name, "Costs $1 and $2, " + 20 * "a long caption ")
        assert not plt.fignum_exists(figure.number)
    first, second = (tmp_path / "figures" / "smoke" / f"{name}.png" for name in ("f", "g"))
    assert first.read_bytes() == second.read_bytes() and len(shown) == 2


def test_the_context_reaches_those_whom_it_concerns(shown, monkeypatch):
    told = []
    monkeypatch.setattr(processes, "join", told.append)
    monkeypatch.setattr(sources, "assume_hub_unreachable", told.append)
    start("01", "smoke", "tiny", "auto", {"meeting": "/a/file", "hub_unreachable": "no route"})
    assert told == ["/a/file", "no route"]


CHOSEN = {"start": 1, "end": 2, "exit": 3}


def test_settings_from_sample_data_never_leave_the_run(tmp_path, shown):
    save_settings("org/model", {"cot": CHOSEN, "ke": CHOSEN}, {"chosen_by": "real data"})
    before = (tmp_path / "configs" / "org--model.yaml").read_bytes()
    path = save_settings("org/model", {"cot": CHOSEN | {"exit": 1}, "new": CHOSEN}, {}, sample=True, profile="smoke")
    assert path == tmp_path / "runs" / "smoke" / "settings" / "org--model.yaml"
    assert (tmp_path / "configs" / "org--model.yaml").read_bytes() == before
    real, sample = load_settings("org/model", False, "smoke"), load_settings("org/model", True, "smoke")
    assert {name: s.exit_layer for name, s in real.items()} == {"cot": 3, "ke": 3}
    assert {name: s.exit_layer for name, s in sample.items()} == {"cot": 1, "ke": 3, "new": 3}
    assert load_settings("org/model", True, "default") == real and start("01", "smoke", "org/model").settings == sample


def test_missing_settings_name_the_command_that_makes_them(shown):
    run = start("01", "smoke", "org/model")
    with pytest.raises(FileNotFoundError, match="python -m lib.studies.layers org/model"):
        run.settings  # noqa: B018
