"""Properties that hold for any sentence, searched for counterexamples with hypothesis, in every run the same search."""

from random import Random

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_models import HIDDEN, KINDS, TP, assert_same, build_tokenizer, tiny_backbone

from lib import AttentionValues, ContrastivePrompting, SentenceEncoder, TokenPrepending
from lib.core.tokens import PromptTokenizer

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
ODD = (
    *SPECIAL, "<PST>", "<<PST>>", "<PST", "PST>", "<0x0A>", "{sentence}", '"', "'", '" means in one word:"', "?", ".",
    "", " ", "  ", "\n", "\t", "\r\n", "\x00", "\ufeff", "\u00a0", "\u2028", "\u202e", "\u200b", "▁", "Ġ", "e\u0301",
    "\uffff", "שלום עולם", "مرحبا بالعالم", "日本語", "ﷺ", "🙂", "👩‍👩‍👧", "🇳🇴", "\U0010ffff", "The plane takes off.")
ENCODERS = {f"{name}, {tp}": {"prompt": name, "method": tp} for name in ("prompteol", "none") for tp in (None, TP)}
ENCODERS |= {"two placeholders": {"prompt": "ke", "method": TokenPrepending(1, 3, place="in_quote", count=2)}}
ENCODERS |= {"ke, mean": {"prompt": "ke", "pooling": "mean"}, "contrastive": {"method": ContrastivePrompting(1)}}
ENCODERS |= {"attention values": {"method": TP, "pooling": AttentionValues()}, "echo": {"prompt": "echo"}}

characters = st.characters(exclude_categories=["Cs"])  # no surrogates: halves of characters, which no tokenizer takes
anything = st.text(characters, max_size=12)
sentence = anything | st.lists(st.sampled_from(ODD) | anything, max_size=5).map("".join)
batch = st.lists(sentence, min_size=1, max_size=5)
units = st.sampled_from(ODD) | st.text(characters, min_size=1, max_size=6)
encoders = pytest.mark.parametrize("name", ENCODERS)
kinds = pytest.mark.parametrize("kind", KINDS)
BLANK = ["", " \n\t ", ".", "\x00", "\u3000", "<PST>"]


def make_encoder(name: str, kind: str = "bytes") -> SentenceEncoder:
    return SentenceEncoder(tiny_backbone("llama", kind), **ENCODERS[name])


@pytest.mark.filterwarnings("ignore:[0-9]+ of [0-9]+ sentences were cut")  # which is not what this test is about
@encoders
@settings(max_examples=12)
@given(sentences=batch, kind=st.sampled_from(KINDS), random=st.randoms(use_true_random=False))
@example(sentences=BLANK, kind="bytes", random=Random(1))
@example(sentences=BLANK, kind="metaspace", random=Random(1))
def test_every_sentence_has_an_embedding_of_its_own(name, sentences, kind, random):
    """What it is encoded with changes nothing but the rounding; order and repetitions change not a bit."""
    encoder = make_encoder(name, kind)
    found = encoder.encode(sentences)
    assert found.shape == (len(sentences), HIDDEN) and found.dtype == np.float32 and np.isfinite(found).all()
    assert np.abs(found).max(axis=1).min() > 0
    for row, text in zip(found, sentences):
        assert_same(row, encoder.encode(text), repr(text))
    order = random.choices(range(len(sentences)), k=3) + random.sample(range(len(sentences)), len(sentences))
    assert np.array_equal(encoder.encode([sentences[i] for i in order]), found[order])


def tokenised(name: str, kind: str, sentences, max_length: int = 4096) -> tuple:
    """A tokenizer that also has the special tokens of chat models, a template, prepared sentences, and their rows."""
    tokenizer = build_tokenizer(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    encoder = make_encoder(name)
    template, texts = encoder.templates[0], [encoder.prompt.prepare(text) for text in sentences]
    return tokenizer, template, texts, PromptTokenizer(tokenizer, max_length)(template, texts, span=True)


@kinds
@encoders
@settings(max_examples=15)
@given(sentences=batch)
@example(sentences=["".join(SPECIAL), " ".join(SPECIAL), *SPECIAL])
@example(sentences=["<PST>", "<<PST>>", "<<<PST>>> <PST>", "<", "PST>"])
@example(sentences=["{sentence}"])
def test_a_sentence_stays_plain_text(kind, name, sentences):
    """No special token and no placeholder comes from a sentence, and what it says can be read back from the ids."""
    tokenizer, template, texts, rows = tokenised(name, kind, sentences)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(special) == (6 if kind == "metaspace" else 5)
    for i, (row, text) in enumerate(zip(rows.ids, texts)):
        if not text and template == "{sentence}":
            assert row == [tokenizer.bos_token_id]
            continue
        begin = kind != "bytes"  # after <s>
        assert not begin or row[0] == tokenizer.bos_token_id
        places = rows.placeholders[i] if rows.placeholders else []
        assert len(places) == template.count("<PST>")
        kept = [token for k, token in enumerate(row) if k >= begin and k not in places]
        assert not special & set(kept), tokenizer.convert_ids_to_tokens(kept)
        if kind != "metaspace":  # that one writes a space as it writes the character "▁"
            assert tokenizer.decode(kept) == template.replace("<PST>", "").replace("{sentence}", text)
            assert not places or tokenizer.decode(row[begin : places[0]]) == template.partition("<PST>")[0]


@kinds
@encoders
@settings(max_examples=5)
@given(words=st.lists(units, min_size=1, max_size=3), limit=st.integers(140, 256))
@example(words=["the ", "plane", " takes", "日本 ☃", "...", '"cold" ; ', "🙂", "é"], limit=150)
def test_ten_thousand_tokens_are_cut_with_a_warning_and_the_prompt_is_not(name, kind, words, limit):
    unit = "".join(words)
    assume(unit.strip())
    tokens = len(build_tokenizer(kind)(unit * 20, split_special_tokens=True)["input_ids"])
    long = unit * (11_000 * 20 // tokens + 20)
    with pytest.warns(UserWarning, match="^1 of 2 sentences were cut to [0-9]+ tokens") as caught:
        tokenizer, template, texts, rows = tokenised(name, kind, [long, "No."], limit)
    assert len(caught) == 1 and limit - 40 <= len(rows.ids[0]) <= limit
    assert rows.ids[1] == tokenised(name, kind, ["No."])[3].ids[0]
    head, _, tail = template.replace("<PST>", "").partition("{sentence}")
    text = tokenizer.decode(rows.ids[0], skip_special_tokens=True)
    assert text.endswith(tail.rpartition("{sentence}")[2])
    if kind == "bytes" and rows.placeholders is None and "�" not in text:
        between, *echo = tail.split("{sentence}")
        beginnings = text.removeprefix(head).split(between) if echo else [text.removeprefix(head).removesuffix(tail)]
        assert len(set(beginnings)) == 1 and texts[0].startswith(beginnings[0]) and beginnings[0]
