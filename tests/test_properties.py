"""Properties that hold for any sentence and any data file, searched for counterexamples with hypothesis.

"Any sentence" is any Unicode text without surrogates: those are halves of UTF-16 pairs, not characters, and no tokenizer
takes them. The search is the same in every run (`derandomize`).
"""

import dataclasses
import json
import re
import warnings

import numpy as np
import pytest
from conftest import threads
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_models import HIDDEN, assert_same, build_tokenizer, tiny_backbone

from lib.data import retrieval as beir, relatedness
from lib.data.retrieval import BeirSet, load_beir
from lib.data.sts import STS_FILES, DataError, DataSource, load_sts, load_transfer
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS
from lib.core.token_prepending import TokenPrepending
from lib.core.tokens import PromptTokenizer
from lib.data.transfer import TRANSFER_FILES, TRANSFER_TASKS

TP = TokenPrepending(1, 3)
KINDS = ("bytes", "bytes_bos", "metaspace")
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
ODD = (
    *SPECIAL, "<PST>", "<<PST>>", "<PST", "PST>", "<0x0A>", "{sentence}", '"', "'", '" means in one word:"', "?", ".", "",
    " ", "  ", "\n", "\t", "\r\n", "\x00", "\ufeff", "\u00a0", "\u2028", "\u202e", "\u200b", "▁", "Ġ", "e\u0301", "\uffff",
    "שלום עולם", "مرحبا بالعالم", "日本語", "ﷺ", "🙂", "👩‍👩‍👧", "🇳🇴", "\U0010ffff", "The plane takes off.", "flute", "7",
)
ENCODERS = {
    "prompteol": ("prompteol", None), "prompteol, tp": ("prompteol", TP), "none": ("none", None), "none, tp": ("none", TP),
    "echo": ("echo", None), "two placeholders": ("ke", TokenPrepending(1, 3, place="in_quote", count=2)),
}


def fixed(examples: int):
    """Settings of one test: so many examples, the same in each run, however slow the machine is."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


characters = st.characters(exclude_categories=["Cs"])  # no surrogates
anything = st.text(characters, max_size=12)
sentence = anything | st.lists(st.sampled_from(ODD) | anything, max_size=5).map("".join)
batch = st.lists(sentence, min_size=1, max_size=5)
encoders = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_all():
    with threads(1):
        yield


def make_encoder(name: str, kind: str = "bytes", **options) -> SentenceEncoder:
    prompt, tp = ENCODERS[name]
    return SentenceEncoder(tiny_backbone("llama", kind), prompt, tp, **options)


def make_tokenizer(kind: str):
    """One that also has the special tokens of chat models."""
    tokenizer = build_tokenizer(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def quiet(encoder: SentenceEncoder, sentences) -> np.ndarray:
    """Embeddings; the warning about a sentence that was cut is not what these tests are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ sentences were cut")
        return encoder.encode(sentences)


# The encoder


@encoders
@fixed(9)
@given(sentences=batch, kind=st.sampled_from(KINDS))
@example(sentences=["", " \n\t ", "\x00", "\u3000", "<PST>"], kind="bytes_bos")
def test_every_sentence_has_an_embedding_of_its_own(name, sentences, kind):
    """Finite, float32, the right shape; and what it is encoded with changes nothing but the rounding."""
    encoder = make_encoder(name, kind)
    found = quiet(encoder, sentences)
    assert found.shape == (len(sentences), HIDDEN) and found.dtype == np.float32 and np.isfinite(found).all()
    for row, text in zip(found, sentences):
        assert_same(row, quiet(encoder, text), repr(text))


@encoders
@fixed(10)
@given(sentences=batch, data=st.data())
def test_permutations_and_duplicates(name, sentences, data):
    """Bit for bit: each distinct sentence is computed once, in an order that is not the caller's."""
    order = data.draw(st.permutations([*range(len(sentences))] * 2))
    encoder = make_encoder(name)
    assert np.array_equal(quiet(encoder, [sentences[i] for i in order]), quiet(encoder, sentences)[order])


@fixed(30)
@given(sentences=st.lists(sentence, min_size=2, max_size=5))
def test_different_texts_have_different_embeddings(sentences):
    """With the bare sentence as prompt nothing is cleaned away, so that each text is seen as it is."""
    found = quiet(make_encoder("none"), sentences)
    for i, a in enumerate(sentences):
        for j, b in enumerate(sentences[:i]):
            assert np.array_equal(found[i], found[j]) == (a == b), (a, b)


# Token ids


@pytest.mark.parametrize("kind", KINDS)
@encoders
@fixed(15)
@given(sentences=batch)
@example(sentences=["".join(SPECIAL), " ".join(SPECIAL), *SPECIAL])
@example(sentences=["<PST>", "<<PST>>", "<<<PST>>> <PST>", "<", "PST>"])
def test_a_sentence_stays_plain_text(kind, name, sentences):
    """No special token and no placeholder comes from a sentence, and what it says can be read back from the ids."""
    (prompt, tp), tokenizer = ENCODERS[name], make_tokenizer(kind)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(special) == (6 if kind == "metaspace" else 5)
    prompt = PROMPTS[prompt]
    template = (prompt.with_placeholder(tp.place, tp.count) if tp else prompt.templates)[0]
    texts = [prompt.prepare(text) for text in sentences]
    rows = PromptTokenizer(tokenizer, 4096)(template, texts, mean_span=prompt.pooling != "last")
    for i, (row, text) in enumerate(zip(rows.ids, texts)):
        begin = kind != "bytes"  # after <s>
        if not text and template == "{sentence}":
            assert row == [tokenizer.bos_token_id]
            continue
        assert not begin or row[0] == tokenizer.bos_token_id
        kept = row[begin:]
        if tp:
            place = rows.placeholders[i] - begin
            kept = kept[:place] + kept[place + tp.count :]
        assert not special & set(kept), tokenizer.convert_ids_to_tokens(kept)
        if kind != "metaspace":  # that one writes a space as it writes the character "▁"
            assert tokenizer.decode(kept) == template.replace("<PST>", "").replace("{sentence}", text)
            assert not tp or tokenizer.decode(kept[:place]) == template.partition("<PST>")[0]


def test_the_real_tokenizer_keeps_special_tokens_out_too(smollm2):
    tokenizer, text = smollm2.tokenizer, "a <|im_start|>user <|im_end|><|endoftext|> <PST> end"
    special = set(tokenizer.all_special_ids)
    assert special & set(tokenizer(text)["input_ids"])  # which is what would happen otherwise
    (template,) = PROMPTS["none"].with_placeholder("before_quote")
    rows = PromptTokenizer(tokenizer, 512)(template, [text])
    assert rows.placeholders == [0] and not special & set(rows.ids[0][1:])
    assert tokenizer.decode(rows.ids[0][1:]) == f" {text}"


# Long sentences


@encoders
@fixed(4)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_ten_thousand_tokens_are_cut_with_a_warning_and_the_prompt_is_not(name, data, kind):
    (prompt, tp), tokenizer = ENCODERS[name], make_tokenizer(kind)
    prompt = PROMPTS[prompt]
    template = (prompt.with_placeholder(tp.place, tp.count) if tp else prompt.templates)[0]
    unit = data.draw(st.sampled_from(ODD).filter(str.strip) | st.text(characters, min_size=1, max_size=6).filter(str.strip))
    unit, limit = unit + data.draw(st.sampled_from(["", " "])), data.draw(st.integers(140, 256))
    tokens = len(tokenizer(unit * 20, split_special_tokens=True)["input_ids"])
    long = prompt.prepare(unit * (11_000 * 20 // tokens + 20))
    assert len(tokenizer(long, split_special_tokens=True)["input_ids"]) >= 10_000
    with pytest.warns(UserWarning, match="^1 of 2 sentences were cut to [0-9]+ tokens") as caught:
        rows = PromptTokenizer(tokenizer, limit)(template, [long, "No."])
    assert len(caught) == 1 and limit - 40 <= len(rows.ids[0]) <= limit
    assert rows.ids[1] == PromptTokenizer(tokenizer, limit)(template, ["No."]).ids[0]
    text = tokenizer.decode(rows.ids[0], skip_special_tokens=True)
    assert text.endswith(template.rpartition("{sentence}")[2].replace("<PST>", ""))
    if kind == "bytes" and not tp and "�" not in text:
        kept = text.removeprefix(template.partition("{sentence}")[0])[:20]
        assert long.startswith(kept)


@encoders
@fixed(2)
@given(unit=st.sampled_from(["flute ", "日本", "🙂", "a", "<PST>", "</s>", "\x00", "שלום "]))
def test_a_long_sentence_beside_short_ones(name, unit):
    encoder = make_encoder(name)
    with pytest.warns(UserWarning, match="^1 of 2 sentences were cut"):
        found = encoder.encode(["No.", unit * 10_000])
    assert np.isfinite(found).all()
    assert_same(found[0], encoder.encode("No."))


# Data files: valid rows, or a `DataError` that names the file. Nothing else.

field = st.text(st.characters(codec="utf-8", exclude_characters="\t\n"), max_size=8)
field = field | st.sampled_from(["a\u2028b", "a\x85b", "a\x0bb", 'a "b', "\ufeffa"])  # none of these ends a line
# Scores, of which some are none.
number = st.sampled_from(["0", "1", "2.5", "5", "5.01", "-1", "nan", "inf", "1e999", "", " ", "٣", "1_0", "0x1", "three"])
raw = st.binary(max_size=60) | st.lists(st.sampled_from(
    [b"a\tb", b"\t", b"\n", b"\r\n", b"\x00", b"\xef\xbb\xbf", b"\xff", b"\xc3", b"1", b"5\n", b'"', b"\xe2\x80\xa8", b"{}"]
), max_size=12).map(b"".join)
STS_SPLITS = {"STS13": "test", "STS-B": "dev", "SICK-R": "dev", "sample": "test"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("source")


def write(path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def lines_of(columns: tuple[str, ...], kinds: dict):
    """Lists of lines of these columns between tabs: all lines as they should be, or with odd ones among them."""
    good = st.tuples(*(kinds.get(column, field.filter(str.strip)) for column in columns)).map("\t".join)
    odd = st.tuples(*(number if column == "score" else kinds.get(column, field) for column in columns)).map("\t".join)
    other = st.lists(field, max_size=9).map("\t".join)
    return st.lists(good, max_size=3) | st.lists(good | odd, max_size=3) | st.lists(good | other, max_size=3)


def encoded(lines: list[str], header: str, end: str = "\n") -> bytes:
    return "".join(line + end for line in ([header] if header else []) + lines).encode()


def loaded_or_refused(load, *names: str):
    """What `load` returns, or None if it raised a `DataError` that names one of the files and a line or a count."""
    try:
        return load()
    except DataError as error:
        message = str(error)
        assert any(name in message for name in names), message
        assert re.search(r", (line|pair) \d+: |: (found|expected) |found \d+ |no such query", message), message
        return None


@pytest.mark.parametrize("task", STS_SPLITS)
@fixed(25)
@given(data=st.data())
def test_sts_files_give_valid_rows_or_a_data_error(folder, task, data):
    split = STS_SPLITS[task]
    parts = STS_FILES[task][split]
    file, rest = parts[0], parts[1:]
    kinds = {"score": st.sampled_from(["1", "2.5", "5.0"]), "split": st.sampled_from(["test", "test", "dev"])}
    lines = data.draw(lines_of(file.columns, kinds))
    expected = sum("split" not in file.columns or line.startswith("test") for line in lines)
    content = encoded(lines, file.header, data.draw(st.sampled_from(["\n", "\r\n"])))
    write(folder / file.path, data.draw(st.just(content) | st.just(content) | raw))
    if file.scores:
        scores = data.draw(st.lists(kinds["score"], min_size=expected, max_size=expected) | st.lists(number, max_size=3))
        write(folder / file.scores, data.draw(st.just(encoded(scores, "")) | raw))
    for part in rest:
        write(folder / part.path, b"a\tb\n")
        write(folder / part.scores, b"1\n")
    source = DataSource("sample" if task == "sample" else "folder", folder)
    with pytest.MonkeyPatch.context() as patch:
        changed = (dataclasses.replace(file, rows=expected), *(dataclasses.replace(part, rows=1) for part in rest))
        patch.setitem(STS_FILES, task, STS_FILES[task] | {split: changed})
        dataset = loaded_or_refused(lambda: load_sts(task, split, source), file.path, file.scores or file.path)
    if dataset is None:
        return
    assert len(dataset) == expected + len(rest)
    assert all(file.lowest <= score <= 5 for score in dataset["score"][:])
    texts = {*dataset["sentence1"][:expected], *dataset["sentence2"][:expected]}
    assert all(text.strip() for text in texts)
    # Nothing is lost or changed on the way: each sentence is a field of the file.
    assert texts <= set(re.split("\t|\r?\n", (folder / file.path).read_bytes().decode("utf-8-sig")))


@pytest.mark.parametrize("task", TRANSFER_TASKS)
@fixed(12)
@given(data=st.data())
def test_transfer_files_give_valid_rows_or_a_data_error(folder, task, data):
    parts, changed, names = TRANSFER_FILES[task], [], []
    label = st.just("NUM:count How") if task == "TREC" else st.sampled_from(["0", "1"])
    for part in parts:
        lines = data.draw(lines_of(tuple(re.findall(r"\?P<(\w+)>", part.pattern)), {"label": label}))
        content = encoded(lines, part.header)
        content = data.draw(st.just(content) | st.just(content) | raw)
        write(folder / part.path, content)
        names.append(part.path)
        changed.append(dataclasses.replace(part, rows=dict.fromkeys(part.rows, (len(lines),))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRANSFER_FILES, task, tuple(changed))
        dataset = loaded_or_refused(lambda: load_transfer(task, DataSource("folder", folder)), *names)
    if dataset is None:
        return
    assert len(dataset) == sum(count for part in changed for (count,) in part.rows.values())
    assert set(dataset["label"][:]) <= set(range(len(parts[0].labels)))
    assert not any("\n" in text for text in dataset["sentence1"][:])


# Retrieval: one of the files is odd, the others are as they should be.

simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text(characters, max_size=6)
value = simple | st.lists(simple, max_size=2) | st.sampled_from(["q1", "d1", "1", 1, 0.5, ""])
GOOD = {
    "corpus.jsonl": b'{"_id": "d1", "title": "A", "text": "A text"}\n',
    "queries.jsonl": b'{"_id": "q1", "text": "What"}\n',
    "qrels/test.jsonl": b'{"query-id": "q1", "corpus-id": "d1", "score": 1}\n',
    "qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq1\td1\t1\n",
    "qrels/code_minus1.tsv": b"query-id\tcorpus-id\tscore\nq1\td1\t1\n",
}


def objects(*keys: str):
    """Lines of JSON objects; some lack the last of these keys. Or other bytes."""
    line = st.fixed_dictionaries({key: value for key in keys[:-1]}, optional={keys[-1]: value}).map(json.dumps)
    return st.lists(line, max_size=2).map(lambda lines: "\n".join(lines).encode()) | raw


def put_beir(folder, name: str, more: bytes) -> DataSource:
    """Write a set whose file `name` has `more` after its good line."""
    for file, content in GOOD.items():
        write(folder / file, content)
    (folder / "qrels" / ("test.jsonl" if name.endswith(".tsv") else "test.tsv")).unlink()
    write(folder / name, GOOD[name] + more)
    return DataSource("folder", folder)


def check_beir(folder, name: str, more: bytes, expected: BeirSet) -> None:
    source = put_beir(folder, name, more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(beir.SETS, "scifact", expected)
        found = loaded_or_refused(lambda: load_beir("scifact", source), name.rpartition("/")[2], f"{folder}: found")
    if found is not None:
        assert (len(found.corpus), len(found.queries)) == (expected.documents, expected.queries)
        assert found.corpus["id"][0] == "d1" and found.corpus["text"][0] == "A text" and found.qrels["q1"]["d1"] == 1
        assert all(grade >= 0 for grades in found.qrels.values() for grade in grades.values())


@fixed(40)
@given(more=objects("_id", "text", "title"))
def test_a_corpus_gives_documents_or_a_data_error(folder, more):
    check_beir(folder, "corpus.jsonl", more, BeirSet(1 + len(more.splitlines()), 1, 1))


@fixed(25)
@given(more=objects("_id", "text"))
def test_queries_give_texts_or_a_data_error(folder, more):
    check_beir(folder, "queries.jsonl", more, BeirSet(1, 1, 1))


@pytest.mark.parametrize("name", ["qrels/test.jsonl", "qrels/test.tsv", "qrels/code_minus1.tsv"])
@fixed(20)
@given(data=st.data())
def test_judgements_are_grades_or_a_data_error(folder, name, data):
    line = st.lists(st.sampled_from(["q1", "d1", "d2"]) | field | number, min_size=1, max_size=4).map("\t".join)
    tabs = st.lists(line, max_size=2).map(lambda lines: "\n".join(lines).encode()) | raw
    more = data.draw(objects("query-id", "corpus-id", "score") if name.endswith("jsonl") else tabs)
    check_beir(folder, name, more, BeirSet(1, 1, 1, excluded=name if "code" in name else ""))


@fixed(25)
@given(data=st.data())
def test_relatedness_gives_pairs_or_a_data_error(folder, data):
    cell = (field | number | st.sampled_from(["a\nb", "a b", '"'])).map(lambda text: text.replace('"', '""'))
    rows = data.draw(st.lists(st.lists(cell, min_size=1, max_size=4), max_size=3))
    text = "PairID,Text,Score\n" + "".join(",".join(f'"{c}"' for c in row) + "\n" for row in rows)
    content = data.draw(st.just(text.encode()) | raw | raw.map(lambda more: text.encode() + more))
    write(folder / "str-2022" / relatedness.FILE, content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_DATA_DIR", str(folder))
        patch.setattr(relatedness, "ROWS", len(rows))
        dataset = loaded_or_refused(relatedness.load_str2022, relatedness.FILE)
    assert dataset is None or (len(dataset) == len(rows) and all(0 <= score <= 1 for score in dataset["score"][:]))


# What JSON and CSV allow and the search above does not come upon.
EXTREME = {
    "a title that is no text": ("corpus.jsonl", b'{"_id": "d2", "text": "t", "title": 7}'),
    "half a character": ("corpus.jsonl", b'{"_id": "d2", "text": "\\ud800"}'),
    "half a character in an id": ("corpus.jsonl", b'{"_id": "\\ud800", "text": "t"}'),
    "lists in lists": ("queries.jsonl", b"[" * 100_000),
    "digits without end": ("queries.jsonl", b'{"_id": 1' + b"0" * 5000 + b', "text": "t"}'),
    "a grade beyond all floats": (
        "qrels/test.jsonl", b'{"query-id": "q1", "corpus-id": "d2", "score": 1' + b"0" * 400 + b"}"
    ),
}


@pytest.mark.parametrize("case", EXTREME)
def test_extreme_lines_are_a_data_error(folder, monkeypatch, case):
    name, more = EXTREME[case]
    monkeypatch.setitem(beir.SETS, "scifact", BeirSet(2, 1, 1))
    source = put_beir(folder, name, more)
    with pytest.raises(DataError, match=f"{name}, line 2: expected"):
        load_beir("scifact", source)


def test_a_quote_that_is_never_closed_is_a_data_error(folder, monkeypatch):
    """The rest of the file is one field then, and that can be longer than what the csv module takes."""
    monkeypatch.setenv("TP_DATA_DIR", str(folder))
    rest = b"2,a text of thirty-two characters.,0.5\n" * 5_000
    write(folder / "str-2022" / relatedness.FILE, b'PairID,Text,Score\n1,"a\nb,0.5\n' + rest)
    with pytest.raises(DataError, match=f"{relatedness.FILE}, pair 1: expected"):
        relatedness.load_str2022()
