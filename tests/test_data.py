"""`lib.data`: files written for the test, a loopback server as the hub, the real data if it is there.

Retrieval sets are in `test_beir.py`.
"""

import errno
import hashlib
import io
import os
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from unittest.mock import Mock

import numpy as np
import pytest
from datasets import Dataset
from fake_hub import serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.data import download, sources, texts
from lib.data.download import DownloadError
from lib.data.files import FILES
from lib.data.sources import DataError, DataSource, EvaluationData, MissingDataError, SampleDataWarning, find_source
from lib.data.sts import STS_TASKS, dev_task, load_sts, sts_tasks
from lib.data.transfer import PAIR_TASKS, SAMPLE_TASKS, TRANSFER_TASKS, load_transfer, transfer_tasks

REAL = os.environ.get("TP_DATA_DIR")
SAMPLE = DataSource("sample", sources.ROOT / "data" / "sample")
BINARY = ("MR", "CR", "SUBJ", "MPQA")  # whose files hold one class each
STSB, STSB_ROW = "STS/STSBenchmark/sts-dev.csv", "forum\tf.txt\t2020\t7\t3.4\ta b\tc d\n"
SICK = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"

pytestmark = pytest.mark.usefixtures("no_data")  # each test starts without data and without a hub


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def load_written(folder, task, contents, counts=(), split=None):
    """Write a task's files (those of a split; None: not there; a pair: with scores), expect so many examples, load."""
    parts, changed = [file for file in FILES[task] if split in (None, *file["rows"])], []
    for file, content, count in zip_longest(parts, contents, counts):
        both = content if isinstance(content, tuple) else (content,)
        for path, text in zip((file["path"], file["path"].replace(".input.", ".gs.")), both):
            if text is not None:
                put(folder / path, text)
        changed.append(file | {"rows": dict.fromkeys(file["rows"], 1 if count is None else count)})
    source = DataSource("sample" if task in ("sample", *SAMPLE_TASKS) else "folder", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FILES, task, changed)
        return load_sts(task, split, source) if split else load_transfer(task, source)


@pytest.fixture
def tiny(tmp_path):
    return lambda *arguments, **options: load_written(tmp_path / "tiny", *arguments, **options)


# What is read, and how.


def test_semeval_pairs_without_a_score_are_dropped_and_subsets_keep_their_order(tiny):
    fnwn = ("a cat\ta dog\nnever\tscored\na hat\ta cap\n", "0.5\n\n4.25\n")
    data = tiny("STS13", [fnwn, ("a b\tc d\n", "1.0\n"), ("x\ty", "5")], [2, 1, 1], "test")
    assert data["subset"] == ["FNWN", "FNWN", "headlines", "OnWN"] and data["score"] == [0.5, 4.25, 1.0, 5.0]
    assert data["sentence1"] == ["a cat", "a hat", "a b", "x"] and data["sentence2"] == ["a dog", "a cap", "c d", "y"]
    assert (data.name, len(data)) == ("STS13", 4) and list(data.to_pandas().columns) == data.rows.column_names


def test_only_a_line_feed_ends_a_line_and_quotes_are_text(tiny):
    odd = 'so\u0085\u2028\x0b\x0c\x1c "he said'
    line = f'forum\tf.txt\t2020\t7\t3.4\t{odd}\tb "c" d'
    data = tiny("STS-B", [f"{line}\tlicence\tmore\n{line}\n"], [2], "dev")
    assert data.rows[0] == {"subset": "forum", "sentence1": odd, "sentence2": 'b "c" d', "score": 3.4} == data.rows[1]
    data = tiny("MRPC", [MRPC + '1\t1\t2\t" He said\tHe " said\n', MRPC.strip("\ufeff") + "0\t1\t2\te\tf\n"])
    assert data.rows[0] == {"split": "train", "sentence1": '" He said', "sentence2": 'He " said', "label": 1}
    data = tiny("MR", [b"caf\xe9 \x85 x\x0b\x0c\x1cy\r\nnext", b"bad\n"], [2, 1])  # latin-1, as SentEval reads it
    assert data["sentence1"] == ["caf\u00e9 \u0085 x\x0b\x0c\x1cy", "next", "bad"]
    text = SICK + "1\ta girl\ta boy\t1\tNEUTRAL\n2\tit rains\train falls\t4.9\tENTAILMENT\n"
    for content in (text, text.replace("\n", "\r\n"), text.rstrip("\n"), "\ufeff" + text):
        data = tiny("SICK-R", [content], [2], "dev")
        assert data.rows[1] == {"subset": "SICK-R", "sentence1": "it rains", "sentence2": "rain falls", "score": 4.9}


def test_labels_are_those_of_the_file_or_the_coarse_classes_by_alphabet(tiny):
    for task in BINARY:
        data = tiny(task, ["good\n\n", "\nbad : 0\t\"x\n\n"], [2, 3])
        assert data["sentence1"] == ["good", "", "", 'bad : 0\t"x', ""] and data["label"] == [1, 1, 0, 0, 0]
        assert set(data["split"]) == {"all"} and set(data["sentence2"]) == {""}
        assert FILES[task][0]["path"].endswith(("rt-polarity.pos", "custrev.pos", "subj.objective", "mpqa.pos"))
    classes = ["NUM", "ABBR", "HUM", "LOC", "DESC", "ENTY"]
    data = tiny("TREC", ["".join(f"{name}:x Is : {name} ?\n" for name in classes), b"HUM:ind W\xfcr \x85 ?\n"], [6, 1])
    assert data["label"] == [5, 0, 3, 4, 1, 2, 3] and data["split"] == ["train"] * 6 + ["test"]
    assert data["sentence1"][1] == "Is : ABBR ?" and data["sentence1"][6] == "W\u00fcr \u0085 ?"


def test_both_sizes_of_sst2_are_right_and_the_provenance_says_which(tiny):
    for size in (2, 5):
        contents = [size * "a\t1\n", "b\t0\n", "c\t1\n"]
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in contents]
        assert tiny("SST2", contents, [[2, 5], 1, 1]).provenance == {
            "task": "SST2", "splits": {"train": size, "dev": 1, "test": 1}, "rows": size + 2, "rows_total": size + 2,
            "caps": [], "source": {"kind": "folder", "label": "real data"},
            "files": dict(zip((file["path"] for file in FILES["SST2"]), hashes, strict=True)),
        }


# What is refused: the message names file, line and expectation.

MALFORMED = {  # task and split, the content of its first file, what the message says
    "one column": ("STS13 test", ("a\tb\nalone\n", "1\n2\n"), "input.FNWN.txt, line 2: expected '{sentence1}"),
    "above 5": ("STS13 test", ("a\tb\n", "5.01\n"), "gs.FNWN.txt, line 1: expected a score from 0 to 5, found '5.01'"),
    "scores missing": ("STS13 test", ("a\tb\nc\td\n", "1\n"), "gs.FNWN.txt: found 1 lines, expected 2"),
    "no scores": ("STS13 test", ("a\tb\n", None), "gs.FNWN.txt: expected this file"),
    "not UTF-8": ("STS13 test", (b"a\tb\nc\td\xe9\n", "1\n"), "FNWN.txt, line 2: expected UTF-8, found another byte"),
    "too many": ("STS-B dev", 2 * STSB_ROW, "sts-dev.csv: found 2 examples of the split 'dev', expected 1"),
    "no header": ("SICK-R dev", "1\ta\tb\t2\tNEUTRAL\n", "SICK_trial.txt, line 1: expected the header 'pair_ID"),
    "other label": ("SST2", "a\t2\n", "sentiment-train, line 1: expected the label 0 or 1, found '2'"),
    "other split": ("paraphrase", "split\tlabel\tsentence1\tsentence2\ntrian\t1\ta\tb\n", "expected the split train"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named_with_line_and_expectation(tiny, case):
    (task, _, split), content, message = MALFORMED[case][0].partition(" "), *MALFORMED[case][1:]
    with pytest.raises(DataError, match=re.escape(message)):
        tiny(task, [content], split=split or None)


def test_unknown_names_list_what_exists():
    real = DataSource("folder", sources.DATA)
    for load, arguments, exists in (
        (load_sts, ("STSB", "test", real), "STS12, .*STS-B, SICK-R"),
        (load_sts, ("STS-B", "validation", real), "train, dev, test"),
        (load_sts, ("STS-B", "train", SAMPLE), "dev, test"),
        (load_transfer, ("sentiment", real), "MR, CR, .*TREC, MRPC"),
        (load_transfer, ("MR", SAMPLE), "sentiment, .*paraphrase"),
    ):
        with pytest.raises(ValueError, match=f"choose from {exists}"):
            load(*arguments)


# Samples and parts.


def made_up(count, name="made up", **columns):
    return EvaluationData(name, Dataset.from_dict({"row": list(range(count))} | columns), {"rows": count, "caps": []})


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
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


def test_a_sample_is_the_same_everywhere_and_every_data_set_has_its_own():
    data = made_up(200)
    assert data.first(5)["row"] == [33, 61, 79, 117, 191]  # in every version of this package and of numpy
    assert data.first(50)["row"] != made_up(200, "another").first(50)["row"] != made_up(201).first(50)["row"]
    assert data.first(None) is data.first(200) is data.first(999) is data
    with pytest.raises(ValueError, match="at least one row, got count=0"):
        data.first(0)


def test_samples_within_a_column_and_parts_say_in_their_provenance_what_they_are():
    genres = ["b"] * 30 + ["a"] * 4 + ["c"] * 40 + ["b"] * 30
    data = made_up(len(genres), text=genres)
    few, more = data.first(10, within="text"), data.first(12, within="text")
    assert Counter(few["text"]) == {"b": 10, "a": 4, "c": 10} and few["row"] == sorted(few["row"])
    assert set(few["row"]) < set(more["row"]) and more.first(10, within="text")["row"] == few["row"]
    caps = [{"first": 10, "within": "text"}]
    assert few.provenance == {"rows": 24, "caps": caps} and data.provenance["caps"] == []
    assert few.first(5).provenance["caps"] == [*caps, {"first": 5}] and data.first(60, within="text") is data
    for rows in ([row in (1, 30) for row in data["row"]], [1, 30], np.array([1, 30])):
        part = data.where(rows, "of interest")
        assert part.texts == ["b", "a"] and part.provenance == {"rows": 2, "caps": [{"where": "of interest"}]}
    with pytest.raises(ValueError, match="The mask has 5 values, made up has 104 rows"):
        data.where([True] * 5, "too short")


# Where data comes from.


def test_the_folder_comes_before_downloads_and_downloads_before_the_sample(monkeypatch, tmp_path):
    with pytest.warns(SampleDataWarning, match="TP_DATA_DIR/senteval .*downloads/senteval .*the hub") as caught:
        assert find_source() == find_source() == DataSource("sample", sources.DATA / "sample")
    assert len(caught) == 1  # it is loud once
    assert (sts_tasks(), dev_task(), transfer_tasks()) == (("sample",), "sample", SAMPLE_TASKS)
    sources.forget_sources()
    (sources.DATA / "downloads" / "senteval").mkdir(parents=True)
    assert find_source() == DataSource("downloads", sources.DATA / "downloads" / "senteval")
    (tmp_path / "mine" / "senteval").mkdir(parents=True)
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "mine"))
    assert find_source() == DataSource("folder", tmp_path / "mine" / "senteval")
    assert (sts_tasks(), dev_task(), transfer_tasks()) == (STS_TASKS, "STS-B", TRANSFER_TASKS)
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "typo"))
    with pytest.raises(DataError, match="TP_DATA_DIR is '.*typo', so SentEval's data was expected in .*typo/senteval"):
        load_sts("STS12")


def test_the_samples_load_and_no_sentence_is_in_two_splits():
    data, dev = load_sts("STS12", source=SAMPLE), load_sts("STS-B", "dev", SAMPLE)  # it stands in for any
    assert data.name == dev.name == "sample" and not {*data.texts} & {*dev.texts}
    for task in SAMPLE_TASKS:
        frame, labels = load_transfer(task, SAMPLE).to_pandas(), set(range(6 if task == "question_type" else 2))
        assert set(frame["split"]) >= {"train", "test"} and frame.groupby("sentence1")["split"].nunique().max() == 1
        assert all(set(part["label"]) == labels for _, part in frame.groupby("split"))
        assert frame["sentence2"].str.strip().all() == (task in PAIR_TASKS)


# The hub: a loopback server stands in for it.


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
    with serving({"senteval.tar": GOOD_TAR}, monkeypatch) as hub:
        yield hub


@pytest.mark.parametrize("content", [GOOD_TAR, NESTED_TAR], ids=["flat", "nested"])
def test_a_good_archive_is_unpacked_and_downloaded_once_however_many_want_it(hub, content):
    hub.files["senteval.tar"], target = content, sources.DATA / "downloads" / "senteval"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: download.fetch(*sources.SENTEVAL[:2], target, "STS"), range(3)))
    asked = len(hub.requests)
    assert find_source() == DataSource("downloads", target) and len(hub.requests) == asked
    assert hub.sent("senteval.tar") == 1
    assert (target / STSB).read_text() == STSB_ROW and (target / "SICK" / "readme.txt").is_file()


FULL_DISK = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
# What went wrong at a hub that answers: what brings it about, and what the message says.
FAILURES = {
    "a file that is gone": (lambda hub, patch: hub.files.pop("senteval.tar"), "404"),
    "a typo": (lambda hub, patch: patch.setenv("HF_ENDPOINT", "typo"), "http"),
    "wrong hash": (lambda hub, patch: hub.stated.update({"senteval.tar": "0" * 64}), "hash of senteval.tar .*deleted"),
    "full disk": (lambda hub, patch: patch.setattr(download, "hf_hub_download", FULL_DISK), "No space left"),
}
FAILURES |= {mode: (lambda hub, patch, mode=mode: setattr(hub, "mode", mode), status) for mode, status in (
    ("404", "404"), ("500", "500"), ("GET fails", "403"), ("page", "could not be downloaded"))}
FAILURES |= {text: (lambda hub, patch, tar=tar: hub.files.update({"senteval.tar": tar}), text) for text, tar in (
    ("opened", b"no tar at all"), ("no folder 'STS'", tar_of(("GLUE/x", "y"))), ("escaped", tar_of(("../escaped", ""))),
    ("link", tar_of((STSB, ""), ("STS/link", "", tarfile.SYMTYPE, "../../escaped"))),
    ("STS/hard", tar_of((STSB, ""), ("STS/hard", "", tarfile.LNKTYPE, STSB))),
    ("STS/pipe", tar_of((STSB, ""), ("STS/pipe", "", tarfile.FIFOTYPE, ""))))}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_hub_that_answers_badly_is_an_error_and_never_the_sample(hub, monkeypatch, tmp_path, failure):
    with monkeypatch.context() as patch:
        FAILURES[failure][0](hub, patch)
        with pytest.raises(DownloadError, match=f"{FAILURES[failure][1]}.*put the files there by hand") as caught:
            find_source()
    assert not isinstance(caught.value, download.HubUnreachableError) and sources.hub_unreachable is None
    assert not (sources.DATA / "downloads" / "senteval").exists() and not list(tmp_path.rglob("escaped*"))
    if hub.files.get("senteval.tar", GOOD_TAR) == GOOD_TAR:  # once the hub is as it should be, the next try succeeds
        hub.mode, hub.stated, hub.files = "good", {}, {"senteval.tar": GOOD_TAR}
        assert find_source().kind == "downloads"


@pytest.mark.parametrize("mode", ["hang", "drip", "drop", "closed", "no such name"])
def test_only_a_hub_that_does_not_answer_is_replaced_by_the_sample_and_asked_once(hub, monkeypatch, mode):
    assert download.HUB_TIMEOUT < 10
    monkeypatch.setattr(download, "HUB_TIMEOUT", 0.5)
    hub.mode = mode
    if mode == "closed":
        hub.close()
    if mode == "no such name":
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    with pytest.warns(SampleDataWarning, match="cannot be reached"):
        assert find_source().is_sample and "cannot be reached" in sources.hub_unreachable
    asked = len(hub.requests)
    with pytest.raises(MissingDataError, match="STR-2022 cannot be found.*cannot be reached.*go online and start"):
        texts.load_str2022()
    assert len(hub.requests) == asked


@pytest.mark.parametrize("switch", [*download.OFFLINE_SWITCHES, "another process"])
def test_switches_and_what_another_process_found_keep_us_off_the_hub(hub, monkeypatch, switch):
    if switch == "another process":
        sources.assume_hub_unreachable(f"not asked, because {switch} found it silent")
    else:
        monkeypatch.setenv(switch, "1")
    with pytest.warns(SampleDataWarning, match=f"not asked, because {switch}"):
        assert find_source().is_sample and hub.requests == []
    monkeypatch.setenv(switch, "0")
    sources.forget_sources()
    assert find_source().kind == "downloads"


def test_an_interrupted_unpacking_is_not_trusted_and_goes_well_the_next_time(hub, monkeypatch):
    def stop_halfway(self, path, **_):
        self.extract(self.getmembers()[0], path, filter="data")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", stop_halfway)
        with pytest.raises(KeyboardInterrupt):
            find_source()
    assert not (sources.DATA / "downloads" / "senteval").exists()
    assert (find_source().path / "SICK" / "readme.txt").is_file() and hub.sent("senteval.tar") == 1
    assert [p.name for p in (sources.DATA / "downloads").iterdir() if p.is_dir()] == ["senteval"]


# Smaller sets of texts.

STR2022 = 'PairID,Text,Score\n1,"A dog runs.\nA ""cat"", too.",0.5\n2,"One.\nTwo.",1\n'


def test_str2022_is_read_as_pairs_or_refused(tmp_path, monkeypatch):
    def load(content):
        put(tmp_path / "str-2022" / texts.STR2022_FILE, content)
        return texts.load_str2022()

    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(texts, "STR2022_ROWS", 2)
    for content in (STR2022, STR2022.replace("\n", "\r\n")):
        data = load(content)
        assert data["sentence1"] == ["A dog runs.", "One."] and data["sentence2"] == ['A "cat", too.', "Two."]
        assert data["score"] == [0.5, 1.0] and list(data.provenance["files"]) == [texts.STR2022_FILE]
    endless = 'PairID,Text,Score\n1,"a\nb,0.5\n' + "2,a text of thirty-two characters.,0.5\n" * 5_000
    for content, message in (
        (STR2022.replace("0.5", "1.5"), "pair 1: expected from 0 to 1"), (endless, "pair 1: expected a table with"),
        (STR2022.replace("One.\nTwo.", "One."), "pair 2: expected two sentences"), ("", "found 0 pairs, expected 2"),
        (STR2022.replace("Score", "score"), "pair 1: expected from 0 to 1"),
    ):
        with pytest.raises(DataError, match=f"{texts.STR2022_FILE}.*{message}"):
            load(content)


@pytest.mark.filterwarnings("ignore::lib.data.sources.SampleDataWarning")
def test_texts_of_the_sample_are_distinct_and_nested():
    found, missing = texts.alignment_texts(10)
    assert list(found) == ["sample STS", "sample documents"] and not missing
    assert len(found["sample STS"].texts) <= 10 == len(found["sample documents"].texts)
    assert set(found["sample STS"].texts) < set(texts.pair_texts(load_sts("sample")).texts)
    assert texts.load_minimal_pairs().groupby("kind").size().tolist() == [16] * 5


# Any bytes give valid rows or a `DataError` that names the file; nothing else.

FIXED = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
field = st.text(st.characters(codec="utf-8", exclude_characters="\t\n"), max_size=8)
field = field | st.sampled_from(["a\u2028b", "a\x85b", "a\x0bb", 'a "b', "\ufeffa"])  # none of these ends a line
number = st.sampled_from(["0", "1", "2.5", "5", "5.01", "-1", "nan", "inf", "1e999", "", " ", "٣", "1_0", "0x1"])
raw = st.binary(max_size=60) | st.lists(st.sampled_from(
    [b"a\tb", b"\t", b"\n", b"\r\n", b"\x00", b"\xef\xbb\xbf", b"\xff", b"\xc3", b"1", b"5\n", b'"', b"{}"]
), max_size=12).map(b"".join)


def file_contents(file):
    """Contents for a file of a task: lines as they should be, such lines with odd cells among them, or other bytes."""
    names = re.findall(r"{(\w+)}", file["line"]) or ["sentence1"]
    kinds = {"score": ["1", "2.5"], "split": [*file["rows"]], "label": file["labels"] or ["0"]}
    good = {name: st.sampled_from(kinds[name]) if name in kinds else field.filter(str.strip) for name in names}
    odd = {name: cell | number | field for name, cell in good.items()}
    rows = st.lists(st.fixed_dictionaries(good), max_size=3) | st.lists(st.fixed_dictionaries(odd), max_size=3)
    line, header = file["line"] or "{sentence1}", [file["header"]] if file["header"] else []
    written = st.builds(lambda rows, end: "".join(text + end for text in header + [line.format(**row) for row in rows]),
                        rows, st.sampled_from(["\n", "\r\n"])).map(str.encode)
    return written | written | raw


@pytest.mark.parametrize("task", ["STS13", "STS-B", "SICK-R", "sample", "MR", "SST2", "TREC", "MRPC"])
@settings(max_examples=20, **FIXED)
@given(data=st.data())
def test_files_give_valid_rows_or_a_data_error(tmp_path, task, data):
    split = {"STS-B": "dev", "SICK-R": "dev", "STS13": "test", "sample": "test"}.get(task)
    parts = [file for file in FILES[task] if split in (None, *file["rows"])]
    scores = st.lists(st.just("2.5") | number, max_size=3).map(lambda rows: "".join(row + "\n" for row in rows)) | raw
    kinds = [st.tuples(file_contents(file), scores) if file["scores"] else file_contents(file) for file in parts]
    drawn = data.draw(st.tuples(*kinds))
    try:
        found = load_written(tmp_path, task, drawn, [[0, 1, 2, 3]] * len(parts), split)
    except DataError as error:
        assert any(file["path"] in str(error).replace(".gs.", ".input.") for file in parts), error
        assert re.search(r", line \d+: expected|: (found|expected) ", str(error)), error
        return
    if split:
        assert all(parts[0]["lowest"] <= score <= 5 for score in found["score"])
    else:
        assert set(found["label"]) <= set(range(len(parts[0]["labels"])))
    # Nothing is lost or changed on the way: each sentence is part of a file.
    whole = "".join((tmp_path / file["path"]).read_bytes().decode(file["encoding"]) for file in parts)
    assert all(text in whole and (text.strip() or task in BINARY) for text in found.texts)


# The real data, where there is any.


@pytest.mark.skipif(not REAL, reason="TP_DATA_DIR is not set: no real evaluation data")
def test_real_data_loads_whole(monkeypatch):
    monkeypatch.setenv("TP_DATA_DIR", REAL)
    assert all(load_sts(task, split).texts for task in STS_TASKS for file in FILES[task] for split in file["rows"])
    empty = {task: load_transfer(task)["sentence1"].count("") for task in TRANSFER_TASKS}
    assert empty == dict.fromkeys(TRANSFER_TASKS, 0) | {"CR": 4, "MPQA": 3}
    found, missing = texts.alignment_texts(None)
    assert not missing and len(found["MS MARCO"].texts) == 500 and len(found["STS12 SMTnews"].texts) == 297
