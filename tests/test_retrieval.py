"""`lib.data.retrieval`, `lib.studies.sparse`, `lib.evaluation.retrieval`: made-up sets, a loopback server as the hub, values by hand, real data if there."""

import hashlib
import json
import os
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fake_hub import FakeHub

from lib.data import retrieval as beir, download, sources
from lib.studies import sparse
from lib.data.retrieval import SETS, BeirSet, find_beir, hold_out, load_beir, load_beir_sets
from lib.data.sts import DataError, DataSource, SampleDataWarning, provenance
from lib.report.plots_retrieval import cost_curves, effectiveness_bars, setting_curves
from lib.evaluation.retrieval import (
    METRICS,
    BM25Retriever,
    DenseRetriever,
    compare_retrieval,
    cost_growth,
    evaluate_retrieval,
    reciprocal_rank_fusion,
    synthetic_rows,
)
from lib.studies.sparse import (
    WEIGHTS,
    AlignedTokens,
    SparseRetriever,
    SparseSetting,
    logit_chunks,
    mean_logits,
    strongest_tokens,
)


@pytest.fixture(autouse=True)
def clean_slate(no_data):
    """Each test starts without data."""


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def pairs(*rows):
    return "query-id\tcorpus-id\tscore\n" + "".join("\t".join(row) + "\n" for row in rows)


CORPUS = lines(
    {"_id": "d1", "title": "Wings", "text": "Wings lift."}, {"_id": "d2", "title": "On heat", "text": "It flows."},
    {"_id": "d3", "title": "", "text": ""}, {"_id": "q1", "text": "what lifts, in Zürich?"},
)
QUERIES = lines({"_id": "q1", "text": "what lifts"}, {"_id": "q2", "text": "heat"}, {"_id": "q3", "text": "not judged"})
QRELS = pairs(("q1", "d1", "3"), ("q2", "d2", "1"), ("q2", "d3", "0"))
FILES = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.tsv": QRELS}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """tiny(files, **known): write these files beside those of a good set, with what is known of it, and load it."""

    def load(files=None, **known):
        for name, content in (FILES | (files or {})).items():
            path = tmp_path / "tiny" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setitem(SETS, "tiny", BeirSet(**({"documents": 4, "queries": 2, "judgements": 3} | known)))
        return load_beir("tiny", DataSource("folder", tmp_path / "tiny"))

    return load


# What is read, and how.


def test_titles_are_joined_once_and_queries_without_judgement_left_out(tiny):
    data = tiny()
    assert data.corpus["id"][:] == ["d1", "d2", "d3", "q1"]
    assert data.corpus["text"][:] == ["Wings lift.", "On heat It flows.", "", "what lifts, in Zürich?"]
    assert (data.queries["id"][:], data.queries["text"][:]) == (["q1", "q2"], ["what lifts", "heat"])
    assert data.qrels == {"q1": {"d1": 3}, "q2": {"d2": 1, "d3": 0}} and data.excluded == {}


def test_judgements_of_the_hub_are_json_lines_with_floats(tiny):
    rows = [{"query-id": "q1", "corpus-id": "d1", "score": 3.0}, {"query-id": "q2", "corpus-id": "d2", "score": 1}]
    data = tiny({"qrels/test.tsv": None, "qrels/test.jsonl": lines(*rows)}, judgements=2)
    assert data.qrels == {"q1": {"d1": 3}, "q2": {"d2": 1}}
    assert list(provenance(data.corpus)["files"]) == ["corpus.jsonl", "queries.jsonl", "qrels/test.jsonl"]


def test_excluded_documents_come_from_a_file_or_are_the_query_itself(tiny):
    extra = pairs(("q1", "d2", "-1"), ("q1", "d3", "-1"))
    assert tiny({"qrels/out.tsv": extra}, excluded="qrels/out.tsv").excluded == {"q1": {"d2", "d3"}}
    assert tiny(excluded="self").excluded == {"q1": {"q1"}}
    with pytest.raises(DataError, match="out.tsv, line 2: no such query and document: 'q2', 'd9'"):
        tiny({"qrels/out.tsv": pairs(("q2", "d9", "-1"))}, excluded="qrels/out.tsv")


def test_a_judged_document_that_is_missing_counts_and_is_never_found(tiny):
    files = {"qrels/test.tsv": QRELS + "q1\tlost\t1\n"}
    assert tiny(files, judgements=4, missing=1).qrels["q1"] == {"d1": 3, "lost": 1}
    with pytest.raises(DataError, match="found 1 judgements of documents that are not in the corpus, expected 0"):
        tiny(files, judgements=4)


def test_provenance_names_files_and_no_path(tiny, tmp_path):
    data = tiny()
    hashes = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in FILES.items()}
    assert {"task": "tiny", "part": "queries", "rows": 2, "files": hashes}.items() <= provenance(data.queries).items()
    assert str(tmp_path) not in str(provenance(data.corpus))


MALFORMED = {
    "no JSON": ({"corpus.jsonl": CORPUS + "{d5\n"}, "corpus.jsonl, line 5: expected a JSON object with _id, text, found '{d5'"),
    "no object": ({"corpus.jsonl": "[1]\n"}, "corpus.jsonl, line 1: expected a JSON object"),
    "empty line": ({"queries.jsonl": "\n" + QUERIES}, "queries.jsonl, line 1: expected a JSON object"),
    "no text": ({"queries.jsonl": QUERIES + '{"_id": "q4"}\n'}, "queries.jsonl, line 4: expected a JSON object with _id, text"),
    "not a string": ({"corpus.jsonl": lines({"_id": "d1", "text": 7})}, "line 1: expected a string in text, found 7"),
    "same id": ({"corpus.jsonl": CORPUS + CORPUS}, "corpus.jsonl, line 5: the _id 'd1' has been used before"),
    "empty query": ({"queries.jsonl": lines({"_id": "q1", "text": " "})}, "queries.jsonl: expected a text in query 'q1'"),
    "not UTF-8": ({"corpus.jsonl": CORPUS.encode() + b"\xe9\n"}, "corpus.jsonl, line 5: expected UTF-8, found the byte 0xe9"),
    "no header": ({"qrels/test.tsv": "q1\td1\t3\n"}, "test.tsv, line 1: expected the header query-id, corpus-id, score"),
    "header twice": ({"qrels/test.tsv": pairs() + pairs()}, "test.tsv, line 2: expected a whole score from 0, found 'score'"),
    "two columns": ({"qrels/test.tsv": QRELS + "q1\td2\n"}, "test.tsv, line 5: expected query-id, corpus-id, score between"),
    "no score": ({"qrels/test.tsv": QRELS + "q1\td2\tx\n"}, "test.tsv, line 5: expected a whole score from 0, found 'x'"),
    "half": ({"qrels/test.tsv": QRELS + "q1\td2\t0.5\n"}, "test.tsv, line 5: expected a whole score from 0, found '0.5'"),
    "negative": ({"qrels/test.tsv": QRELS + "q1\td2\t-1\n"}, "test.tsv, line 5: expected a whole score from 0, found '-1'"),
    "no such query": ({"qrels/test.tsv": QRELS + "q9\td2\t1\n"}, "test.tsv, line 5: the query 'q9' is not in queries.jsonl"),
    "judged twice": ({"qrels/test.tsv": QRELS + "q1\td1\t1\n"}, "test.tsv, line 5: the query 'q1' and the document 'd1' have"),
    "no file": ({"qrels/test.tsv": None}, "test.tsv: expected this file"),
    "documents": ({"corpus.jsonl": CORPUS + lines({"_id": "d9", "text": "x"})}, "found 5 documents, expected 4"),
    "queries": ({"qrels/test.tsv": pairs(("q1", "d1", "3"))}, "found 1 judged queries, expected 2"),
    "judgements": ({"qrels/test.tsv": QRELS + "q1\td2\t1\n"}, "found 4 judgements, expected 3"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named_with_line_and_expectation(tiny, case):
    files, message = MALFORMED[case]
    with pytest.raises(DataError, match=re.escape(message)):
        tiny(files)


def test_the_sample_is_whole_graded_and_not_trivial():
    data = load_beir("sample")
    assert len(data.corpus) >= 60 and len(data.queries) == 30 and data.source.is_sample
    grades = [grade for judged in data.qrels.values() for grade in judged.values()]
    assert set(grades) == {1, 2} and sum(len(judged) > 1 for judged in data.qrels.values()) >= 10
    bm25 = BM25Retriever(data.corpus["id"], data.corpus["text"]).search(data.queries["id"], data.queries["text"])
    score = evaluate_retrieval(bm25, data.qrels)["nDCG@10"].mean()
    assert 0.5 < score < 0.8  # several queries share no word with what answers them


def test_queries_are_held_out_and_the_rest_is_the_rest():
    queries = load_beir("sample").queries
    held, rest = hold_out(queries, 10, seed=1)
    assert len(held) == 10 and len(rest) == 20 and not set(held["id"]) & set(rest["id"])
    assert provenance(held)["caps"] == [{"count": 10, "seed": 1}]
    assert provenance(rest)["caps"] == [{"without": {"count": 10, "seed": 1}}] and provenance(rest)["rows"] == 20
    assert provenance(queries)["caps"] == []
    with pytest.raises(ValueError, match="Of 30 queries, 30 cannot be held out"):
        hold_out(queries, 30, seed=1)


# Where sets come from.


def test_the_folder_comes_before_downloads(monkeypatch, tmp_path):
    (sources.DATA / "downloads" / "beir" / "scifact").mkdir(parents=True)
    assert find_beir("scifact") == DataSource("downloads", sources.DATA / "downloads" / "beir" / "scifact")
    (tmp_path / "mine" / "beir" / "scifact").mkdir(parents=True)
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "mine"))
    assert find_beir("scifact") == DataSource("folder", tmp_path / "mine" / "beir" / "scifact")


def test_what_cannot_be_had_is_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    message = (
        "'scifact' is not here. Tried: $TP_DATA_DIR/beir/scifact (not set), data/downloads/beir/scifact (not there); the "
        "Hugging Face hub: not asked, because TP_HUB_UNREACHABLE is set. To get it, go online and start again, or put"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        load_beir("scifact")
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"beir/cranfield \(not there\).*it is not on the hub. To get it, put its files"):
        load_beir("cranfield")
    with pytest.raises(ValueError, match="Unknown retrieval set 'trec'; choose from cranfield, msmarco-sample, scifact"):
        load_beir("trec")


def test_the_sample_stands_in_only_if_no_set_can_be_had_and_loudly(monkeypatch, tmp_path):
    with pytest.warns(SampleDataWarning, match="its scores compare with no paper.*'cranfield' is not here.*'fiqa' is not"):
        found, reasons = load_beir_sets(["cranfield", "fiqa"])
    assert list(found) == ["sample"] and list(reasons) == ["cranfield", "fiqa"]
    folder = tmp_path / "mine" / "beir" / "tiny" / "qrels"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder.parent / name).write_text(content)
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "mine"))
    monkeypatch.setitem(SETS, "tiny", BeirSet(4, 2, 3))
    found, reasons = load_beir_sets(["tiny", "fiqa"])
    assert list(found) == ["tiny"] and list(reasons) == ["fiqa"]


HUB_QRELS = lines({"query-id": "q1", "corpus-id": "d1", "score": 1.0}, {"query-id": "q2", "corpus-id": "d2", "score": 1.0})


@pytest.fixture
def hub(monkeypatch):
    contents = dict(zip(beir.HUB_FILES, (CORPUS, QUERIES, HUB_QRELS)))
    server = FakeHub({name: content.encode() for name, content in contents.items()})
    monkeypatch.delenv("TP_HUB_UNREACHABLE")
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setitem(SETS, "scifact", BeirSet(4, 2, 2, "mteb/scifact"))
    yield server
    server.close()


def test_a_set_is_downloaded_once_checked_and_whole(hub):
    data = load_beir("scifact")
    folder = sources.DATA / "downloads" / "beir" / "scifact"
    assert data.source == DataSource("downloads", folder) and data.qrels == {"q1": {"d1": 1}, "q2": {"d2": 1}}
    assert sorted(p.name for p in folder.iterdir()) == ["corpus.jsonl", "qrels", "queries.jsonl"]
    got = [path for command, path in hub.requests if command == "GET"]
    assert got == [f"/datasets/mteb/scifact/resolve/{'c' * 40}/{name}" for name in beir.HUB_FILES]
    asked = len(hub.requests)
    assert load_beir("scifact").corpus[:] == data.corpus[:] and len(hub.requests) == asked


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_a_wrong_hash_is_reported_and_the_next_try_takes_up_what_was_good(hub, name):
    hub.stated[name] = "0" * 40
    with pytest.raises(DataError, match=f"{name} was damaged on the way and deleted: its hash is not {'0' * 40}"):
        load_beir("scifact")
    folder = sources.DATA / "downloads" / "beir"
    assert not (folder / "scifact").exists()
    hub.stated.clear()
    assert len(load_beir("scifact").corpus) == 4 and not list(folder.glob(".scifact-partial"))
    assert [path for command, path in hub.requests if command == "GET" and path.endswith("corpus.jsonl")][2:] == []


def test_http_errors_are_named_and_leave_nothing_that_looks_whole(hub):
    del hub.files["queries.jsonl"]
    with pytest.raises(DataError, match=r"answered HTTP 404 for mteb/scifact/queries.jsonl"):
        load_beir("scifact")
    hub.files["queries.jsonl"], hub.mode = QUERIES.encode(), "GET fails"
    with pytest.raises(DataError, match="answered HTTP 403 for mteb/scifact. To get it"):
        load_beir("scifact")
    assert not (sources.DATA / "downloads" / "beir" / "scifact").exists()


def test_a_hub_that_is_not_there_is_asked_once_for_all_sets(hub, monkeypatch):
    hub.close()
    asked = []
    ask = download.get_hf_file_metadata
    monkeypatch.setattr(download, "get_hf_file_metadata", lambda url, **options: asked.append(url) or ask(url, **options))
    with pytest.warns(SampleDataWarning, match="could not be fetched from"):
        _, reasons = load_beir_sets(["scifact", "nfcorpus", "fiqa", "arguana"])
    assert len(reasons) == 4 and len(asked) == 1


# Aligned tokens and the sparse index.

VOCABULARY, HIDDEN, DOCUMENTS, QUESTIONS = 40, 8, 60, 7


def random_texts(seed=0):
    """Embeddings of documents and queries, an unembedding, the queries' own tokens."""
    generator = np.random.default_rng(seed)
    unembedding = generator.normal(size=(HIDDEN, VOCABULARY)).astype(np.float32)
    documents, queries = (generator.normal(0.5, 1, (n, HIDDEN)).astype(np.float32) for n in (DOCUMENTS, QUESTIONS))
    own = [generator.integers(0, VOCABULARY, 4).tolist() for _ in range(QUESTIONS)]
    return documents, queries, lambda rows: rows @ unembedding, own


def aligned(embeddings, logits, k, centre_on=None, classes=None):
    classes = np.arange(VOCABULARY) if classes is None else classes
    mean = None if centre_on is None else mean_logits(logit_chunks(centre_on, logits, classes))
    return strongest_tokens(logit_chunks(embeddings, logits, classes), k, mean)


def dense_scores(documents, queries, logits, own, setting):
    """The definition, written out over full matrices."""
    of_documents, of_queries = logits(documents), logits(queries)
    if setting.centred:
        of_documents, of_queries = of_documents - of_documents.mean(axis=0), of_queries - logits(documents).mean(axis=0)
    kept = np.zeros_like(of_documents)
    for row, values in zip(kept, of_documents):
        best = np.argsort(-values)[: setting.k]
        row[best] = WEIGHTS[setting.weight](values[best])
    if setting.idf:
        frequency = (kept != 0).sum(axis=0)
        kept *= np.log(1 + (len(kept) - frequency + 0.5) / (frequency + 0.5))
    scores = np.zeros((len(queries), len(documents)))
    for i, tokens in enumerate(own):
        chosen = set(tokens) | set(np.argsort(-of_queries[i])[: setting.m].tolist())
        scores[i] = sum(kept[:, token] for token in chosen)
    return scores


SETTINGS = [
    SparseSetting(k=5, m=0, centred=False), SparseSetting(k=12, m=3, centred=False, weight="log1p"),
    SparseSetting(k=12, m=3), SparseSetting(k=7, m=2, weight="log1p", idf=True), SparseSetting(k=40, m=1, idf=True),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_sparse_scores_are_those_of_the_full_matrices(setting):
    documents, queries, logits, own = random_texts()
    centre = documents if setting.centred else None
    retriever = SparseRetriever([f"d{i}" for i in range(DOCUMENTS)], aligned(documents, logits, 40, centre), setting)
    matrix = retriever.queries(own, aligned(queries, logits, 5, centre))
    expected = dense_scores(documents, queries, logits, own, setting)
    np.testing.assert_allclose((matrix @ retriever.index).toarray(), expected, atol=1e-4)
    ranking = retriever.search([f"q{i}" for i in range(QUESTIONS)], matrix, depth=10)
    for i in range(QUESTIONS):
        ranked = [int(d[1:]) for d in ranking[f"q{i}"]]
        found = [d for d in np.argsort(-expected[i], kind="stable") if expected[i, d] != 0]
        np.testing.assert_allclose(expected[i, ranked], expected[i, found[:10]], atol=1e-4)
        assert len(set(ranked)) == len(ranked) <= 10
    assert retriever.index.dtype == np.float32 and retriever.index.indices.dtype == np.int32


def test_chunks_change_nothing(monkeypatch):
    documents, _, logits, _ = random_texts()
    whole = aligned(documents, logits, 6, documents)
    for rows in (1, 7, 60):
        monkeypatch.setattr(sparse, "LOGIT_ROWS", rows)
        cut = aligned(documents, logits, 6, documents)
        assert (cut.ids == whole.ids).all() and cut.vocabulary == VOCABULARY and cut.centred
        np.testing.assert_allclose(cut.values, whole.values, atol=1e-5)
    assert (np.diff(whole.values) <= 0).all() and whole.ids.dtype == np.int32 and whole[[3, 3]].ids.shape == (2, 6)


def test_only_one_chunk_of_logits_is_asked_for_at_a_time(monkeypatch):
    documents, _, logits, _ = random_texts()
    monkeypatch.setattr(sparse, "LOGIT_ROWS", 16)
    sizes = []
    aligned(documents, lambda rows: sizes.append(len(rows)) or logits(rows), 3, documents)
    assert sizes == [16, 16, 16, 12] * 2


def test_a_token_rule_merges_entries_into_their_best_and_leaves_others_out():
    def logits(rows):
        return rows

    rows = np.array([[5, 0, 7, 3, 9], [0, 4, 2, 6, 9]], np.float32)
    classes = np.array([0, 1, 0, 3, -1])
    plain = aligned(rows, logits, 3, classes=classes)
    assert plain.ids.tolist() == [[0, 3, 1], [3, 1, 0]] and plain.values.tolist() == [[7, 3, 0], [6, 4, 2]]
    centred = aligned(rows, logits, 3, rows, classes=classes)  # means: 4.5, 2, 4.5
    assert centred.ids.tolist() == [[0, 3, 1], [1, 3, 0]]
    assert centred.values.tolist() == [[2.5, -1.5, -2], [2, 1.5, -2.5]]
    for k in (4, 9):
        with pytest.raises(ValueError, match=f"fewer than k={k} tokens"):
            aligned(rows, logits, k, classes=classes)


def test_settings_that_do_not_fit_are_refused():
    documents, queries, logits, own = random_texts()
    tokens = aligned(documents, logits, 5)
    with pytest.raises(ValueError, match="centred=True, the aligned tokens centred=False"):
        SparseRetriever(range(DOCUMENTS), tokens, SparseSetting(k=5))
    with pytest.raises(ValueError, match="wants 6 aligned tokens of a text, there are 5"):
        SparseRetriever(range(DOCUMENTS), tokens, SparseSetting(k=6, centred=False))
    retriever = SparseRetriever(range(DOCUMENTS), tokens, SparseSetting(k=5, m=2, centred=False))
    with pytest.raises(ValueError, match="With m=2, the aligned tokens of the queries are needed"):
        retriever.queries(own)
    with pytest.raises(ValueError, match="wants 2 aligned tokens"):
        retriever.queries(own, aligned(queries, logits, 1))


def test_index_size_and_operations_by_hand():
    """Two documents with two tokens each over three: token 1 is in both, so a query for tokens 1 and 2 touches 3 entries."""
    tokens = AlignedTokens(np.array([[0, 1], [1, 2]], np.int32), np.array([[4, 3], [2, 1]], np.float32), 3, False)
    retriever = SparseRetriever(["a", "b"], tokens, SparseSetting(k=2, centred=False))
    queries = retriever.queries([[1, 2], [0, 0], []])
    assert (queries @ retriever.index).toarray().tolist() == [[3, 3], [4, 0], [0, 0]]
    assert retriever.operations(queries).tolist() == [3, 1, 0]
    assert retriever.bytes_per_document == (4 * 4 + 4 * 4 + 4 * 4) / 2  # weights, documents, starts of four bytes each
    assert retriever.search(["x", "y", "z"], queries) == {"x": ["a", "b"], "y": ["a"], "z": []}
    dense = DenseRetriever(["a", "b"], np.ones((2, 5), np.float32))
    assert dense.operations(np.ones((4, 5))).tolist() == [10] * 4 and dense.bytes_per_document == 20


def test_weights_of_nothing_take_no_room():
    tokens = AlignedTokens(np.array([[0, 1]], np.int32), np.array([[1, -1]], np.float32), 2, True)
    sizes = {weight: SparseRetriever(["a"], tokens, SparseSetting(k=2, weight=weight)).index.nnz for weight in WEIGHTS}
    assert sizes == {"logit": 2, "log1p": 1}


def test_an_index_leaves_the_tokens_that_it_was_made_of_alone():
    values = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    ids = np.stack([np.random.default_rng(i).permutation(9)[:5] for i in range(6)]).astype(np.int32)
    tokens = AlignedTokens(ids.copy(), values.copy(), 9, True)
    for weight in WEIGHTS:
        SparseRetriever(list("abcdef"), tokens, SparseSetting(k=5, weight=weight, idf=True))
    np.testing.assert_array_equal(tokens.ids, ids)
    np.testing.assert_array_equal(tokens.values, values)


def test_a_sampled_set_keeps_what_its_queries_need():
    data = load_beir("sample")
    few = beir.sample_set(data, 5, 20, seed=1)
    assert len(few.queries) == 5 and len(few.corpus) == 20 and few.qrels is data.qrels
    needed = {document for query in few.queries["id"] for document in data.qrels[query]}
    assert needed <= set(few.corpus["id"]) and few.corpus["id"][:] == [d for d in data.corpus["id"] if d in set(few.corpus["id"])]
    assert provenance(few.corpus)["caps"] == [{"documents": 20, "judged for queries": 5, "seed": 1}] and provenance(few.corpus)["rows"] == 20
    assert provenance(data.corpus)["caps"] == []
    assert beir.sample_set(data, 5, 20, seed=1).corpus["id"][:] == few.corpus["id"][:] != beir.sample_set(data, 5, 20, seed=2).corpus["id"][:]
    assert len(beir.sample_set(data, None, 1).corpus) == len({d for grades in data.qrels.values() for d in grades})
    whole = beir.sample_set(data, None, None)
    assert whole.corpus is data.corpus and whole.queries is data.queries


# The other ways to rank.


def test_dense_ranking_is_by_cosine():
    documents, queries, _, _ = random_texts()
    documents[7] = 3 * documents[2]  # the same direction: a tie, which goes by the corpus's order
    names = [f"q{i}" for i in range(QUESTIONS)]
    cosine = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        documents / np.linalg.norm(documents, axis=1, keepdims=True)).T
    expected = {name: np.argsort(-np.round(row, 5), kind="stable")[:9].tolist() for name, row in zip(names, cosine)}
    found = DenseRetriever(range(DOCUMENTS), documents).search(names, queries, depth=9)
    assert {name: sorted(row) for name, row in found.items()} == {name: sorted(row) for name, row in expected.items()}
    assert all(np.all(np.diff(cosine[i, found[name]]) < 1e-5) for i, name in enumerate(names))


def test_equal_scores_go_by_the_order_of_the_corpus():
    dense = DenseRetriever(["b", "a", "c", "d"], np.array([[0, 1], [1, 0], [1, 0], [1, 0]], np.float32))
    assert dense.search(["q"], np.array([[2, 0]], np.float32), depth=2) == {"q": ["a", "c"]}
    assert dense.search(["q"], np.array([[0, 0]], np.float32)) == {"q": ["b", "a", "c", "d"]}


def test_bm25_ranks_an_exact_match_first_and_what_shares_no_word_not_at_all():
    texts = ["supersonic flow past a cone", "heat in composite slabs", "", "flow of heat", "slabs of the wing"]
    bm25 = BM25Retriever(list("abcde"), texts)
    found = bm25.search(["x", "y", "z"], ["Heat in composite slabs!", "of the", "unheard"], depth=10)
    assert found["x"][0] == "b" and sorted(found["x"]) == ["b", "d", "e"] and found["y"] == found["z"] == []
    assert bm25.search(["x"], ["heat"], depth=1) == {"x": ["d"]}


def test_reciprocal_rank_fusion_by_hand():
    """a 1/61 + 1/63, b 1/62 + 1/61, c 1/63, d 1/62."""
    first, second = {"q": ["a", "b", "c"], "r": ["a"]}, {"q": ["b", "d", "a"], "r": []}
    assert reciprocal_rank_fusion([first, second]) == {"q": ["b", "a", "d", "c"], "r": ["a"]}


# Metrics and intervals.

QRELS_BY_HAND = {"q": {"d1": 2, "d3": 1, "d9": 1, "d4": 0}}


def test_metrics_by_hand():
    ranking = {"q": ["d1", "d4", "d3"]}
    scores = evaluate_retrieval(ranking, QRELS_BY_HAND).set_index("query").loc["q"]
    best = 2 + 1 / np.log2(3) + 1 / 2
    np.testing.assert_allclose(scores[["nDCG@10", "Recall@100", "MRR@10"]].astype(float), [2.5 / best, 2 / 3, 1])


def test_excluded_documents_leave_the_ranking_before_ranks_are_counted():
    ranking = {"q": ["out", "d4", "d3", "d1"]}
    best = 2 + 1 / np.log2(3) + 1 / 2
    kept = evaluate_retrieval(ranking, QRELS_BY_HAND).iloc[0]
    gone = evaluate_retrieval(ranking, QRELS_BY_HAND, {"q": {"out"}, "other": {"d3"}}).iloc[0]
    assert kept["nDCG@10"] == pytest.approx((1 / 2 + 2 / np.log2(5)) / best) and kept["MRR@10"] == pytest.approx(1 / 3)
    assert gone["nDCG@10"] == pytest.approx((1 / np.log2(3) + 2 / 2) / best) and gone["MRR@10"] == pytest.approx(1 / 2)
    assert kept["Recall@100"] == gone["Recall@100"] == pytest.approx(2 / 3)


def test_metrics_stop_at_their_depth_and_empty_rankings_score_nothing():
    far = {"q": [f"x{i}" for i in range(10)] + ["d1"] + [f"y{i}" for i in range(89)] + ["d3"], "e": []}
    scores = evaluate_retrieval(far, QRELS_BY_HAND | {"e": {"d1": 1}, "not asked": {"d1": 1}}).set_index("query")
    assert list(scores.index) == ["q", "e"]
    assert scores.loc["q"].tolist() == pytest.approx([0, 1 / 3, 0]) and scores.loc["e"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="1 queries are not judged, the first is 'z'"):
        evaluate_retrieval({"z": ["d1"]}, QRELS_BY_HAND)


def per_query(values):
    return pd.DataFrame({"query": [f"q{i}" for i in range(len(values))]} | {metric: values for metric in METRICS})


def test_comparison_by_hand_and_its_intervals():
    generator = np.random.default_rng(0)
    base = generator.uniform(0.2, 0.8, 200)
    table = compare_retrieval({"base": per_query(base), "half": per_query(base / 2), "noisy": per_query(
        base + generator.normal(0, 0.2, 200))}, "base", draws=2000).set_index(["run", "metric"])
    half = table.loc["half", "nDCG@10"]
    assert half["score"] == pytest.approx(base.mean() / 2) and half["difference"] == pytest.approx(-base.mean() / 2)
    assert half[["ratio", "ratio_low", "ratio_high"]].tolist() == pytest.approx([0.5] * 3)
    own = table.loc["base", "MRR@10"]
    assert own[["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]
    width = 2 * 1.96 * base.std() / np.sqrt(200)  # of the normal approximation
    assert own["score_high"] - own["score_low"] == pytest.approx(width, rel=0.1)
    noisy = table.loc["noisy", "Recall@100"]
    assert noisy["ratio_low"] < noisy["ratio"] < noisy["ratio_high"]
    with pytest.raises(ValueError, match="do not hold the same queries"):
        compare_retrieval({"a": per_query(base), "b": per_query(base[:9])}, "a")


# Costs and figures.


def test_synthetic_collections_hold_the_real_documents():
    assert synthetic_rows(5, 5).tolist() == [0, 1, 2, 3, 4]
    fewer, more = synthetic_rows(50, 20), synthetic_rows(5, 1000)
    assert len(set(fewer)) == 20 and fewer.max() < 50
    assert more[:5].tolist() == [0, 1, 2, 3, 4] and len(more) == 1000 and np.bincount(more).min() > 100
    assert (more == synthetic_rows(5, 1000)).all()


@pytest.fixture(scope="module")
def growth():
    documents, queries, logits, own = random_texts()
    tokens, of_queries = aligned(documents, logits, 6, documents), aligned(queries, logits, 2, documents)
    return cost_growth(tokens, documents, SparseSetting(k=6, m=2), own, of_queries, queries, [60, 600, 6000], rounds=2)


def test_costs_grow_with_the_collection(growth):
    assert growth["synthetic"].tolist() == [False, False, True, True, True, True]
    sparse, dense = (growth[growth["method"] == method] for method in ("sparse", "dense"))
    assert dense["operations"].tolist() == [60 * HIDDEN, 600 * HIDDEN, 6000 * HIDDEN]
    np.testing.assert_allclose(sparse["operations"].iloc[2] / sparse["operations"].iloc[0], 100, rtol=0.25)
    assert dense["bytes"].tolist() == [4 * HIDDEN] * 3 and sparse["bytes"].iloc[2] == pytest.approx(6 * 8, rel=0.01)
    assert (growth["ms"] > 0).all() and (growth["low"] <= growth["ms"]).all() and (growth["ms"] <= growth["high"]).all()


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(plt.Text)]


def test_figures_hold_what_they_are_given(growth):
    figure = cost_curves(growth, "costs", unembedding=HIDDEN * VOCABULARY)
    assert all((axis.get_xscale(), axis.get_yscale()) == ("log", "log") for axis in figure.axes)
    assert {"sparse", "dense", "documents in the collection", "one query through the unembedding"} <= set(texts_of(figure))
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), growth["operations"][growth["method"] == "sparse"])
    rows = [{"set": name, "run": run, "kind": run, "score": s, "score_low": s - 0.1, "score_high": s + 0.1}
            for name in ("one", "two") for run, s in (("BM25", 0.25), ("dense", 0.5))]
    figure = effectiveness_bars(pd.DataFrame(rows), "nDCG@10", "bars")
    assert [patch.get_width() for patch in figure.axes[1].patches] == [0.25, 0.5]
    assert {"one", "two", "nDCG@10, with 95 % interval over queries", "  0.250"} <= set(texts_of(figure))
    study = pd.DataFrame([{"k": k, "m": m, "weighting": w, "score": k / 100} for k in (8, 32) for m in (0, 5) for w in "ab"])
    figure = setting_curves(study, "nDCG@10", "study")
    assert [axis.get_title() for axis in figure.axes] == ["query: its own tokens", "query: its own tokens + 5 aligned"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.08, 0.32]
    plt.close("all")


# The real data, where there is any.

REAL = os.environ.get("TP_DATA_DIR")


@pytest.mark.skipif(not REAL, reason="TP_DATA_DIR is not set: no real retrieval data")
def test_real_sets_are_whole_and_bm25_scores_as_it_should(monkeypatch):
    monkeypatch.setenv("TP_DATA_DIR", REAL)
    cranfield, msmarco = load_beir("cranfield"), load_beir("msmarco-sample")
    texts = dict(zip(cranfield.corpus["id"], cranfield.corpus["text"]))
    assert (len(texts), len(cranfield.queries), len(msmarco.corpus), len(msmarco.queries)) == (1400, 225, 500, 472)
    assert [i for i, text in texts.items() if not text] == ["471", "995"]
    assert texts["1"].count("experimental investigation of the aerodynamics") == 1
    assert {len(documents) for documents in cranfield.excluded.values()} == {1} and len(cranfield.excluded) == 225
    ranking = BM25Retriever(list(texts), list(texts.values())).search(cranfield.queries["id"], cranfield.queries["text"])
    scores = [evaluate_retrieval(ranking, cranfield.qrels, out)["nDCG@10"].mean() for out in (None, cranfield.excluded)]
    assert scores == pytest.approx([0.337, 0.385], abs=0.002)
