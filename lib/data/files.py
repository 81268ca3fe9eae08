"""How a data file becomes rows that can be trusted: lines, columns between tabs, JSON lines, pinned counts.
Every error is a `DataError` that names the file, the line and what was expected. Tables are indexed by where their rows
stand ("path, line 7"). Only a line feed ends a line: `str.splitlines` cuts at U+0085 too. Text is never quoted."""

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from lib.data.sources import DataError, DataSource, EvaluationData

PINNED = yaml.safe_load(Path(__file__).with_name("pinned.yaml").read_text(encoding="utf-8"))
FORMAT = {"line": "", "fixed": {}, "header": "", "scores": [], "lowest": 0, "labels": [], "encoding": "utf-8-sig"}
# task -> its files, in the order of their examples; pinned.yaml explains the keys
FILES = {task: [FORMAT | file for file in files] for task, files in PINNED["tasks"].items()}
# What a column holds: anything but a tab, a sentence not nothing, and `more`, at the end of a line, further columns.
COLUMNS = defaultdict(lambda: r"[^\t]*?", more=r"(?:\t.*)?")
COLUMNS |= {"sentence1": r"[^\t]*\S[^\t]*", "sentence2": r"[^\t]*\S[^\t]*"}


def expect(good: pd.Series, expected: str, found: pd.Series) -> None:
    """Raise `DataError` for the first row that is not good."""
    for row in np.flatnonzero(~good.to_numpy(bool)):
        raise DataError(f"{good.index[row]}: expected {expected}, found {found.iloc[row]!r:.60}.")


class Reader:
    """Reads the files of one source, and remembers the SHA-256 of each for the provenance."""

    def __init__(self, source: DataSource):
        self.source, self.hashes = source, {}

    def lines(self, name: str, header: str = "", encoding: str = "utf-8-sig") -> pd.Series:
        """The lines below the header. A carriage return before the line feed is dropped."""
        path = self.source.path / name
        if not path.is_file():
            raise DataError(f"{path}: expected this file, and it is not there.")
        content = path.read_bytes()
        self.hashes[name] = hashlib.sha256(content).hexdigest()
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1  # of the object, which has no byte-order mark any more
            raise DataError(f"{path}, line {line}: expected UTF-8, found another byte: {error.reason}.") from None
        lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
        if header and lines[:1] != [header]:
            raise DataError(f"{path}, line 1: expected the header {header!r}.")
        where = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
        return pd.Series(lines, where, dtype=object).iloc[1 if header else 0 :]

    def columns(self, name: str, line: str, header: str = "", encoding: str = "utf-8-sig") -> pd.DataFrame:
        """The columns of each line of a file, as they stand there."""
        pattern = re.sub(r"{(\w+)}", lambda column: f"(?P<{column[1]}>{COLUMNS[column[1]]})", line)
        pattern = re.compile(pattern or "(?P<sentence1>.*)")
        lines = self.lines(name, header, encoding)
        matches = lines.map(pattern.fullmatch)
        expect(matches.map(bool), repr(line), lines)
        return pd.DataFrame([match.groupdict() for match in matches], lines.index, list(pattern.groupindex), object)

    def examples(self, file: dict) -> pd.DataFrame:
        """The examples of a file of `FILES` that have a label or a score: that, split, sentence1, sentence2 (or "")."""
        table = self.columns(file["path"], file["line"], file["header"], file["encoding"])
        if file["scores"]:
            name = file["path"].replace(*file["scores"])
            scores = self.lines(name)
            if len(scores) != len(table):
                raise DataError(f"{self.source.path / name}: found {len(scores)} lines, expected {len(table)}.")
            table = table.set_axis(scores.index).assign(score=scores)[scores.map(str.strip) != ""]
        for column, value in ({"split": next(iter(file["rows"])), "sentence2": ""} | file["fixed"]).items():
            table[column] = table.get(column, value)
        expect(table["split"].isin(list(file["rows"])), f"the split {' or '.join(file['rows'])}", table["split"])
        if labels := file["labels"]:
            expect(table["label"].isin(labels), f"the label {' or '.join(labels)}", table["label"])
            table["label"] = table["label"].map(labels.index)
        else:
            scores, lowest = pd.to_numeric(table["score"], errors="coerce").astype(float), file["lowest"]
            expect(scores.between(lowest, 5), f"a score from {lowest} to 5", table["score"])
            table["score"] = scores
        for split, right in file["rows"].items():
            found = int((table["split"] == split).sum())
            if found not in np.atleast_1d(right):
                path = self.source.path / file["path"]
                raise DataError(f"{path}: found {found} examples of the split {split!r}, expected {right}.")
        return table

    def objects(self, name: str, *keys: str, optional: tuple[str, ...] = ()) -> pd.DataFrame:
        """The values of these keys in a file with one JSON object a line; those of optional keys may be None."""
        def parse(line: str) -> dict | None:
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half a character, written \\ud800, is no text
                return {key: row[key] for key in keys} | {key: row.get(key) for key in optional}
            except (ValueError, RecursionError, KeyError, TypeError):
                return None

        lines = self.lines(name)
        rows = lines.map(parse)
        expect(rows.map(bool), f"a JSON object with {', '.join(keys)}", lines)
        return pd.DataFrame(rows.tolist(), lines.index, [*keys, *optional], object)

    def data(self, name: str, table: pd.DataFrame, columns: tuple[str, ...], **about) -> EvaluationData:
        """A data set of these columns. Its provenance is `about` and what the reader knows."""
        from datasets import Dataset  # here, because it takes a second, and what only encodes does not need it
        about |= {"source": self.source.describe(), "rows": len(table), "rows_total": len(table), "caps": []}
        rows = Dataset.from_dict({column: table[column].tolist() for column in columns})
        return EvaluationData(name, rows, about | {"files": dict(self.hashes)})
