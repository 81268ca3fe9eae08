"""`lib.core.mteb_encoder`: mteb's score on pairs of the sample is ours, other settings are other results, no network."""

import dataclasses
import importlib
import json
import socket
import sys

import numpy as np
import pytest
from datasets import DatasetDict
from tiny_models import tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.store import ROOT
from lib.core.token_prepending import TokenPrepending
from lib.data.sts import DataSource, load_sts
from lib.evaluation.sts import cosine, spearman

mteb = pytest.importorskip("mteb", minversion="2", reason='mteb is optional: pip install "mteb>=2,<3"')

from mteb.abstasks.sts import AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import EncoderProtocol  # noqa: E402

from lib.core.mteb_encoder import MtebEncoder, mteb_identity  # noqa: E402

PAIRS, COMMIT = 40, "12fd25f77366fa6b3b4b768ec3050bf629380bac"
SETTINGS = {
    "baseline": {},
    "tp": {"method": TokenPrepending(1, 3)},
    "another end": {"method": TokenPrepending(1, 2)},
    "another vector": {"method": TokenPrepending(1, 3, init=np.zeros(32))},
    "one more vector": {"method": TokenPrepending(1, 3, init=np.ones(32))},
    "another layer": {"exit_layer": 2},
    "another prompt": {"prompt": "ke"},
    "another pooling": {"pooling": "mean"},
    "another length": {"max_length": 100},
}


class SamplePairs(AbsTaskSTS):
    """An STS task whose pairs are in memory."""

    metadata = TaskMetadata(
        name="SamplePairs", description="Pairs of the sample", type="STS", main_score="cosine_spearman",
        eval_splits=["test"], eval_langs=["eng-Latn"], dataset={"path": "in/memory", "revision": "1"},
    )

    def __init__(self, pairs):
        super().__init__()
        self.dataset, self.data_loaded = DatasetDict(test=pairs), True


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Looking up a name or opening a connection ends the test, also where the caller would swallow an error."""

    def refuse(*args, **_):
        reached.append(args)
        raise OSError("no test may use the network")

    reached = []
    for owner, name in ((socket, "getaddrinfo"), (socket.socket, "connect"), (socket.socket, "connect_ex")):
        monkeypatch.setattr(owner, name, refuse)
    yield
    assert not reached


@pytest.fixture
def pairs():
    return load_sts("sample", "test", DataSource("sample", ROOT / "data" / "sample")).first(PAIRS).rows


@pytest.fixture
def backbone(one_thread):
    return tiny_backbone()


@pytest.mark.parametrize("setting", ["baseline", "tp"])
def test_the_score_is_ours(backbone, pairs, setting):
    encoder = SentenceEncoder(backbone, **SETTINGS[setting])
    found = mteb.evaluate(MtebEncoder(encoder), SamplePairs(pairs), cache=None, show_progress_bar=False)
    first, second = (encoder.encode(pairs[side][:], batch_size=32) for side in ("sentence1", "sentence2"))
    expected = spearman(pairs["score"], cosine(first, second))
    assert 100 * found.task_results[0].get_score() == pytest.approx(expected, abs=1e-6)
    # The score is of these pairs in this order.
    assert abs(expected) > 1 and abs(expected - spearman(pairs["score"], cosine(first, second[::-1]))) > 1


def test_it_is_an_encoder_of_mteb_and_refuses_what_it_cannot_do(backbone):
    adapted = MtebEncoder(SentenceEncoder(backbone))
    about = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}
    assert isinstance(adapted, EncoderProtocol)
    texts = ["No.", "A plane takes off.", "No."]
    found = adapted.encode([{"text": texts[:2]}, {"text": texts[2:]}], **about, precision="float32")
    assert found.dtype == np.float32 and np.array_equal(found, adapted.encoder.encode(texts))
    with pytest.raises(ValueError, match="precision='int8'"):
        adapted.encode([{"text": texts}], **about, precision="int8")
    with pytest.raises(TypeError, match="normalise"):
        adapted.encode([{"text": texts}], **about, normalise=True)
    with pytest.raises(ValueError, match="nothing to encode"):
        adapted.encode([], **about)


def test_the_batch_size_is_honoured(backbone, pairs):
    rows = []
    handle = backbone.embeddings.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    adapted = MtebEncoder(SentenceEncoder(backbone, share_prefix=False))
    for size in (1, 3, 7):
        rows.clear()
        task = SamplePairs(pairs)
        mteb.evaluate(adapted, task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": size})
        assert max(rows) == size and sum(rows) == sum(len(set(pairs[side][:])) for side in ("sentence1", "sentence2"))
    handle.remove()


def test_every_setting_is_an_experiment_of_its_own(backbone):
    metas = {name: MtebEncoder(SentenceEncoder(backbone, **options)).mteb_model_meta for name, options in SETTINGS.items()}
    assert len({meta.experiment_name for meta in metas.values()}) == len(SETTINGS)
    assert {meta.name for meta in metas.values()} == {"local/tiny-llama"}
    values = metas["tp"].experiment_kwargs
    expected = {"prompt": "prompteol", "exit_layer": 4, "method": "TokenPrepending", "method_start": 1, "method_end": 3, "method_init": "normal"}
    assert expected.items() <= values.items() and metas["baseline"].experiment_kwargs["method"] == "baseline"
    assert metas["another vector"].experiment_kwargs["method_init"] == "vector"
    for meta in metas.values():
        assert json.loads(json.dumps(meta.experiment_kwargs)) == meta.experiment_kwargs
        assert f"prompt_{meta.experiment_kwargs['prompt']}" in meta.experiment_name  # it is readable, and not a hash


def test_mteb_files_two_tp_settings_apart_and_finds_them_again(backbone, pairs, monkeypatch, tmp_path):
    cache = mteb.ResultCache(cache_path=tmp_path)

    def evaluate(setting):
        adapted = MtebEncoder(SentenceEncoder(backbone, **SETTINGS[setting]))
        result = mteb.evaluate(adapted, SamplePairs(pairs), cache=cache, show_progress_bar=False)
        return result.task_results[0].get_score()

    scores = [evaluate("tp"), evaluate("another end")]
    files = list(tmp_path.rglob("SamplePairs.json"))
    assert len({file.parent.name for file in files}) == 2 and scores[0] != scores[1]
    assert all("local__tiny-llama" in str(file.relative_to(tmp_path)) for file in files)
    monkeypatch.setattr(SentenceEncoder, "encode", None)  # from here on nothing can be computed
    assert [evaluate("tp"), evaluate("another end")] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize(
    "name, revision, expected",
    [
        ("meta-llama/Llama-2-7b-hf", COMMIT, ("meta-llama/Llama-2-7b-hf", COMMIT)),
        ("gpt2", COMMIT, ("local/gpt2", "abc")),
        ("smollm2", "some-package==0.1.2 model.gguf", ("local/smollm2", "abc")),
        ("/home/me/models/tuned/", "local folder", ("local/tuned", "abc")),
        ("models/tuned", "local folder", ("local/tuned", "abc")),
    ],
)
def test_names_have_an_organisation_and_tell_no_path(name, revision, expected):
    assert mteb_identity(name, revision, "abc") == expected


def test_a_folder_is_known_by_its_name_and_weights(backbone, monkeypatch, tmp_path):
    (tmp_path / "tuned").mkdir()
    monkeypatch.chdir(tmp_path / "tuned")
    here = dataclasses.replace(backbone, name=".", revision="local folder")
    meta = MtebEncoder(SentenceEncoder(here)).mteb_model_meta
    assert (meta.name, meta.revision) == ("local/tuned", here.fingerprint)
    assert type(meta).model_validate(meta.model_dump()).name == meta.name  # mteb checks the name's form here


def test_without_mteb_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mteb"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "lib.core.mteb_encoder")
    with pytest.raises(ImportError, match='pip install "mteb>=2,<3"'):
        importlib.import_module("lib.core.mteb_encoder")
