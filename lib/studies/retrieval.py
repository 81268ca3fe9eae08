"""Retrieval sets under one encoder (notebook 06): rankings, the settings of sparse retrieval, and what a search costs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd

from lib.core.backbone import Backbone
from lib.core.postprocess import ComponentRemoved, principal_components
from lib.data.retrieval import RetrievalData
from lib.evaluation.alignment import output_matrix
from lib.evaluation.intervals import compare, mean_of
from lib.evaluation.retrieval import BM25Retriever, DenseRetriever, Ranking, evaluate_retrieval, reciprocal_rank_fusion
from lib.evaluation.vocabulary import DEFAULT_RULE, TokenRule, text_tokens, token_classes
from lib.studies.cost import QUARTILES, measure
from lib.studies.sparse import WEIGHTINGS, AlignedTokens, SparseRetriever, SparseSetting, collection_tokens


@dataclass
class EncodedSet:
    """Embeddings of a retrieval set's documents and queries, float32 (texts, hidden), and what decodes them.

    Args:
        layer: that of the embeddings. deepest: the highest K and M that tokens are kept for.
    """

    data: RetrievalData
    documents: np.ndarray
    queries: np.ndarray
    decoder: Backbone
    layer: int
    deepest: tuple[int, int]
    _tokens: dict = field(default_factory=dict)

    def own(self, rule: TokenRule = DEFAULT_RULE) -> list[np.ndarray]:
        """The tokens of each query's text, int64."""
        classes = token_classes(self.decoder.tokenizer, len(output_matrix(self.decoder)), rule)
        return text_tokens(self.decoder.tokenizer, self.data.queries["text"], classes)

    def tokens(self, centred: bool, rule: TokenRule = DEFAULT_RULE) -> tuple[AlignedTokens, AlignedTokens]:
        """The aligned tokens of documents and of queries; `centred` subtracts the documents' mean logits from both."""
        if (centred, rule) not in self._tokens:
            embeddings = self.decoder, self.documents, self.queries, self.layer
            self._tokens[centred, rule] = collection_tokens(*embeddings, rule, centred, *self.deepest)
        return self._tokens[centred, rule]

    def sparse(self, setting: SparseSetting, queries: Sequence[str], rule: TokenRule = DEFAULT_RULE) -> Ranking:
        """The ranking of these queries (ids) by aligned tokens."""
        documents, of_queries = self.tokens(setting.centred, rule)
        retriever = SparseRetriever(self.data.corpus["id"], documents, setting)
        return retriever.search(queries, retriever.queries(self.own(rule), of_queries)[self._rows(queries)])

    def dense(self, queries: Sequence[str]) -> Ranking:
        """The ranking of these queries (ids) by cosine similarity."""
        return DenseRetriever(self.data.corpus["id"], self.documents).search(queries, self.queries[self._rows(queries)])

    def without_first_component(self) -> EncodedSet:
        """The same without the first principal component of the documents' embeddings (uncentred)."""
        remove = ComponentRemoved(principal_components(self.documents)[0][0])
        return replace(self, documents=remove(self.documents), queries=remove(self.queries), _tokens={})

    def score(self, ranking: Ranking) -> pd.Series:
        """nDCG@10 of each query of a ranking, by id, without the documents of `RetrievalData.excluded`."""
        return evaluate_retrieval(ranking, self.data.qrels, self.data.excluded).set_index("item")["nDCG@10"]

    def _rows(self, queries: Sequence[str]) -> list[int]:
        place = {query: i for i, query in enumerate(self.data.queries["id"])}
        return [place[query] for query in queries]


def encode_set(
    encoder, data: RetrievalData, decoder: Backbone, deepest: tuple[int, int], of_documents=None
) -> EncodedSet:
    """Encode a set; documents by `of_documents` where an embedder has another prompt for them."""
    documents = (of_documents or encoder).encode(data.corpus["text"])
    return EncodedSet(data, documents, encoder.encode(data.queries["text"]), decoder, encoder.exit_layer, deepest)


def all_rankings(
    encoded: dict[str, EncodedSet], best: str, setting: SparseSetting, queries: Sequence[str], rule: TokenRule = DEFAULT_RULE
) -> dict[str, tuple[str, Ranking]]:
    """BM25, every method dense and sparse, and the method `best` fused: label -> kind and ranking of these queries (ids).

    Args:
        encoded: method -> the same set under its encoder. setting, rule: of the sparse rankings.
    """
    corpus, texts = encoded[best].data.corpus, dict(zip(*(encoded[best].data.queries[c] for c in ("id", "text"))))
    bm25 = BM25Retriever(corpus["id"], corpus["text"]).search(queries, [texts[query] for query in queries])
    found = {"BM25": ("BM25", bm25)}
    for method, of in encoded.items():
        found[f"{method}, dense"] = "dense", of.dense(queries)
        found[f"{method}, sparse"] = "sparse", of.sparse(setting, queries, rule)
    single = {"BM25": bm25, "dense": found[f"{best}, dense"][1], "sparse": found[f"{best}, sparse"][1]}
    for one, two in (("dense", "sparse"), ("sparse", "BM25"), ("dense", "BM25")):
        found[f"{best}, {one} + {two}"] = "fused", reciprocal_rank_fusion([single[one], single[two]])
    return found


def kept_of_dense(runs: dict[str, pd.DataFrame], methods: Iterable[str], draws: int) -> pd.DataFrame:
    """Sparse over dense nDCG@10 of the same embeddings: columns set, method, dense, sparse, kept, kept_low, kept_high.

    `runs`: labels of `all_rankings` -> tables of `evaluate_retrieval` with the column task.
    """
    parts = []
    for method in methods:
        pair = {kind: runs[f"{method}, {kind}"] for kind in ("dense", "sparse")}
        table = compare(pair, mean_of("nDCG@10"), "dense", True, draws).query("run == 'sparse' and task != 'Avg'")
        parts.append(table.assign(method=method, dense=table["value"] - table["difference"]))
    names = {"task": "set", "value": "sparse", "ratio": "kept", "ratio_low": "kept_low", "ratio_high": "kept_high"}
    return pd.concat(parts).rename(columns=names)[["set", "method", "dense", "sparse", "kept", "kept_low", "kept_high"]]


def common_part(
    encoded: dict[str, EncodedSet], setting: SparseSetting, queries: dict[str, Sequence[str]], rule: TokenRule
) -> pd.DataFrame:
    """Two ways to take away what all documents have in common, and both: columns logits, and nDCG@10 of each set."""
    ways = {"as they are": (False, False), "mean logits subtracted": (False, True), "first component removed": (True, False),
            "both": (True, True)}
    rows = []
    for way, (removed, centred) in ways.items():
        sides = {name: of.without_first_component() if removed else of for name, of in encoded.items()}
        rankings = {name: of.sparse(replace(setting, centred=centred), queries[name], rule) for name, of in sides.items()}
        rows.append({"logits": way} | {name: sides[name].score(ranking).mean() for name, ranking in rankings.items()})
    return pd.DataFrame(rows)


def setting_scores(encoded: EncodedSet, ks: Iterable[int], ms: Iterable[int]) -> pd.DataFrame:
    """nDCG@10 of each query (rows, by id) under every setting (columns k, m, weighting)."""
    queries, columns = encoded.data.queries["id"], {}
    for k, m, (name, changes) in product(ks, ms, WEIGHTINGS.items()):
        columns[k, m, name] = encoded.score(encoded.sparse(SparseSetting(k, m, **changes), queries))
    return pd.DataFrame(columns).rename_axis(columns=["k", "m", "weighting"])


def choose_setting(scores: Iterable[pd.DataFrame]) -> tuple[int, int, str]:
    """K, M and weighting from tables of `setting_scores`, one a set: the smallest K that reaches 95 % of the best mean, and
    the M and weighting that are best for it."""
    mean = pd.concat([table.mean() for table in scores], axis=1).mean(axis=1)
    sizes = mean.index.get_level_values("k")
    return mean[sizes == sizes[mean >= 0.95 * mean.max()].min()].idxmax()


def cross_fitted(scores: dict[str, pd.DataFrame], dense: dict[str, pd.Series], halvings: int = 5) -> pd.DataFrame:
    """What sparse keeps of dense when the setting is chosen on one half of each set's queries and scored on the other.

    Args:
        scores: set -> table of `setting_scores`. dense: set -> nDCG@10 by query.
        halvings: seeded ones; each is used both ways.

    Returns:
        Columns set, halving, k, m, weighting, kept.
    """
    generator, rows = np.random.default_rng(0), []
    for halving in range(halvings):
        halves = {name: np.array_split(generator.permutation(list(table.index)), 2) for name, table in scores.items()}
        for chosen, scored in ((0, 1), (1, 0)):
            setting = choose_setting(table.loc[halves[name][chosen]] for name, table in scores.items())
            for name, table in scores.items():
                half = halves[name][scored]
                kept = table.loc[half, setting].mean() / dense[name][half].mean()
                rows.append((name, halving, *setting, kept))
    return pd.DataFrame(rows, columns=["set", "halving", "k", "m", "weighting", "kept"])


def synthetic_rows(real: int, count: int) -> np.ndarray:
    """Which of `real` documents make up a collection of `count`.

    Some of them, each once, or all of them and then documents drawn again and again. Token frequencies stay as they are,
    so the lists of the index grow with the collection.
    """
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
        Columns method, documents, synthetic (bool), ms (median over rounds of the mean per query) with its quartiles,
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
                "method": method, "documents": size, "synthetic": size > real,
                "ms": median, QUARTILES[0]: low, QUARTILES[1]: high,
                "operations": retriever.operations(queries).mean(), "bytes": retriever.bytes_per_document,
            })
    return pd.DataFrame(rows)


def _one_by_one(retriever: SparseRetriever | DenseRetriever, queries) -> None:
    for i in range(queries.shape[0]):
        retriever.search([str(i)], queries[i : i + 1])
