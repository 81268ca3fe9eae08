"""STR-2022 (arXiv 2110.04845): 5,500 sentence pairs with scores of relatedness. Its licence keeps it out of this project."""

from __future__ import annotations

import csv
from io import StringIO

from datasets import Dataset

from lib.data.retrieval import find_folder
from lib.data.sts import STS_FEATURES
from lib.data.sources import DataError, make_dataset, read_lines

REPO, FILE, ROWS = "vkpriya/str-2022", "sem_text_rel_ranked.csv", 5500


def load_str2022() -> Dataset:
    """The pairs in the columns of `lib.data.sts.load_sts`; score runs from 0, unrelated, to 1.

    Looked for in `$TP_DATA_DIR/str-2022/`, then in `data/downloads/str-2022/`, where it is downloaded to from the hub.
    Raises `DataError` if it cannot be had or is not what it should be.
    """
    source, hashes, rows = find_folder("STR-2022", "str-2022", REPO, [FILE]), {}, []
    text = "\n".join(read_lines(source.path, FILE, hashes))
    try:
        table = list(csv.DictReader(StringIO(text, newline="")))
    except csv.Error as error:  # a field without an end
        raise DataError(f"{source.path / FILE}, pair 1: expected a table with commas; {error}.") from None
    for number, row in enumerate(table, 1):
        sentences = (row.get("Text") or "").split("\n")
        try:
            score = float(row["Score"])
        except (KeyError, TypeError, ValueError):
            score = -1.0
        if len(sentences) != 2 or not 0 <= score <= 1:
            expected = "two sentences, one a line, in the column Text and from 0 to 1 in Score"
            raise DataError(f"{source.path / FILE}, pair {number}: expected {expected}, found {str(row)[:80]}.")
        rows.append({"subset": "STR-2022", "sentence1": sentences[0], "sentence2": sentences[1], "score": score})
    if len(rows) != ROWS:
        raise DataError(f"{source.path / FILE}: found {len(rows)} pairs, expected {ROWS}.")
    return make_dataset(rows, STS_FEATURES, source, hashes, task="STR-2022", split="all")
