"""An encoder as a sentence-transformers model: same embeddings, saved and loaded elsewhere, in their tools and mteb."""

import subprocess
import sys

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from tiny_models import SENTENCES, save_tiny

from lib.core.attention_values import AttentionValues
from lib.core.backbone import load_backbone
from lib.core.contrastive import ContrastivePrompting
from lib.core.encoder import SentenceEncoder
from lib.core.postprocess import EmbedFilter, MeanDirectionRemoved
from lib.core.sentence_transformer import TrainingFree
from lib.core.store import ROOT
from lib.core.token_prepending import TokenPrepending
from lib.evaluation.sts import cosine, spearman

CHOICES = {
    "TP": {"prompt": "ke", "method": TokenPrepending(1, 3, init=(0.5,) * 32), "exit_layer": 3},
    "AlignedWVA": {"prompt": "prompteol", "pooling": AttentionValues(1), "method": TokenPrepending(0, 2)},
    "CP": {"prompt": "cot", "method": ContrastivePrompting(2, rule="NR"), "share_prefix": False}}
LOAD = """import sys
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
np.save(sys.argv[2], model.encode(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(str(save_tiny(tmp_path_factory.mktemp("model"))), "float32", "cpu")


def model_of(encoder: SentenceEncoder) -> SentenceTransformer:
    return SentenceTransformer(modules=[TrainingFree(encoder)], device="cpu")


@pytest.mark.parametrize("name", CHOICES)
def test_saved_and_loaded_in_another_process_it_gives_the_same(name, backbone, tmp_path):
    encoder = SentenceEncoder(backbone, **CHOICES[name])
    encoder = encoder.changed(postprocess=MeanDirectionRemoved.fit(encoder.encode(SENTENCES), "the test"))
    model, expected = model_of(encoder), encoder.encode(SENTENCES)
    np.testing.assert_allclose(model.encode(SENTENCES), expected, atol=1e-6)
    model.save_pretrained(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("*.safetensors"))  # weights stay where they are
    command = [sys.executable, "-c", LOAD, str(tmp_path / "saved"), str(tmp_path / "found.npy"), *SENTENCES]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)


def test_prompts_dimension_and_several_processes(backbone):
    encoder = SentenceEncoder(backbone, "none", postprocess=EmbedFilter.fit(backbone, 2))
    model = model_of(encoder)
    assert model.get_embedding_dimension() == 16 and model.max_seq_length == encoder.max_length
    prompted = model.encode(["The plane takes off."], prompt="query: ")
    np.testing.assert_allclose(prompted[0], encoder.encode("query: The plane takes off."), atol=1e-6)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        np.testing.assert_allclose(model.encode(SENTENCES, pool=pool), encoder.encode(SENTENCES), atol=1e-5)
    finally:
        model.stop_multi_process_pool(pool)


def test_its_evaluator_gives_our_score(backbone):
    encoder = SentenceEncoder(backbone, "ke", TokenPrepending(1, 3))
    first, second, gold = SENTENCES, SENTENCES[1:] + SENTENCES[:1], [0.1, 0.9, 0.3, 0.7, 0.2]
    found = EmbeddingSimilarityEvaluator(first, second, gold, show_progress_bar=False)(model_of(encoder))
    expected = spearman(gold, cosine(encoder.encode(first), encoder.encode(second)))
    assert 100 * found["spearman_cosine"] == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_saved_or_is_not_what_was_saved_is_refused(backbone, tmp_path):
    own = type("Own", (), {"describe": lambda self: {"method": "own"}})()  # which no settings file could hold
    with pytest.raises(ValueError, match="Own is not of this package"):
        model_of(SentenceEncoder(backbone, "none", own)).save_pretrained(str(tmp_path))
    model_of(SentenceEncoder(backbone, "none")).save_pretrained(str(tmp_path))
    file = tmp_path / "training_free.json"
    text = file.read_text()
    for old, new, said in (("local folder", "abc", "was saved with abc"), ("lib.core.prompts", "os", "ask for os")):
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
