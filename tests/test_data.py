"""`lib.data`: files written for the test, a loopback server as the hub, the real data if it is there."""

import errno
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import ANY, Mock

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from fake_hub import FakeHub, forget_sources
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import retrieval, sources, texts
from lib.data.files import FILES
from lib.data.retrieval import load_beir, load_beir_sets
from lib.data.sources import DataError, DataSource, EvaluationData, MissingDataError, SampleDataWarning, find_source
from lib.data.sts import STS_TASKS, dev_task, load_sts, sts_tasks
from lib.data.transfer import PAIR_TASKS, SAMPLE_TASKS, TRANSFER_TASKS, load_transfer, transfer_tasks

REAL = os.environ.get("TP_DATA_DIR")
OFFLINE_SWITCHES, DownloadError = sources.OFFLINE_SWITCHES, sources.DownloadError
SAMPLE = DataSource("sample", sources.ROOT / "data" / "sample")
SPLITS = {"STS13": "test", "STS-B": "dev", "SICK-R": "dev", "sample": "test"}  # that these tests read
BINARY = ("MR", "CR", "SUBJ", "MPQA")  # whose files hold one class each, a sentence a line
FNWN, FNWN_SCORES = (f"STS/STS13-en-test/STS.{kind}.FNWN.txt" for kind in ("input", "gs"))
STSB, STSB_ROW = "STS/STSBenchmark/sts-dev.csv", "forum\tf.txt\t2020\t7\t3.4\ta b\tc d\n"
SICK, SICK_HEADER = "SICK/SICK_trial.txt", "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
DEV, MRPC, QRELS = "SST/binary/sentiment-dev", "MRPC/msr_paraphrase_train.txt", "qrels/test.tsv"

pytestmark = pytest.mark.usefixtures("no_data")  # each test starts without data and without a hub


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def judgements(*rows):
    return "query-id\tcorpus-id\tscore\n" + "".join("\t".join(row) + "\n" for row in rows)


RETRIEVAL = {  # the files of a retrieval set
    "corpus.jsonl": lines(
        {"_id": "d1", "title": "Wings", "text": "Wings lift."}, {"_id": "d2", "title": "On heat", "text": "It flows."},
        {"_id": "d3", "text": ""}, {"_id": "q1", "title": None, "text": "what lifts, in Zürich?"}),
    "queries.jsonl": lines(
        {"_id": "q1", "text": "what lifts"}, {"_id": "q2", "text": "heat"}, {"_id": "q3", "text": "not judged"}),
    QRELS: judgements(("q1", "d1", "3"), ("q2", "d2", "1"), ("q2", "d3", "0"))}
HUB_QRELS = lines(*({"query-id": q, "corpus-id": d, "score": s} for q, d, s in (("q1", "d1", 3.0), ("q2", "d2", 1))))


def good_files(task):
    """The files that are read of a task, with two rows each, or those of a retrieval set: path -> content."""
    found = {}
    for file in FILES.get(task, ()):
        if SPLITS.get(task) in (None, *file["rows"]):
            cells = {"sentence1": "a b", "sentence2": "c d", "score": "2", "split": next(reversed(file["rows"]))}
            cells |= {"label": (file["labels"] or [""])[0], "more": ""}
            row = (file["line"] or "{sentence1}").format_map(defaultdict(lambda: "7", cells))
            found[file["path"]] = "".join(f"{line}\n" for line in (file["header"], row, row) if line)
            if file["scores"]:
                found[file["path"].replace(*file["scores"])] = "2\n2\n"
    return found or RETRIEVAL


def put(folder, files):
    """Write files, path -> content; those whose content is None are not there afterwards."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).unlink(missing_ok=True)
        if content is not None:
            (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def load_written(folder, task, files, rows=ANY, **known):
    """Write the files of a good set, with `files` in place of theirs, and load it. `rows`, of each split, and `known`,
    of a retrieval set, are what it has to have; by default whatever it has."""
    put(folder, good_files(task) | files)
    source = DataSource("sample" if task in ("sample", *SAMPLE_TASKS) else "folder", folder)
    with pytest.MonkeyPatch.context() as patch:
        if task == "beir":
            anything = dict.fromkeys(("documents", "queries", "judgements", "missing"), ANY)
            patch.setitem(retrieval.SETS, task, anything | known)
            return load_beir(task, source)
        patch.setitem(FILES, task, [file | {"rows": dict.fromkeys(file["rows"], rows)} for file in FILES[task]])
        return load_sts(task, SPLITS[task], source) if task in SPLITS else load_transfer(task, source)


@pytest.fixture
def tiny(tmp_path):
    return lambda task, files=None, **known: load_written(tmp_path / "tiny", task, files or {}, **known)


def test_semeval_pairs_without_a_score_are_dropped_and_subsets_keep_their_order(tiny):
    data = tiny("STS13", {FNWN: "a cat\ta dog\nnever\tscored\na hat\ta cap", FNWN_SCORES: "0.5\n\n4.25\n"})
    assert data["subset"] == ["FNWN", "FNWN", "headlines", "headlines", "OnWN", "OnWN"]
    assert data["sentence1"][:3] == ["a cat", "a hat", "a b"] and data["sentence2"][:3] == ["a dog", "a cap", "c d"]
    assert data["score"] == [0.5, 4.25, 2, 2, 2, 2] and (data.name, len(data)) == ("STS13", 6)


def test_only_a_line_feed_ends_a_line_and_quotes_are_text(tiny):
    odd = 'so\u0085\u2028\x0b\x0c\x1c "he said'
    line = f'forum\tf.txt\t2020\t7\t3.4\t{odd}\tb "c" d'
    data = tiny("STS-B", {STSB: f"{line}\tlicence\tmore\n{line}\n"})
    assert data.rows[0] == {"subset": "forum", "sentence1": odd, "sentence2": 'b "c" d', "score": 3.4} == data.rows[1]
    data = tiny("MRPC", {MRPC: '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\t" He said\tHe " said\n'})
    assert data.rows[0] == {"split": "train", "sentence1": '" He said', "sentence2": 'He " said', "label": 1}
    data = tiny("MR", {"MR/rt-polarity.pos": b"caf\xe9 \x85 x\x0b\x0c\x1cy\r\nnext"})  # latin-1, as SentEval reads it
    assert data["sentence1"] == ["caf\u00e9 \u0085 x\x0b\x0c\x1cy", "next", "a b", "a b"]
    text = SICK_HEADER + "1\ta girl\ta boy\t1\tNEUTRAL\n2\tit rains\train falls\t4.9\tENTAILMENT\n"
    for content in (text, text.replace("\n", "\r\n"), text.rstrip("\n"), "\ufeff" + text):
        data = tiny("SICK-R", {SICK: content})
        assert data.rows[1] == {"subset": "SICK-R", "sentence1": "it rains", "sentence2": "rain falls", "score": 4.9}


def test_labels_are_those_of_the_file_or_the_coarse_classes_by_alphabet(tiny):
    for task in BINARY:
        positive, negative = good_files(task)
        data = tiny(task, {positive: "good\n\n", negative: '\nbad : 0\t"x\n\n'})
        assert data["sentence1"] == ["good", "", "", 'bad : 0\t"x', ""] and data["label"] == [1, 1, 0, 0, 0]
        assert set(data["split"]) == {"all"} and set(data["sentence2"]) == {""}
        assert positive.endswith(("rt-polarity.pos", "custrev.pos", "subj.objective", "mpqa.pos"))
    classes, (train, test) = ["NUM", "ABBR", "HUM", "LOC", "DESC", "ENTY"], good_files("TREC")
    rows = "".join(f"{name}:x Is : {name} ?\n" for name in classes)
    data = tiny("TREC", {train: rows, test: b"HUM:ind W\xfcr \x85 ?\n"})
    assert data["label"] == [5, 0, 3, 4, 1, 2, 3] and data["split"] == ["train"] * 6 + ["test"]
    assert data["sentence1"][1] == "Is : ABBR ?" and data["sentence1"][6] == "W\u00fcr \u0085 ?"


def test_both_sizes_of_sst2_are_right_and_the_provenance_says_which(tiny):
    for size in (2, 5):
        files = dict.fromkeys(good_files("SST2"), size * "a\t1\n")
        assert tiny("SST2", files, rows=[2, 5]).provenance == {
            "task": "SST2", "splits": {"train": size, "dev": size, "test": size}, "rows": 3 * size,
            "rows_total": 3 * size, "caps": [], "source": {"kind": "folder", "label": "real data"},
            "files": {path: hashlib.sha256(content.encode()).hexdigest() for path, content in files.items()}}


def test_of_retrieval_sets_titles_are_joined_documents_excluded_and_what_lacks_counted_or_left_out(tiny):
    data = tiny("beir")
    assert data.corpus["id"] == ["d1", "d2", "d3", "q1"] and data.queries["id"] == ["q1", "q2"]
    assert data.corpus["text"] == ["Wings lift.", "On heat It flows.", "", "what lifts, in Zürich?"]
    assert data.queries["text"] == ["what lifts", "heat"] and data.qrels == {"q1": {"d1": 3}, "q2": {"d2": 1, "d3": 0}}
    assert data.queries.provenance["rows"] == 2 and list(data.queries.provenance["files"]) == list(RETRIEVAL)
    extra = judgements(("q1", "d2", "-1"), ("q1", "d3", "-1"))
    assert tiny("beir", {"qrels/out.tsv": extra}, excluded="qrels/out.tsv").excluded == {"q1": {"d2", "d3"}}
    assert tiny("beir", excluded="self").excluded == {"q1": {"q1"}}
    with pytest.raises(DataError, match="out.tsv, line 2: expected a document of corpus.jsonl, found 'd9'"):
        tiny("beir", {"qrels/out.tsv": judgements(("q2", "d9", "-1"))}, excluded="qrels/out.tsv")
    files = {QRELS: RETRIEVAL[QRELS] + "q1\tlost\t1\n"}
    assert tiny("beir", files, judgements=4, missing=1, documents=4, queries=2).qrels["q1"] == {"d1": 3, "lost": 1}
    for known in ({"missing": 0}, {"judgements": 3}, {"documents": 5}, {"queries": 3}):
        [(what, count)] = known.items()
        with pytest.raises(DataError, match=rf"found \d for {what}, expected {count}"):
            tiny("beir", files, **known)
    assert tiny("beir", {QRELS: None, "qrels/test.jsonl": HUB_QRELS}).qrels["q2"] == {"d2": 1}


MALFORMED = {  # data set, file, its content, what the message says after its name
    "one column": ("STS13", FNWN, "a\tb\nalone\n", ", line 2: expected '{sentence1}"),
    "scores missing": ("STS13", FNWN_SCORES, "1\n", ": found 1 lines, expected 2"),
    "no file": ("STS13", FNWN_SCORES, None, ": expected this file"),
    "not UTF-8": ("STS13", FNWN, b"a\tb\nc\td\xe9\n", ", line 2: expected UTF-8, found another byte"),
    "too many": ("SST2", DEV, 3 * "a\t1\n", ": found 3 examples of the split 'dev', expected 2"),
    "no header": ("SICK-R", SICK, "1\ta\tb\t2\tNEUTRAL\n", ", line 1: expected the header 'pair_ID"),
    "other split": ("paraphrase", "paraphrase.tsv", "split\tlabel\tsentence1\tsentence2\ntrian\t1\ta\tb\n",
                    ", line 2: expected the split train or test, found 'trian'"),
    "half a text": ("beir", "corpus.jsonl", '{"_id": "d1", "text": "\\ud800"}', ", line 1: expected a JSON object"),
    "lists in lists": ("beir", "queries.jsonl", "[" * 100_000, ", line 1: expected a JSON object"),
    "empty query": ("beir", "queries.jsonl", lines({"_id": "q1", "text": " "}), ", line 1: expected a text"),
    "half a grade": ("beir", QRELS, RETRIEVAL[QRELS] + "q1\td2\t0.5\n", ", line 5: expected a whole score from 0"),
    "judged twice": ("beir", QRELS, RETRIEVAL[QRELS] + "q1\td1\t1\n", ", line 5: expected a pair that no line before")}


@pytest.mark.parametrize("task, path, content, message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_are_named_with_line_and_expectation(tiny, task, path, content, message):
    with pytest.raises(DataError, match=re.escape(path + message)):
        tiny(task, {path: content}, rows=2)


def test_unknown_names_list_what_exists():
    real = DataSource("folder", sources.DATA)
    for load, arguments, exists in (
        (load_sts, ("STSB", "test", real), "STS12, .*STS-B, SICK-R"), (load_beir, ("trec",), "cranfield, msmarco"),
        (load_sts, ("STS-B", "validation", real), "train, dev, test"),
        (load_sts, ("STS-B", "train", SAMPLE), "dev, test"), (load_transfer, ("MR", SAMPLE), "sentiment, .*phrase")):
        with pytest.raises(ValueError, match=f"choose from {exists}"):
            load(*arguments)


field = st.text(st.characters(codec="utf-8", exclude_characters="\t\n"), max_size=8) | st.sampled_from(
    ["a\u2028b", "a\x85b", "a\x0bb", 'a "b', "\ufeffa"])  # none of these ends a line
number = st.sampled_from(["0", "1", "2.5", "5", "5.01", "-1", "nan", "inf", "1e999", "", " ", "٣", "1_0", "0x1"])
literal = st.sampled_from(["null", "true", '"q1"', '""', "[]", "[[]]", "{}", "7", '"\\ud800"'])
raw = st.lists(st.binary(max_size=9) | st.sampled_from(
    [b"a\tb", b"\t", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff", b"1", b"5\n", b'"', b"{}"]), max_size=12).map(b"".join)


@st.composite
def odd_contents(draw, good):
    """The lines of a good file, up to three of them again with an odd word; or other bytes."""
    rows = good.splitlines()
    for row in draw(st.lists(st.sampled_from(rows), max_size=3)):
        words = re.split(r"(\t|[:,]? )", row)
        words[2 * draw(st.integers(0, len(words) // 2))] = draw(field | number | literal)
        rows.insert(draw(st.integers(0, len(rows))), "".join(words))
    return "".join(row + draw(st.sampled_from(["\n", "\r\n"])) for row in rows).encode()


@pytest.mark.parametrize("task", ["STS13", "STS-B", "SICK-R", "sample", "MR", "SST2", "TREC", "MRPC", "beir"])
@settings(max_examples=40)
@given(data=st.data())
def test_files_give_valid_rows_or_a_data_error(tmp_path, task, data):
    good = good_files(task)
    path = data.draw(st.sampled_from(list(good)))
    try:
        found = load_written(tmp_path, task, {path: data.draw(odd_contents(good[path]) | raw)})
    except DataError as error:
        assert any(re.search(rf"{name}(, line \d+: expected|: (found|expected) )", str(error)) for name in good), error
        return
    if task == "beir":
        assert all(grade >= 0 for grades in found.qrels.values() for grade in grades.values())
        assert set(found.queries["id"]) == set(found.qrels) and len(set(found.corpus["id"])) == len(found.corpus)
        return
    if task in SPLITS:
        assert all((task == "SICK-R") <= score <= 5 for score in found["score"])
    else:
        assert set(found["label"]) <= set(range(6 if task == "TREC" else 2))
    # Nothing is lost or changed on the way: each sentence is part of a file.
    whole = "".join((tmp_path / f["path"]).read_bytes().decode(f["encoding"]) for f in FILES[task] if f["path"] in good)
    assert all(text in whole and (text.strip() or task in BINARY) for text in found.texts)


def made_up(count, name="made up", **columns):
    return EvaluationData(name, Dataset.from_dict({"row": list(range(count))} | columns), {"rows": count, "caps": []})


@settings(max_examples=25)
@given(count=st.integers(1, 90), sizes=st.lists(st.integers(1, 99), min_size=2, max_size=4).map(sorted))
def test_samples_are_nested_and_are_the_same_whatever_was_drawn_before(count, sizes):
    data = made_up(count)
    drawn = [data.first(size)["row"] for size in sizes]
    assert all(set(fewer) <= set(more) for fewer, more in zip(drawn, drawn[1:]))
    assert all(rows == sorted(set(rows)) and len(rows) == min(size, count) for rows, size in zip(drawn, sizes))
    again, first = data.first(sizes[-1]).first(sizes[0]), data.first(sizes[0])
    assert again["row"] == first["row"] and again.provenance == first.provenance
    odd = data.where([row % 2 == 1 for row in data["row"]], "odd")
    assert set(odd.first(sizes[0])["row"]) >= {row for row in first["row"] if row % 2}


def test_a_sample_is_the_same_everywhere_is_each_data_set_s_own_and_says_in_its_provenance_what_it_is():
    data = made_up(200)
    assert data.first(5)["row"] == [33, 61, 79, 117, 191]  # in every version of this package and of numpy
    assert data.first(50)["row"] != made_up(200, "another").first(50)["row"] != made_up(201).first(50)["row"]
    assert data.first(None) is data.first(200) is data.first(999) is data
    with pytest.raises(ValueError, match="at least one row, got count=0"):
        data.first(0)
    with pytest.raises(ValueError, match="The mask has 2 values, made up has 200 rows"):
        data.where([True, False], "too short")
    genres = ["b"] * 30 + ["a"] * 4 + ["c"] * 40 + ["b"] * 30
    data, caps = made_up(len(genres), text=genres), [{"first": 10, "within": "text"}]
    few, more = data.first(10, within="text"), data.first(12, within="text")
    assert Counter(few["text"]) == {"b": 10, "a": 4, "c": 10} and few["row"] == sorted(few["row"])
    assert more.first(10, within="text")["row"] == few["row"]
    assert few.provenance == {"rows": 24, "caps": caps} and data.provenance["caps"] == []
    assert few.first(5).provenance["caps"] == [*caps, {"first": 5}] and data.first(60, within="text") is data
    for kind in (list, np.array, pd.Series):
        part = data.where(kind([row in (1, 30) for row in data["row"]]), "of interest")
        assert part.texts == ["b", "a"] and part.provenance == {"rows": 2, "caps": [{"where": "of interest"}]}


def test_sampled_retrieval_sets_are_nested_and_keep_what_their_queries_need():
    data = load_beir("sample")
    assert retrieval.sample_set(data, None, None).corpus is data.corpus
    smaller = retrieval.sample_set(data, 2, 5)
    for queries, documents in ((2, 5), (5, 5), (5, 20), (9, 60), (None, 60)):
        few = retrieval.sample_set(data, queries, documents)
        kept, needed = set(few.corpus["id"]), {i for query in few.queries["id"] for i in data.qrels[query]}
        assert len(few.queries) == (queries or 30) and needed <= kept
        assert documents <= len(kept) == few.corpus.provenance["rows"] <= documents + len(needed)
        assert few.corpus["id"] == [document for document in data.corpus["id"] if document in kept]
        assert set(smaller.corpus["id"]) <= kept and set(smaller.queries["id"]) <= set(few.queries["id"])
        smaller = few
    held, rest = retrieval.hold_out(data.queries, 10)
    assert held["id"] == data.queries.first(10)["id"] and sorted(held["id"] + rest["id"]) == sorted(data.queries["id"])
    with pytest.raises(ValueError, match="Of 30 queries, 30 cannot be held out"):
        retrieval.hold_out(data.queries, 30)


def test_the_folder_comes_before_downloads_and_downloads_before_the_sample(monkeypatch, tmp_path):
    with pytest.warns(SampleDataWarning, match="TP_DATA_DIR/senteval .*downloads/senteval .*the hub") as caught:
        assert find_source() == find_source() == DataSource("sample", sources.DATA / "sample")
    assert len(caught) == 1  # it is loud once
    assert (sts_tasks(), dev_task(), transfer_tasks()) == (("sample",), "sample", SAMPLE_TASKS)
    forget_sources()
    (sources.DATA / "downloads" / "senteval").mkdir(parents=True)
    assert find_source() == DataSource("downloads", sources.DATA / "downloads" / "senteval")
    (tmp_path / "mine" / "senteval").mkdir(parents=True)
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "mine"))
    assert find_source() == DataSource("folder", tmp_path / "mine" / "senteval")
    assert (sts_tasks(), dev_task(), transfer_tasks()) == (STS_TASKS, "STS-B", TRANSFER_TASKS)
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "typo"))
    with pytest.raises(DataError, match="TP_DATA_DIR is '.*typo', so SentEval's data was expected in .*typo/senteval"):
        load_sts("STS12")


def test_the_sample_stands_in_for_retrieval_sets_only_if_none_can_be_had(monkeypatch, tmp_path):
    with pytest.warns(SampleDataWarning, match="compare with no paper.*'cranfield' cannot be found.*'fiqa' cannot be"):
        found, reasons = load_beir_sets(["cranfield", "fiqa"])
    assert list(found) == ["sample"] and list(reasons) == ["cranfield", "fiqa"]
    assert "the hub (not there)" in reasons["cranfield"] and "go online" in reasons["fiqa"]
    put(tmp_path / "beir" / "tiny", RETRIEVAL)
    monkeypatch.setitem(retrieval.SETS, "tiny", {"documents": 4, "queries": 2, "judgements": 3})
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path))
    found, reasons = load_beir_sets(["tiny", "fiqa"])
    assert found["tiny"].corpus.provenance["source"]["kind"] == "folder" and list(reasons) == ["fiqa"]


@pytest.mark.filterwarnings("ignore::lib.data.sources.SampleDataWarning")
def test_the_samples_load_and_no_sentence_is_in_two_splits():
    data, dev = load_sts("STS12", source=SAMPLE), load_sts("STS-B", "dev", SAMPLE)  # it stands in for any
    assert data.name == dev.name == "sample" and not {*data.texts} & {*dev.texts}
    for task in SAMPLE_TASKS:
        frame, labels = load_transfer(task, SAMPLE).to_pandas(), set(range(6 if task == "question_type" else 2))
        assert set(frame["split"]) >= {"train", "test"} and frame.groupby("sentence1")["split"].nunique().max() == 1
        assert all(set(part["label"]) == labels for _, part in frame.groupby("split"))
        assert frame["sentence2"].str.strip().all() == (task in PAIR_TASKS)
    found, missing = texts.alignment_texts(10)
    assert list(found) == ["sample STS", "sample documents"] and not missing
    assert len(found["sample STS"].texts) <= 10 == len(found["sample documents"].texts)
    assert set(found["sample STS"].texts) < set(texts.pair_texts(load_sts("sample")).texts)


def tar_of(*members):
    """A tar file in memory, of plain files `(name, text)` and of anything else `(name, "", kind, link)`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text, *special in members:
            member = tarfile.TarInfo(name)
            member.size, (member.type, member.linkname) = len(text), special or (tarfile.REGTYPE, "")
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


GOOD_TAR = tar_of((STSB, STSB_ROW), ("SICK/readme.txt", "words"))
NESTED_TAR = tar_of(("data/downstream/" + STSB, STSB_ROW), ("data/downstream/SICK/readme.txt", "words"))


@pytest.fixture
def hub(monkeypatch):
    hub = FakeHub({"senteval.tar": GOOD_TAR})
    forget_sources()
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield hub
    hub.close()


@pytest.mark.parametrize("content", [GOOD_TAR, NESTED_TAR], ids=["flat", "nested"])
def test_a_good_archive_is_unpacked_and_downloaded_once_however_many_want_it(hub, content):
    hub.files["senteval.tar"], target = content, sources.DATA / "downloads" / "senteval"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: sources.fetch(*sources.SENTEVAL[:2], target, "STS"), range(3)))
    asked = len(hub.requests)
    assert find_source() == DataSource("downloads", target) and len(hub.requests) == asked
    assert hub.sent("senteval.tar") == 1
    assert (target / STSB).read_text() == STSB_ROW and (target / "SICK" / "readme.txt").is_file()


@pytest.mark.parametrize("failure", ["corpus.jsonl", "queries.jsonl", "gone"])
def test_a_set_of_files_is_downloaded_once_and_whole_or_not_at_all(hub, monkeypatch, failure):
    known = {"documents": 4, "queries": 2, "judgements": 2, "repo": "mteb/scifact"}
    monkeypatch.setitem(retrieval.SETS, "scifact", known)
    folder = sources.DATA / "downloads" / "beir" / "scifact"
    contents = (RETRIEVAL["corpus.jsonl"], RETRIEVAL["queries.jsonl"], HUB_QRELS)
    files = {name: content.encode() for name, content in zip(retrieval.HUB_FILES, contents, strict=True)}
    hub.files, hub.stated = dict(files), {failure: "0" * 40}
    if failure == "gone":
        del hub.files["queries.jsonl"]
    with pytest.raises(DownloadError, match="404" if failure == "gone" else f"the hash of {failure} was not"):
        load_beir_sets(["scifact", "cranfield"])
    assert not folder.exists()
    hub.files, hub.stated = files, {}
    data = load_beir("scifact")
    assert data.corpus.provenance["source"]["kind"] == "downloads" and data.qrels == {"q1": {"d1": 3}, "q2": {"d2": 1}}
    assert sorted(p.name for p in folder.iterdir()) == ["corpus.jsonl", "qrels", "queries.jsonl"]
    asked = len(hub.requests)
    assert load_beir("scifact").corpus["text"] == data.corpus["text"] and len(hub.requests) == asked


FULL_DISK = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
# What went wrong at a hub that answers: what brings it about, and what the message says.
BAD_HUBS = [
    (lambda hub, patch: hub.files.pop("senteval.tar"), "404"),
    (lambda hub, patch: patch.setenv("HF_ENDPOINT", "typo"), "http"),
    (lambda hub, patch: hub.stated.update({"senteval.tar": "0" * 64}), "hash of senteval.tar .*deleted"),
    (lambda hub, patch: patch.setattr(sources, "hf_hub_download", FULL_DISK), "No space left"),
    *((lambda hub, patch, mode=mode: setattr(hub, "mode", mode), said) for mode, said in (
        ("404", "404"), ("500", "500"), ("GET fails", "403"), ("page", "could not be downloaded")))]
BAD_TARS = {
    "opened": b"no tar at all", "no folder 'STS'": tar_of(("GLUE/x", "y")), "escaped": tar_of(("../escaped", "")),
    "link": tar_of((STSB, ""), ("STS/link", "", tarfile.SYMTYPE, "../../escaped")),
    "STS/hard": tar_of((STSB, ""), ("STS/hard", "", tarfile.LNKTYPE, STSB)),
    "STS/pipe": tar_of((STSB, ""), ("STS/pipe", "", tarfile.FIFOTYPE, ""))}
BAD_HUBS += [(lambda hub, _, tar=tar: hub.files.update({"senteval.tar": tar}), said) for said, tar in BAD_TARS.items()]


@pytest.mark.parametrize("go_wrong, said", BAD_HUBS)
def test_a_hub_that_answers_badly_is_an_error_and_never_the_sample(hub, monkeypatch, tmp_path, go_wrong, said):
    with monkeypatch.context() as patch:
        go_wrong(hub, patch)
        with pytest.raises(DownloadError, match=f"{said}.*put the files there by hand") as caught:
            find_source()
    assert not isinstance(caught.value, sources.HubUnreachableError) and sources.hub_unreachable is None
    assert not (sources.DATA / "downloads" / "senteval").exists() and not list(tmp_path.rglob("escaped*"))
    if hub.files.get("senteval.tar", GOOD_TAR) == GOOD_TAR:  # once the hub is as it should be, the next try succeeds
        hub.mode, hub.stated, hub.files = "good", {}, {"senteval.tar": GOOD_TAR}
        assert find_source().kind == "downloads"


@pytest.mark.parametrize("why", ["hang", "drip", "drop", "closed", "no name", "another process", *OFFLINE_SWITCHES])
def test_only_a_hub_that_does_not_answer_or_must_not_be_asked_is_replaced_by_the_sample(hub, monkeypatch, why):
    monkeypatch.setattr(sources, "HUB_TIMEOUT", 0.5)
    hub.mode, asks = why, why not in ("another process", *OFFLINE_SWITCHES)
    if why == "closed":
        hub.close()
    elif why == "no name":
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    elif why == "another process":
        sources.hub_unreachable = f"not asked, because {why} found it silent"
    elif why in OFFLINE_SWITCHES:
        monkeypatch.setenv(why, "1")
    with pytest.warns(SampleDataWarning, match="cannot be reached" if asks else f"not asked, because {why}"):
        assert find_source().is_sample
    asked = len(hub.requests)
    with pytest.raises(MissingDataError, match="STR-2022 cannot be found.*go online and start again"):
        texts.load_str2022()
    assert len(hub.requests) == asked and (asks or not asked)
    if not asks:
        monkeypatch.setenv(why, "0")
        forget_sources()
        assert find_source().kind == "downloads"


def test_an_interrupted_unpacking_is_not_trusted_and_goes_well_the_next_time(hub, monkeypatch):
    def stop_halfway(self, path, **_):
        self.extract(self.getmembers()[0], path, filter="data")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tarfile.TarFile, "extractall", stop_halfway)
        find_source()
    assert not (sources.DATA / "downloads" / "senteval").exists()
    assert (find_source().path / "SICK" / "readme.txt").is_file() and hub.sent("senteval.tar") == 1
    assert [p.name for p in (sources.DATA / "downloads").iterdir() if p.is_dir()] == ["senteval"]


def test_str2022_is_read_as_pairs_or_refused(tmp_path, monkeypatch):
    def load(content):
        put(tmp_path / "str-2022", {texts.STR2022_FILE: content})
        return texts.load_str2022()
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(texts, "STR2022_ROWS", 2)
    good = 'PairID,Text,Score\n1,"A dog runs.\nA ""cat"", too.",0.5\n2,"One.\nTwo.",1\n'
    for data in (load(good), load(good.replace("\n", "\r\n"))):
        assert data["sentence1"] == ["A dog runs.", "One."] and data["sentence2"] == ['A "cat", too.', "Two."]
        assert data["score"] == [0.5, 1.0]
    endless = 'PairID,Text,Score\n1,"a\nb,0.5\n' + "2,a text of thirty-two characters.,0.5\n" * 5_000
    for content, message in (
        (good.replace("0.5", "1.5"), "pair 1: expected from 0 to 1"), (endless, "pair 1: expected a table with"),
        (good.replace("One.\nTwo.", "One."), "pair 2: expected two sentences"), ("", "found 0 pairs, expected 2")):
        with pytest.raises(DataError, match=f"{texts.STR2022_FILE}.*{message}"):
            load(content)


@pytest.mark.skipif(not REAL, reason="TP_DATA_DIR is not set: no real evaluation data")
def test_real_data_loads_whole(monkeypatch):
    monkeypatch.setenv("TP_DATA_DIR", REAL)
    assert all(load_sts(task, split).texts for task in STS_TASKS for file in FILES[task] for split in file["rows"])
    empty = {task: load_transfer(task)["sentence1"].count("") for task in TRANSFER_TASKS}
    assert empty == dict.fromkeys(TRANSFER_TASKS, 0) | {"CR": 4, "MPQA": 3}
    found, missing = texts.alignment_texts(None)
    assert not missing and len(found["MS MARCO"].texts) == 500 and len(found["STS12 SMTnews"].texts) == 297
