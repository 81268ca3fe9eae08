"""Sparse retrieval: documents as their aligned tokens in an inverted index (arXiv 2406.17378), built in bounded memory.

A ranking is a dict: query id -> document ids, best first. Equal scores go by the documents' order in the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_array
from tqdm import tqdm

Ranking = dict[str, list[str]]

# Deep enough for Recall@100 after documents have been taken out of the ranking.
DEPTH = 128
# How many texts' logits are held at once (50 MB with a vocabulary of 50,000).
LOGIT_ROWS = 256

# What a document's token weighs, from its logit (minus the corpus mean, if that was taken off).
WEIGHTS = {"logit": np.asarray, "log1p": lambda logits: np.log1p(np.maximum(logits, 0))}


@dataclass(frozen=True)
class SparseSetting:
    """How texts become tokens with weights: K aligned tokens of a document, M of a query besides its own, whether logits
    are taken minus the corpus mean of their token, a key of `WEIGHTS`, and whether weights are multiplied by BM25's idf.
    """

    k: int = 128
    m: int = 0
    centred: bool = True
    weight: str = "logit"
    idf: bool = False


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


def logit_chunks(
    embeddings: np.ndarray, logits: Callable[[np.ndarray], np.ndarray], classes: np.ndarray
) -> Iterator[torch.Tensor]:
    """The logits of embeddings (texts, hidden), some texts at a time: float32 (rows, vocabulary).

    Args:
        logits: (rows, hidden) -> float32 (rows, vocabulary), the model's unembedding.
        classes: from `lib.evaluation.vocabulary.token_classes`: a token's column holds the logit of its best entry, every other column
            -inf.
    """
    counted = np.flatnonzero(classes >= 0)
    target = torch.from_numpy(classes[counted])
    starts = range(0, len(embeddings), LOGIT_ROWS)
    for begin in tqdm(starts, desc="logits", unit="chunk", leave=False, disable=len(starts) < 5):
        chunk = torch.from_numpy(logits(embeddings[begin : begin + LOGIT_ROWS]))
        merged = torch.full_like(chunk, -torch.inf)
        yield merged.scatter_reduce_(1, target.expand(len(chunk), -1), chunk[:, counted], "amax")


def mean_logits(chunks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Each token's mean logit over all texts, float32 (vocabulary,), from chunks of their logits."""
    total, count = 0.0, 0
    for chunk in chunks:
        total, count = total + chunk.sum(dim=0, dtype=torch.float64), count + len(chunk)
    return (total / count).float()


def strongest_tokens(chunks: Iterable[torch.Tensor], k: int, mean: torch.Tensor | None = None) -> AlignedTokens:
    """The k aligned tokens of each text, from chunks of their logits.

    Args:
        mean: from `mean_logits` over the documents; it is taken off before the tokens are chosen, and from queries too.

    Raises:
        ValueError: fewer than k tokens count.
    """
    ids, values = [], []
    for chunk in chunks:
        if mean is not None:
            chunk = torch.where(mean.isneginf(), -torch.inf, chunk - mean)
        best = chunk.topk(min(k, chunk.shape[1]))
        if best.values.shape[1] < k or best.values[:, -1].isneginf().any():
            raise ValueError(f"There are fewer than k={k} tokens that count.")
        ids.append(best.indices.numpy().astype(np.int32))
        values.append(best.values.numpy())
    return AlignedTokens(np.concatenate(ids), np.concatenate(values), chunk.shape[1], mean is not None)


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
        """`queries`: from the method of that name, one row for each id."""
        ranking = {}
        for i, query in enumerate(query_ids):
            scores = queries[i : i + 1] @ self.index
            ranking[query] = [self.document_ids[d] for d in best_first(scores.indices, scores.data, depth)]
        return ranking

    @property
    def bytes_per_document(self) -> float:
        return sum(part.nbytes for part in (self.index.data, self.index.indices, self.index.indptr)) / len(self.document_ids)

    def operations(self, queries: csr_array) -> np.ndarray:
        """Additions for each query: the entries of the index (postings) that it touches. A query with m > 0 has to be put
        through the unembedding besides: hidden x vocabulary multiply-adds, whatever the size of the collection."""
        return queries @ self.frequency

    def _first(self, tokens: AlignedTokens, count: int) -> AlignedTokens:
        """The first of each text, if there are so many and they fit the setting."""
        if tokens.ids.shape[1] < count:
            raise ValueError(f"The setting wants {count} aligned tokens of a text, there are {tokens.ids.shape[1]}.")
        if tokens.centred != self.setting.centred:
            raise ValueError(f"The setting has centred={self.setting.centred}, the aligned tokens centred={tokens.centred}.")
        return tokens[:, :count]


def best_first(places: np.ndarray, scores: np.ndarray, depth: int) -> np.ndarray:
    """The places with the highest scores, best first; among equals the lowest place."""
    if len(scores) > depth:
        kept = scores >= np.partition(scores, -depth)[-depth]
        places, scores = places[kept], scores[kept]
    return places[np.lexsort((places, -scores))[:depth]]
