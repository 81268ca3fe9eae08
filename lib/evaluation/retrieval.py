"""Dense retrieval, BM25 and fusion, beside the sparse retrieval of `lib.studies.retrieval`, and how good a ranking is.
A ranking is a dict: query id -> document ids, best first. Equal scores go by the documents' order in the corpus."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

import bm25s
import numpy as np
import pandas as pd
from ir_measures import RR, R, iter_calc, nDCG

from lib.core.postprocess import Normalise

Ranking = dict[str, list[str]]
DEPTH = 128  # deep enough for Recall@100 after documents have been taken out of the ranking
QUERY_ROWS = 16  # queries whose cosines with all documents are held at once
WORDS = partial(bm25s.tokenize, stopwords="en", return_ids=False, show_progress=False)
METRICS = {"nDCG@10": nDCG @ 10, "Recall@100": R @ 100, "MRR@10": RR @ 10}


class DenseRetriever:
    """Cosine similarity with every document; embeddings (documents, hidden) are kept as float32 of length 1."""

    def __init__(self, document_ids: Sequence[str], embeddings: np.ndarray):
        self.document_ids, self.documents = list(document_ids), Normalise()(embeddings.astype(np.float32))

    def search(self, query_ids: Sequence[str], queries: np.ndarray, depth: int = DEPTH) -> Ranking:
        """The best `depth` documents of each query; `queries` are their embeddings (queries, hidden)."""
        places, parts = np.arange(len(self.documents)), range(0, len(queries), QUERY_ROWS)
        units = (Normalise()(queries[begin : begin + QUERY_ROWS].astype(np.float32)) for begin in parts)
        rows = zip(query_ids, chain.from_iterable(unit @ self.documents.T for unit in units), strict=True)
        return {query: best_first(self.document_ids, places, scores, depth) for query, scores in rows}


class BM25Retriever:
    """BM25 as in Lucene with k1 = 1.5 and b = 0.75 (bm25s), on lower-cased words of two letters or more, not stemmed,
    without bm25s's English stop words. Documents that share no word with the query are not ranked."""

    def __init__(self, document_ids: Sequence[str], texts: Sequence[str]):
        self.document_ids, self.bm25 = list(document_ids), bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        words = WORDS(list(texts))
        if not any(words):
            raise ValueError("BM25 has nothing to count: no document holds a word of two letters or more.")
        self.bm25.index(words, show_progress=False)

    def search(self, query_ids: Sequence[str], queries: Sequence[str], depth: int = DEPTH) -> Ranking:
        """The best `depth` documents of each query; `queries` are their texts."""
        ranking = {}
        for query, words in zip(query_ids, WORDS(list(queries)), strict=True):
            scores = self.bm25.get_scores_from_ids(self.bm25.get_tokens_ids(words))
            ranking[query] = best_first(self.document_ids, np.flatnonzero(scores), scores[scores != 0], depth)
        return ranking


def best_first(document_ids: Sequence[str], places: np.ndarray, scores: np.ndarray, depth: int) -> list[str]:
    """The ids at the places with the highest scores, best first; among equals the lowest place is first."""
    if len(scores) > depth:
        kept = scores >= np.partition(scores, -depth)[-depth]
        places, scores = places[kept], scores[kept]
    return [document_ids[place] for place in places[np.lexsort((places, -scores))[:depth]]]


def reciprocal_rank_fusion(rankings: Iterable[Ranking]) -> Ranking:
    """Each document's sum over the rankings of 1 / (60 + rank), ranks from 1 (Cormack et al., SIGIR 2009)."""
    scores: dict[str, Counter] = defaultdict(Counter)
    for ranking in rankings:
        for query, documents in ranking.items():
            scores[query].update({document: 1 / (60 + rank) for rank, document in enumerate(documents, 1)})
    return {query: [document for document, _ in found.most_common(DEPTH)] for query, found in scores.items()}


def evaluate_retrieval(ranking: Ranking, qrels: dict[str, dict[str, int]], excluded=None) -> pd.DataFrame:
    """Each ranked query's metrics by trec_eval's definitions (ir-measures): item (its id), and `METRICS` from 0 to 1.
    nDCG has linear gains, as in BEIR; a document with any grade above 0 is relevant for recall and reciprocal rank.
    `excluded` (query id -> documents) is taken out of the ranking first. `ValueError` if a query is not judged."""
    if unjudged := [query for query in ranking if query not in qrels]:
        raise ValueError(f"{len(unjudged)} queries are not judged, the first is {unjudged[0]!r}.")
    run, judged, out = {}, {query: qrels[query] for query in ranking}, excluded or {}
    for query, documents in ranking.items():
        left = (document for document in documents if document not in out.get(query, ()))
        run[query] = {document: -float(rank) for rank, document in enumerate(left)}
    found = {(value.query_id, value.measure): value.value for value in iter_calc(list(METRICS.values()), judged, run)}
    scores = {name: [found.get((query, metric), 0.0) for query in ranking] for name, metric in METRICS.items()}
    return pd.DataFrame({"item": list(ranking)} | scores)
