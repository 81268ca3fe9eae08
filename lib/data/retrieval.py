"""Retrieval sets in BEIR's layout (arXiv 2104.08663): documents, queries, judgements; local, from the hub, or the sample.

Counts are those of the test parts in BEIR and in `mteb/*` on the hub; Cranfield's and the MS MARCO sample's are explained
in `data/README.md`.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value

from lib.data import sources
from lib.data.sts import cap_rows
from lib.data.download import DownloadError, fetch_files
from lib.data.sources import DataError, DataSource, SampleDataWarning, make_dataset, read_lines

SAMPLE = "sample"
TEXT_FEATURES = Features({"id": Value("string"), "text": Value("string")})
QRELS_KEYS = ("query-id", "corpus-id", "score")
HUB_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.jsonl")
# The document that has the query's own id.
SELF = "self"


@dataclass(frozen=True)
class BeirSet:
    """What is known of a set before it is read."""

    documents: int
    queries: int  # those that are judged in the test part
    judgements: int
    repo: str = ""  # on the hub; "" if it is not there
    excluded: str = ""  # a file with pairs that an evaluation can take out of the ranking, or SELF
    missing: int = 0  # judgements of documents that the corpus lacks; they count as relevant and are never found


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
        corpus, queries: data sets with the columns id and text (str), in the order of the files; `lib.data.sts.provenance` of
            either names all files that were read.
        qrels: query id -> document id -> grade; 0 is not relevant, and so is what is not judged.
        excluded: query id -> documents that an evaluation can take out of the ranking. Say which was done.
    """

    corpus: Dataset
    queries: Dataset
    qrels: dict[str, dict[str, int]]
    excluded: dict[str, set[str]]
    source: DataSource


def load_beir(name: str, source: DataSource | None = None) -> RetrievalData:
    """Load a retrieval set, one of `SETS`, from `source` or where `find_beir` finds it.

    A document's text is its title and text; where the text begins with the title (Cranfield), the title is not repeated.
    A document may be empty (two of Cranfield's are). Queries without a judgement in the test part are left out.

    Raises:
        ValueError: no such set.
        DataError: the set cannot be had, or a file of it is missing, short or malformed.
    """
    known, source, hashes = _known(name), source or find_beir(name), {}
    documents, queries = {}, {}
    for i, row in _read_texts(source.path, "corpus.jsonl", hashes).items():
        title, text = (row.get("title") or "").strip(), row["text"].strip()
        documents[i] = text if text.startswith(title) else f"{title} {text}".strip()
    for i, row in _read_texts(source.path, "queries.jsonl", hashes).items():
        queries[i] = row["text"].strip()
        if not queries[i]:
            raise DataError(f"{source.path / 'queries.jsonl'}: expected a text in query {i!r}, found none.")
    qrels = _read_qrels(source.path, hashes, queries)
    queries = {i: text for i, text in queries.items() if i in qrels}
    judged = [document for grades in qrels.values() for document in grades]
    for what, found, expected in (
        ("documents", len(documents), known.documents),
        ("judged queries", len(queries), known.queries),
        ("judgements", len(judged), known.judgements),
        ("judgements of documents that are not in the corpus", sum(d not in documents for d in judged), known.missing),
    ):
        if found != expected:
            raise DataError(f"{source.path}: found {found} {what}, expected {expected}.")
    excluded = _read_excluded(known.excluded, source.path, hashes, documents, queries)
    corpus, queries = (
        make_dataset([{"id": i, "text": t} for i, t in texts.items()], TEXT_FEATURES, source, hashes, task=name, part=part)
        for part, texts in (("corpus", documents), ("queries", queries))
    )
    return RetrievalData(corpus, queries, qrels, excluded, source)


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
    """Where a set is (`find_folder`). Each is looked for on its own; unlike SentEval's, none stands in for another.

    Raises:
        ValueError: no such set. DataError: it is nowhere.
    """
    known = _known(name)
    if name == SAMPLE:
        return DataSource("sample", sources.DATA / "sample" / "beir")
    return find_folder(f"The retrieval set {name!r}", f"beir/{name}", known.repo, HUB_FILES)


def find_folder(what: str, place: str, repo: str, files: Sequence[str]) -> DataSource:
    """The folder `place` of `$TP_DATA_DIR` or of `data/downloads`, where `files` are downloaded to if `repo` is not "".

    Raises `DataError` if it is nowhere; the message names `what` was looked for and says what to do.
    """
    folder = os.environ.get("TP_DATA_DIR", "")
    own, path = Path(folder).expanduser() / place, sources.DATA / "downloads" / place
    if folder and own.is_dir():
        return DataSource("folder", own)
    reason = "it is not on the hub"
    try:
        if repo and not path.is_dir():
            fetch_files(repo, files, path)
        if path.is_dir():
            return DataSource("downloads", path)
    except DownloadError as error:
        reason = f"the Hugging Face hub: {error}"
    raise DataError(
        f"{what} is not here. Tried: $TP_DATA_DIR/{place} ({'not there' if folder else 'not set'}), data/downloads/{place} "
        f"(not there); {reason}. To get it, {'go online and start again, or ' if repo else ''}put its files into one of "
        f"these folders: see data/README.md."
    )


def sample_set(data: RetrievalData, queries: int | None, documents: int | None, seed: int = 0) -> RetrievalData:
    """A smaller set: at most so many seeded queries, and of the documents those judged or excluded for them and seeded
    others, at most so many if that is possible. None takes all. In fewer documents, relevant ones are easier to find.
    """
    kept = cap_rows(data.queries, queries, seed)
    needed = {document for query in kept["id"] for document in (*data.qrels[query], *data.excluded.get(query, ()))}
    others = [document for document in data.corpus["id"] if document not in needed]
    room = len(others) if documents is None else max(0, documents - (len(data.corpus) - len(others)))
    if room >= len(others):
        return replace(data, queries=kept)
    drawn = np.random.default_rng(seed).choice(others, room, replace=False)
    cap = {"documents": documents, "judged for queries": len(kept), "seed": seed}
    return replace(data, corpus=_with_ids(data.corpus, needed.union(drawn.tolist()), cap), queries=kept)


def hold_out(queries: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split queries into `count` to choose settings on (drawn as in `cap_rows`) and the rest to report on.

    Raises `ValueError` if nothing would be left to report on.
    """
    if count >= len(queries):
        raise ValueError(f"Of {len(queries)} queries, {count} cannot be held out: none would be left to report on.")
    chosen = cap_rows(queries, count, seed)
    rest = set(queries["id"]).difference(chosen["id"])
    return chosen, _with_ids(queries, rest, {"without": {"count": count, "seed": seed}})


def _with_ids(dataset: Dataset, ids: set[str], cap: dict) -> Dataset:
    """The rows with these ids; `cap` says in their provenance how they were chosen."""
    rows = dataset.select([i for i, identity in enumerate(dataset["id"]) if identity in ids])
    about = json.loads(rows.info.description)
    about["caps"].append(cap)
    rows.info.description = json.dumps(about)
    return rows


def _known(name: str) -> BeirSet:
    if name not in SETS:
        raise ValueError(f"Unknown retrieval set {name!r}; choose from {', '.join(SETS)}.")
    return SETS[name]


# The readers below add each file's SHA-256 to `hashes`.


def _read_rows(folder: Path, name: str, hashes: dict[str, str], keys: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """The rows of JSON lines, or of columns between tabs under a header: where each stands, and its values by key."""
    lines, is_table, names = read_lines(folder, name, hashes), name.endswith(".tsv"), ", ".join(keys)
    if is_table and lines[:1] != ["\t".join(keys)]:
        found = "".join(lines[:1])[:40]
        raise DataError(f"{folder / name}, line 1: expected the header {names} between tabs, found {found!r}.")
    for number, line in list(enumerate(lines, 1))[is_table:]:
        where = f"{folder / name}, line {number}"
        try:
            row = dict(zip(keys, line.split("\t"), strict=True)) if is_table else json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate, written \ud800, is no text
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not all(key in row for key in keys):
            expected = f"{names} between tabs" if is_table else f"a JSON object with {names}"
            raise DataError(f"{where}: expected {expected}, found {line[:40]!r}.")
        yield where, row


def _read_texts(folder: Path, name: str, hashes: dict[str, str]) -> dict[str, dict]:
    """The rows of a corpus or of queries by their id."""
    rows = {}
    for where, row in _read_rows(folder, name, hashes, ("_id", "text")):
        identity = str(row["_id"])
        for key, text in {"text": row["text"], "title": row.get("title") or ""}.items():
            if not isinstance(text, str):
                raise DataError(f"{where}: expected a string in {key}, found {text!r:.40}.")
        if identity in rows:
            raise DataError(f"{where}: the _id {identity!r} has been used before.")
        rows[identity] = row
    return rows


def _read_qrels(folder: Path, hashes: dict[str, str], queries: dict[str, str]) -> dict[str, dict[str, int]]:
    """Judgements of the test part, from test.jsonl as the hub has it or test.tsv as BEIR has it."""
    name = "qrels/test.jsonl" if (folder / "qrels" / "test.jsonl").is_file() else "qrels/test.tsv"
    qrels: dict[str, dict[str, int]] = {}
    for where, row in _read_rows(folder, name, hashes, QRELS_KEYS):
        query, document, score = (str(row[key]) for key in QRELS_KEYS)
        if not re.fullmatch(r"[0-9]{1,9}(\.0*)?", score):
            raise DataError(f"{where}: expected a whole score from 0, found {score!r:.20}.")
        if query not in queries:
            raise DataError(f"{where}: the query {query!r} is not in queries.jsonl.")
        if document in qrels.setdefault(query, {}):
            raise DataError(f"{where}: the query {query!r} and the document {document!r} have been judged before.")
        qrels[query][document] = int(float(score))
    return qrels


def _read_excluded(name: str, folder: Path, hashes: dict, documents: dict, queries: dict) -> dict[str, set[str]]:
    if name == SELF:
        return {query: {query} for query in queries if query in documents}
    excluded: dict[str, set[str]] = {}
    for where, row in _read_rows(folder, name, hashes, QRELS_KEYS) if name else ():
        query, document = row["query-id"], row["corpus-id"]
        if query not in queries or document not in documents:
            raise DataError(f"{where}: no such query and document: {query!r}, {document!r}.")
        excluded.setdefault(query, set()).add(document)
    return excluded
