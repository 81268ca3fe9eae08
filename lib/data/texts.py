"""Smaller sets: the texts that alignment is measured on, minimal pairs, and STR-2022."""

import csv
import re
from dataclasses import replace

import pandas as pd

from lib.data import sources
from lib.data.files import Reader, expect
from lib.data.retrieval import SAMPLE, load_beir
from lib.data.sources import DataError, EvaluationData, MissingDataError, find_folder, find_source
from lib.data.sts import STS_COLUMNS, load_sts

# STR-2022's repository on the hub, its file, and how many pairs that holds
STR2022, STR2022_FILE, STR2022_ROWS = "vkpriya/str-2022", "sem_text_rel_ranked.csv", 5500


def alignment_texts(count: int | None) -> tuple[dict[str, EvaluationData], dict[str, str]]:
    """Data sets whose `texts`, at most `count` of each, alignment is measured on; and for each that is nowhere, why.
    `STS12 SMTnews`: the pairs with a gold score above 4, without " ." and " ?", as in the official code of arXiv
    2406.17378, but each sentence once (297 of 582; that code counts repetitions). `MS MARCO`: passages from its
    development part, which that code ships. Without real data the sample's own."""
    source = find_source()
    if source.is_sample:
        passages, name, found = "sample documents", SAMPLE, {"sample STS": pair_texts(load_sts("sample"), count)}
    else:
        from datasets import Dataset
        passages, name, news = "MS MARCO", "msmarco-sample", load_sts("STS12", "test", source)
        rows = [row["subset"] == "surprise.SMTnews" and row["score"] > 4 for row in news.rows]
        news = pair_texts(news.where(rows, "surprise.SMTnews, score above 4, without ' .' and ' ?'"), count)
        texts = {key: [re.sub(r" [.?]", "", text) for text in news[key]] for key in ("sentence1", "sentence2")}
        found = {"STS12 SMTnews": replace(news, rows=Dataset.from_dict(texts))}
    try:
        return found | {passages: load_beir(name).corpus.first(count)}, {}
    except MissingDataError as error:
        return found, {passages: str(error)}


def pair_texts(pairs: EvaluationData, count: int | None = None) -> EvaluationData:
    """The first `count` / 2 STS pairs (None: all), which have at most `count` distinct `texts`."""
    return pairs.first(count and max(1, count // 2))


def load_minimal_pairs() -> pd.DataFrame:
    """The pairs written for this project: columns kind, sentence1, sentence2; 16 pairs of each of five kinds."""
    return pd.read_csv(sources.DATA / "sample" / "minimal_pairs.tsv", sep="\t", keep_default_na=False)


def load_str2022() -> EvaluationData:
    """STR-2022 (arXiv 2110.04845): 5,500 sentence pairs in the columns of `load_sts`; score, how related they are, runs
    from 0 to 1. Its licence keeps it out of this project. Raises what `find_folder` raises, and `DataError`."""
    reader = Reader(find_folder("STR-2022", "str-2022", STR2022, (STR2022_FILE,)))
    path = reader.source.path / STR2022_FILE
    lines = reader.lines(STR2022_FILE) + "\n"  # the two sentences of a pair stand on two lines, in quotes
    try:
        table = pd.DataFrame(list(csv.DictReader(lines)), columns=["Text", "Score"], dtype=object).fillna("")
    except csv.Error as error:  # a field without an end
        raise DataError(f"{path}, pair 1: expected a table with commas; {error}.") from None
    table.index = [f"{path}, pair {number}" for number in range(1, len(table) + 1)]
    sentences, scores = table["Text"].str.split("\n"), pd.to_numeric(table["Score"], errors="coerce")
    expect(sentences.str.len() == 2, "two sentences, one a line, in the column Text", table["Text"])
    expect(scores.between(0, 1), "from 0 to 1 in the column Score", table["Score"])
    if len(table) != STR2022_ROWS:
        raise DataError(f"{path}: found {len(table)} pairs, expected {STR2022_ROWS}.")
    pairs = table.assign(subset="STR-2022", sentence1=sentences.str[0], sentence2=sentences.str[1], score=scores)
    return reader.data("STR-2022", pairs, STS_COLUMNS, task="STR-2022", split="all")
