"""`lib.data.retrieval`: made-up sets in BEIR's layout, a loopback server as the hub, the sample."""

import hashlib
import json
import re

import pytest
from fake_hub import serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import field, number, put, raw

from lib.data import sources
from lib.data.download import DownloadError
from lib.data.retrieval import HUB_FILES, SETS, hold_out, load_beir, load_beir_sets, sample_set
from lib.data.sources import DataError, DataSource, MissingDataError, SampleDataWarning

pytestmark = pytest.mark.usefixtures("no_data")  # each test starts without data and without a hub


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def pairs(*rows):
    return "query-id\tcorpus-id\tscore\n" + "".join("\t".join(row) + "\n" for row in rows)


CORPUS = lines(
    {"_id": "d1", "title": "Wings", "text": "Wings lift."}, {"_id": "d2", "title": "On heat", "text": "It flows."},
    {"_id": "d3", "text": ""}, {"_id": "q1", "title": None, "text": "what lifts, in Zürich?"},
)
QUERIES = lines({"_id": "q1", "text": "what lifts"}, {"_id": "q2", "text": "heat"}, {"_id": "q3", "text": "not judged"})
QRELS = pairs(("q1", "d1", "3"), ("q2", "d2", "1"), ("q2", "d3", "0"))
HUB_QRELS = lines(*({"query-id": q, "corpus-id": d, "score": s} for q, d, s in (("q1", "d1", 3.0), ("q2", "d2", 1))))
FILES = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.tsv": QRELS}


def load_written(folder, files, known, name="tiny"):
    """Write these files beside those of a good set (None: not there), with what is known of it, and load it."""
    for path, content in (FILES | files).items():
        (folder / path).unlink(missing_ok=True)
        if content is not None:
            put(folder / path, content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETS, name, {"documents": 4, "queries": 2, "judgements": 3} | known)
        return load_beir(name, DataSource("folder", folder))


@pytest.fixture
def tiny(tmp_path):
    return lambda files=None, **known: load_written(tmp_path / "tiny", files or {}, known)


# What is read, and how.


def test_titles_are_joined_once_and_queries_without_judgement_left_out(tiny):
    data = tiny()
    assert data.corpus["id"] == ["d1", "d2", "d3", "q1"] and data.queries["id"] == ["q1", "q2"]
    assert data.corpus["text"] == ["Wings lift.", "On heat It flows.", "", "what lifts, in Zürich?"]
    assert data.queries["text"] == ["what lifts", "heat"] and data.qrels == {"q1": {"d1": 3}, "q2": {"d2": 1, "d3": 0}}
    assert data.name == "tiny" and data.excluded == {} and not data.source.is_sample
    hashes = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in FILES.items()}
    expected = {"task": "tiny", "part": "queries", "rows": 2, "rows_total": 2, "files": hashes, "caps": []}
    assert data.queries.provenance == expected | {"source": {"kind": "folder", "label": "real data"}}
    assert tiny({"qrels/test.tsv": None, "qrels/test.jsonl": HUB_QRELS}, judgements=2).qrels["q2"] == {"d2": 1}


def test_excluded_documents_are_read_and_missing_ones_counted(tiny):
    extra = pairs(("q1", "d2", "-1"), ("q1", "d3", "-1"))
    assert tiny({"qrels/out.tsv": extra}, excluded="qrels/out.tsv").excluded == {"q1": {"d2", "d3"}}
    assert tiny(excluded="self").excluded == {"q1": {"q1"}}
    with pytest.raises(DataError, match="out.tsv, line 2: expected a document of corpus.jsonl, found 'd9'"):
        tiny({"qrels/out.tsv": pairs(("q2", "d9", "-1"))}, excluded="qrels/out.tsv")
    files = {"qrels/test.tsv": QRELS + "q1\tlost\t1\n"}
    assert tiny(files, judgements=4, missing=1).qrels["q1"] == {"d1": 3, "lost": 1}
    with pytest.raises(DataError, match="found 1 for missing, expected 0"):
        tiny(files, judgements=4)


MALFORMED = {  # file, its content, what the message says
    "half a character": ("corpus.jsonl", '{"_id": "d1", "text": "\\ud800"}', "line 1: expected a JSON object"),
    "lists in lists": ("queries.jsonl", "[" * 100_000, "line 1: expected a JSON object"),
    "no text": ("queries.jsonl", QUERIES + '{"_id": "q4"}\n', "line 4: expected a JSON object with _id, text"),
    "same id": ("corpus.jsonl", CORPUS + CORPUS, "line 5: expected an _id that no line before has, found 'd1'"),
    "empty query": ("queries.jsonl", lines({"_id": "q1", "text": " "}), "line 1: expected a text"),
    "no header": ("qrels/test.tsv", "q1\td1\t3\n", "line 1: expected the header 'query-id"),
    "half a grade": ("qrels/test.tsv", QRELS + "q1\td2\t0.5\n", "line 5: expected a whole score from 0, found '0.5'"),
    "no such query": ("qrels/test.tsv", QRELS + "q9\td2\t1\n", "line 5: expected a query of queries.jsonl, found 'q9'"),
    "judged twice": ("qrels/test.tsv", QRELS + "q1\td1\t1\n", "line 5: expected a pair that no line before has"),
    "no file": ("qrels/test.tsv", None, "expected this file"),
    "judgements": ("qrels/test.tsv", QRELS + "q1\td2\t1\n", "found 4 for judgements, expected 3"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named_with_line_and_expectation(tiny, case):
    name, content, message = MALFORMED[case]
    with pytest.raises(DataError, match=f"({name}.*|: )" + re.escape(message)):
        tiny({name: content})


simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
value = simple | st.lists(simple, max_size=2) | st.sampled_from(["q1", "d1", "1", 1, 0.5, ""])
FILE_KEYS = {"corpus.jsonl": ["_id", "text", "title"], "queries.jsonl": ["_id", "text"], "qrels/test.tsv": []}


@pytest.mark.parametrize("name", FILE_KEYS)
@settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_lines_after_the_good_ones_give_a_valid_set_or_a_data_error(tmp_path_factory, name, data):
    odd = st.dictionaries(st.sampled_from(FILE_KEYS[name] or ["_id"]), value).map(json.dumps)
    if not FILE_KEYS[name]:
        cell = st.sampled_from(["q1", "d2", "d3", "1"]) | field | number
        odd = st.lists(cell, min_size=1, max_size=4).map("\t".join)
    more = data.draw(st.lists(odd, max_size=2).map("\n".join) | raw)
    more = more.encode() if isinstance(more, str) else more
    part = {"corpus.jsonl": {"documents": 4}, "qrels/test.tsv": {"judgements": 3}}.get(name, {})
    counts = {what: count + len(more.splitlines()) for what, count in part.items()}
    try:
        found = load_written(tmp_path_factory.mktemp("beir"), {name: FILES[name].encode() + more}, counts)
    except DataError as error:
        assert re.search(rf"{name}, line \d+: expected|: found \d+ for ", str(error)), error
    else:
        assert found.corpus["id"][:4] == ["d1", "d2", "d3", "q1"] and found.corpus["text"][0] == "Wings lift."
        assert found.qrels["q1"]["d1"] == 3 and all(g >= 0 for grades in found.qrels.values() for g in grades.values())


# Parts of a set.


def test_sampled_sets_are_nested_and_keep_what_their_queries_need():
    data = load_beir("sample")
    assert sample_set(data, None, None).corpus is data.corpus and data.source.is_sample
    smaller = sample_set(data, 2, 5)
    for queries, documents in ((2, 5), (5, 5), (5, 20), (9, 60), (None, 60)):
        few = sample_set(data, queries, documents)
        kept, needed = set(few.corpus["id"]), {i for query in few.queries["id"] for i in data.qrels[query]}
        assert len(few.queries) == (queries or 30) and needed <= kept
        assert documents <= len(kept) == few.corpus.provenance["rows"] <= documents + len(needed)
        assert few.corpus["id"] == [document for document in data.corpus["id"] if document in kept]
        assert set(smaller.corpus["id"]) <= kept and set(smaller.queries["id"]) <= set(few.queries["id"])
        smaller = few


def test_queries_are_held_out_and_the_rest_is_the_rest():
    queries = load_beir("sample").queries
    held, rest = hold_out(queries, 10)
    assert len(held) == 10 and sorted(held["id"] + rest["id"]) == sorted(queries["id"])
    assert set(hold_out(queries, 5)[0]["id"]) < set(held["id"]) == set(queries.first(10)["id"])
    assert rest.provenance["caps"] == [{"where": "without the first 10"}] and rest.provenance["rows"] == 20
    with pytest.raises(ValueError, match="Of 30 queries, 30 cannot be held out"):
        hold_out(queries, 30)


# Where sets come from.


def test_what_cannot_be_had_says_what_to_do_and_the_sample_stands_in_only_for_all(monkeypatch, tmp_path):
    with pytest.raises(MissingDataError, match=r"downloads/beir/cranfield \(not there\), the hub \(not there\)"):
        load_beir("cranfield")
    with pytest.raises(ValueError, match="Unknown retrieval set 'trec'; choose from cranfield, msmarco-sample"):
        load_beir("trec")
    with pytest.warns(SampleDataWarning, match="compare with no paper.*'cranfield' cannot be found.*'fiqa' cannot be"):
        found, reasons = load_beir_sets(["cranfield", "fiqa"])
    assert list(found) == ["sample"] and list(reasons) == ["cranfield", "fiqa"]
    for name, content in FILES.items():
        put(tmp_path / "mine" / "beir" / "tiny" / name, content)
    monkeypatch.setitem(SETS, "tiny", {"documents": 4, "queries": 2, "judgements": 3})
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "mine"))
    found, reasons = load_beir_sets(["tiny", "fiqa"])
    assert found["tiny"].source.kind == "folder" and list(reasons) == ["fiqa"]


@pytest.mark.parametrize("failure", ["corpus.jsonl", "queries.jsonl", "gone"])
def test_a_set_is_downloaded_once_and_whole_or_not_at_all(monkeypatch, failure):
    monkeypatch.setitem(SETS, "scifact", {"documents": 4, "queries": 2, "judgements": 2, "repo": "mteb/scifact"})
    folder = sources.DATA / "downloads" / "beir" / "scifact"
    files = dict(zip(HUB_FILES, (CORPUS.encode(), QUERIES.encode(), HUB_QRELS.encode()), strict=True))
    with serving({k: v for k, v in files.items() if failure != "gone" or "corpus" in k}, monkeypatch) as hub:
        hub.stated[failure] = "0" * 40
        with pytest.raises(DownloadError, match="404" if failure == "gone" else f"the hash of {failure} was not"):
            load_beir_sets(["scifact", "cranfield"])
        assert not folder.exists()
        hub.stated, hub.files = {}, files
        data = load_beir("scifact")
        assert data.source == DataSource("downloads", folder) and data.qrels == {"q1": {"d1": 3}, "q2": {"d2": 1}}
        assert sorted(p.name for p in folder.iterdir()) == ["corpus.jsonl", "qrels", "queries.jsonl"]
        asked = len(hub.requests)
        assert load_beir("scifact").corpus["text"] == data.corpus["text"] and len(hub.requests) == asked
