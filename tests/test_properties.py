"""Properties that hold for any sentence, searched for counterexamples with hypothesis.

"Any sentence" is any Unicode text without surrogates: those are halves of UTF-16 pairs, not characters, and no tokenizer
takes them. The search is the same in every run (`derandomize`).
"""

import warnings

import numpy as np
import pytest
from conftest import threads
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_models import HIDDEN, assert_same, build_tokenizer, tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS
from lib.core.token_prepending import TokenPrepending
from lib.core.tokens import PromptTokenizer

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
    rows = PromptTokenizer(tokenizer, 4096)(template, texts, span=prompt.pooling != "last")
    for i, (row, text) in enumerate(zip(rows.ids, texts)):
        begin = kind != "bytes"  # after <s>
        if not text and template == "{sentence}":
            assert row == [tokenizer.bos_token_id]
            continue
        assert not begin or row[0] == tokenizer.bos_token_id
        kept = row[begin:]
        if tp:
            place = rows.placeholders[i][0] - begin
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
    assert rows.placeholders == [[0]] and not special & set(rows.ids[0][1:])
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
