"""`lib.data.sts`, `lib.data.sources`, `lib.data.download`: made-up SentEval files, a loopback server as the hub, real data if there."""

import dataclasses
import hashlib
import io
import os
import re
import tarfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from fake_hub import FakeHub

from lib.data import sts as data, download, sources
from lib.data.sts import DataError, DataSource, SampleDataWarning, cap_rows, find_source, load_sts, provenance, sts_tasks

STS13 = "STS/STS13-en-test/STS"
STSB = "STS/STSBenchmark/sts-dev.csv"
SICK = "SICK/SICK_trial.txt"
SICK_HEADER = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
TOTALS = {
    ("STS12", "test"): 3108, ("STS13", "test"): 1500, ("STS14", "test"): 3750, ("STS15", "test"): 3000,
    ("STS16", "test"): 1186, ("STS-B", "train"): 5749, ("STS-B", "dev"): 1500, ("STS-B", "test"): 1379,
    ("SICK-R", "train"): 4500, ("SICK-R", "dev"): 500, ("SICK-R", "test"): 4927,
}


@pytest.fixture(autouse=True)
def clean_slate(no_data):
    """Each test starts without data."""


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """tiny(task, split, files, rows): write the files (path -> text or bytes), expect so many rows per file, load."""

    def load(task, split, files, rows):
        for name, content in files.items():
            path = tmp_path / "tiny" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        parts = [dataclasses.replace(part, rows=n) for part, n in zip(data.STS_FILES[task][split], rows, strict=True)]
        monkeypatch.setitem(data.STS_FILES, task, data.STS_FILES[task] | {split: tuple(parts)})
        return load_sts(task, split, DataSource("folder", tmp_path / "tiny"))

    return load


def sts13(pairs="a b\tc d\n", scores="1.0\n", **subsets):
    """The files of an STS13 whose subsets all hold `pairs` and `scores`, but for those given."""
    files = {}
    for name in ("FNWN", "headlines", "OnWN"):
        files[f"{STS13}.input.{name}.txt"], files[f"{STS13}.gs.{name}.txt"] = subsets.get(name, (pairs, scores))
    return files


# What is read, and how.


def test_expected_rows_are_those_of_senteval():
    files = {(task, split): files for task in data.STS_TASKS for split, files in data.STS_FILES[task].items()}
    assert {key: sum(file.rows for file in files[key]) for key in files} == TOTALS


def test_semeval_pairs_without_a_score_are_dropped_and_subsets_keep_their_order(tiny):
    fnwn = ("a cat\ta dog\nnever\tscored\na hat\ta cap\n", "0.5\n\n4.25\n")
    dataset = tiny("STS13", "test", sts13(FNWN=fnwn, OnWN=("x\ty", "5")), (2, 1, 1))
    assert dataset["subset"][:] == ["FNWN", "FNWN", "headlines", "OnWN"]
    assert dataset["sentence1"][:] == ["a cat", "a hat", "a b", "x"]
    assert dataset["sentence2"][:] == ["a dog", "a cap", "c d", "y"]
    assert dataset["score"][:] == [0.5, 4.25, 1.0, 5.0]
    assert dataset.cache_files == []


def test_only_a_line_feed_ends_a_line_and_quotes_are_text(tiny):
    odd = 'so\u0085\u2028\x0b\x0c\x1c "he said'
    dataset = tiny("STS13", "test", sts13(FNWN=(f'{odd}\t"\nnext\tone\n', "1\n2\n")), (2, 1, 1))
    assert (dataset["sentence1"][0], dataset["sentence2"][0], dataset["sentence1"][1]) == (odd, '"', "next")
    line = f'forum\tf.txt\t2020\t7\t3.4\t{odd}\tb "c" d'
    dataset = tiny("STS-B", "dev", {STSB: f"{line}\tlicence\tmore\n{line}\n"}, (2,))
    assert dataset[0] == {"subset": "forum", "sentence1": odd, "sentence2": 'b "c" d', "score": 3.4} == dataset[1]


def test_sick_reads_below_its_header_also_with_windows_line_ends(tiny):
    text = SICK_HEADER + "1\ta girl\ta boy\t1\tNEUTRAL\n2\tit rains\train falls\t4.9\tENTAILMENT\n"
    for content in (text, text.replace("\n", "\r\n"), text.rstrip("\n"), "\ufeff" + text):
        dataset = tiny("SICK-R", "dev", {SICK: content}, (2,))
        assert dataset[1] == {"subset": "SICK-R", "sentence1": "it rains", "sentence2": "rain falls", "score": 4.9}
        assert dataset["score"][:] == [1.0, 4.9]


# What is refused, and with which words.

STSB_ROW = "forum\tf.txt\t2020\t7\t3.4\ta b\tc d\n"
MALFORMED = {
    "one column": ("STS13", sts13(FNWN=("a\tb\nalone\n", "1\n2\n")), "input.FNWN.txt, line 2: found 1 columns, expected 2"),
    "three columns": ("STS13", sts13(OnWN=("a\tb\tc\n", "1\n")), "input.OnWN.txt, line 1: found 3 columns, expected 2"),
    "no such score": ("STS13", sts13(FNWN=("a\tb\nc\td\n", "1\nx\n")), "gs.FNWN.txt, line 2: expected a score"),
    "above 5": ("STS13", sts13(scores="5.01\n"), "gs.FNWN.txt, line 1: expected a score from 0 to 5, found '5.01'"),
    "not a number": ("STS13", sts13(scores="nan\n"), "gs.FNWN.txt, line 1: expected a score from 0 to 5, found 'nan'"),
    "scores missing": ("STS13", sts13(headlines=("a\tb\nc\td\n", "1\n")), "gs.headlines.txt: found 1 lines, expected 2"),
    "scores left over": ("STS13", sts13(headlines=("a\tb\n", "1\n2\n")), "gs.headlines.txt: found 2 lines, expected 1"),
    "no sentence": ("STS13", sts13(pairs="a\t \n"), "input.FNWN.txt, line 1: expected a sentence in sentence2"),
    "not UTF-8": ("STS13", sts13(pairs=b"a\tb\nc\td\xe9\n"), "input.FNWN.txt, line 2: expected UTF-8, found the byte 0xe9"),
    "empty file": ("STS13", sts13(OnWN=("", "")), "input.OnWN.txt: found 0 scored rows, expected 1"),
    "no score at all": ("STS13", sts13(OnWN=("a\tb\n", "\n")), "input.OnWN.txt: found 0 scored rows, expected 1"),
    "too many rows": ("STS-B", {STSB: 2 * STSB_ROW}, "sts-dev.csv: found 2 scored rows, expected 1"),
    "cut row": ("STS-B", {STSB: STSB_ROW.replace("\tc d", "")}, "sts-dev.csv, line 1: found 6 columns, expected 7"),
    "empty line": ("STS-B", {STSB: STSB_ROW + "\n" + STSB_ROW}, "sts-dev.csv, line 2: found 1 columns, expected 7"),
    "empty score": ("STS-B", {STSB: STSB_ROW.replace("3.4", "")}, "dev.csv, line 1: expected a score from 0 to 5, found ''"),
    "negative": ("STS-B", {STSB: STSB_ROW.replace("3.4", "-1")}, "line 1: expected a score from 0 to 5, found '-1'"),
    "no header": ("SICK-R", {SICK: "1\ta\tb\t2\tNEUTRAL\n"}, "SICK_trial.txt, line 1: expected the header 'pair_ID"),
    "nothing": ("SICK-R", {SICK: ""}, "SICK_trial.txt, line 1: expected the header 'pair_ID"),
    "below 1": ("SICK-R", {SICK: SICK_HEADER + "1\ta\tb\t0.5\tN\n"}, "trial.txt, line 2: expected a score from 1 to 5"),
    "no file": ("SICK-R", {}, "SICK_trial.txt: expected this file"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named_with_line_and_expectation(tiny, case):
    task, files, message = MALFORMED[case]
    split = "test" if task == "STS13" else "dev"
    with pytest.raises(DataError, match=re.escape(message)):
        tiny(task, split, files, [1] * len(data.STS_FILES[task][split]))


def test_a_missing_score_file_is_named(tiny):
    files = sts13()
    del files[f"{STS13}.gs.headlines.txt"]
    with pytest.raises(DataError, match=r"STS\.gs\.headlines\.txt: expected this file"):
        tiny("STS13", "test", files, (1, 1, 1))


def test_unknown_names_list_what_exists(tmp_path):
    source = DataSource("folder", tmp_path)
    with pytest.raises(ValueError, match="Unknown STS task 'STSB'; choose from STS12, .*STS-B, SICK-R"):
        load_sts("STSB", source=source)
    with pytest.raises(ValueError, match="Unknown STS task 'sample'"):
        load_sts("sample", source=source)
    with pytest.raises(ValueError, match="STS-B has no split 'validation'; choose from train, dev, test"):
        load_sts("STS-B", "validation", source)
    with pytest.raises(ValueError, match="STS12 has no split 'dev'; choose from test"):
        load_sts("STS12", "dev", source)


# Provenance and subsets.


def test_provenance_survives_a_cap_and_holds_no_path_of_this_machine(tiny, tmp_path):
    files = sts13(FNWN=("".join(f"s{i}\tt{i}\n" for i in range(50)), "2\n" * 50))
    dataset = tiny("STS13", "test", files, (50, 1, 1))
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    expected = {"task": "STS13", "split": "test", "rows": 52, "rows_total": 52, "files": hashes, "caps": []}
    assert expected.items() <= provenance(dataset).items()
    assert provenance(dataset)["source"] == {"kind": "folder", "label": "real data", "where": "the folder in $TP_DATA_DIR"}
    capped = cap_rows(cap_rows(dataset, 20, seed=1), 7, seed=2)
    caps = [{"count": 20, "seed": 1}, {"count": 7, "seed": 2}]
    assert provenance(capped) == provenance(dataset) | {"rows": 7, "caps": caps}
    assert provenance(dataset)["caps"] == []
    assert str(tmp_path) not in str(provenance(capped))
    with pytest.raises(ValueError, match="carries no provenance"):
        provenance(Dataset.from_dict({"a": [1]}))


def test_cap_rows_is_seeded_keeps_the_order_and_repeats_no_row(tiny):
    dataset = tiny("STS-B", "dev", {STSB: "".join(STSB_ROW.replace("a b", f"{i:03d}") for i in range(200))}, (200,))
    first, again, other = (cap_rows(dataset, 50, seed)["sentence1"][:] for seed in (0, 0, 1))
    assert first == again == sorted(set(first)) and len(first) == 50
    assert other != first and first != dataset["sentence1"][:50]
    for count in (None, 200, 999):
        assert cap_rows(dataset, count, 0)["sentence1"][:] == dataset["sentence1"][:]
    with pytest.raises(ValueError, match="at least one row, got count=0"):
        cap_rows(dataset, 0, 0)


def test_cap_rows_without_a_column_draws_what_it_always_drew(tiny):
    dataset = tiny("STS-B", "dev", {STSB: "".join(STSB_ROW.replace("a b", f"{i:03d}") for i in range(200))}, (200,))
    drawn = np.sort(np.random.default_rng(7).choice(200, 50, replace=False))
    assert [int(text) for text in cap_rows(dataset, 50, 7)["sentence1"]] == drawn.tolist()
    assert provenance(cap_rows(dataset, 50, 7))["caps"] == [{"count": 50, "seed": 7}]


def test_cap_rows_within_a_column_caps_each_value_alone(tiny):
    """Here b is first, too large, and not in one piece; a is small enough; c is too large, and drawn after b."""
    genres = ["b"] * 30 + ["a"] * 4 + ["c"] * 40 + ["b"] * 30
    text = "".join(STSB_ROW.replace("forum", genre).replace("a b", str(i)) for i, genre in enumerate(genres))
    dataset = tiny("STS-B", "dev", {STSB: text}, (len(genres),))
    generator, places = np.random.default_rng(3), {g: np.flatnonzero(np.array(genres) == g) for g in "bac"}
    drawn = [places[g][generator.choice(len(places[g]), 10, replace=False)] if g != "a" else places[g] for g in "bac"]
    capped = cap_rows(dataset, 10, 3, within="subset")
    assert [int(text) for text in capped["sentence1"]] == np.sort(np.concatenate(drawn)).tolist()
    assert Counter(capped["subset"]) == {"b": 10, "a": 4, "c": 10}
    expected = {"rows": 24, "caps": [{"count": 10, "seed": 3, "within": "subset"}]}
    assert provenance(capped) == provenance(dataset) | expected
    assert cap_rows(dataset, 60, 3, within="subset") is dataset


# Where data comes from.


def test_the_folder_comes_before_downloads_and_downloads_before_the_sample(monkeypatch, tmp_path):
    with pytest.warns(SampleDataWarning):
        assert find_source() == DataSource("sample", sources.DATA / "sample")
    sources.forget_sources()
    (sources.DATA / "downloads" / "senteval").mkdir(parents=True)
    assert find_source() == DataSource("downloads", sources.DATA / "downloads" / "senteval")
    (tmp_path / "mine" / "senteval").mkdir(parents=True)
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "mine"))
    assert find_source() == DataSource("folder", tmp_path / "mine" / "senteval")
    assert sts_tasks() == data.STS_TASKS and find_source().label == "real data" and not find_source().is_sample
    monkeypatch.setenv("TP_DATA_DIR", "")
    assert find_source().kind == "downloads"


def test_a_wrong_folder_is_an_error_and_no_fallback(monkeypatch, tmp_path):
    (sources.DATA / "downloads" / "senteval").mkdir(parents=True)
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "typo"))
    with pytest.raises(DataError, match="TP_DATA_DIR is '.*typo', so the folder .*typo/senteval was expected, with STS/"):
        load_sts("STS12")


def test_the_sample_is_loud_once_and_says_what_was_tried():
    with pytest.warns(SampleDataWarning) as caught:
        source = find_source()
    message = str(caught[0].message)
    assert "TP_DATA_DIR (not set), data/downloads/senteval (not there), the Hugging Face hub (not asked" in message
    assert "because TP_HUB_UNREACHABLE is set" in message and "see data/README.md" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_source() is source and source.is_sample
    assert source.label == "sample data (written for this project)"
    assert source.describe() == {"kind": "sample", "label": source.label, "where": "data/sample"}


def test_the_sample_is_one_task_that_stands_in_for_any():
    with pytest.warns(SampleDataWarning):
        assert sts_tasks() == ("sample",)
    dataset = load_sts("sample")
    assert len(dataset) == 160 and len(load_sts("sample", "dev")) == 80 == len(load_sts("STS-B", "dev"))
    assert load_sts("STS12")[:] == dataset[:] and len(set(dataset["subset"][:])) > 1
    assert not set(dataset["sentence1"][:]) & set(load_sts("sample", "dev")["sentence1"][:])
    about = provenance(load_sts("STS12"))
    assert about["task"] == "sample" and about["source"]["kind"] == "sample" and list(about["files"]) == ["sts.tsv"]
    with pytest.raises(DataError, match="The sample data has no split 'train', only dev, test"):
        load_sts("STS-B", "train")
    with pytest.raises(ValueError, match="STS12 has no split 'train'; choose from test"):
        load_sts("STS12", "train")
    with pytest.raises(ValueError, match="Unknown STS task 'STS99'; choose from .*sample"):
        load_sts("STS99")


# The hub: a loopback server stands in for it.


def tar_of(*members):
    """A tar file in memory: `(name, text)` are plain files, anything else a `TarInfo`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            content = b""
            if isinstance(member, tuple):
                content = member[1].encode()
                member = tarfile.TarInfo(member[0])
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


GOOD_TAR = tar_of((STSB, STSB_ROW), ("SICK/readme.txt", "words"))
NESTED_TAR = tar_of(("data/downstream/" + STSB, STSB_ROW), ("data/downstream/SICK/readme.txt", "words"))


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub({"senteval.tar": GOOD_TAR})
    monkeypatch.delenv("TP_HUB_UNREACHABLE")
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield server
    server.close()


def fall_back():
    """Find the sample, and return the warning's text."""
    with pytest.warns(SampleDataWarning) as caught:
        assert find_source().is_sample
    return str(caught[0].message)


def downloads():
    """The names in data/downloads, without the lock and the hub's own bookkeeping."""
    names = {path.name for path in (sources.DATA / "downloads").glob("*")}
    return sorted(names - {".cache", ".senteval.lock"})


@pytest.mark.parametrize("mode, content", [("good", NESTED_TAR), ("redirect", GOOD_TAR)], ids=["nested", "redirect"])
def test_a_good_archive_is_downloaded_once_and_unpacked(hub, mode, content):
    hub.mode, hub.files["senteval.tar"] = mode, content
    source = find_source()
    assert source == DataSource("downloads", sources.DATA / "downloads" / "senteval") and downloads() == ["senteval"]
    assert (source.path / STSB).read_text() == STSB_ROW and (source.path / "SICK" / "readme.txt").is_file()
    assert source.path.stat().st_mode & 0o777 == 0o755
    path = "/datasets/princeton-nlp/datasets-for-simcse/resolve/{}/senteval.tar"
    got = "/senteval.tar" if mode == "redirect" else path.format("c" * 40)
    assert hub.requests[0] == ("HEAD", path.format("main")) and hub.requests[-1] == ("GET", got)
    asked = len(hub.requests)
    sources.forget_sources()
    assert find_source() == source and len(hub.requests) == asked
    with pytest.raises(DataError, match=r"sts-dev\.csv: found 1 scored rows, expected 1500"):
        load_sts("STS-B", "dev")


def test_processes_that_want_the_same_archive_download_it_once(hub):
    target = sources.DATA / "downloads" / "senteval"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: download.fetch_archive(*sources.SENTEVAL[:2], target, "STS"), range(3)))
    assert [command for command, _ in hub.requests].count("GET") == 1 and (target / STSB).is_file()


def test_a_wrong_hash_is_reported_and_the_file_deleted(hub):
    hub.stated["senteval.tar"] = "0" * 64
    assert f"senteval.tar was damaged on the way and deleted: its hash is not {'0' * 64}" in fall_back()
    assert downloads() == []


def test_an_archive_without_a_stated_hash_is_not_trusted(hub):
    hub.stated["senteval.tar"] = "not-a-hash"
    assert "the hub states no SHA-256 for senteval.tar" in fall_back()
    assert downloads() == [] and "GET" not in [command for command, _ in hub.requests]


@pytest.mark.parametrize("mode, status", [("404", 404), ("500", 500), ("401", 401), ("GET fails", 403)])
def test_http_errors_are_named_and_not_remembered_as_a_dead_hub(hub, mode, status):
    hub.mode = mode
    assert f"{hub.url} answered HTTP {status} for princeton-nlp/datasets-for-simcse/senteval.tar" in fall_back()
    assert downloads() == []
    hub.mode = "good"
    sources._search.cache_clear()
    assert find_source().kind == "downloads"


@pytest.mark.parametrize("mode", ["hang", "drip"])
def test_a_silent_hub_is_noticed_in_time_and_asked_once(hub, monkeypatch, mode):
    assert download.HUB_TIMEOUT < 10
    monkeypatch.setattr(download, "HUB_TIMEOUT", 0.5)
    hub.mode = mode
    begin = time.monotonic()
    assert "did not answer within 0.5 seconds" in fall_back()
    assert 0.4 < time.monotonic() - begin < 10
    sources._search.cache_clear()  # as if other data were wanted
    assert "did not answer within 0.5 seconds" in fall_back() and len(hub.requests) == 1
    hub.mode = "good"
    sources.forget_sources()
    assert find_source().kind == "downloads"


def test_a_hub_that_is_not_there_is_named(hub, monkeypatch):
    hub.close()
    assert f"could not be fetched from {hub.url}: ConnectError" in fall_back()


@pytest.mark.parametrize("switch", download.OFFLINE_SWITCHES)
def test_switches_keep_us_off_the_hub(hub, monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    assert f"not asked, because {switch} is set" in fall_back() and hub.requests == []
    monkeypatch.setenv(switch, "0")
    sources.forget_sources()
    assert find_source().kind == "downloads"


def unsafe(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


UNSAFE = [
    unsafe("../escaped"),
    unsafe("STS/../../escaped"),
    unsafe("/tmp/escaped-from-a-test"),
    unsafe("STS/link", tarfile.SYMTYPE, "readme.txt"),
    unsafe("STS/hard", tarfile.LNKTYPE, STSB),
    unsafe("STS/device", tarfile.CHRTYPE),
    unsafe("STS/pipe", tarfile.FIFOTYPE),
]


@pytest.mark.parametrize("member", UNSAFE, ids=lambda member: member.name)
def test_unsafe_archives_are_refused_whole(hub, tmp_path, member):
    hub.files["senteval.tar"] = tar_of((STSB, STSB_ROW), member)
    message = fall_back()
    assert f"senteval.tar holds the unsafe member {member.name!r}; nothing was unpacked" in message
    assert downloads() == ["senteval.tar"]
    assert not list(tmp_path.rglob("escaped*")) and not Path("/tmp/escaped-from-a-test").exists()


OTHER_ARCHIVES = [(b"no tar at all", "ReadError"), (tar_of(("GLUE/x", "y")), "senteval.tar has no folder 'STS'")]


@pytest.mark.parametrize("content, reason", OTHER_ARCHIVES, ids=["no tar", "no STS"])
def test_an_archive_of_something_else_is_refused(hub, content, reason):
    hub.files["senteval.tar"] = content
    assert reason in fall_back()
    assert downloads() == ["senteval.tar"]


def test_an_interrupted_unpacking_is_not_trusted_and_goes_well_the_next_time(hub, monkeypatch):
    def stop_halfway(self, path, members=None, **_):
        self.extract(members[0], path, filter="data")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", stop_halfway)
        with pytest.raises(KeyboardInterrupt):
            find_source()
    assert downloads() == ["senteval.tar"]
    (sources.DATA / "downloads" / ".senteval-killed" / "STS").mkdir(parents=True)  # what a killed process leaves behind
    assert find_source().kind == "downloads" and downloads() == ["senteval"]
    assert [command for command, _ in hub.requests].count("GET") == 1
    assert (sources.DATA / "downloads" / "senteval" / "SICK" / "readme.txt").is_file()


# The real data, where there is any.

REAL = os.environ.get("TP_DATA_DIR")


@pytest.mark.skipif(not REAL, reason="TP_DATA_DIR is not set: no real evaluation data")
def test_real_data_loads_whole_and_fast(monkeypatch):
    monkeypatch.setenv("TP_DATA_DIR", REAL)
    begin = time.monotonic()
    datasets = {(task, split): load_sts(task, split) for task, split in TOTALS}
    assert time.monotonic() - begin < 20
    for (task, split), dataset in datasets.items():
        assert len(dataset) == TOTALS[task, split] == provenance(dataset)["rows_total"]
        assert min(dataset["score"]) >= (1 if task == "SICK-R" else 0) and max(dataset["score"]) <= 5
        assert all(dataset["subset"]) and all(dataset["sentence1"]) and all(dataset["sentence2"])
