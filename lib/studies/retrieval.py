"""Sparse retrieval with aligned tokens (arXiv 2406.17378) beside other ways, its settings and its cost: notebook 06."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Self

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from lib.core.backbone import Backbone
from lib.core.postprocess import ComponentRemoved, principal_components
from lib.data.retrieval import RetrievalData
from lib.evaluation import retrieval
from lib.evaluation.alignment import counted, logit_chunks, mean_logits, top_tokens
from lib.evaluation.intervals import compare, mean_of
from lib.evaluation.retrieval import DEPTH, BM25Retriever, DenseRetriever, Ranking, best_first, evaluate_retrieval
from lib.evaluation.vocabulary import CONTENT_RULE, DEFAULT_RULE, TokenRule, text_tokens
from lib.studies.cost import QUARTILES, measure, ratio_quartiles

# What a document's token weighs, by its logit (minus the corpus mean, if that was taken off).
WEIGHTS = {"logit": np.asarray, "log1p": lambda logits: np.log1p(np.maximum(logits, 0))}
# How logits become weights: name -> what differs from `SparseSetting`'s defaults.
WEIGHTINGS = {
    "logit": {"centred": False}, "logit - mean": {}, "log(1 + logit - mean)": {"weight": "log1p"},
    "(logit - mean) x idf": {"idf": True}, "log(1 + logit - mean) x idf": {"weight": "log1p", "idf": True}}


@dataclass(frozen=True)
class SparseSetting:
    """How texts become tokens with weights."""

    k: int = 128  # aligned tokens of a document
    m: int = 0  # aligned tokens of a query besides its own
    centred: bool = True  # whether logits are taken minus the corpus mean of their token
    weight: str = "logit"  # a key of `WEIGHTS`
    idf: bool = False  # whether weights are multiplied by BM25's inverse document frequency


@dataclass(frozen=True)
class AlignedTokens:
    """The tokens with the highest logits of each text, best first. An index cuts both arrays, as in `tokens[:, :k]`."""

    ids: np.ndarray  # int32 (texts, K)
    values: np.ndarray  # float32 (texts, K)
    vocabulary: int
    centred: bool

    def __getitem__(self, index) -> Self:
        return replace(self, ids=self.ids[index], values=self.values[index])


class SparseRetriever:
    """An inverted index: token -> the documents that align to it, with weights; a CSR matrix (vocabulary, documents). A
    document's score is the sum of its weights over the query's set of tokens; those that share none are not ranked.
    `AlignedTokens` fewer than the setting wants, or centred where it says they are not, are a `ValueError`."""

    def __init__(self, document_ids: Sequence[str], documents: AlignedTokens, setting: SparseSetting):
        self.document_ids, self.setting = list(document_ids), setting
        documents = self._first(documents, setting.k)
        weights = WEIGHTS[setting.weight](documents.values).astype(np.float32)
        # 32 bits as long as they count to the end; the positions of the index take the type of these.
        starts = np.arange(0, weights.size + 1, setting.k, np.int32 if weights.size < 2**31 else np.int64)
        tokens = documents.ids.flatten()  # a copy, because removing zeros moves entries in place
        by_document = csr_array((weights.ravel(), tokens, starts), shape=(len(weights), documents.vocabulary))
        by_document.eliminate_zeros()
        self.index: csr_array = by_document.tocsc().T
        self.frequency = np.diff(self.index.indptr)
        if setting.idf:
            idf = np.log1p((len(weights) - self.frequency + 0.5) / (self.frequency + 0.5))
            self.index.data *= np.repeat(idf, self.frequency).astype(np.float32)

    def queries(self, own: Sequence[Collection[int]], aligned: AlignedTokens | None = None) -> csr_array:
        """Each query's set of tokens, `own` (from `text_tokens`, under the rule that documents' tokens were chosen by)
        and the first M aligned ones, as ones in a matrix (queries, vocabulary)."""
        more = self._first(aligned, self.setting.m).ids if self.setting.m else [()] * len(own)
        sets = [np.union1d(*pair).astype(np.int32) for pair in zip(own, more, strict=True)]
        columns, starts = np.concatenate(sets), np.cumsum([0, *map(len, sets)], dtype=np.int32)
        return csr_array((np.ones(len(columns), np.float32), columns, starts), (len(sets), self.index.shape[0]))

    def search(self, query_ids: Sequence[str], queries: csr_array, depth: int = DEPTH) -> Ranking:
        """The ranking of each query; `queries` has a row for each id, from the method of that name."""
        found = ((query, queries[i : i + 1] @ self.index) for i, query in enumerate(query_ids))
        return {query: best_first(self.document_ids, of.indices, of.data, depth) for query, of in found}

    def _first(self, tokens: AlignedTokens | None, count: int) -> AlignedTokens:
        """The first tokens of each text, which must be there and fit the setting."""
        if tokens is None or tokens.ids.shape[1] < count or tokens.centred != self.setting.centred:
            found = "none" if tokens is None else f"{tokens.ids.shape[1]}, with centred={tokens.centred}"
            raise ValueError(f"{self.setting} wants {count} aligned tokens of a text; there are {found}.")
        return tokens[:, :count]


@dataclass
class EncodedSet:
    """Embeddings of a retrieval set's documents and queries, float32 (texts, hidden), and what decodes them."""

    data: RetrievalData
    documents: np.ndarray
    queries: np.ndarray
    decoder: Backbone
    layer: int  # of the embeddings
    deepest: tuple[int, int]  # the highest K and M that tokens are kept for
    read: list[str]  # the documents' texts as far as they were encoded: cleaned, and cut at the encoder's length
    _tokens: dict = field(default_factory=dict)

    def own(self, rule: TokenRule = DEFAULT_RULE) -> list[np.ndarray]:
        """The tokens of each query's text, int64."""
        return text_tokens(self.decoder.tokenizer, self.data.queries["text"], counted(self.decoder, rule))

    def tokens(self, centred: bool, rule: TokenRule = DEFAULT_RULE) -> tuple[AlignedTokens, AlignedTokens]:
        """The aligned tokens of documents and of queries; `centred` subtracts the documents' mean logits from both."""
        if (centred, rule) not in self._tokens:
            classes, sides = counted(self.decoder, rule), zip((self.documents, self.queries), self.deepest)
            mean = mean_logits(logit_chunks(self.decoder, self.documents, self.layer, classes)) if centred else None
            found = (top_tokens(self.decoder, states, self.layer, k, classes, mean) for states, k in sides)
            self._tokens[centred, rule] = tuple(
                AlignedTokens(ids.astype(np.int32), values, len(classes), centred) for ids, values in found)
        return self._tokens[centred, rule]

    def sparse(self, setting: SparseSetting, queries: Sequence[str], rule: TokenRule = DEFAULT_RULE) -> Ranking:
        """The ranking of these queries (ids) by aligned tokens."""
        documents, of_queries = self.tokens(setting.centred, rule)
        retriever = SparseRetriever(self.data.corpus["id"], documents, setting)
        return retriever.search(queries, retriever.queries(self.own(rule), of_queries)[self._rows(queries)])

    def own_words(self, queries: Sequence[str]) -> Ranking:
        """The ranking of these queries (ids) by the rule of PromptReps (arXiv 2404.18424), without its limit of 128: a
        text has only tokens of its own content words, a token weighs log(1 + logit), with negative logits as 0, and a
        document's score is the sum over shared tokens of the product of both weights."""
        documents = self._own_weights(self.documents, self.read).T
        asked = self._own_weights(self.queries, self.data.queries["text"])[self._rows(queries)]
        found = ((query, asked[i : i + 1] @ documents) for i, query in enumerate(queries))
        return {query: best_first(self.data.corpus["id"], of.indices, of.data, DEPTH) for query, of in found}

    def _own_weights(self, states: np.ndarray, texts: Sequence[str]) -> csr_array:
        """The weights of `own_words` of texts and their embeddings (texts, hidden): float32 (texts, vocabulary)."""
        own = text_tokens(self.decoder.tokenizer, texts, classes := counted(self.decoder, CONTENT_RULE))
        logits = chain.from_iterable(logit_chunks(self.decoder, states, self.layer, classes))
        parts = [(row[tokens].cpu().numpy(), tokens) for row, tokens in zip(logits, map(np.unique, own), strict=True)]
        weights, ids = map(np.concatenate, zip(*parts))
        starts = np.cumsum([0, *(len(tokens) for _, tokens in parts)])
        return csr_array((WEIGHTS["log1p"](weights), ids, starts), (len(own), len(classes)))

    def dense(self, queries: Sequence[str]) -> Ranking:
        """The ranking of these queries (ids) by cosine similarity."""
        return DenseRetriever(self.data.corpus["id"], self.documents).search(queries, self.queries[self._rows(queries)])

    def without_first_component(self) -> Self:
        """The same without the first principal component of the documents' embeddings (uncentred)."""
        remove = ComponentRemoved(principal_components(self.documents)[0][0])
        return replace(self, documents=remove(self.documents), queries=remove(self.queries), _tokens={})

    def score(self, ranking: Ranking) -> pd.Series:
        """nDCG@10 of each query of a ranking, by id, without the documents of `RetrievalData.excluded`."""
        return evaluate_retrieval(ranking, self.data.qrels, self.data.excluded).set_index("item")["nDCG@10"]

    def _rows(self, queries: Sequence[str]) -> list[int]:
        return list(map(self.data.queries["id"].index, queries))


def encode_set(encoder, data: RetrievalData, decoder: Backbone, deepest: tuple[int, int], documents=None) -> EncodedSet:
    """Encode a set; `documents` encodes its documents where an embedder has another prompt for them."""
    documents, texts = documents or encoder, data.corpus["text"]
    read = documents.tokenize(documents.templates[0], list(map(documents.prompt.prepare, texts))).texts
    sides = documents.encode(texts), encoder.encode(data.queries["text"])
    return EncodedSet(data, *sides, decoder, encoder.exit_layer, deepest, read)


def all_rankings(encoded: dict[str, EncodedSet], best: str, setting: SparseSetting, queries, rule=DEFAULT_RULE) -> dict:
    """BM25, every method dense, sparse and by own words, and `best` fused (with BM25 of whole documents): label -> kind
    and ranking of the queries (ids). `encoded`: method -> the same set under its encoder; documents are cut as `best`
    cuts them. `setting` and `rule` are those of the sparse rankings."""
    corpus, texts = encoded[best].data.corpus, dict(zip(*(encoded[best].data.queries[key] for key in ("id", "text"))))
    asked, found = [texts[query] for query in queries], {}
    for name, of in {"cut": encoded[best].read, "whole": corpus["text"]}.items():
        found[f"BM25, {name} documents"] = "BM25", BM25Retriever(corpus["id"], of).search(queries, asked)
    for method, of in encoded.items():
        found[f"{method}, dense"] = "dense", of.dense(queries)
        found[f"{method}, sparse"] = "sparse", of.sparse(setting, queries, rule)
        found[f"{method}, own words"] = "own words", of.own_words(queries)
    for one, two in (("dense", "sparse"), ("sparse", "BM25"), ("dense", "BM25")):
        pair = [found["BM25, whole documents" if kind == "BM25" else f"{best}, {kind}"][1] for kind in (one, two)]
        found[f"{best}, {one} + {two}"] = "fused", retrieval.reciprocal_rank_fusion(pair)
    return found


def kept_of_dense(runs: dict[str, pd.DataFrame], methods: Iterable[str], draws: int) -> pd.DataFrame:
    """Sparse over dense nDCG@10 of the same embeddings: columns set, method, dense, sparse, kept, kept_low, kept_high.
    `runs`: label of `all_rankings` -> table of `evaluate_retrieval` with the column task."""
    pairs = {method: {kind: runs[f"{method}, {kind}"] for kind in ("dense", "sparse")} for method in methods}
    tables = [compare(pair, mean_of("nDCG@10"), "dense", True, draws).assign(method=of) for of, pair in pairs.items()]
    table = pd.concat(tables).query("run == 'sparse' and task != 'Avg'")
    names = {"task": "set", "value": "sparse", "ratio": "kept", "ratio_low": "kept_low", "ratio_high": "kept_high"}
    table = table.assign(dense=table["value"] - table["difference"]).rename(columns=names)
    return table[["set", "method", "dense", "sparse", "kept", "kept_low", "kept_high"]]


def common_part(encoded: dict[str, EncodedSet], setting: SparseSetting, queries: dict, rule: TokenRule) -> pd.DataFrame:
    """Two ways to take away what all documents share, and both: columns logits, and nDCG@10 of each set's `queries`."""
    table = pd.DataFrame({"logits": ["as they are", "mean logits subtracted", "first component removed", "both"]})
    for name, of in encoded.items():
        ways = product((of, of.without_first_component()), (False, True))
        rankings = (side.sparse(replace(setting, centred=centred), queries[name], rule) for side, centred in ways)
        table[name] = [of.score(ranking).mean() for ranking in rankings]
    return table


def setting_scores(encoded: EncodedSet, ks: Iterable[int], ms: Iterable[int]) -> pd.DataFrame:
    """nDCG@10 of each query (rows, by id) under every setting (columns k, m, weighting)."""
    settings = {(k, m, name): SparseSetting(k, m, **WEIGHTINGS[name]) for k, m, name in product(ks, ms, WEIGHTINGS)}
    scores = {key: encoded.score(encoded.sparse(of, encoded.data.queries["id"])) for key, of in settings.items()}
    return pd.DataFrame(scores).rename_axis(columns=["k", "m", "weighting"])


def choose_setting(scores: Iterable[pd.DataFrame]) -> tuple[int, int, str]:
    """The smallest K with 95 % of the best mean, its best M and weighting; `scores`: a `setting_scores` a set."""
    mean = pd.concat([table.mean() for table in scores], axis=1).mean(axis=1)
    sizes = mean.index.get_level_values("k")
    return mean[sizes == sizes[mean >= 0.95 * mean.max()].min()].idxmax()


def cross_fitted(scores: dict[str, pd.DataFrame], dense: dict[str, pd.Series], halvings: int = 5) -> pd.DataFrame:
    """What sparse keeps of `dense` (set -> nDCG@10 of each query) when the setting is chosen from `scores` (set ->
    `setting_scores`) on half of its queries and scored on the rest, both ways: set, halving, k, m, weighting, kept."""
    generator, rows = np.random.default_rng(0), []
    for halving in range(halvings):
        halves = {name: np.array_split(generator.permutation(list(table.index)), 2) for name, table in scores.items()}
        for chosen in (0, 1):
            setting = choose_setting(table.loc[halves[name][chosen]] for name, table in scores.items())
            for name, table in scores.items():
                rest = halves[name][1 - chosen]
                rows.append((name, halving, *setting, table.loc[rest, setting].mean() / dense[name][rest].mean()))
    return pd.DataFrame(rows, columns=["set", "halving", "k", "m", "weighting", "kept"])


def cost_growth(documents: AlignedTokens, embeddings: np.ndarray, setting: SparseSetting, own: Sequence,
                query_tokens: AlignedTokens | None, query_embeddings: np.ndarray, sizes, rounds=5) -> pd.DataFrame:
    """What a search costs as the collection grows, with queries sent one at a time: columns method, documents,
    synthetic (bool), ms (of a query, from its tokens or embedding to its ranking, median of rounds) with quartiles,
    operations (mean per query), the same with unembedding, bytes (per document, of the index or the embeddings).
    Operations are multiply-adds with all embeddings, or an addition for each entry of the index that a query touches.
    With m > 0, unembedding a query takes hidden x vocabulary more. Synthetic collections are all documents and then
    some again, so that token frequencies stay; a million take 7 GB (K = 128, hidden size 576)."""
    real, rows, once = len(embeddings), [], embeddings.shape[1] * documents.vocabulary * (setting.m > 0)
    for size in sizes:
        generator, ids = np.random.default_rng(0), list(map(str, range(size)))
        chosen = (np.append(np.arange(real), generator.integers(0, real, size - real)) if size > real
                  else np.sort(generator.choice(real, size, replace=False)))
        sparse = SparseRetriever(ids, documents[:, : setting.k][chosen], setting)
        dense, queries = DenseRetriever(ids, embeddings[chosen]), sparse.queries(own, query_tokens)
        sent = {"sparse": (sparse, queries), "dense": (dense, query_embeddings)}
        index_bytes = sum(getattr(sparse.index, part).nbytes for part in ("data", "indices", "indptr"))
        work = {"sparse": ((queries @ sparse.frequency).mean(), once, index_bytes / size),
                "dense": (dense.documents.size, 0, dense.documents.nbytes / size)}
        calls = {method: lambda to=to, of=of: [to.search([""], of[i : i + 1]) for i in range(len(own))]
                 for method, (to, of) in sent.items()}
        for method, seconds in measure(calls, rounds).items():
            ms, (operations, more, in_bytes) = ratio_quartiles(seconds, len(own) / 1000), work[method]
            rows.append((method, size, size > real, *ms, operations, operations + more, in_bytes))
    names = ["method", "documents", "synthetic", "ms", *QUARTILES, "operations", "with unembedding", "bytes"]
    return pd.DataFrame(rows, columns=names)
