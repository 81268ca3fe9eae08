"""Retrieval sets in BEIR's layout (arXiv 2104.08663): documents, queries, judgements; local, from the hub, or the sample.

Counts are those of the test parts in BEIR and in `mteb/*` on the hub; Cranfield's and the MS MARCO sample's are explained
in `data/README.md`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value

from lib import sources
from lib.data import cap_rows, provenance
from lib.download import DownloadError, fetch_files
from lib.sources import DataError, DataSource, SampleDataWarning, make_dataset, read_lines

SAMPLE = "sample"
TEXT_FEATURES = Features({"id": Value("string"), "text": Value("string")})
QRELS_HEADER = ("query-id", "corpus-id", "score")
HUB_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.jsonl")
SELF = "self"


@dataclass(frozen=True)
class BeirSet:
    """What is known of a set before it is read.

    Args:
        documents, queries, judgements: how many there are; of the queries, those that are judged in the test part.
        repo: its repository on the hub; "" if it is not there.
        excluded: a file with pairs that an evaluation can take out of the ranking, or `SELF`: the document that has the
            query's own id.
        missing: how many judgements name a document that the corpus lacks. They count as relevant and are never found.
    """

    documents: int
    queries: int
    judgements: int
    repo: str = ""
    excluded: str = ""
    missing: int = 0


SETS = {
    "cranfield": BeirSet(1400, 225, 1612, excluded="qrels/code_minus1.tsv"),
    "msmarco-sample": BeirSet(500, 472, 500),
    "scifact": BeirSet(5183, 300, 339, "mteb/scifact"),
    "nfcorpus": BeirSet(3633, 323, 12334, "mteb/nfcorpus"),
    "fiqa": BeirSet(57638, 648, 1706, "mteb/fiqa"),
    # Its queries are documents too. One judged document is not in the corpus: github.com/beir-cellar/beir/issues/101
    "arguana": BeirSet(8674, 1406, 1406, "mteb/arguana", excluded=SELF, missing=1),
    SAMPLE: BeirSet(66, 30, 54),
}


@dataclass(frozen=True)
class RetrievalData:
    """A retrieval set.

    Args:
        corpus, queries: data sets with the columns id and text (str), in the order of the files; `lib.data.provenance` of
            either names all files that were read.
        qrels: query id -> document id -> grade; 0 is not relevant, and so is what is not judged.
        excluded: query id -> documents that an evaluation can take out of the ranking. Say which was done.
    """

    name: str
    corpus: Dataset
    queries: Dataset
    qrels: dict[str, dict[str, int]]
    excluded: dict[str, frozenset[str]]
    source: DataSource


def load_beir(name: str, source: DataSource | None = None) -> RetrievalData:
    """Load a retrieval set, one of `SETS`.

    A document's text is its title and text; where the text begins with the title (Cranfield), the title is not repeated.
    A document may be empty (two of Cranfield's are). Queries without a judgement in the test part are left out.

    Args:
        source: where its files are; None asks `find_beir`.

    Raises:
        ValueError: no such set.
        DataError: the set cannot be had, or a file of it is missing, short or malformed.
    """
    known, source, hashes = _known(name), source or find_beir(name), {}
    documents = {i: _joined(row.get("title") or "", row["text"]) for i, row in _read_texts(source.path, "corpus.jsonl", hashes)}
    queries = {}
    for i, row in _read_texts(source.path, "queries.jsonl", hashes):
        if not row["text"].strip():
            raise DataError(f"{source.path / 'queries.jsonl'}: expected a text in query {i!r}, found none.")
        queries[i] = row["text"].strip()
    qrels = _read_qrels(source.path, hashes, queries)
    queries = {i: text for i, text in queries.items() if i in qrels}
    pairs = [(query, document) for query, grades in qrels.items() for document in grades]
    for what, found, expected in (
        ("documents", len(documents), known.documents), ("judged queries", len(queries), known.queries),
        ("judgements", len(pairs), known.judgements),
        ("judgements of documents that are not in the corpus", sum(d not in documents for _, d in pairs), known.missing),
    ):
        if found != expected:
            raise DataError(f"{source.path}: found {found} {what}, expected {expected}.")
    excluded = _excluded(known, source.path, hashes, documents, queries)
    corpus, queries = (
        make_dataset([{"id": i, "text": t} for i, t in texts.items()], TEXT_FEATURES, source, hashes, task=name, part=part)
        for part, texts in (("corpus", documents), ("queries", queries))
    )
    return RetrievalData(name, corpus, queries, qrels, excluded, source)


def load_beir_sets(names: Iterable[str]) -> tuple[dict[str, RetrievalData], dict[str, str]]:
    """The sets that can be had, and for each other one the reason why not. If none can, the sample, with a warning.

    A malformed set is no reason: it raises `DataError`.
    """
    found, reasons = {}, {}
    for name in names:
        try:
            found[name] = find_beir(name)
        except DataError as error:
            reasons[name] = str(error)
    if not found:
        warnings.warn(
            f"No real retrieval data: the sample written for this project stands in for it, and its scores compare with no "
            f"paper. {' '.join(reasons.values())}", SampleDataWarning, stacklevel=2,
        )
        found = {SAMPLE: find_beir(SAMPLE)}
    return {name: load_beir(name, source) for name, source in found.items()}, reasons


def find_beir(name: str) -> DataSource:
    """The folder that holds the files of a set: `$TP_DATA_DIR/beir/<name>`, `data/downloads/beir/<name>`, where what the
    hub has is downloaded to. Unlike SentEval's, these sets are looked for one by one, and none stands in for another.

    Raises:
        ValueError: no such set. DataError: it is nowhere; the message says what to do.
    """
    known, folder = _known(name), os.environ.get("TP_DATA_DIR", "")
    if name == SAMPLE:
        return DataSource("sample", sources.DATA / "sample" / "beir")
    own = Path(folder).expanduser() / "beir" / name
    if folder and own.is_dir():
        return DataSource("folder", own)
    path = sources.DATA / "downloads" / "beir" / name
    reason = "it is not on the hub"
    try:
        if known.repo and not path.is_dir():
            fetch_files(known.repo, HUB_FILES, path)
        if path.is_dir():
            return DataSource("downloads", path)
    except DownloadError as error:
        reason = f"the Hugging Face hub: {error}"
    advice = "go online and start again, or put" if known.repo else "put"
    raise DataError(
        f"The retrieval set {name!r} is not here. Tried: $TP_DATA_DIR/beir/{name} ({'not there' if folder else 'not set'}), "
        f"data/downloads/beir/{name} (not there); {reason}. To get it, {advice} its files into one of these folders: "
        f"see data/README.md."
    )


def sample_set(data: RetrievalData, queries: int | None, documents: int | None, seed: int = 0) -> RetrievalData:
    """A smaller set: at most so many seeded queries, and of the documents those judged or excluded for them and seeded
    others, at most so many if that is possible. None takes all. In fewer documents, relevant ones are easier to find.
    """
    kept = cap_rows(data.queries, queries, seed)
    needed = {document for query in kept["id"] for document in (*data.qrels[query], *data.excluded.get(query, ()))}
    others = [i for i, document in enumerate(data.corpus["id"]) if document not in needed]
    room = len(others) if documents is None else max(0, documents - (len(data.corpus) - len(others)))
    if room >= len(others):
        return replace(data, queries=kept)
    drawn = set(np.random.default_rng(seed).choice(others, room, replace=False).tolist())
    corpus = data.corpus.select([i for i, document in enumerate(data.corpus["id"]) if document in needed or i in drawn])
    _add_cap(corpus, {"documents": documents, "judged for queries": len(kept), "seed": seed})
    return replace(data, corpus=corpus, queries=kept)


def _add_cap(dataset: Dataset, cap: dict) -> None:
    about = {k: v for k, v in provenance(dataset).items() if k != "rows"}
    dataset.info.description = json.dumps(about | {"caps": [*about["caps"], cap]})


def hold_out(queries: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split queries into `count` to choose settings on (drawn as in `cap_rows`) and the rest to report on.

    Raises `ValueError` if nothing would be left to report on.
    """
    if count >= len(queries):
        raise ValueError(f"Of {len(queries)} queries, {count} cannot be held out: none would be left to report on.")
    chosen = cap_rows(queries, count, seed)
    held = set(chosen["id"])
    rest = queries.select([i for i, query in enumerate(queries["id"]) if query not in held])
    _add_cap(rest, {"without": {"count": count, "seed": seed}})
    return chosen, rest


def _known(name: str) -> BeirSet:
    if name not in SETS:
        raise ValueError(f"Unknown retrieval set {name!r}; choose from {', '.join(SETS)}.")
    return SETS[name]


def _joined(title: str, text: str) -> str:
    title, text = title.strip(), text.strip()
    return text if text.startswith(title) else f"{title} {text}".strip()


def _read_objects(folder: Path, name: str, hashes: dict[str, str], keys: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """Where it stands, and the object, for each line of a file of JSON objects that have these keys."""
    for number, line in enumerate(read_lines(folder, name, hashes), 1):
        where = f"{folder / name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(key in row for key in keys):
            raise DataError(f"{where}: expected a JSON object with {', '.join(keys)}, found {line[:40]!r}.")
        yield where, row


def _read_texts(folder: Path, name: str, hashes: dict[str, str]) -> Iterator[tuple[str, dict]]:
    """(id, object) for each line of a corpus or of queries."""
    seen = set()
    for where, row in _read_objects(folder, name, hashes, ("_id", "text")):
        identity = str(row["_id"])
        if not isinstance(row["text"], str):
            raise DataError(f"{where}: expected a string in text, found {row['text']!r:.40}.")
        if identity in seen:
            raise DataError(f"{where}: the _id {identity!r} has been used before.")
        seen.add(identity)
        yield identity, row


def _read_pairs(folder: Path, name: str, hashes: dict[str, str]) -> Iterator[tuple[str, str, str, object]]:
    """(where, query, document, score) for each line of judgements: JSON lines, or tab-separated with a header."""
    if name.endswith(".jsonl"):
        for where, row in _read_objects(folder, name, hashes, QRELS_HEADER):
            yield where, str(row["query-id"]), str(row["corpus-id"]), row["score"]
        return
    for number, line in enumerate(read_lines(folder, name, hashes), 1):
        where, fields = f"{folder / name}, line {number}", tuple(line.split("\t"))
        if len(fields) != 3 or (number == 1) != (fields == QRELS_HEADER):
            expected = "the header query-id, corpus-id, score" if number == 1 else "query-id, corpus-id, score"
            raise DataError(f"{where}: expected {expected} between tabs, found {line[:40]!r}.")
        if number > 1:
            yield where, *fields


def _read_qrels(folder: Path, hashes: dict[str, str], queries: dict[str, str]) -> dict[str, dict[str, int]]:
    """Judgements of the test part, from test.tsv as BEIR has it or test.jsonl as the hub has it."""
    name = "qrels/test.jsonl" if (folder / "qrels" / "test.jsonl").is_file() else "qrels/test.tsv"
    qrels: dict[str, dict[str, int]] = {}
    for where, query, document, score in _read_pairs(folder, name, hashes):
        try:
            grade = float(score)
        except (TypeError, ValueError):
            grade = -1.0
        if grade < 0 or not grade.is_integer():
            raise DataError(f"{where}: expected a whole score from 0, found {score!r:.20}.")
        if query not in queries:
            raise DataError(f"{where}: the query {query!r} is not in queries.jsonl.")
        if document in qrels.setdefault(query, {}):
            raise DataError(f"{where}: the query {query!r} and the document {document!r} have been judged before.")
        qrels[query][document] = int(grade)
    return qrels


def _excluded(known: BeirSet, folder: Path, hashes: dict, documents: dict, queries: dict) -> dict[str, frozenset[str]]:
    if known.excluded == SELF:
        pairs = [(query, query) for query in queries if query in documents]
    else:
        pairs = [row[1:3] for row in _read_pairs(folder, known.excluded, hashes)] if known.excluded else []
    excluded: dict[str, frozenset[str]] = {}
    for query, document in pairs:
        if query not in queries or document not in documents:
            raise DataError(f"{folder / known.excluded}: no such query and document: {query!r}, {document!r}.")
        excluded[query] = excluded.get(query, frozenset()) | {document}
    return excluded
