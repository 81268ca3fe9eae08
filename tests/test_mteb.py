"""`mteb_model`: mteb's score is ours, other settings are other results, and no network is needed."""

import dataclasses
import json
import socket

import numpy as np
import pytest
from datasets import DatasetDict

from lib import SentenceEncoder, TokenPrepending
from lib.data.sources import DATA, DataSource
from lib.data.sts import load_sts
from lib.evaluation.sts import cosine, spearman

mteb = pytest.importorskip("mteb", minversion="2", reason='mteb is optional: pip install "mteb>=2,<3"')

from mteb.abstasks.sts import AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import EncoderProtocol  # noqa: E402

from lib.core.sentence_transformer import mteb_identity, mteb_model  # noqa: E402

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


def score(model, pairs, cache=None, **options) -> float:
    found = mteb.evaluate(model, SamplePairs(pairs), cache=cache, show_progress_bar=False, **options)
    return 100 * found.task_results[0].get_score()


@pytest.mark.parametrize("setting", ["baseline", "tp"])
def test_the_score_is_ours_and_the_batch_size_is_honoured(backbone, passes, pairs, setting):
    encoder = SentenceEncoder(backbone, **SETTINGS[setting], share_prefix=False)
    sides = [pairs[side][:] for side in ("sentence1", "sentence2")]
    first, second = (encoder.encode(side) for side in sides)
    expected = spearman(pairs["score"], cosine(first, second))
    # The score is of these pairs in this order.
    assert abs(expected) > 1 and abs(expected - spearman(pairs["score"], cosine(first, second[::-1]))) > 1
    model = mteb_model(encoder)
    for size in (1, 7):
        passes.clear()
        assert score(model, pairs, encode_kwargs={"batch_size": size}) == pytest.approx(expected, abs=1e-6)
        rows = [rows for rows, _ in passes]
        assert max(rows) == size and sum(rows) == sum(len(set(side)) for side in sides)


def test_it_is_an_encoder_of_mteb(backbone):
    assert isinstance(mteb_model(SentenceEncoder(backbone)), EncoderProtocol)


def test_every_setting_is_an_experiment_of_its_own(backbone):
    metas = [mteb_model(SentenceEncoder(backbone, **options)).mteb_model_meta for options in SETTINGS.values()]
    assert len({meta.experiment_name for meta in metas}) == len(SETTINGS)
    methods = dict(zip(SETTINGS, (meta.experiment_kwargs["method"] for meta in metas)))
    assert methods["baseline"] == "baseline" and methods["tp"] == "TokenPrepending"
    for meta in metas:
        values = meta.experiment_kwargs
        assert meta.name == "local/tiny-llama" and json.loads(json.dumps(values)) == values
        assert f"prompt_{values['prompt']}" in meta.experiment_name  # it is readable, and not a hash


def test_mteb_files_two_tp_settings_apart_and_finds_them_again(backbone, pairs, monkeypatch, tmp_path):
    cache = mteb.ResultCache(cache_path=tmp_path)
    models = [mteb_model(SentenceEncoder(backbone, **SETTINGS[name])) for name in ("tp", "another end")]
    scores = [score(model, pairs, cache) for model in models]
    files = list(tmp_path.rglob("SamplePairs.json"))
    assert len({file.parent.name for file in files}) == 2 and scores[0] != scores[1]
    assert all("local__tiny-llama" in str(file.relative_to(tmp_path)) for file in files)
    monkeypatch.setattr(SentenceEncoder, "encode", None)  # from here on nothing can be computed
    assert [score(model, pairs, cache) for model in models] == pytest.approx(scores, abs=1e-3)


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
