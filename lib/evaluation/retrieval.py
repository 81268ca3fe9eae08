"""Dense retrieval, BM25 and fusion beside the sparse retrieval of `lib.studies.sparse`; how well they rank, and what they cost.

A ranking is a dict: query id -> document ids, best first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import partial

import bm25s
import numpy as np
import pandas as pd
from ir_measures import RR, R, iter_calc, nDCG

from lib.studies.cost import measure
from lib.studies.sparse import DEPTH, AlignedTokens, Ranking, SparseRetriever, SparseSetting, best_first

METRICS = {"nDCG@10": nDCG @ 10, "Recall@100": R @ 100, "MRR@10": RR @ 10}
# Queries whose cosines with all documents are held at once.
QUERY_ROWS = 16


class DenseRetriever:
    """Cosine similarity with every document. Embeddings are float32 (documents, hidden)."""

    def __init__(self, document_ids: Sequence[str], embeddings: np.ndarray):
        self.document_ids, self.documents = list(document_ids), _unit(embeddings)

    def search(self, query_ids: Sequence[str], queries: np.ndarray, depth: int = DEPTH) -> Ranking:
        """`queries`: embeddings (queries, hidden)."""
        ranking, places = {}, np.arange(len(self.documents))
        for begin in range(0, len(query_ids), QUERY_ROWS):
            rows = slice(begin, begin + QUERY_ROWS)
            for query, scores in zip(query_ids[rows], _unit(queries[rows]) @ self.documents.T):
                ranking[query] = [self.document_ids[d] for d in best_first(places, scores, depth)]
        return ranking

    @property
    def bytes_per_document(self) -> float:
        return self.documents.nbytes / len(self.documents)

    def operations(self, queries: np.ndarray) -> np.ndarray:
        """Multiply-adds for each query."""
        return np.full(len(queries), self.documents.size)


class BM25Retriever:
    """BM25 as in Lucene with k1 = 1.5 and b = 0.75 (bm25s): lower-cased words of two letters or more without bm25s's
    English stop words, no stemming. Documents that share no word with the query are not ranked."""

    def __init__(self, document_ids: Sequence[str], texts: Sequence[str]):
        self.document_ids, self.bm25 = list(document_ids), bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        self.bm25.index(_words(texts), show_progress=False)

    def search(self, query_ids: Sequence[str], queries: Sequence[str], depth: int = DEPTH) -> Ranking:
        """`queries`: their texts."""
        ranking = {}
        for query, words in zip(query_ids, _words(queries), strict=True):
            scores = self.bm25.get_scores_from_ids(self.bm25.get_tokens_ids(words))
            found = np.flatnonzero(scores)
            ranking[query] = [self.document_ids[d] for d in best_first(found, scores[found], depth)]
        return ranking


def reciprocal_rank_fusion(rankings: Iterable[Ranking]) -> Ranking:
    """Each document's sum over the rankings of 1 / (60 + rank), ranks from 1 (Cormack et al., SIGIR 2009)."""
    scores: dict[str, Counter] = defaultdict(Counter)
    for ranking in rankings:
        for query, documents in ranking.items():
            scores[query].update({document: 1 / (60 + rank) for rank, document in enumerate(documents, 1)})
    return {query: [document for document, _ in found.most_common(DEPTH)] for query, found in scores.items()}


def evaluate_retrieval(
    ranking: Ranking, qrels: dict[str, dict[str, int]], excluded: dict[str, Collection[str]] | None = None
) -> pd.DataFrame:
    """Each ranked query's metrics by trec_eval's definitions (ir-measures): columns query and `METRICS`, 0 to 1.

    nDCG has linear gains, as in BEIR; a document with any grade above 0 is relevant for recall and reciprocal rank.

    Args:
        excluded: query id -> documents that are taken out of the ranking first.

    Raises:
        ValueError: a query is not judged.
    """
    unjudged = [query for query in ranking if query not in qrels]
    if unjudged:
        raise ValueError(f"{len(unjudged)} queries are not judged, the first is {unjudged[0]!r}.")
    run = {}
    for query, documents in ranking.items():
        left = [document for document in documents if document not in (excluded or {}).get(query, ())]
        run[query] = {document: -float(rank) for rank, document in enumerate(left)}
    judged = {query: qrels[query] for query in ranking}
    found = {(value.query_id, value.measure): value.value for value in iter_calc(list(METRICS.values()), judged, run)}
    scores = {name: [found.get((query, metric), 0.0) for query in ranking] for name, metric in METRICS.items()}
    return pd.DataFrame({"query": list(ranking)} | scores)


def compare_retrieval(tables: dict[str, pd.DataFrame], reference: str, draws: int = 10_000) -> pd.DataFrame:
    """Every run beside one of them, with 95 % paired bootstrap intervals over queries.

    Args:
        tables: label -> table from `evaluate_retrieval`, over the same queries. reference: the label to compare with.

    Returns:
        Columns run, metric, score, score_low, score_high, and the same three for difference and ratio to the reference.

    Raises:
        ValueError: the tables are not over the same queries.
    """
    queries = tables[reference]["query"]
    if not all(queries.equals(table["query"]) for table in tables.values()):
        raise ValueError("The tables do not hold the same queries in the same order.")
    count, at, rows = len(queries), list(tables).index(reference), []
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), draws) / count
    for metric in METRICS:
        values = np.stack([table[metric].to_numpy() for table in tables.values()], axis=1)
        # The first row is the queries as they are, the others are resamples.
        means = np.vstack([values.mean(axis=0), drawn @ values])
        kinds = {"score": means, "difference": means - means[:, [at]], "ratio": means / means[:, [at]]}
        for k, label in enumerate(tables):
            row = {"run": label, "metric": metric}
            for kind, of_kind in kinds.items():
                low, high = np.percentile(of_kind[1:, k], [2.5, 97.5])
                row |= {kind: of_kind[0, k], f"{kind}_low": low, f"{kind}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def synthetic_rows(real: int, count: int) -> np.ndarray:
    """Which of `real` documents make up a collection of `count`: some of them, each once, or all of them and then documents
    drawn again and again. Token frequencies stay as they are, so the lists of the index grow with the collection."""
    generator = np.random.default_rng(0)
    if count <= real:
        return np.sort(generator.choice(real, count, replace=False))
    return np.append(np.arange(real), generator.integers(0, real, count - real))


def cost_growth(
    documents: AlignedTokens, embeddings: np.ndarray, setting: SparseSetting, own: Sequence[Collection[int]],
    query_tokens: AlignedTokens | None, query_embeddings: np.ndarray, sizes: Iterable[int], rounds: int = 5,
) -> pd.DataFrame:
    """What a search costs as the collection grows beyond the real documents, with queries sent one at a time.

    The time is that of the search, from a query's tokens or embedding to its ranking; the model's own is not in it.
    A million documents take some 7 GB of memory (K = 128, hidden size 576).

    Args:
        documents, embeddings: of the real documents, in the same order.
        own, query_tokens: the tokens of the queries, as in `SparseRetriever.queries`.

    Returns:
        Columns method, documents, synthetic (bool), ms (median over rounds of the mean per query), low and high (quartiles),
        operations (mean per query), bytes (of the index, per document).
    """
    real, rows = len(embeddings), []
    for size in sizes:
        chosen, ids = synthetic_rows(real, size), list(map(str, range(size)))
        sparse = SparseRetriever(ids, documents[:, : setting.k][chosen], setting)
        dense = DenseRetriever(ids, embeddings[chosen])
        methods = {"sparse": (sparse, sparse.queries(own, query_tokens)), "dense": (dense, query_embeddings)}
        seconds = measure({method: partial(_one_by_one, *pair) for method, pair in methods.items()}, rounds)
        for method, (retriever, queries) in methods.items():
            low, median, high = 1000 * np.quantile(seconds[method], [0.25, 0.5, 0.75]) / len(query_embeddings)
            rows.append({
                "method": method, "documents": size, "synthetic": size > real, "ms": median, "low": low, "high": high,
                "operations": retriever.operations(queries).mean(), "bytes": retriever.bytes_per_document,
            })
    return pd.DataFrame(rows)


def _one_by_one(retriever: SparseRetriever | DenseRetriever, queries) -> None:
    for i in range(queries.shape[0]):
        retriever.search([str(i)], queries[i : i + 1])


def _unit(embeddings: np.ndarray) -> np.ndarray:
    embeddings = embeddings.astype(np.float32, copy=False)
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


def _words(texts: Sequence[str]) -> list[list[str]]:
    return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
