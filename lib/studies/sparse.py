"""Sparse retrieval: documents as their aligned tokens in an inverted index (arXiv 2406.17378).

A ranking is a dict: query id -> document ids, best first. Equal scores go by the documents' order in the corpus.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

from lib.core.backbone import Backbone
from lib.evaluation.alignment import logit_chunks, mean_logits, output_matrix, top_tokens
from lib.evaluation.retrieval import DEPTH, Ranking, best_first
from lib.evaluation.vocabulary import TokenRule, token_classes

# What a document's token weighs, from its logit (minus the corpus mean, if that was taken off).
WEIGHTS = {"logit": np.asarray, "log1p": lambda logits: np.log1p(np.maximum(logits, 0))}


@dataclass(frozen=True)
class SparseSetting:
    """How texts become tokens with weights.

    Args:
        k: aligned tokens of a document. m: aligned tokens of a query besides its own.
        centred: whether logits are taken minus the corpus mean of their token.
        weight: a key of `WEIGHTS`. idf: whether weights are multiplied by BM25's inverse document frequency.
    """

    k: int = 128
    m: int = 0
    centred: bool = True
    weight: str = "logit"
    idf: bool = False


# How logits become weights: name -> what differs from `SparseSetting`'s defaults.
WEIGHTINGS = {
    "logit": {"centred": False},
    "logit - mean": {},
    "log(1 + logit - mean)": {"weight": "log1p"},
    "(logit - mean) x idf": {"idf": True},
    "log(1 + logit - mean) x idf": {"weight": "log1p", "idf": True},
}


@dataclass(frozen=True)
class AlignedTokens:
    """The tokens with the highest logits of each text, best first: ids int32 and values float32, both (texts, K).

    An index cuts both: `tokens[rows]`, `tokens[:, :k]`.
    """

    ids: np.ndarray
    values: np.ndarray
    vocabulary: int
    centred: bool

    def __getitem__(self, index) -> AlignedTokens:
        return replace(self, ids=self.ids[index], values=self.values[index])


def collection_tokens(
    decoder: Backbone, documents: np.ndarray, queries: np.ndarray, layer: int, rule: TokenRule, centred: bool, k: int, m: int
) -> tuple[AlignedTokens, AlignedTokens]:
    """The aligned tokens of documents (the first k) and of queries (the first m), from embeddings (texts, hidden).

    `centred` subtracts each token's mean logit over the documents from both.
    """
    size = len(output_matrix(decoder))
    classes = token_classes(decoder.tokenizer, size, rule)
    mean = mean_logits(logit_chunks(decoder, documents, layer, classes)) if centred else None
    found = (top_tokens(decoder, *side, classes, mean) for side in ((documents, layer, k), (queries, layer, m)))
    first, second = (AlignedTokens(ids.astype(np.int32), values, size, centred) for ids, values in found)
    return first, second


class SparseRetriever:
    """An inverted index: token -> the documents that align to it, with weights, as a CSR matrix (vocabulary, documents).

    A document's score is the sum of its weights over the query's set of tokens. Documents that share no token with the
    query are not ranked.

    Args:
        documents: their aligned tokens, at least `setting.k` of them.

    Raises:
        ValueError: the tokens are too few, or centred where the setting says they are not.
    """

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
        """Each query's set of tokens, its own and the first M aligned ones, as ones in a matrix (queries, vocabulary).

        Args:
            own: from `lib.evaluation.vocabulary.text_tokens`, under the rule that the documents' tokens were chosen by.
        """
        sets = [set(tokens) for tokens in own]
        if self.setting.m:
            if aligned is None:
                raise ValueError(f"With m={self.setting.m}, the aligned tokens of the queries are needed.")
            rows = self._first(aligned, self.setting.m).ids.tolist()
            sets = [tokens.union(row) for tokens, row in zip(sets, rows, strict=True)]
        starts = np.cumsum([0, *map(len, sets)], dtype=np.int32)
        columns = np.array([token for tokens in sets for token in sorted(tokens)], np.int32)
        return csr_array((np.ones(len(columns), np.float32), columns, starts), shape=(len(sets), self.index.shape[0]))

    def search(self, query_ids: Sequence[str], queries: csr_array, depth: int = DEPTH) -> Ranking:
        """The ranking of each query; `queries` is from the method of that name, with a row for each id."""
        ranking = {}
        for i, query in enumerate(query_ids):
            scores = queries[i : i + 1] @ self.index
            ranking[query] = [self.document_ids[d] for d in best_first(scores.indices, scores.data, depth)]
        return ranking

    @property
    def bytes_per_document(self) -> float:
        """Of the index, mean over the documents."""
        return sum(part.nbytes for part in (self.index.data, self.index.indices, self.index.indptr)) / len(self.document_ids)

    def operations(self, queries: csr_array) -> np.ndarray:
        """Additions for each query: the entries of the index (postings) that it touches.

        A query with m > 0 has to be put through the unembedding besides: hidden x vocabulary multiply-adds, whatever the
        size of the collection.
        """
        return queries @ self.frequency

    def _first(self, tokens: AlignedTokens, count: int) -> AlignedTokens:
        """The first of each text, if there are so many and they fit the setting."""
        if tokens.ids.shape[1] < count:
            raise ValueError(f"The setting wants {count} aligned tokens of a text, there are {tokens.ids.shape[1]}.")
        if tokens.centred != self.setting.centred:
            raise ValueError(f"The setting has centred={self.setting.centred}, the aligned tokens centred={tokens.centred}.")
        return tokens[:, :count]
