"""`benchmarks.mteb`: mteb's score is ours, other settings are other results, the paper's tables stand beside ours."""

import dataclasses
import json
import socket
from unittest.mock import DEFAULT, Mock

import numpy as np
import pandas as pd
import pytest
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer

from lib import SentenceEncoder, TokenPrepending
from lib.core.sentence_transformer import TrainingFree
from lib.data.sources import DATA, DataSource, HubUnreachableError
from lib.data.sts import load_sts
from lib.evaluation.sts import cosine, spearman
from lib.report import paper

mteb = pytest.importorskip("mteb", minversion="2", reason='mteb is optional: pip install "mteb>=2,<3"')

from mteb.abstasks.sts import AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.mocks import MOCK_TASK_REGISTRY  # noqa: E402
from mteb.models import EncoderProtocol  # noqa: E402

from benchmarks import mteb as runner  # noqa: E402
from benchmarks.mteb import mteb_identity, mteb_model  # noqa: E402

METHODS = {"tp": TokenPrepending(1, 3), "another end": TokenPrepending(1, 2)}
METHODS |= {f"vector of {n}": TokenPrepending(1, 3, init=np.full(32, n)) for n in (0, 1)}
SETTINGS = {"baseline": {}, "another layer": {"exit_layer": 2}, "another prompt": {"prompt": "ke"}}
SETTINGS |= {"another pooling": {"pooling": "mean"}, "another length": {"max_length": 100}}
SETTINGS |= {name: {"method": method} for name, method in METHODS.items()}


class SamplePairs(AbsTaskSTS):
    """An STS task whose pairs are in memory."""

    metadata = TaskMetadata(
        name="SamplePairs", description="Pairs of the sample", type="STS", main_score="cosine_spearman",
        eval_splits=["test"], eval_langs=["eng-Latn"], dataset={"path": "in/memory", "revision": "1"})

    def __init__(self, pairs):
        super().__init__()
        self.dataset, self.data_loaded = DatasetDict(test=pairs), True


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Looking up a name or opening a connection ends the test, by an exception that nobody catches as an error."""
    for owner, name in ((socket, "getaddrinfo"), (socket.socket, "connect"), (socket.socket, "connect_ex")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("no test may use the network"))


@pytest.fixture
def pairs():
    return load_sts("sample", "test", DataSource("sample", DATA / "sample")).first(40).rows


def score(model, pairs, **options) -> float:
    found = mteb.evaluate(model, SamplePairs(pairs), cache=None, show_progress_bar=False, **options)
    return 100 * found.task_results[0].get_score()


@pytest.mark.parametrize("setting", ["baseline", "tp"])
def test_the_score_is_ours_and_the_batch_size_is_honoured(backbone, passes, pairs, setting):
    encoder = SentenceEncoder(backbone, **SETTINGS[setting], share_prefix=False)
    sides = [pairs[side][:] for side in ("sentence1", "sentence2")]
    first, second = (encoder.encode(side) for side in sides)
    expected = spearman(pairs["score"], cosine(first, second))
    # The score is of these pairs in this order.
    assert abs(expected) > 1 and abs(expected - spearman(pairs["score"], cosine(first, second[::-1]))) > 1
    assert isinstance(model := mteb_model(encoder), EncoderProtocol)
    assert score(SentenceTransformer(modules=[TrainingFree(encoder)]), pairs) == pytest.approx(expected, abs=1e-6)
    for size in (1, 7):
        passes.clear()
        assert score(model, pairs, encode_kwargs={"batch_size": size}) == pytest.approx(expected, abs=1e-6)
        rows = [rows for rows, _ in passes]
        assert max(rows) == size and sum(rows) == sum(len(set(side)) for side in sides)


def test_every_setting_is_an_experiment_of_its_own(backbone):
    metas = [mteb_model(SentenceEncoder(backbone, **options)).mteb_model_meta for options in SETTINGS.values()]
    assert len({meta.experiment_name for meta in metas}) == len(SETTINGS)
    methods = dict(zip(SETTINGS, (meta.experiment_kwargs["method"] for meta in metas)))
    assert methods["baseline"] == "baseline" and methods["tp"] == "TokenPrepending"
    for meta in metas:
        values = meta.experiment_kwargs
        assert meta.name == "local/tiny-llama" and json.loads(json.dumps(values)) == values
        assert f"prompt_{values['prompt']}" in meta.experiment_name  # it is readable, and not a hash


def test_names_have_an_organisation_and_tell_no_path(backbone, monkeypatch, tmp_path):
    llama = ("meta-llama/Llama-2-7b-hf", "12fd25f77366fa6b3b4b768ec3050bf629380bac")
    assert mteb_identity(*llama, "abc") == llama
    assert mteb_identity("gpt2", llama[1], "abc") == ("local/gpt2", "abc")
    (tmp_path / "tuned").mkdir()
    monkeypatch.chdir(tmp_path / "tuned")
    here = dataclasses.replace(backbone, name=".", revision="local folder")
    meta = mteb_model(SentenceEncoder(here)).mteb_model_meta
    assert (meta.name, meta.revision) == ("local/tuned", here.fingerprint)
    assert type(meta).model_validate(meta.model_dump()).name == meta.name  # mteb checks the name's form here


def test_the_tasks_are_those_of_the_papers_tables_and_of_mteb():
    assert [len(tasks) for tasks in runner.CATEGORIES.values()] == [12, 3, 4, 11, 1, 1]
    assert set(runner.CATEGORIES) == set(paper.read_paper("a5_ablations").query("metric == 'mteb_score'")["task"])
    known = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    assert all(known[name].eval_splits == ["test"] for names in runner.CATEGORIES.values() for name in names)


def test_the_command_goes_on_where_it_stopped_and_the_paper_stands_beside_it(backbone, monkeypatch, tmp_path, capsys):
    two, one = ["MockClusteringTask", "MockRerankingTask"], ["MockSTSTask"]
    categories, tasks = {"MTEB clustering (11)": two, "MTEB BIOSSES": one}, [MOCK_TASK_REGISTRY[n]() for n in two + one]
    llama = dataclasses.replace(backbone, name="meta-llama/Llama-2-7b-hf")
    replaced = {"CATEGORIES": categories, "SETTING": ("prompteol", 1, 3, 3), "FIGURES": tmp_path}
    for name, value in (replaced | {"ask_hub": Mock(), "load_backbone": Mock(return_value=llama)}).items():
        monkeypatch.setattr(runner, name, value)
    monkeypatch.setattr(mteb, "get_benchmark", lambda _: Mock(tasks=tasks))
    command, written = f"--end 3 --exit-layer 3 --folder {tmp_path}/cache".split(), tmp_path / "llama2-7b"
    first_fails = Mock(wraps=tasks[1].load_data, side_effect=[ConnectionError("no network"), DEFAULT])
    monkeypatch.setattr(tasks[1], "load_data", first_fails)
    assert runner.main(command) == 2 and "MockRerankingTask (ConnectionError: no net" in capsys.readouterr().err
    table = pd.read_csv(written / "mteb_beside_paper.csv").groupby("task")
    assert table["ours"].count().to_dict() == {"MTEB clustering (11)": 0, "MTEB BIOSSES": 2}
    assert "lacks 1 of 2 tasks, first MockReranking" in table["status"].first()["MTEB clustering (11)"]
    for task in (tasks[0], tasks[2]):  # whose results are stored
        monkeypatch.setattr(task, "load_data", None)
    assert runner.main(command) == 0
    for row in pd.read_csv(written / "mteb_beside_paper.csv").itertuples():
        files = [file for name in categories[row.task] for file in (tmp_path / "cache").rglob(f"{name}.json")]
        scores = [json.loads(file.read_text())["scores"]["test"][0]["main_score"]
                  for file in files if ("method_TokenPrepending" in str(file)) == row.tp]
        assert len(files) == 2 * len(scores) and row.ours == pytest.approx(100 * np.mean(scores), abs=1e-3)
    monkeypatch.setattr(paper, "FIGURES", tmp_path)
    monkeypatch.setattr("sys.argv", ["paper", "--measured"])
    assert paper.main() == 1 and capsys.readouterr().out.count("| a5_ablations | llama2-7b | prompteol") == 4


def test_without_a_hub_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(runner, "ask_hub", Mock(side_effect=HubUnreachableError("the hub cannot be reached")))
    assert runner.main(["--tasks", "BIOSSES", "SummEval"]) == 2
    [message] = capsys.readouterr().err.splitlines()
    assert "needs meta-llama/Llama-2-7b-hf and the data of 2 tasks" in message
