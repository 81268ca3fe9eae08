"""Sparse retrieval on the sample corpus and a tiny model: against dense numpy, and what each choice does."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from tiny_models import HIDDEN, tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.postprocess import principal_components
from lib.data.retrieval import load_beir
from lib.data.sources import DATA, DataSource
from lib.evaluation.alignment import counted, decode_logits
from lib.evaluation.vocabulary import CONTENT_RULE, DEFAULT_RULE, text_tokens, token_classes
from lib.studies import retrieval
from lib.studies.retrieval import WEIGHTINGS, AlignedTokens, SparseRetriever, SparseSetting


@pytest.fixture(scope="module")
def encoded():
    data = load_beir("sample", DataSource("sample", DATA / "sample" / "beir"))
    generator, backbone = np.random.default_rng(0), tiny_backbone()
    sides = [generator.normal(size=(len(side), HIDDEN)).astype(np.float32) + 1 for side in (data.corpus, data.queries)]
    return retrieval.EncodedSet(data, *sides, backbone, backbone.num_layers, (40, 8), list(data.corpus["text"]))


@pytest.mark.parametrize("m, weighting", product([0, 5], WEIGHTINGS))
def test_rankings_are_those_of_dense_numpy(encoded, m, weighting):
    setting = SparseSetting(20, m, **WEIGHTINGS[weighting])
    logits, of_queries = (decode_logits(encoded.decoder, side) for side in (encoded.documents, encoded.queries))
    classes = token_classes(encoded.decoder.tokenizer, logits.shape[1], DEFAULT_RULE)
    tokens = np.unique(classes[classes >= 0])
    logits, of_queries = (
        np.stack([side[:, classes == c].max(axis=1) for c in tokens], axis=1) for side in (logits, of_queries))
    if setting.centred:
        logits, of_queries = logits - logits.mean(axis=0), of_queries - logits.mean(axis=0)
    kept = np.argsort(np.argsort(-logits, axis=1), axis=1) < 20
    weights = np.where(kept, np.log1p(np.maximum(logits, 0)) if setting.weight == "log1p" else logits, 0)
    if setting.idf:
        frequency = (weights != 0).sum(axis=0)
        weights = weights * np.log1p((len(weights) - frequency + 0.5) / (frequency + 0.5))
    own = text_tokens(encoded.decoder.tokenizer, encoded.data.queries["text"], classes)
    queries, place = encoded.data.queries["id"][:7], {d: k for k, d in enumerate(encoded.data.corpus["id"])}
    for i, found in enumerate(encoded.sparse(setting, queries).values()):
        wanted = set(np.searchsorted(tokens, own[i])) | set(np.argsort(-of_queries[i])[:m])
        scores = weights[:, sorted(wanted)].sum(axis=1)
        best = np.sort(scores[scores != 0])[::-1][: len(found)]
        np.testing.assert_allclose(scores[[place[d] for d in found]], best, rtol=1e-3, atol=1e-4)


def test_every_setting_is_scored_and_the_first_component_taken_out(encoded):
    scores, ids = retrieval.setting_scores(encoded, [8, 40], [0, 8]), encoded.data.queries["id"]
    assert list(scores.index) == ids and scores.shape[1] == 2 * 2 * len(WEIGHTINGS)
    one = encoded.score(encoded.sparse(SparseSetting(40, 8, idf=True), ids))
    assert scores[40, 8, "(logit - mean) x idf"].tolist() == one.tolist()
    encoded.tokens(False)  # which it keeps
    bare, first = encoded.without_first_component(), principal_components(encoded.documents)[0][0]
    assert np.abs(bare.documents @ first).max() < 1e-4 and np.abs(bare.queries @ first).max() < 1e-4
    assert not np.array_equal(bare.tokens(False)[0].values, encoded.tokens(False)[0].values), "its tokens are its own"


def test_own_words_against_dense_numpy(encoded):
    """Both sides weigh only what they say themselves, and nothing that the encoder did not read."""
    read = [text[:40] for text in encoded.read]
    of, classes = replace(encoded, read=read), counted(encoded.decoder, CONTENT_RULE)
    sides = []
    for states, texts in ((of.documents, read), (of.queries, of.data.queries["text"])):
        logits = decode_logits(of.decoder, states)
        sides.append(np.zeros_like(logits))
        for row, tokens in enumerate(text_tokens(of.decoder.tokenizer, texts, classes)):
            for token in tokens:
                sides[-1][row, token] = np.log1p(max(0, logits[row, classes == token].max()))
    queries, place = of.data.queries["id"][5:1:-1], {d: k for k, d in enumerate(of.data.corpus["id"])}
    for query, found in of.own_words(queries).items():
        scores = sides[0] @ sides[1][of.data.queries["id"].index(query)]
        best = np.sort(scores[scores > 0])[::-1][: len(found)]
        np.testing.assert_allclose(scores[[place[d] for d in found]][: len(best)], best, rtol=1e-4)


def test_documents_are_kept_as_far_as_they_are_read(encoded):
    data = encoded.data
    encoder = SentenceEncoder(tiny_backbone(), "prompteol", max_length=40)
    with pytest.warns(UserWarning, match="were cut"):
        read = retrieval.encode_set(encoder, data, encoder.backbone, (5, 1)).read
    whole = list(map(encoder.prompt.prepare, data.corpus["text"]))
    assert all(text.startswith(part) for text, part in zip(whole, read, strict=True)) and read != whole


def test_the_smallest_index_that_is_good_enough_is_chosen():
    """K = 8 is below 95 % of the best, 32 is above; of its settings the best mean of both sets wins."""
    columns = {(8, 0, "x"): (0.90, 0.90), (32, 0, "x"): (0.97, 0.95), (32, 8, "x"): (0.90, 1.0), (128, 0, "y"): (1, 1)}
    first, second = (pd.DataFrame({key: values[i] for key, values in columns.items()}, index=list("abcd"))
                     .rename_axis(columns=["k", "m", "weighting"]) for i in (0, 1))
    assert retrieval.choose_setting([first, second]) == (32, 0, "x")
    assert retrieval.choose_setting([second]) == (32, 8, "x")


def test_cross_fitting_scores_no_query_that_its_setting_was_chosen_on(monkeypatch):
    generator, ids, seen = np.random.default_rng(1), [str(i) for i in range(21)], []
    columns = pd.MultiIndex.from_product([[8, 32], [0], ["x"]], names=["k", "m", "weighting"])
    scores = {name: pd.DataFrame(generator.random((21, 2)), ids, columns) for name in "pq"}
    dense = {name: pd.Series(generator.random(21) + 1, ids) for name in "pq"}
    monkeypatch.setattr(retrieval, "choose_setting", lambda tables: seen.append(list(tables)) or (32, 0, "x"))
    found = retrieval.cross_fitted(scores, dense, halvings=3)
    assert len(found) == 3 * 2 * 2 and len(seen) == 6
    for half, kept in enumerate(found.query("set == 'p' and halving == 0")["kept"]):
        scored = seen[1 - half][0].index  # what is chosen on one half is scored on the other
        assert not set(seen[half][0].index) & set(scored) and len(seen[half][0]) + len(scored) == 21
        assert kept == pytest.approx(scores["p"].loc[scored, (32, 0, "x")].mean() / dense["p"][scored].mean())


def test_settings_that_do_not_fit_are_refused(encoded):
    documents, queries = encoded.tokens(False)
    for setting, message in ((SparseSetting(k=5), "centred=True"), (SparseSetting(k=41, centred=False), "41 aligned")):
        with pytest.raises(ValueError, match=message):
            SparseRetriever(encoded.data.corpus["id"], documents, setting)
    retriever = SparseRetriever(encoded.data.corpus["id"], documents, SparseSetting(k=5, m=2, centred=False))
    for tokens in (None, queries[:, :1]):
        with pytest.raises(ValueError, match="m=2|2 aligned tokens"):
            retriever.queries(encoded.own(), tokens)


def test_index_size_and_operations_by_hand():
    """Two documents of two tokens each over three: token 1 is in both, so a query for 1 and 2 touches 3 entries."""
    tokens = AlignedTokens(np.array([[0, 1], [1, 2]], np.int32), np.array([[4, 3], [2, 1]], np.float32), 3, False)
    retriever = SparseRetriever(["a", "b"], tokens, SparseSetting(k=2, centred=False))
    queries = retriever.queries([[1, 2], [0, 0], []])
    assert (queries @ retriever.index).toarray().tolist() == [[3, 3], [4, 0], [0, 0]]
    states = np.ones((3, 5), np.float32)
    growth = retrieval.cost_growth(tokens, states[:2], retriever.setting, [[1, 2], [0, 0], []], None, states, [2, 3], 1)
    assert growth["synthetic"].tolist() == [False, False, True, True]
    assert growth["operations"].tolist()[:2] == pytest.approx([(3 + 1 + 0) / 3, 2 * 5])  # sparse, dense
    # Weights, documents and starts of four bytes each; or five numbers.
    assert growth["bytes"].tolist()[:2] == [(4 * 4 + 4 * 4 + 4 * 4) / 2, 5 * 4]
    assert retriever.search(["x", "y", "z"], queries) == {"x": ["a", "b"], "y": ["a"], "z": []}
    # An index leaves its tokens alone and keeps no weight of nothing.
    ids, values = np.array([[0, 1], [2, 1]], np.int32), np.array([[1, -1], [3, 2]], np.float32)
    tokens = AlignedTokens(ids.copy(), values.copy(), 3, True)
    settings = [SparseSetting(2, weight=weight, idf=True) for weight in ("logit", "log1p")]
    assert [SparseRetriever(["a", "b"], tokens, setting).index.nnz for setting in settings] == [4, 3]
    assert (tokens.ids == ids).all() and (tokens.values == values).all()


def test_costs_grow_with_the_collection(encoded):
    (tokens, of_queries), real = encoded.tokens(True), len(encoded.documents)
    sizes, queries = [real, 10 * real, 40 * real], (encoded.own(), of_queries, encoded.queries)
    growth = retrieval.cost_growth(tokens, encoded.documents, SparseSetting(k=6, m=2), *queries, sizes, rounds=1)
    assert growth["synthetic"].tolist() == [False, False, True, True, True, True]
    sparse, dense = (growth[growth["method"] == method] for method in ("sparse", "dense"))
    assert dense["operations"].tolist() == [size * HIDDEN for size in sizes]
    once = growth["with unembedding"] - growth["operations"]
    assert sorted(set(once)) == [0, HIDDEN * tokens.vocabulary] and not once[growth["method"] == "dense"].any()
    np.testing.assert_allclose(sparse["operations"].iloc[2] / sparse["operations"].iloc[0], 40, rtol=0.25)
    assert dense["bytes"].tolist() == [4 * HIDDEN] * 3 and sparse["bytes"].iloc[2] == pytest.approx(6 * 8, rel=0.1)
