"""STR-2022 (arXiv 2110.04845): 5,500 sentence pairs with scores of relatedness. Its licence keeps it out of this project."""

from __future__ import annotations

import csv
import os
from io import StringIO
from pathlib import Path

from datasets import Dataset

from lib import sources
from lib.data import STS_FEATURES
from lib.download import DownloadError, fetch_files
from lib.sources import DataError, DataSource, make_dataset, read_lines

REPO, FILE, ROWS = "vkpriya/str-2022", "sem_text_rel_ranked.csv", 5500


def load_str2022() -> Dataset:
    """The pairs in the columns of `lib.data.load_sts`; score runs from 0, unrelated, to 1.

    Looked for in `$TP_DATA_DIR/str-2022/`, then in `data/downloads/str-2022/`, where it is downloaded to from the hub.
    Raises `DataError` if it cannot be had or is not what it should be.
    """
    source, hashes, rows = _find(), {}, []
    text = "\n".join(read_lines(source.path, FILE, hashes))
    for number, row in enumerate(csv.DictReader(StringIO(text, newline="")), 1):
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


def _find() -> DataSource:
    folder, path = os.environ.get("TP_DATA_DIR", ""), sources.DATA / "downloads" / "str-2022"
    own = Path(folder).expanduser() / "str-2022"
    if folder and own.is_dir():
        return DataSource("folder", own)
    try:
        if not path.is_dir():
            fetch_files(REPO, [FILE], path)
    except DownloadError as error:
        raise DataError(
            f"STR-2022 is not here: no folder str-2022 in TP_DATA_DIR or data/downloads, and the Hugging Face hub: {error}. "
            f"To get it, go online and start again, or put its file {FILE} into one of these folders."
        ) from error
    return DataSource("downloads", path)
