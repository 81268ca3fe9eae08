"""Sentences in, embeddings out: order, batches, pooling, prompts, bad input, the store, and the embedded model."""

import contextlib
import copy
import csv
import dataclasses
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_models import (
    BOS,
    HIDDEN,
    LAYERS,
    ROWS,
    SPARE_TOKEN,
    assert_same,
    build_tokenizer,
    cosines,
    hook_ids,
    loop_states,
    official_ids,
    randomise,
    tiny_backbone,
)
from transformers import T5Config, T5ForConditionalGeneration

import lib.core.encoder
from lib.core.backbone import Backbone, ModelNotFoundError, UnsupportedModelError, load_backbone
from lib.core.batches import token_batches
from lib.core.encoder import SentenceEncoder
from lib.core.forward import block_input, replace_input
from lib.core.pooling import POOLINGS, Mean
from lib.core.postprocess import MeanRemoved, Normalise
from lib.core.prompts import PROMPTS, Prompt, clean_sentence
from lib.core.store import EmbeddingStore, write_atomically
from lib.core.token_prepending import TokenPrepending
from lib.core.tokens import PromptTokenizer

TP = TokenPrepending(1, 3)
SENTENCES = [
    "The plane takes off.",
    "A man is playing a large flute on the street, and nobody who walks by that morning seems to hear him at all.",
    "No.",
    'She said "nothing at all" about it?',
    "No.",
    "Three children run across the field!",
    "The stock market fell by 3.5 percent on Tuesday, analysts said.",
]
both = pytest.mark.parametrize("tp", [None, TP], ids=["plain", "tp"])


@pytest.fixture
def backbone(one_thread):
    return tiny_backbone()


@pytest.fixture
def count_passes(backbone):
    """The shapes (rows, tokens) of all forward passes of the model in this test."""
    shapes = []
    handle = backbone.embeddings.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    yield shapes
    handle.remove()


# Cleaning


@pytest.mark.parametrize(
    "sentence, expected",
    [
        ("A man is eating", "A man is eating."),
        ("A man is eating.", "A man is eating."),
        ("Is he eating?", "Is he eating."),
        ("Is he eating??", "Is he eating?."),
        ("He is!", "He is!."),
        ("(aside)", "(aside)."),
        ("He waits ...", "He waits ..."),
        ('He said "no"', "He said 'no'"),
        ('He said "no".', "He said 'no'."),
        ('He asked "why?"', "He asked 'why?'"),
        ('He said "no', "He said 'no."),
        ("the dogs'", "the dogs'"),
        ('"', "'"),
        ("?", "."),
        ("  many \t spaces\nand lines  ", "many spaces and lines."),
        ("日本", "日本."),
        ("", ""),
        (" \n\t ", ""),
    ],
)
def test_clean_sentence(sentence, expected):
    assert clean_sentence(sentence) == expected


# Order, duplicates, batches


@both
def test_permuting_the_input_permutes_the_output(backbone, tp):
    encoder = SentenceEncoder(backbone, "prompteol", tp)
    found = encoder.encode(SENTENCES)
    single = np.stack([encoder.encode(sentence) for sentence in SENTENCES])
    assert_same(found, single)
    order = np.random.default_rng(0).permutation(len(SENTENCES))
    assert_same(encoder.encode([SENTENCES[i] for i in order]), found[order])
    # Different sentences are further apart than any rounding, so a mix-up would have been seen.
    distinct = np.unique(found, axis=0)
    assert len(distinct) == len(set(SENTENCES))
    assert all(cosines(a[None], b[None]) < 0.999 for i, a in enumerate(distinct) for b in distinct[:i])


@both
def test_duplicates_get_equal_rows_and_are_computed_once(backbone, count_passes, tp):
    encoder = SentenceEncoder(backbone, "prompteol", tp, share_prefix=False)
    found = encoder.encode(["No.", *SENTENCES, "No", "  No. "])
    for i in (3, 5, -2, -1):  # the last two are equal once cleaned
        assert np.array_equal(found[0], found[i])
    assert sum(rows for rows, _ in count_passes) == len(set(SENTENCES))


@both
@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_long_neighbour_changes_nothing(backbone, tp, share_prefix):
    encoder = SentenceEncoder(backbone, "prompteol", tp, share_prefix=share_prefix)
    assert_same(encoder.encode(["No.", "a long way " * 30])[0], encoder.encode("No."))


@both
@pytest.mark.parametrize("share_prefix", [True, False])
def test_batch_size_changes_nothing_but_the_batches(backbone, count_passes, tp, share_prefix):
    encoder = SentenceEncoder(backbone, "prompteol", tp, share_prefix=share_prefix)
    distinct = sorted(set(SENTENCES))
    encoder.encode(["No."])  # the first call may check whether the model can share a prefix
    results = {}
    for batch_size, expected in [(1, [1] * 6), (4, [4, 2]), (64, [6]), (None, [6])]:
        count_passes.clear()
        results[batch_size] = encoder.encode(distinct, batch_size=batch_size)
        prefix = [1] if share_prefix else []
        assert [rows for rows, _ in count_passes] == prefix + expected
    for found in results.values():
        assert_same(found, results[1])


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(backbone, size):
    with pytest.raises(ValueError, match=f"batch_size.*{size}"):
        SentenceEncoder(backbone).encode(SENTENCES, batch_size=size)


def test_batches_keep_to_their_limits():
    generator = np.random.default_rng(1)
    for _ in range(200):
        lengths = generator.integers(1, 60, size=generator.integers(1, 40)).tolist()
        budget, size = int(generator.integers(1, 300)), [None, 1, 3, 64][generator.integers(4)]
        batches = token_batches(lengths, budget, size)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        widths = [max(lengths[i] for i in batch) for batch in batches]
        assert widths == sorted(widths, reverse=True)
        for batch, width in zip(batches, widths):
            assert len(batch) * width <= budget or len(batch) == 1
            assert size is None or len(batch) <= size
    assert token_batches([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]


# What comes back


def test_shapes_and_types(backbone):
    encoder = SentenceEncoder(backbone, method=TP)
    many, one = encoder.encode(SENTENCES), encoder.encode(SENTENCES[0])
    assert many.shape == (len(SENTENCES), HIDDEN) and many.dtype == np.float32
    assert one.shape == (HIDDEN,) and one.dtype == np.float32
    assert encoder.encode(SENTENCES[:1]).shape == (1, HIDDEN)
    tensor = encoder.encode(SENTENCES, convert_to_numpy=False)
    assert isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and not tensor.requires_grad
    assert np.array_equal(tensor.numpy(), many)
    assert encoder.encode(SENTENCES[0], convert_to_numpy=False).shape == (HIDDEN,)
    for other in (tuple(SENTENCES), np.array(SENTENCES), (s for s in SENTENCES)):
        assert np.array_equal(encoder.encode(other), many)


def test_normalised_embeddings_have_length_one_and_the_same_direction(backbone):
    encoder = SentenceEncoder(backbone)
    plain = encoder.encode(SENTENCES)
    assert np.linalg.norm(plain, axis=1).min() > 1.5
    found = encoder.encode(SENTENCES, normalize_embeddings=True)
    np.testing.assert_allclose(found, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(encoder.encode(SENTENCES[0], normalize_embeddings=True), found[0], rtol=1e-4, atol=1e-6)
    # What was handed out is the caller's own.
    found[:] = 0
    assert np.array_equal(encoder.encode(SENTENCES), plain)


def test_layers_keep_their_names_and_equal_single_passes(backbone, count_passes):
    encoder = SentenceEncoder(backbone, method=TP, share_prefix=False)
    found = encoder.encode_layers(SENTENCES, [-1, 2, 0, LAYERS])
    assert list(found) == [-1, 2, 0, LAYERS] and len(count_passes) == 1
    assert np.array_equal(found[-1], found[LAYERS])
    for layer in (0, 2, LAYERS):
        alone = SentenceEncoder(backbone, method=TP, exit_layer=layer, share_prefix=False)
        assert np.array_equal(found[layer], alone.encode(SENTENCES))
    assert SentenceEncoder(backbone, exit_layer=-2).exit_layer == LAYERS - 1


def test_a_progress_bar_is_shown_when_asked_for(backbone, capsys):
    encoder = SentenceEncoder(backbone)
    encoder.encode(SENTENCES)
    assert capsys.readouterr().err == ""
    encoder.encode(SENTENCES, show_progress_bar=True)
    assert "prompteol" in capsys.readouterr().err
    encoder = SentenceEncoder(backbone, exit_layer=0)
    encoder.encode([str(n) for n in range(1000)])
    assert capsys.readouterr().err == ""
    encoder.encode([str(n) for n in range(1001)])
    assert "prompteol" in capsys.readouterr().err
    encoder.encode([str(n) for n in range(1001)], show_progress_bar=False)
    assert capsys.readouterr().err == ""


def test_half_precision_stays_close(backbone):
    half = Backbone.from_model(copy.deepcopy(backbone.model).to(torch.bfloat16), build_tokenizer(), name="half")
    assert half.dtype == torch.bfloat16
    for prompt in ("prompteol", "echo"):
        tp = TP if prompt == "prompteol" else None
        full = SentenceEncoder(backbone, prompt, tp).encode(SENTENCES)
        found = SentenceEncoder(half, prompt, tp).encode(SENTENCES)
        assert found.dtype == np.float32
        assert cosines(found, full).min() > 0.98 and not np.array_equal(found, full)


# Bad input


def test_bad_sentences_are_refused(backbone, count_passes):
    encoder = SentenceEncoder(backbone)
    for call in (encoder.encode, lambda sentences: encoder.encode_layers(sentences, [1])):
        with pytest.raises(ValueError, match="list of sentences is empty"):
            call([])
        with pytest.raises(TypeError, match="Sentence 1 is int.*7"):
            call(["No.", 7])
        with pytest.raises(TypeError, match="Sentence 0 is NoneType"):
            call([None])
        with pytest.raises(TypeError, match="Sentence 2 is float.*nan"):
            call(["No.", "Yes.", float("nan")])
        with pytest.raises(TypeError):
            call(None)
    with pytest.raises(TypeError, match="got one string"):  # and not four embeddings of one letter each
        encoder.encode_layers("Nope", [1])
    assert not count_passes


def test_bad_settings_are_refused(backbone):
    with pytest.raises(ValueError, match="Unknown prompt 'eol'.*none, prompteol, cot, ke, ck, metaeol, echo"):
        SentenceEncoder(backbone, "eol")
    with pytest.raises(ValueError, match="Unknown pooling 'max'.*last, mean, weighted_mean"):
        SentenceEncoder(backbone, pooling="max")
    for layer in (LAYERS + 1, -LAYERS - 2):
        with pytest.raises(ValueError, match=rf"Layer {layer} does not exist.*0\.\.{LAYERS}"):
            SentenceEncoder(backbone, exit_layer=layer)
        with pytest.raises(ValueError, match=f"Layer {layer} does not exist"):
            SentenceEncoder(backbone).encode_layers(SENTENCES, [1, layer])
    with pytest.raises(ValueError, match="'echo'.*TP does not apply"):
        SentenceEncoder(backbone, "echo", TP)


def test_bad_models_are_refused(tmp_path):
    T5Config(vocab_size=ROWS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load_backbone(str(tmp_path / "t5"))
    t5 = T5ForConditionalGeneration(T5Config.from_pretrained(tmp_path / "t5"))
    with pytest.raises(UnsupportedModelError, match="tiny-t5 is an encoder-decoder model"):
        Backbone.from_model(t5, build_tokenizer(), name="tiny-t5")
    tiny_backbone().model.config.save_pretrained(tmp_path / "no-weights")
    for folder in ("no-weights", "no-such-folder"):
        with pytest.raises(ModelNotFoundError, match=rf"Cannot load '.*{folder}'(.|\n)*it must hold config.json"):
            load_backbone(str(tmp_path / folder))
    with pytest.raises(ValueError, match="Unknown dtype 'int8'.*float32, bfloat16, float16"):
        load_backbone("smollm2", dtype="int8")
    with pytest.raises(ValueError, match="not both"):
        load_backbone("smollm2", device="cpu", device_map="auto")


def test_a_model_from_a_folder_gives_the_same_embeddings(backbone, tmp_path):
    backbone.model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path), dtype="float32", device="cpu")
    expected = SentenceEncoder(backbone, "ke", TP).encode(SENTENCES)
    assert_same(SentenceEncoder(loaded, "ke", TP).encode(SENTENCES), expected)
    assert loaded.revision == "local folder" and loaded.describe()["dtype"] == "float32"


@pytest.mark.parametrize("kind", ["bytes", "bytes_bos", "metaspace"])
@pytest.mark.parametrize("setting", ["plain", "tp", "mean"])
@pytest.mark.parametrize("prompt", ["none", "prompteol", "ke", "echo"])
def test_empty_and_blank_sentences_have_embeddings(one_thread, prompt, setting, kind):
    if (prompt, setting) == ("echo", "tp"):
        setting = "plain"  # TP does not apply to Echo
    backbone = tiny_backbone("llama", kind)
    tp, pooling = TP if setting == "tp" else None, "mean" if setting == "mean" else None
    encoder = SentenceEncoder(backbone, prompt, tp, pooling=pooling)
    found = encoder.encode(["", " \n ", "No.", "."])
    assert found.shape == (4, HIDDEN) and np.isfinite(found).all()
    assert np.abs(found).max(axis=1).min() > 0
    assert_same(found[0], encoder.encode(""))
    assert_same(found[2], encoder.encode("No."))
    if PROMPTS[prompt].clean:
        assert np.array_equal(found[0], found[1])


# Long sentences

WORDS = "the plane takes off and 日本 ☃ is ... \"cold\" ; "


@both
@pytest.mark.parametrize("prompt", ["prompteol", "ke", "none"])
def test_a_sentence_of_ten_thousand_tokens_is_cut_and_counted(backbone, count_passes, prompt, tp):
    long = "flute " * 10_000
    assert len(backbone.tokenizer(long)["input_ids"]) >= 10_000
    encoder = SentenceEncoder(backbone, prompt, tp, max_length=200, share_prefix=False)
    with pytest.warns(UserWarning, match=r"^2 of 4 sentences were cut to (\d+) tokens") as caught:
        found = encoder.encode(["No.", long, long[:5000] + "x", "Yes."])
    assert len(caught) == 1
    width = max(tokens for _, tokens in count_passes)
    assert 180 <= width <= 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(found[0], encoder.encode("No."))
    # The cut text is a beginning of the sentence, and all of the prompt stands around it.
    room = int(str(caught[0].message).split("cut to ")[1].split()[0])
    uncleaned = Prompt("uncleaned", encoder.prompt.templates, clean=False)
    expected = SentenceEncoder(backbone, uncleaned, tp, max_length=250).encode(backbone.tokenizer.decode(
        backbone.tokenizer(clean_sentence(long) if encoder.prompt.clean else long)["input_ids"][:room]
    ))
    assert_same(found[1], expected)


@pytest.mark.parametrize("kind", ["bytes", "bytes_bos", "metaspace"])
@pytest.mark.parametrize("name", ["none", "prompteol", "ke", "echo"])
def test_cut_prompts_fit_and_keep_their_ending(name, kind):
    tokenizer, prompt = build_tokenizer(kind), PROMPTS[name]
    generator = np.random.default_rng(3)
    alphabet = [*WORDS, " ", "  ", "plane", "flute ", "🙂", "é", ".", '"']
    sentences = ["".join(generator.choice(alphabet, size=300)) for _ in range(40)] + ["No."]
    sentences = [prompt.prepare(sentence) for sentence in sentences]
    templates = [*prompt.templates, *(prompt.with_placeholder("before_quote", 2) if prompt.pooling == "last" else ())]
    for template in templates:
        with pytest.warns(UserWarning, match="40 of 41 sentences were cut"):
            rows = PromptTokenizer(tokenizer, 150)(template, sentences, span=True)
        assert max(map(len, rows.ids)) <= 150
        assert min(map(len, rows.ids[:40])) > 120
        head, _, tail = template.rpartition("{sentence}")
        for row, place in zip(rows.ids, rows.placeholders or [None] * len(rows.ids)):
            text = tokenizer.decode(row if place is None else row[place[-1] + 1 :], skip_special_tokens=True)
            assert text.endswith(tail)
        if name == "echo":
            text = tokenizer.decode(rows.ids[0], skip_special_tokens=True)
            first, second = text.lstrip().removeprefix("Rewrite the sentence: ").split("\nThe rewritten sentence: ")
            assert first == second and sentences[0].startswith(first)


def test_no_room_for_a_sentence_is_an_error(backbone):
    with pytest.raises(ValueError, match="max_length=20 leaves no room.*prompt alone has"):
        SentenceEncoder(backbone, "ke", max_length=20).encode("No.")


def test_max_length_is_at_most_the_models(backbone):
    assert backbone.max_length == 256
    assert SentenceEncoder(backbone, max_length=512).max_length == 256
    assert SentenceEncoder(backbone, max_length=100).max_length == 100


# Prompts of several templates


@both
@pytest.mark.parametrize("name", ["metaeol", "ck"])
def test_several_templates_give_the_mean(backbone, name, tp):
    found = SentenceEncoder(backbone, name, tp).encode_layers(SENTENCES, [2, -1])
    parts = [Prompt(f"part {i}", (template,)) for i, template in enumerate(PROMPTS[name].templates)]
    assert len(parts) == {"metaeol": 8, "ck": 2}[name]
    for layer in (2, -1):
        single = [SentenceEncoder(backbone, part, tp).encode_layers(SENTENCES, [layer])[layer] for part in parts]
        assert cosines(single[0], single[1]).max() < 0.99
        assert_same(found[layer], np.mean(single, axis=0))


@both
def test_ck_is_the_mean_of_cot_and_ke(backbone, tp):
    ck, cot, ke = (SentenceEncoder(backbone, name, tp).encode(SENTENCES) for name in ("ck", "cot", "ke"))
    assert_same(ck, (cot + ke) / 2)


# Pooling


def pooled(states: np.ndarray, pooling: str) -> np.ndarray:
    weights = np.arange(1, len(states) + 1) if pooling == "weighted_mean" else np.ones(len(states))
    return (states.astype(np.float64) * weights[:, None]).sum(0) / weights.sum()


def second_copy(tokenizer, text: str, sentence: str) -> int:
    """The first token of the last occurrence of `sentence`, found by counting the bytes that the tokens stand for."""
    begin = len(text.encode()) - len(sentence.encode())
    seen, tokens = 0, tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    metaspace = any("▁" in token for token in tokens)
    for i, token in enumerate(tokens):
        if token == BOS:
            seen -= metaspace  # that kind puts one more space before the text
        elif metaspace:
            seen += 1 if token.startswith("<0x") else len(token.replace("▁", " ").encode())
        else:
            seen += len(token)  # each sign stands for one byte
        if seen > begin:
            return i
    raise AssertionError("not found")


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
@pytest.mark.parametrize("name, kind", [("none", "bytes"), ("echo", "bytes"), ("echo", "bytes_bos"), ("echo", "metaspace")])
def test_means_against_numpy(one_thread, name, kind, pooling, share_prefix):
    """Echo pools exactly the second copy of the sentence, the bare sentence all of it."""
    backbone = tiny_backbone("llama", kind)
    (template,) = PROMPTS[name].templates
    sentences = [*SENTENCES, "The rewritten sentence: a", "日本 ☃", " spaces ", template.replace("{sentence}", "x")]
    found = SentenceEncoder(backbone, name, pooling=pooling, share_prefix=share_prefix).encode_layers(sentences, [1, LAYERS])
    for i, sentence in enumerate(sentences):
        text = template.replace("{sentence}", sentence)
        states = loop_states(backbone, backbone.tokenizer(text)["input_ids"])
        first = second_copy(backbone.tokenizer, text, sentence)
        assert (first > 0) == (name == "echo")
        for layer in (1, LAYERS):
            expected = pooled(states[layer][first:].numpy(), pooling)
            assert_same(found[layer][i], expected.astype(np.float32), f"{sentence!r}, layer {layer}")
            for k in {first - 1, first + 1} & set(range(len(states[layer]))):
                wrong = pooled(states[layer][k:].numpy(), pooling)
                assert np.abs(wrong - expected).max() > 1e-3, "one token more or less would not be seen"


@pytest.mark.parametrize("sentences", [["sentence"], ["sentence one", "sentence two"], ["sentence", "one", "(two)"]])
def test_means_where_the_first_token_holds_a_part_of_the_prompt(backbone, sentences):
    """The space before the sentence joins its first token, so a prefix "... word : " must not be run by itself."""
    template = "In one short word : {sentence}"
    found = SentenceEncoder(backbone, Prompt("mine", (template,), pooling="mean", clean=False)).encode(sentences)
    for row, sentence in zip(found, sentences):
        text = template.replace("{sentence}", sentence)
        first = second_copy(backbone.tokenizer, text, sentence)
        states = loop_states(backbone, backbone.tokenizer(text)["input_ids"])
        assert_same(row, pooled(states[LAYERS][first:].numpy(), "mean").astype(np.float32), sentence)


def test_poolings_differ(backbone):
    found = {p: SentenceEncoder(backbone, "none", pooling=p).encode(SENTENCES) for p in ("last", "mean", "weighted_mean")}
    assert SentenceEncoder(backbone, "none").pooling == POOLINGS["last"]
    assert SentenceEncoder(backbone, "echo").pooling == POOLINGS["mean"]
    assert cosines(found["last"], found["mean"]).max() < 0.999
    assert cosines(found["weighted_mean"], found["mean"]).max() < 0.9999
    states = loop_states(backbone, backbone.tokenizer("No.")["input_ids"])
    assert_same(found["last"][2], states[LAYERS][-1])


# The store


def stored(backbone, folder, **options):
    options = {"prompt": "prompteol", "method": TP} | options
    return SentenceEncoder(backbone, **options, share_prefix=False, store=EmbeddingStore(folder))


def test_a_second_call_computes_nothing(backbone, count_passes, tmp_path):
    expected = SentenceEncoder(backbone, "prompteol", TP, share_prefix=False).encode_layers(SENTENCES, [2, -1])
    first = stored(backbone, tmp_path).encode_layers(SENTENCES, [2, -1])
    count_passes.clear()
    again = stored(backbone, tmp_path).encode_layers(SENTENCES[::-1], [2, -1])
    one_layer = stored(backbone, tmp_path, exit_layer=2).encode(SENTENCES)
    assert not count_passes
    for layer in (2, -1):
        assert np.array_equal(first[layer], expected[layer])
        assert np.array_equal(again[layer], first[layer][::-1])
    assert np.array_equal(one_layer, first[2])


def test_what_is_stored_does_not_decide_what_is_computed(backbone, tmp_path):
    """Other neighbours in a batch mean other rounding: a call gives the same bits, whatever ran before it."""
    stored(backbone, tmp_path).encode(SENTENCES[:3])
    found = stored(backbone, tmp_path).encode(SENTENCES)
    assert np.array_equal(found, stored(backbone, tmp_path / "empty").encode(SENTENCES))


def test_a_layer_that_is_missing_is_computed(backbone, count_passes, tmp_path):
    stored(backbone, tmp_path).encode_layers(SENTENCES, [2])
    count_passes.clear()
    found = stored(backbone, tmp_path).encode_layers(SENTENCES, [2, 3])
    assert len(count_passes) == 1
    assert np.array_equal(found[3], SentenceEncoder(backbone, "prompteol", TP, 3, share_prefix=False).encode(SENTENCES))


def test_ck_finds_what_cot_and_ke_stored(backbone, count_passes, tmp_path):
    cot, ke = (stored(backbone, tmp_path, prompt=name).encode(SENTENCES) for name in ("cot", "ke"))
    count_passes.clear()
    assert_same(stored(backbone, tmp_path, prompt="ck").encode(SENTENCES), (cot + ke) / 2)
    assert not count_passes


@pytest.mark.parametrize(
    "change",
    [
        {"method": None},
        {"method": TokenPrepending(1, 4)},
        {"method": TokenPrepending(1, 3, seed=1)},
        {"method": TokenPrepending(1, 3, init="zeros")},
        {"method": TokenPrepending(1, 3, init=np.arange(HIDDEN))},
        {"method": TokenPrepending(1, 3, place="start")},
        {"method": TokenPrepending(1, 3, count=2)},
        {"prompt": "cot"},
        {"prompt": Prompt("prompteol", PROMPTS["prompteol"].templates, clean=False)},
        {"pooling": "mean"},
        {"exit_layer": 2},
        {"max_length": 100},
    ],
    ids=str,
)
def test_every_setting_counts(backbone, count_passes, tmp_path, change):
    stored(backbone, tmp_path).encode(SENTENCES)
    count_passes.clear()
    found = stored(backbone, tmp_path, **change).encode(SENTENCES)
    assert len(count_passes) == 1
    options = {"prompt": "prompteol", "method": TP} | change
    assert np.array_equal(found, SentenceEncoder(backbone, **options, share_prefix=False).encode(SENTENCES))


def test_other_weights_are_another_model(backbone, tmp_path):
    first = stored(backbone, tmp_path).encode(SENTENCES)
    model = copy.deepcopy(backbone.model)
    randomise(model, seed=1)
    other = Backbone.from_model(model, build_tokenizer(), name=backbone.name, revision=backbone.revision)
    assert cosines(stored(other, tmp_path).encode(SENTENCES), first).max() < 0.9


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_noticed_and_computed_again(backbone, count_passes, tmp_path, damage, monkeypatch):
    monkeypatch.setattr(lib.core.encoder, "CHUNK", 3)
    first = stored(backbone, tmp_path).encode(SENTENCES)
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 2  # six distinct sentences in chunks of three
    content = files[0].read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    files[0].write_bytes({"cut": content[:-50], "changed": flipped, "empty": b""}[damage])
    count_passes.clear()
    with pytest.warns(UserWarning, match=f"{files[0].name} is damaged"):
        again = stored(backbone, tmp_path).encode(SENTENCES)
    assert sum(rows for rows, _ in count_passes) == 3
    assert_same(again, first)
    count_passes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored(backbone, tmp_path).encode(SENTENCES)
    assert not count_passes


def test_an_interrupted_run_goes_on_where_it_stopped(backbone, count_passes, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.core.encoder, "CHUNK", 2)
    hooks = hook_ids(backbone.model)
    calls = []

    def interrupt(_, args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = backbone.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        stored(backbone, tmp_path).encode_layers(SENTENCES, [2, -1])
    handle.remove()
    assert hook_ids(backbone.model) == hooks
    assert len(list(tmp_path.rglob("*.npy"))) == 4  # two chunks, two layers
    assert not list(tmp_path.rglob("*.tmp"))
    count_passes.clear()
    found = stored(backbone, tmp_path).encode_layers(SENTENCES, [2, -1])
    assert sum(rows for rows, _ in count_passes) == 2
    expected = SentenceEncoder(backbone, "prompteol", TP).encode_layers(SENTENCES, [2, -1])
    for layer in (2, -1):
        assert_same(found[layer], expected[layer])


def test_a_full_disk_is_an_error_and_leaves_no_half_file(backbone, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        stored(backbone, tmp_path).encode(SENTENCES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.undo()
    target = tmp_path / "folder" / "file.txt"
    write_atomically(target, b"old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old" and list(target.parent.iterdir()) == [target]


def test_stored_texts_may_hold_anything(backbone, count_passes, tmp_path):
    odd = ["\x00", "a\u2028b", "e\u0301", "\u00e9"]
    first = stored(backbone, tmp_path).encode(odd)
    count_passes.clear()
    assert np.array_equal(stored(backbone, tmp_path).encode(odd), first)
    assert not count_passes
    stored(backbone, tmp_path).encode(odd[:-1] + ["e"])
    assert count_passes


# The embedded model

REAL = ["a girl is styling her hair .", "Three men are playing chess, and one asks \"who won?\"", "No"]


def test_smollm2_tokenises_the_prompt_as_the_official_code(one_thread, smollm2):
    (template,) = PROMPTS["prompteol"].with_placeholder("before_quote")
    rows = PromptTokenizer(smollm2.tokenizer, 512)(template, [clean_sentence("A dog runs"), clean_sentence(REAL[0])])
    tokens = smollm2.tokenizer.convert_ids_to_tokens(rows.ids[0])
    tokens[rows.placeholders[0][0]] = "<PST>"
    assert tokens == [
        "This", "Ġsentence", "Ġ:", "Ġ", "<PST>", 'Ġ"', "A", "Ġdog", "Ġruns", '."', "Ġmeans", "Ġin", "Ġone", "Ġword", ':"',
    ]
    assert rows.prefix == 4
    other = smollm2.tokenizer.convert_ids_to_tokens(rows.ids[1])
    assert other[-7:] == ["Ġ", '."', "Ġmeans", "Ġin", "Ġone", "Ġword", ':"']
    plain = PromptTokenizer(smollm2.tokenizer, 512)(PROMPTS["prompteol"].templates[0], ["A dog runs."])
    assert len(plain.ids[0]) == len(rows.ids[0]) - 2


@pytest.mark.parametrize("tp", [None, TokenPrepending(1, 7)], ids=["plain", "tp"])
def test_smollm2_equals_the_loop(one_thread, smollm2, tp):
    assert smollm2.num_layers == 30 and smollm2.hidden_size == 576 and smollm2.dtype == torch.float32
    hooks, layers = hook_ids(smollm2.model), [0, 1, 2, 7, 28, 29, 30]
    prompt = PROMPTS["ke"]
    (template,) = prompt.with_placeholder(tp.place) if tp else prompt.templates
    encoder = SentenceEncoder(smollm2, prompt, tp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the prefix is shared
        found = encoder.encode_layers(REAL, layers)
    for i, sentence in enumerate(REAL):
        ids = official_ids(smollm2.tokenizer, template.replace("{sentence}", prompt.prepare(sentence)))
        writes = [(tp.start, tp.end, [ids.index(SPARE_TOKEN)])] if tp else []
        expected = loop_states(smollm2, ids, writes, tp.initial_vector(smollm2) if tp else None, check=not tp)
        for layer in layers:
            assert_same(found[layer][i], expected[layer][-1], f"{sentence!r}, layer {layer}")
    assert hook_ids(smollm2.model) == hooks
    assert smollm2.embeddings.weight.shape[0] == smollm2.model.config.vocab_size


@pytest.mark.slow
@pytest.mark.skipif("TP_DATA_DIR" not in os.environ, reason="set TP_DATA_DIR to a folder with senteval/STS/STSBenchmark")
def test_smollm2_s_score_on_sts_b_is_that_of_the_official_code(smollm2):
    """Spearman x 100 of KE with TP on STS-B test, float32; the expected value is the official code's on the same weights."""
    path = Path(os.environ["TP_DATA_DIR"], "senteval", "STS", "STSBenchmark", "sts-test.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 1379
    scores, first, second = [float(row[4]) for row in rows], [row[5] for row in rows], [row[6] for row in rows]

    encoder = SentenceEncoder(smollm2, "ke", TokenPrepending(1, 7), exit_layer=28)
    states = encoder.encode(first + second, show_progress_bar=False)
    similarity = cosines(states[: len(rows)], states[len(rows) :]).numpy()
    assert 100 * spearmanr(similarity, scores).statistic == pytest.approx(68.37, abs=0.05)


def test_states_that_are_not_finite_are_refused(backbone, tmp_path):
    """As when float16 overflows; nothing of it may reach the store."""
    handle = backbone.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * float("inf"), *args[1:]))
    encoder = SentenceEncoder(backbone, exit_layer=3, store=EmbeddingStore(tmp_path))
    with pytest.raises(FloatingPointError, match="float32"):
        encoder.encode(SENTENCES)
    handle.remove()
    assert not list(tmp_path.rglob("*.npy"))


# The four choices


def test_other_choices_on_the_same_model(backbone):
    encoder = SentenceEncoder(backbone, "ke", TP, exit_layer=2, max_length=100)
    changed = encoder.changed(prompt="cot", method=None)
    assert (changed.prompt.name, changed.method, changed.exit_layer, changed.max_length) == ("cot", None, 2, 100)
    assert np.array_equal(changed.encode(SENTENCES), SentenceEncoder(backbone, "cot", None, 2).encode(SENTENCES))
    assert encoder.describe() != changed.describe() and encoder.changed().describe() == encoder.describe()


def test_a_postprocess_is_applied_to_the_exit_layer_alone(backbone, tmp_path):
    mean = np.arange(HIDDEN)
    encoder = SentenceEncoder(backbone, "prompteol", TP, 2, postprocess=MeanRemoved(mean), store=EmbeddingStore(tmp_path))
    expected = SentenceEncoder(backbone, "prompteol", TP, 2).encode(SENTENCES)
    for _ in range(2):  # what is stored is the embedding before it
        np.testing.assert_allclose(encoder.encode(SENTENCES), expected - mean, atol=1e-5)
    assert np.array_equal(stored(backbone, tmp_path, exit_layer=2).changed(share_prefix=True).encode(SENTENCES), expected)
    with pytest.raises(ValueError, match="postprocess belongs to layer 2"):
        encoder.encode_layers(SENTENCES, [1, 2])
    lengths = np.linalg.norm(encoder.changed(postprocess=Normalise()).encode(SENTENCES), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_a_method_and_a_pooling_of_ones_own(backbone):
    """Ten lines make a method: here one that doubles the last token's state before block 2."""

    class Doubled:
        def templates(self, prompt):
            return prompt.templates

        def check(self, backbone):
            assert backbone.num_layers > 2

        def describe(self):
            return {"method": "Doubled"}

        @contextlib.contextmanager
        def attach(self, backbone, batch):
            def double(_, args, kwargs):
                states = block_input(args, kwargs).clone()
                states[torch.arange(len(states)), batch.last] *= 2
                return replace_input(states, args, kwargs)

            handle = backbone.layers[2].register_forward_pre_hook(double, with_kwargs=True)
            yield
            handle.remove()

    found = SentenceEncoder(backbone, "prompteol", Doubled(), pooling=Mean()).encode("No.")
    ids = backbone.tokenizer(PROMPTS["prompteol"].templates[0].replace("{sentence}", "No."))["input_ids"]

    def change(i, h, block, args, kwargs, states):
        if i == 2:
            h[:, -1] *= 2
        return h, kwargs

    text = PROMPTS["prompteol"].templates[0].replace("{sentence}", "No.")
    states, encoded = loop_states(backbone, ids, change=change)[LAYERS].numpy(), backbone.tokenizer(text, return_offsets_mapping=True)
    first = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > text.index("No."))
    assert_same(found, states[first:].mean(axis=0))
    assert_same(SentenceEncoder(backbone, "prompteol", Doubled()).encode("No."), states[-1])


def test_placeholders_at_independent_positions(backbone):
    prompt = Prompt("two", ('<PST> this sentence : <PST> "{sentence}" means in one word:"',))
    found = SentenceEncoder(backbone, prompt, TP).encode_layers(SENTENCES, [2, LAYERS])
    for i, sentence in enumerate(SENTENCES):
        ids = official_ids(backbone.tokenizer, prompt.templates[0].replace("{sentence}", prompt.prepare(sentence)))
        places = [k for k, token in enumerate(ids) if token == SPARE_TOKEN]
        assert len(places) == 2 and places[1] > places[0] + 2
        expected = loop_states(backbone, ids, [(TP.start, TP.end, places)], TP.initial_vector(backbone))
        for layer in (2, LAYERS):
            assert_same(found[layer][i], expected[layer][-1], f"{sentence!r}, layer {layer}")


def test_the_key_holds_the_batches_and_no_prose(backbone, count_passes, tmp_path):
    """What decides the rounding counts; why a dtype was chosen does not."""
    encoder = stored(backbone, tmp_path)
    encoder.encode(SENTENCES)
    for changed, options in ((encoder, {"batch_size": 2}), (encoder.changed(share_prefix=True), {})):
        count_passes.clear()
        changed.encode(SENTENCES, **options)
        assert count_passes
    reasoned = dataclasses.replace(backbone, notes={"dtype_reason": "another reason"})
    count_passes.clear()
    stored(reasoned, tmp_path).encode(SENTENCES)
    assert not count_passes
