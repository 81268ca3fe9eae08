"""The texts that alignment is measured on: sentences of STS pairs and passages; without real data, those of the sample."""

from __future__ import annotations

import re
from dataclasses import dataclass

from datasets import Dataset

from lib.data.retrieval import SAMPLE, load_beir
from lib.data.sts import DataError, cap_rows, find_source, load_sts, provenance


@dataclass(frozen=True)
class Texts:
    """Distinct texts, in the order of their data, and the provenance of it."""

    texts: list[str]
    provenance: dict


def alignment_texts(count: int | None) -> tuple[dict[str, Texts], dict[str, str]]:
    """At most `count` (None: all) seeded texts of each data set; and for each set that cannot be had the reason why.

    `STS12 SMTnews`: the pairs with a gold score above 4, without " ." and " ?", as in the official code of arXiv 2406.17378,
    but each of their sentences once (297 of 582; that code counts repetitions).
    `MS MARCO`: passages from its development part, which that code ships. Without real data the sample's own.
    """
    source = find_source()
    if source.is_sample:
        news, passages = load_sts("sample", "test", source), ("sample documents", SAMPLE)
        found = {"sample STS": pair_texts(news, count)}
    else:
        news, passages = load_sts("STS12", "test", source), ("MS MARCO", "msmarco-sample")
        rows = [i for i, row in enumerate(news) if row["subset"] == "surprise.SMTnews" and row["score"] > 4]
        pairs = pair_texts(news.select(rows), count)
        about = pairs.provenance | {"chosen": "surprise.SMTnews, score above 4, without ' .' and ' ?'"}
        found = {"STS12 SMTnews": Texts(_distinct(re.sub(r" [.?]", "", text) for text in pairs.texts), about)}
    try:
        corpus = cap_rows(load_beir(passages[1]).corpus, count, seed=0)
    except DataError as error:
        return found, {passages[0]: str(error)}
    return found | {passages[0]: Texts(_distinct(corpus["text"]), provenance(corpus))}, {}


def pair_texts(pairs: Dataset, count: int | None = None) -> Texts:
    """The distinct sentences of at most `count` / 2 seeded STS pairs (None: of all)."""
    pairs = cap_rows(pairs, count and max(1, count // 2), seed=0)
    return Texts(_distinct([*pairs["sentence1"], *pairs["sentence2"]]), provenance(pairs))


def _distinct(texts) -> list[str]:
    return list(dict.fromkeys(texts))
