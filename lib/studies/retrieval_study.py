"""A retrieval set under one encoder: its aligned tokens, its rankings, and the study of sparse retrieval's settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd

from lib.evaluation.alignment import decode_logits, output_matrix
from lib.data.retrieval import RetrievalData
from lib.data.sts import provenance
from lib.core.embedders import EmbedderEncoder
from lib.core.encoder import SentenceEncoder
from lib.core.backbone import Backbone
from lib.evaluation.retrieval import DenseRetriever, Ranking, evaluate_retrieval
from lib.studies.sparse import AlignedTokens, SparseRetriever, SparseSetting, logit_chunks, mean_logits, strongest_tokens
from lib.studies.spectrum import principal_components, remove_component
from lib.evaluation.vocabulary import DEFAULT_RULE, TokenRule, text_tokens, token_classes

# How logits become weights: name -> what differs from `SparseSetting`'s defaults.
WEIGHTINGS = {
    "logit": {"centred": False},
    "logit - mean": {},
    "log(1 + logit - mean)": {"weight": "log1p"},
    "(logit - mean) x idf": {"idf": True},
    "log(1 + logit - mean) x idf": {"weight": "log1p", "idf": True},
}


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
        return text_tokens(self.decoder.tokenizer, self.data.queries["text"], self._classes(rule))

    def tokens(self, centred: bool, rule: TokenRule = DEFAULT_RULE) -> tuple[AlignedTokens, AlignedTokens]:
        """The aligned tokens of documents and of queries; `centred` subtracts the documents' mean logits from both."""
        if (centred, rule) not in self._tokens:
            decode, classes = partial(decode_logits, self.decoder, layer=self.layer), self._classes(rule)
            chunks = partial(logit_chunks, logits=decode, classes=classes)
            mean = mean_logits(chunks(self.documents)) if centred else None
            sides = zip((self.documents, self.queries), self.deepest)
            self._tokens[centred, rule] = tuple(strongest_tokens(chunks(side), k, mean) for side, k in sides)
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
        first = principal_components(self.documents)[0][0]
        documents, queries = remove_component(self.documents, first), remove_component(self.queries, first)
        return replace(self, documents=documents, queries=queries, _tokens={})

    def _classes(self, rule: TokenRule) -> np.ndarray:
        return token_classes(self.decoder.tokenizer, len(output_matrix(self.decoder)), rule)

    def _rows(self, queries: Sequence[str]) -> list[int]:
        place = {query: i for i, query in enumerate(self.data.queries["id"])}
        return [place[query] for query in queries]


def encode_set(
    encoder: SentenceEncoder, data: RetrievalData, decoder: Backbone, deepest: tuple[int, int]
) -> tuple[EncodedSet, dict]:
    """Encode a set; also what it was made of. An embedder reads documents in its format for documents, where it has one."""
    of_documents = encoder.changed(role="document") if isinstance(encoder, EmbedderEncoder) else encoder
    documents, queries = of_documents.encode(list(data.corpus["text"])), encoder.encode(list(data.queries["text"]))
    about = {"documents": of_documents.describe(), "queries": encoder.describe(), "exit_layer": encoder.exit_layer,
             "decoder": decoder.describe(), "corpus": provenance(data.corpus), "query data": provenance(data.queries)}
    return EncodedSet(data, documents, queries, decoder, encoder.exit_layer, deepest), about


def setting_scores(encoded: EncodedSet, queries: Sequence[str], ks: Iterable[int], ms: Iterable[int]) -> pd.DataFrame:
    """nDCG@10 of each query (rows, by id) under every setting (columns k, m, weighting).

    The documents of `RetrievalData.excluded` are taken out of the rankings.
    """
    columns = {}
    for k, m, (name, changes) in product(ks, ms, WEIGHTINGS.items()):
        ranking = encoded.sparse(SparseSetting(k, m, **changes), queries)
        columns[k, m, name] = by_query(ranking, encoded.data)
    return pd.DataFrame(columns).rename_axis(columns=["k", "m", "weighting"])


def by_query(ranking: Ranking, data: RetrievalData) -> pd.Series:
    """nDCG@10 of each query of a ranking, by id, without the documents of `RetrievalData.excluded`."""
    return evaluate_retrieval(ranking, data.qrels, data.excluded).set_index("query")["nDCG@10"]


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
