"""`lib.data.transfer`: files written for the test in SentEval's formats, the sample, the real data if there is any."""

import dataclasses
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import Value

from lib.data import sources
from lib.data.sts import TRANSFER_TASKS, DataError, DataSource, cap_rows, load_transfer, provenance, transfer_tasks
from lib.data.transfer import SAMPLE_TASKS, TRANSFER_FILES

SAMPLE = DataSource("sample", sources.ROOT / "data" / "sample")
REAL = os.environ.get("TP_DATA_DIR")

# SentEval's examples: how many have label 1 and label 0, or how many there are in each split.
BINARY = {"MR": (5331, 5331), "CR": (2407, 1368), "SUBJ": (5000, 5000), "MPQA": (3312, 7294)}
SPLITS = {
    "SST2": {"train": (6920, 67349), "dev": (872,), "test": (1821,)},
    "TREC": {"train": (5452,), "test": (500,)},
    "MRPC": {"train": (4076,), "test": (1725,)},
}
MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
MR, SST = ("MR/rt-polarity.pos", "MR/rt-polarity.neg"), [f"SST/binary/sentiment-{s}" for s in ("train", "dev", "test")]
TREC = ("TREC/train_5500.label", "TREC/TREC_10.label")
MRPC = ("MRPC/msr_paraphrase_train.txt", "MRPC/msr_paraphrase_test.txt")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """tiny(task, contents, *counts): write the task's files (None: not there), expect so many examples of each, load."""

    def load(task, contents, *counts):
        parts = []
        for file, content, count in zip(TRANSFER_FILES[task], contents, counts or [1] * len(contents), strict=True):
            path = tmp_path / "tiny" / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
            expected = dict.fromkeys(file.rows, count if isinstance(count, tuple) else (count,))
            parts.append(dataclasses.replace(file, rows=expected))
        with monkeypatch.context() as patch:
            patch.setitem(TRANSFER_FILES, task, tuple(parts))
            return load_transfer(task, DataSource("folder", tmp_path / "tiny"))

    return load


# What is read, and how.


def test_expected_counts_are_those_of_senteval():
    binary = {task: tuple(file.rows["all"] for file in TRANSFER_FILES[task]) for task in BINARY}
    assert binary == {task: tuple((n,) for n in counts) for task, counts in BINARY.items()}
    assert {task: {s: n for file in TRANSFER_FILES[task] for s, n in file.rows.items()} for task in SPLITS} == SPLITS
    assert (*BINARY, *SPLITS) == TRANSFER_TASKS and {*TRANSFER_TASKS, *SAMPLE_TASKS} == set(TRANSFER_FILES)


@pytest.mark.parametrize("task", BINARY)
def test_the_first_of_two_files_has_label_1_and_empty_lines_are_sentences(tiny, task):
    dataset = tiny(task, ("good\n\n", "\nbad : 0\t\"x\n\n"), 2, 3)
    assert dataset["sentence1"][:] == ["good", "", "", 'bad : 0\t"x', ""] and dataset["label"][:] == [1, 1, 0, 0, 0]
    assert set(dataset["split"]) == {"all"} and set(dataset["sentence2"]) == {""}
    assert dataset.column_names == ["split", "sentence1", "sentence2", "label"]
    assert dataset.features["label"] == Value("int64")


def test_which_class_comes_first():
    firsts = [TRANSFER_FILES[task][0].path for task in BINARY]
    assert firsts == ["MR/rt-polarity.pos", "CR/custrev.pos", "SUBJ/subj.objective", "MPQA/mpqa.pos"]


def test_latin_1_where_senteval_reads_it_and_only_a_line_feed_ends_a_line(tiny):
    """0x85 is the byte at which `str.splitlines` makes 10685 examples of MR's 10662."""
    dataset = tiny("MR", (b"caf\xe9 \x85 x\x0b\x0c\x1cy\r\nnext", b"bad\n"), 2, 1)
    assert dataset["sentence1"][:] == ["caf\u00e9 \u0085 x\x0b\x0c\x1cy", "next", "bad"]
    dataset = tiny("TREC", (b"LOC:city Where is M\xfcnster \x85 ?\n", b"NUM:dist How far : x ?"))
    assert dataset["sentence1"][:] == ["Where is M\u00fcnster \u0085 ?", "How far : x ?"]
    dataset = tiny("SST2", ("caf\u00e9 \u0085 x\t1\n", "b\t0\n", "c \t0\n"))
    assert dataset["sentence1"][:] == ["caf\u00e9 \u0085 x", "b", "c "]


def test_trec_labels_are_the_coarse_classes_by_alphabet(tiny):
    classes = ["NUM", "ABBR", "HUM", "LOC", "DESC", "ENTY"]
    dataset = tiny("TREC", ("".join(f"{name}:x Is this {name} ?\n" for name in classes), "HUM:ind Who ?\n"), 6, 1)
    assert dataset["label"][:] == [5, 0, 3, 4, 1, 2, 3] and dataset["split"][:] == ["train"] * 6 + ["test"]
    assert dataset["sentence1"][1] == "Is this ABBR ?"


def test_mrpc_pairs_below_the_header_are_never_quoted(tiny):
    train, test = '1\t10\t20\t" He said\tHe " said\n0\t11\t21\tc\td\n', "1\t12\t22\te\tf\n"
    dataset = tiny("MRPC", (MRPC_HEADER + train, MRPC_HEADER.strip("\ufeff") + test), 2, 1)
    assert dataset[0] == {"split": "train", "sentence1": '" He said', "sentence2": 'He " said', "label": 1}
    assert dataset["label"][:] == [1, 0, 1] and dataset["split"][2] == "test"


def test_both_sizes_of_sst2_are_right_and_the_provenance_says_which(tiny):
    for size in (2, 5):
        contents = [size * "a\t1\n", "b\t0\n", "c\t1\n"]
        dataset = tiny("SST2", contents, (2, 5), 1, 1)
        expected = {
            "task": "SST2", "splits": {"train": size, "dev": 1, "test": 1}, "rows": size + 2, "rows_total": size + 2,
            "caps": [],
            "source": {"kind": "folder", "label": "real data", "where": "the folder in $TP_DATA_DIR"},
            "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in zip(SST, contents, strict=True)},
        }
        assert provenance(dataset) == expected
    with pytest.raises(DataError, match="sentiment-train: found 3 examples for the split 'train', expected 2 or 5"):
        tiny("SST2", (3 * "a\t1\n", "b\t0\n", "c\t1\n"), (2, 5), 1, 1)


def test_a_cap_within_splits_leaves_rows_in_each(tiny):
    dataset = tiny("TREC", ("LOC:x a\n" * 30, "HUM:x b\n" * 5), 30, 5)
    capped = cap_rows(dataset, 4, seed=0, within="split")
    assert Counter(capped["split"]) == {"train": 4, "test": 4}
    caps = [{"count": 4, "seed": 0, "within": "split"}]
    assert provenance(capped) == provenance(dataset) | {"rows": 8, "caps": caps}


# What is refused, and with which words.

GOOD_SST, GOOD_TREC = ("a\t1\n", "b\t0\n", "c\t1\n"), ("LOC:x a\n", "HUM:x b\n")
GOOD_MRPC = MRPC_HEADER + "1\t2\t3\ta\tb\n"
MALFORMED = {
    "one too few": ("MR", ("", "b\n"), f"{MR[0]}: found 0 examples for the split 'all', expected 1."),
    "one too many": ("MR", ("a\n", "b\n\n"), f"{MR[1]}: found 2 examples for the split 'all', expected 1."),
    "no file": ("MR", ("a\n", None), f"{MR[1]}: expected this file"),
    "no label": ("SST2", ("a\n", *GOOD_SST[1:]), f"{SST[0]}, line 1: expected sentence1<tab>label, found 'a'"),
    "blank line": ("SST2", ("a\t1\n\n", *GOOD_SST[1:]), f"{SST[0]}, line 2: expected sentence1<tab>label, found ''"),
    "no sentence": ("SST2", (*GOOD_SST[:2], " \t1\n"), f"{SST[2]}, line 1: expected sentence1<tab>label, found ' \\t1'"),
    "column more": ("SST2", ("a\t1\t1\n", *GOOD_SST[1:]), f"{SST[0]}, line 1: expected sentence1<tab>label"),
    "no such label": ("SST2", ("a\t2\n", *GOOD_SST[1:]), f"{SST[0]}, line 1: expected the label 0 or 1, found '2'"),
    "not UTF-8": ("SST2", (b"a\t1\nb\xe9\t0\n", *GOOD_SST[1:]), f"{SST[0]}, line 2: expected UTF-8, found the byte 0xe9"),
    "no such class": (
        "TREC", ("LOC:x a\nAGE:x b\n", GOOD_TREC[1]), f"{TREC[0]}, line 2: expected the label ABBR or DESC or ENTY or HUM "
        "or LOC or NUM, found 'AGE'",
    ),
    "no fine class": ("TREC", (GOOD_TREC[0], "LOC Where ?\n"), f"{TREC[1]}, line 1: expected 'COARSE:fine question', found"),
    "no question": ("TREC", (GOOD_TREC[0], "LOC:city \n"), f"{TREC[1]}, line 1: expected 'COARSE:fine question', found"),
    "no header": ("MRPC", ("1\t2\t3\ta\tb\n", GOOD_MRPC), f"{MRPC[0]}, line 1: expected the header 'Quality\\t#1 ID"),
    "nothing": ("MRPC", (GOOD_MRPC, ""), f"{MRPC[1]}, line 1: expected the header 'Quality\\t#1 ID"),
    "four columns": (
        "MRPC", (GOOD_MRPC, MRPC_HEADER + "1\t2\t3\ta\n"), f"{MRPC[1]}, line 2: expected label<tab>id1<tab>id2<tab>sentence1"
        "<tab>sentence2, found '1\\t2\\t3\\ta'",
    ),
    "label of MRPC": ("MRPC", (MRPC_HEADER + "x\t2\t3\ta\tb\n", GOOD_MRPC), f"{MRPC[0]}, line 2: expected the label 0 or 1"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named_with_line_and_expectation(tiny, case):
    task, contents, message = MALFORMED[case]
    with pytest.raises(DataError, match=re.escape(message)):
        tiny(task, contents)


def test_an_unknown_split_is_refused(tmp_path):
    text = (SAMPLE.path / "paraphrase.tsv").read_text()
    (tmp_path / "paraphrase.tsv").write_text(text.replace("\ntrain\t", "\ntrian\t", 1))
    with pytest.raises(DataError, match=r"paraphrase\.tsv, line 2: expected the split train or test, found 'trian'"):
        load_transfer("paraphrase", DataSource("sample", tmp_path))


def test_a_task_that_the_source_does_not_have_lists_those_it_has(tmp_path):
    real = DataSource("folder", tmp_path)
    for task in ("SST", "sentiment"):
        with pytest.raises(ValueError, match=f"No transfer task '{task}' in real data; choose from MR, CR, .*TREC, MRPC"):
            load_transfer(task, real)
    choice = "choose from sentiment, subjectivity, question_type, paraphrase"
    for task in ("MR", "sts"):
        with pytest.raises(ValueError, match=rf"No transfer task '{task}' in sample data \(written .*\); {choice}"):
            load_transfer(task, SAMPLE)


# Where it comes from.


def test_the_source_is_searched_where_none_is_given(monkeypatch, tmp_path):
    (tmp_path / "senteval").mkdir()
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path))
    assert transfer_tasks() == TRANSFER_TASKS == transfer_tasks(DataSource("folder", tmp_path))
    assert transfer_tasks(SAMPLE) == SAMPLE_TASKS
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'senteval' / MR[0]}: expected this file")):
        load_transfer("MR")


@pytest.mark.parametrize("task", SAMPLE_TASKS)
def test_the_sample_loads_and_no_sentence_is_in_two_splits(task):
    dataset = load_transfer(task, SAMPLE)
    frame = dataset.to_pandas()
    assert len(frame) == {"sentiment": 160, "subjectivity": 160, "question_type": 144, "paraphrase": 128}[task]
    assert set(frame["split"]) == ({"train", "test"} | ({"dev"} if task in SAMPLE_TASKS[:2] else set()))
    for _, part in frame.groupby("split"):
        assert set(part["label"]) == set(range(6 if task == "question_type" else 2))
    assert frame["sentence1"].str.strip().all() and frame["sentence2"].str.strip().all() == (task == "paraphrase")
    assert frame.groupby("sentence1")["split"].nunique().max() == 1
    assert provenance(dataset)["source"]["kind"] == "sample" and list(provenance(dataset)["files"]) == [f"{task}.tsv"]


@pytest.mark.skipif(not REAL, reason="TP_DATA_DIR is not set: no real evaluation data")
def test_real_data_loads_whole():
    source = DataSource("folder", Path(REAL).expanduser() / "senteval")
    data = {task: load_transfer(task, source) for task in TRANSFER_TASKS}
    for task, (first, second) in BINARY.items():
        assert data[task]["label"][:] == [1] * first + [0] * second and set(data[task]["split"]) == {"all"}
    for task, splits in SPLITS.items():
        counts = Counter(data[task]["split"])
        assert counts == provenance(data[task])["splits"] and all(counts[split] in splits[split] for split in counts)
        assert counts.keys() == splits.keys() and set(data[task]["label"]) == set(range(6 if task == "TREC" else 2))
    empty = {task: sum(not sentence for sentence in dataset["sentence1"]) for task, dataset in data.items()}
    assert empty == dict.fromkeys(TRANSFER_TASKS, 0) | {"CR": 4, "MPQA": 3}
    assert all(data["MRPC"]["sentence2"]) and not any(data["TREC"]["sentence2"])
    assert data["TREC"][0]["sentence1"].startswith("How did serfdom") and data["TREC"][0]["label"] == 1
