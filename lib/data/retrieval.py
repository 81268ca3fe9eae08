"""Retrieval sets in BEIR's layout (arXiv 2104.08663); `pinned.yaml` lists them, and `data/README.md` explains them."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pandas as pd

from lib.data import sources
from lib.data.files import PINNED, Reader, expect
from lib.data.sources import DataError, DataSource, EvaluationData, MissingDataError, SampleDataWarning, find_folder

SAMPLE = "sample"
SETS: dict[str, dict] = PINNED["retrieval"]
HUB_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.jsonl")


@dataclass(frozen=True, eq=False)
class RetrievalData:
    """A retrieval set. `corpus` and `queries` have the columns id and text (str), and each names all files in its
    provenance. `qrels` is query id -> document id -> grade, where 0 is not relevant, as is what is not judged.
    `excluded` is query id -> documents that an evaluation can take out of the ranking; results say whether it did."""

    name: str
    corpus: EvaluationData
    queries: EvaluationData
    qrels: dict[str, dict[str, int]]
    excluded: dict[str, set[str]]


def load_beir(name: str, source: DataSource | None = None) -> RetrievalData:
    """Load a retrieval set, one of `SETS`, from `source` or from where `find_folder` finds it.
    A document's text is its title and text; where the text begins with the title (Cranfield), that is not repeated. A
    document may be empty (two of Cranfield's are). Queries without a judgement in the test part are left out. Raises
    `ValueError` for an unknown set, what `find_folder` raises, and `DataError` if a file is not as it should be."""
    if name not in SETS:
        raise ValueError(f"Unknown retrieval set {name!r}; choose from {', '.join(SETS)}.")
    known = {"repo": "", "missing": 0, "excluded": ""} | SETS[name]
    source = source or (DataSource("sample", sources.DATA / "sample" / "beir") if name == SAMPLE else
                        find_folder(f"The retrieval set {name!r}", f"beir/{name}", known["repo"], HUB_FILES))
    reader = Reader(source)
    documents, queries = _read_texts(reader, "corpus.jsonl"), _read_texts(reader, "queries.jsonl")
    expect(queries["text"] != "", "a text", queries["text"])
    file = "qrels/test.jsonl" if (source.path / "qrels" / "test.jsonl").is_file() else "qrels/test.tsv"
    judged = _read_pairs(reader, file, queries)
    expect(judged["score"].str.fullmatch(r"[0-9]{1,9}(\.0*)?"), "a whole score from 0", judged["score"])
    judged["score"] = judged["score"].map(float).map(int)
    qrels = {query: dict(zip(of["document"], of["score"])) for query, of in judged.groupby("query", sort=False)}
    queries, excluded = queries[queries["id"].isin(qrels)], {}
    if known["excluded"] == "self":
        excluded = {query: {query} for query in queries["id"][queries["id"].isin(documents["id"])]}
    elif known["excluded"]:
        pairs = _read_pairs(reader, known["excluded"], queries)
        expect(pairs["document"].isin(documents["id"]), "a document of corpus.jsonl", pairs["document"])
        excluded = {query: set(part) for query, part in pairs.groupby("query")["document"]}
    found = {"documents": len(documents), "queries": len(queries), "judgements": len(judged),
             "missing": int((~judged["document"].isin(documents["id"])).sum())}
    for what, count in found.items():
        if count != known[what]:
            raise DataError(f"{source.path}: found {count} for {what}, expected {known[what]} (see pinned.yaml).")
    sides = {"corpus": documents, "queries": queries}
    data = (reader.data(f"{name} {part}", of, ("id", "text"), task=name, part=part) for part, of in sides.items())
    return RetrievalData(name, *data, qrels, excluded)


def _read_texts(reader: Reader, name: str) -> pd.DataFrame:
    """The id and the text of each document or query, the title before it if there is one."""
    table = reader.objects(name, "_id", "text", optional=("title",)).fillna({"title": ""})
    for key in ("title", "text"):
        expect(table[key].map(lambda text: isinstance(text, str)), f"a string in {key}", table[key])
    ids = table["_id"].map(str).astype(object)
    expect(~ids.duplicated(), "an _id that no line before has", ids)
    pairs = zip(table["title"].map(str.strip), table["text"].map(str.strip), strict=True)
    texts = [text if text.startswith(title) else f"{title} {text}".strip() for title, text in pairs]
    return pd.DataFrame({"id": ids, "text": texts}, dtype=object)


def _read_pairs(reader: Reader, name: str, queries: pd.DataFrame) -> pd.DataFrame:
    """Query, document and score (str) of judgements: JSON lines on the hub, columns below a header in BEIR."""
    keys, header = ["query", "document", "score"], ["query-id", "corpus-id", "score"]
    if name.endswith(".tsv"):
        pairs = reader.columns(name, "{query}\t{document}\t{score}", "\t".join(header))
    else:
        pairs = reader.objects(name, *header).set_axis(keys, axis=1).map(str).astype(object)
    expect(pairs["query"].isin(queries["id"]), "a query of queries.jsonl", pairs["query"])
    expect(~pairs.duplicated(["query", "document"]), "a pair that no line before has", pairs["document"])
    return pairs


def load_beir_sets(names: Iterable[str]) -> tuple[dict[str, RetrievalData], dict[str, str]]:
    """The sets that can be had, and for each that is nowhere, why. If none can be had, the sample, with a warning.
    A malformed set, or one that the hub has but does not give, is an error, as in `load_beir`."""
    found, reasons = {}, {}
    for name in names:
        try:
            found[name] = load_beir(name)
        except MissingDataError as error:
            reasons[name] = str(error)
    if not found:
        text = "The sample stands in for retrieval data, and its scores compare with no paper."
        warnings.warn(" ".join([text, *reasons.values()]), SampleDataWarning, stacklevel=2)
        found = {SAMPLE: load_beir(SAMPLE)}
    return found, reasons


def sample_set(data: RetrievalData, queries: int | None, documents: int | None) -> RetrievalData:
    """A smaller set: the first `queries` queries, and the first `documents` documents (None: all) with all that are
    judged or excluded for these. Samples are nested. Among fewer documents, relevant ones are found more easily."""
    kept, corpus = data.queries.first(queries), data.corpus
    needed = {document for query in kept["id"] for document in (*data.qrels[query], *data.excluded.get(query, ()))}
    rows = pd.Series(corpus["id"]).isin(needed.union(corpus.first(documents)["id"]))
    if not rows.all():
        corpus = corpus.where(rows, f"the first {documents}, and those judged or excluded for the {len(kept)} queries")
    return replace(data, queries=kept, corpus=corpus)


def hold_out(queries: EvaluationData, count: int) -> tuple[EvaluationData, EvaluationData]:
    """The first `count` queries, to choose settings on, and the rest, to report on. `ValueError` if no rest is left."""
    if count >= len(queries):
        raise ValueError(f"Of {len(queries)} queries, {count} cannot be held out: none would be left to report on.")
    chosen = queries.first(count)
    return chosen, queries.where(~pd.Series(queries["id"]).isin(chosen["id"]), f"without the first {count}")
