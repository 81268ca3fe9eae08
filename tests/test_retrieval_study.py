"""`lib.retrieval_study` on the sample corpus and a tiny model: against dense numpy, and what each choice does."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from tiny_models import tiny_backbone

from lib.alignment import decode_logits
from lib.beir import load_beir
from lib.data import DataSource
from lib.embedder_registry import Embedder, Format
from lib.embedders import EmbedderEncoder
from lib.encoder import SentenceEncoder
from lib.retrieval_study import WEIGHTINGS, EncodedSet, encode_set, study_settings
from lib.sources import DATA
from lib.sparse import WEIGHTS, SparseSetting
from lib.spectrum import principal_components
from lib.vocabulary import DEFAULT_RULE, text_tokens, token_classes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def data():
    return load_beir("sample", DataSource("sample", DATA / "sample" / "beir"))


@pytest.fixture(scope="module")
def encoded(backbone, data):
    generator = np.random.default_rng(0)
    sides = [generator.normal(size=(len(side), 32)).astype(np.float32) + 1 for side in (data.corpus, data.queries)]
    return EncodedSet(data, *sides, backbone, backbone.num_layers, (40, 8))


@pytest.mark.parametrize("m, weighting", product([0, 5], WEIGHTINGS))
def test_rankings_are_those_of_dense_numpy(encoded, m, weighting):
    setting = SparseSetting(20, m, **WEIGHTINGS[weighting])
    logits, of_queries = (decode_logits(encoded.decoder, side) for side in (encoded.documents, encoded.queries))
    classes = token_classes(encoded.decoder.tokenizer, logits.shape[1], DEFAULT_RULE)
    tokens = np.unique(classes[classes >= 0])
    merge = lambda x: np.stack([x[:, classes == c].max(axis=1) for c in tokens], axis=1)  # noqa: E731
    logits, of_queries = merge(logits), merge(of_queries)
    if setting.centred:
        logits, of_queries = logits - logits.mean(axis=0), of_queries - logits.mean(axis=0)
    kept = np.argsort(np.argsort(-logits, axis=1), axis=1) < 20
    weights = np.where(kept, WEIGHTS[setting.weight](logits), 0)
    if setting.idf:
        frequency = (weights != 0).sum(axis=0)
        weights = weights * np.log1p((len(weights) - frequency + 0.5) / (frequency + 0.5))
    own = text_tokens(encoded.decoder.tokenizer, encoded.data.queries["text"], classes)
    queries = encoded.data.queries["id"][:7]
    for i, (query, found) in enumerate(encoded.sparse(setting, queries).items()):
        wanted = set(np.searchsorted(tokens, own[i])) | set(np.argsort(-of_queries[i])[:m])
        scores = weights[:, sorted(wanted)].sum(axis=1)
        place = {document: k for k, document in enumerate(encoded.data.corpus["id"])}
        np.testing.assert_allclose(scores[[place[d] for d in found]], np.sort(scores[scores != 0])[::-1][: len(found)], rtol=1e-3, atol=1e-4)


def test_rankings_hold_the_queries_asked_for_in_their_order(encoded):
    ids = encoded.data.queries["id"][:]
    some = [ids[4], ids[1]]
    assert list(encoded.dense(some)) == list(encoded.sparse(SparseSetting(8), some)) == some
    assert encoded.dense(some)[ids[1]] == encoded.dense(ids)[ids[1]]


def test_without_its_first_component(encoded):
    bare = encoded.without_first_component()
    first = principal_components(encoded.documents)[0][0]
    assert np.abs(bare.documents @ first).max() < 1e-4 and np.abs(bare.queries @ first).max() < 1e-4
    assert bare.tokens(True)[0].values.tolist() != encoded.tokens(True)[0].values.tolist()


def test_the_study_has_every_setting_once(encoded):
    table = study_settings(encoded, encoded.data.queries["id"][:6], [8, 40], [0, 8])
    assert len(table) == 2 * 2 * len(WEIGHTINGS) and not table.duplicated(["k", "m", "weighting"]).any()
    assert table["score"].between(0, 1).all() and table["score"].nunique() > 1


def test_documents_are_read_in_their_own_format(backbone, data):
    few = replace(data, corpus=data.corpus.select(range(3)), queries=data.queries.select(range(2)))
    embedder = Embedder("e", "hub", backbone.name, Format("q", ("query: {sentence}",)), Format("d", ("passage: {sentence}",)))
    encoder = EmbedderEncoder(embedder, backbone)
    encoded, about = encode_set(encoder, few, backbone, (4, 1))
    assert about["documents"]["templates"] == ["passage: {sentence}"] and about["queries"]["templates"] == ["query: {sentence}"]
    plain = [SentenceEncoder(backbone, form).encode(list(side["text"])) for form, side in ((embedder.document, few.corpus), (embedder.query, few.queries))]
    np.testing.assert_allclose(encoded.documents, plain[0], atol=1e-5)
    np.testing.assert_allclose(encoded.queries, plain[1], atol=1e-5)
