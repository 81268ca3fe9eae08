"""Dense retrieval, BM25, fusion and metrics, by hand; real data where there is any."""

import os

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from tiny_models import tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.data.retrieval import RetrievalData, load_beir
from lib.data.sources import DATA, DataSource, EvaluationData
from lib.evaluation.intervals import compare
from lib.evaluation.retrieval import (
    BM25Retriever,
    DenseRetriever,
    best_first,
    dense_scores,
    evaluate_retrieval,
    reciprocal_rank_fusion,
)
from lib.evaluation.tasks import RETRIEVAL

SAMPLE = DataSource("sample", DATA / "sample")


def test_the_best_come_first_and_among_equals_the_lowest_place():
    places, scores = np.array([9, 4, 7, 2]), np.array([1.0, 3.0, 1.0, 1.0])
    assert best_first(places, scores, 3).tolist() == [4, 2, 7]
    assert best_first(places, scores, 9).tolist() == [4, 2, 7, 9]


def test_dense_ranking_is_by_cosine():
    generator = np.random.default_rng(0)
    documents, queries = (generator.normal(0.5, 1, (count, 8)).astype(np.float32) for count in (60, 37))
    documents[7] = 3 * documents[2]  # the same direction: a tie, which goes by the corpus's order
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, documents)]
    cosine, names = units[0] @ units[1].T, [f"q{i}" for i in range(37)]
    found = DenseRetriever(range(60), documents).search(names, queries, depth=9)
    for name, row in zip(names, cosine):
        assert sorted(found[name]) == sorted(np.argsort(-np.round(row, 5), kind="stable")[:9])
        assert np.all(np.diff(row[found[name]]) < 1e-5)


def test_equal_scores_go_by_the_order_of_the_corpus_and_what_a_search_costs():
    dense = DenseRetriever(["b", "a", "c", "d"], np.array([[0, 1], [1, 0], [1, 0], [1, 0]], np.float32))
    assert dense.search(["q"], np.array([[2, 0]], np.float32), depth=2) == {"q": ["a", "c"]}
    assert dense.search(["q"], np.array([[0, 0]], np.float32)) == {"q": ["b", "a", "c", "d"]}
    assert dense.operations(np.ones((3, 2))).tolist() == [8] * 3 and dense.bytes_per_document == 8


def test_bm25_ranks_an_exact_match_first_and_what_shares_no_word_not_at_all():
    texts = ["supersonic flow past a cone", "heat in composite slabs", "", "flow of heat", "slabs of the wing"]
    bm25 = BM25Retriever(list("abcde"), texts)
    found = bm25.search(["x", "y", "z"], ["Heat in composite slabs!", "of the", "unheard"], depth=10)
    assert found["x"][0] == "b" and sorted(found["x"]) == ["b", "d", "e"] and found["y"] == found["z"] == []
    assert bm25.search(["x"], ["heat"], depth=1) == {"x": ["d"]}


def test_reciprocal_rank_fusion_by_hand():
    """a 1/61 + 1/63, b 1/62 + 1/61, c 1/63, d 1/62."""
    first, second = {"q": ["a", "b", "c"], "r": ["a"]}, {"q": ["b", "d", "a"], "r": []}
    assert reciprocal_rank_fusion([first, second]) == {"q": ["b", "a", "d", "c"], "r": ["a"]}


QRELS_BY_HAND = {"q": {"d1": 2, "d3": 1, "d9": 1, "d4": 0}}
BEST = 2 + 1 / np.log2(3) + 1 / 2


def test_metrics_by_hand_and_excluded_documents_leave_the_ranking_before_ranks_are_counted():
    ranking = {"p": ["d1", "d4", "d3"], "q": ["out", "d4", "d3", "d1"]}
    qrels = {"p": QRELS_BY_HAND["q"], **QRELS_BY_HAND}
    kept = evaluate_retrieval(ranking, qrels)
    gone = evaluate_retrieval(ranking, qrels, {"q": {"out"}, "other": {"d3"}})
    assert list(kept.columns) == ["item", "nDCG@10", "Recall@100", "MRR@10"]
    assert kept.iloc[0].tolist() == gone.iloc[0].tolist() == ["p", pytest.approx(2.5 / BEST), pytest.approx(2 / 3), 1]
    expected = pytest.approx([(1 / 2 + 2 / np.log2(5)) / BEST, 2 / 3, 1 / 3])
    assert kept.iloc[1].tolist()[1:] == expected
    assert gone.iloc[1].tolist()[1:] == pytest.approx([(1 / np.log2(3) + 2 / 2) / BEST, 2 / 3, 1 / 2])


def test_metrics_stop_at_their_depth_and_empty_rankings_score_nothing():
    far = {"q": [f"x{i}" for i in range(10)] + ["d1"] + [f"y{i}" for i in range(89)] + ["d3"], "e": []}
    scores = evaluate_retrieval(far, QRELS_BY_HAND | {"e": {"d1": 1}, "not asked": {"d1": 1}}).set_index("item")
    assert list(scores.index) == ["q", "e"]
    assert scores.loc["q"].tolist() == pytest.approx([0, 1 / 3, 0]) and scores.loc["e"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="'z'"):
        evaluate_retrieval({"z": ["d1"]}, QRELS_BY_HAND)


def texts_of(**texts) -> EvaluationData:
    return EvaluationData("tiny", Dataset.from_dict({"id": list(texts), "text": list(texts.values())}), {})


def test_dense_scores_at_several_layers_are_those_of_their_rankings(one_thread):
    corpus = texts_of(d1="A dog.", d2="The street", d3="A flute", q1="A cat.")
    queries = texts_of(q1="A cat.", q2="It is cold.")
    data = RetrievalData("tiny", corpus, queries, {"q1": {"d1": 2, "d3": 1}, "q2": {"d2": 1}}, {"q1": {"q1"}}, SAMPLE)
    encoder = SentenceEncoder(tiny_backbone(), "prompteol", None, 2)
    table = RETRIEVAL["scifact"].items(encoder, {"tiny": data}, [2, -1])
    assert table["layer"].tolist() == [2, 2, 4, 4] and table["item"].tolist() == ["q1", "q2"] * 2
    assert set(table["task"]) == {"tiny"}
    dense = DenseRetriever(corpus["id"], encoder.encode(corpus["text"]))
    ranking = dense.search(queries["id"], encoder.encode(queries["text"]))
    pd.testing.assert_frame_equal(table.query("layer == 2")[["item", "nDCG@10", "Recall@100", "MRR@10"]],
                                  evaluate_retrieval(ranking, data.qrels, data.excluded))
    assert ranking["q1"][0] == "q1" and table["Recall@100"].eq(1).all()
    pd.testing.assert_frame_equal(dense_scores(encoder, {"tiny": data}), table.query("layer == 2"))
    other = dense_scores(encoder, {"tiny": data}, documents=SentenceEncoder(tiny_backbone(), "none", None, 2))
    assert other["item"].tolist() == ["q1", "q2"]


def test_the_sample_is_hard_enough_for_bm25_and_runs_are_compared_over_queries():
    data = load_beir("sample")
    bm25 = BM25Retriever(data.corpus["id"], data.corpus["text"]).search(data.queries["id"], data.queries["text"])
    rankings = {"BM25": bm25, "reversed": {query: documents[::-1] for query, documents in bm25.items()}}
    runs = {name: evaluate_retrieval(ranking, data.qrels).assign(task="sample") for name, ranking in rankings.items()}
    table = compare(runs, RETRIEVAL["scifact"].statistic, "BM25", ratio=True, draws=500).set_index("run")
    assert 0.5 < table.loc["BM25", "value"] < 0.8  # several queries share no word with what answers them
    assert table.loc["reversed", "difference_high"] < 0 and table.loc["reversed", "ratio_high"] < 1


@pytest.mark.skipif("TP_DATA_DIR" not in os.environ, reason="TP_DATA_DIR is not set: no real retrieval data")
def test_bm25_scores_on_real_data_as_it_should():
    data = load_beir("cranfield")
    bm25 = BM25Retriever(data.corpus["id"], data.corpus["text"])
    ranking = bm25.search(data.queries["id"], data.queries["text"])
    scores = [evaluate_retrieval(ranking, data.qrels, out)["nDCG@10"].mean() for out in (None, data.excluded)]
    assert scores == pytest.approx([0.337, 0.385], abs=0.002)
