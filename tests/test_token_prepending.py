"""Token Prepending and its variants: the method, its context manager, the token ids and positions it works on."""

import itertools

import numpy as np
import pytest
import tiny_models as tiny
import torch
from tiny_models import KINDS, LAYERS, SPARE_TOKEN, assert_equals_loop, assert_same, build_tokenizer, loop_states

from lib import PROMPTS, Placement, Prompt, SentenceEncoder, TokenPrepending, Variant
from lib.core.forward import read_states
from lib.core.prompts import PLACES
from lib.core.tokens import MIN_PREFIX, PromptTokenizer
from lib.core.variants import closing_tokens

SENTENCES = ["The plane takes off.", "It's the dog's bone; it isn't mine!", "No", 'He said "no" . Why?', "", "日本 ☃."]
IDS = [40, 41, 42, SPARE_TOKEN, 43, 44, 45, SPARE_TOKEN, 46, 47]
PLAIN_IDS = torch.tensor([[0 if token == SPARE_TOKEN else token for token in IDS]])
ONE_PLACEHOLDER = [*IDS[:7], 0, *IDS[8:]]


def at(*places: int) -> Placement:
    """One row of `PLAIN_IDS` with placeholders at these positions."""
    return Placement(torch.tensor([places]), torch.tensor([len(IDS) - 1]))


@pytest.mark.parametrize("options", [
    {"start": 3, "end": 3}, {"start": -1}, {"init": "gauss"}, {"place": "middle"}, {"count": 0}, {"write": "first"},
    {"hide": "always"}, {"open": "all"}, {"write": "older", "start": 0}], ids=str)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=str(list(options.values())[0])):
        (Variant if {"write", "hide", "open"} & {*options} else TokenPrepending)(**options)


def test_settings_hold_a_copy_of_their_vector_and_those_for_a_deeper_or_a_narrower_model_are_refused(backbone):
    tp = TokenPrepending(1, LAYERS + 1)
    with pytest.raises(ValueError, match=f"only {LAYERS} blocks"):
        SentenceEncoder(backbone, "prompteol", tp)
    with pytest.raises(ValueError, match=f"only {LAYERS} blocks"), tp.attach(backbone, at(3)):
        pytest.fail("the block ran")
    with pytest.raises(ValueError, match=f"5 values.*hidden size {tiny.HIDDEN}"):
        TokenPrepending(1, 3, init=torch.ones(5)).initial_vector(backbone)
    vector = np.linspace(-1, 1, tiny.HIDDEN, dtype=np.float32)
    ours = {TokenPrepending(init=kind) for kind in (vector, torch.from_numpy(vector.copy()), tuple(vector.tolist()))}
    vector[:] = 0  # the caller's array is not the setting's
    assert len(ours | {TokenPrepending(init=vector)}) == 2


@pytest.mark.parametrize("init, seed, expected", [
    *(("normal", seed, torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))) for seed in (3407, 7)),
    ("uniform", 3407, torch.rand(tiny.HIDDEN, generator=torch.Generator().manual_seed(3407))),
    ("zeros", 0, torch.zeros(tiny.HIDDEN)), ("ones", 0, torch.ones(tiny.HIDDEN)), ("space", 0, None),
    (torch.linspace(-1, 1, tiny.HIDDEN), 0, torch.linspace(-1, 1, tiny.HIDDEN))])
def test_the_placeholder_s_vector_is_what_it_says_and_what_the_model_reads(backbone, init, seed, expected):
    if init == "space":
        expected = backbone.embeddings.weight[backbone.tokenizer.convert_tokens_to_ids("Ġ")]
    tp, state = TokenPrepending(2, 3, init=init, seed=seed), torch.random.get_rng_state()
    torch.testing.assert_close(tp.initial_vector(backbone), expected, rtol=0, atol=1e-7)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"
    with tp.attach(backbone, at(3)):
        states = read_states(backbone, PLAIN_IDS, range(LAYERS + 1))
    first, *others = loop_states(backbone, ONE_PLACEHOLDER, [(2, 3, [3])], expected)
    assert torch.equal(states[0][0], first)
    for layer, wanted in enumerate(others, 1):
        assert_same(states[layer][0], wanted, f"layer {layer}")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, IndexError, RuntimeError])
def test_an_error_leaves_no_hook(backbone, error, monkeypatch):
    def fail(*_, **__):
        raise error
    hooks = tiny.hook_ids(backbone.model)
    if error is RuntimeError:  # while attaching; else, in a hook of its own that finds no such token, or while reading
        monkeypatch.setattr(backbone.layers[2], "register_forward_pre_hook", fail)
    with pytest.raises(error), TokenPrepending(1, 3).attach(backbone, at(99 if error is IndexError else 3)):
        assert tiny.hook_ids(backbone.model) != hooks and error is not RuntimeError
        read_states(backbone, PLAIN_IDS, [2], read=fail)  # that no hook is left, the fixture checks


def test_foreign_hooks_stay_and_what_they_received_is_not_written_to(backbone):
    received = {}
    def keep(name):
        return lambda _, args, *output: received.update({name: (output or args)[0]})
    handles = [block.register_forward_pre_hook(keep(i)) for i, block in enumerate(backbone.layers)]
    handles.append(backbone.embeddings.register_forward_hook(keep("embeddings")))
    with torch.inference_mode(), TokenPrepending(0, LAYERS).attach(backbone, at(3)):
        backbone.base(input_ids=PLAIN_IDS, use_cache=False)
    assert torch.equal(received["embeddings"], torch.nn.functional.embedding(PLAIN_IDS, backbone.embeddings.weight))
    for i in range(LAYERS):  # the foreign hooks were there first, so they see what TP has not changed yet
        assert not torch.equal(received[i][0, 3], received[i][0, -1]), f"block {i}'s input was written in place"
    received.clear()
    read_states(backbone, PLAIN_IDS, [LAYERS])
    assert set(received) == {"embeddings", *range(LAYERS)}
    for handle in handles:
        handle.remove()


def test_nested_settings_apply_together_and_end_separately(backbone):
    outer, inner = TokenPrepending(1, 4, seed=1), TokenPrepending(2, 3, seed=1)
    both, states = [(1, 4, [3]), (2, 3, [7])], lambda: read_states(backbone, PLAIN_IDS, [LAYERS])[LAYERS][0]
    plain, vector = states(), outer.initial_vector(backbone)
    with outer.attach(backbone, at(3)):
        alone = states()
        with inner.attach(backbone, at(7)):
            assert_same(states(), loop_states(backbone, IDS, both, vector)[LAYERS])
        assert_same(states(), loop_states(backbone, ONE_PLACEHOLDER, both[:1], vector)[LAYERS])
        assert torch.equal(states(), alone)
    assert torch.equal(states(), plain)


def rows_of(kind, template, sentences=SENTENCES):
    return PromptTokenizer(build_tokenizer(kind), 512)(template, sentences)


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_those_of_a_tokenizer_with_the_placeholder_added(kind):
    tokenizer = build_tokenizer(kind)
    for name, place, count in itertools.product(("none", "prompteol", "cot", "ke", "metaeol"), PLACES, (1, 2, 3)):
        sentences = [PROMPTS[name].prepare(s) for s in SENTENCES]
        for template in PROMPTS[name].with_placeholder(place, count):
            rows = rows_of(kind, template, sentences)
            for sentence, ids, places in zip(sentences, rows.ids, rows.placeholders, strict=True):
                found = [SPARE_TOKEN if k in places else token for k, token in enumerate(ids)]
                assert found == tiny.official_ids(tokenizer, template.replace("{sentence}", sentence)), template


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place, text", zip(PLACES, (  # as text, so that the code that puts it there is tested, too
    'This sentence : <PST> "No." means in one word:"', '<PST> This sentence : "No." means in one word:"',
    'This sentence : "<PST> No." means in one word:"', 'This sentence : "No. <PST>" means in one word:"'), strict=True))
def test_every_place_and_count_equals_the_loop(kind, place, text):
    backbone = tiny.tiny_backbone("llama", kind)
    assert PROMPTS["prompteol"].with_placeholder(place)[0].replace("{sentence}", "No.") == text
    for count in (1, 3):
        tp = TokenPrepending(1, 3, place=place, count=count)
        assert_equals_loop(SentenceEncoder(backbone, "prompteol", tp), SENTENCES, [2, LAYERS])


@pytest.mark.parametrize("template, count", {
    "In a word, {sentence} is about:": 1, '<PST> this sentence : <PST> "{sentence}" means in one word:"': 2,
    'This : <PST><PST> "{sentence}" means <PST> in one word:"': 3}.items())
def test_templates_of_ones_own_with_placeholders_at_independent_positions(backbone, template, count):
    encoder = SentenceEncoder(backbone, Prompt("mine", (template,)), TokenPrepending(1, 3))
    assert_equals_loop(encoder, SENTENCES, [2, LAYERS])
    assert all(len(row) == count for work in encoder.passes(SENTENCES) for row in work.rows.placeholders)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix_ends_before_what_a_sentence_or_the_placeholder_can_change(kind):
    for name, place in itertools.product(("prompteol", "cot", "ke", "metaeol"), PLACES):
        rows = rows_of(kind, PROMPTS[name].with_placeholder(place)[0])
        assert rows.prefix == 0 if place == "start" else rows.prefix >= MIN_PREFIX
        assert all(row[: rows.prefix] == rows.ids[0][: rows.prefix] for row in rows.ids)
        assert all(rows.prefix <= where[0] for where in rows.placeholders)
    # What sentences share by chance is not the prompt's: here it is long enough to be run once, and is not.
    assert rows_of(kind, "{sentence}", ["same words here and more", "same words here and less"]).prefix == 0
    # All the same up to the last token: one token must remain to be run.
    rows = rows_of(kind, "one sentence in one word: {sentence}", ["", ""])
    assert MIN_PREFIX <= rows.prefix < len(rows.ids[0])


PROMPT, FEW = PROMPTS["prompteol"], SENTENCES[:3]
CLOSING = 6  # tokens after the sentence

# Name -> the variant, the blocks before which a plain loop writes, the blocks in which it uses a mask of its own.
VARIANTS = {
    "tp": (Variant(1, 3), (1, 2), ()), "nothing": (Variant(1, 3, write="nothing"), (), ()),
    **{write: (Variant(1, 3, write=write), (1, 2), ()) for write in ("mean", "older", "same")},
    "resumed": (Variant(0, 2, resume=3), (0, 1, 3), ()),
    "hidden before": (Variant(1, 3, hide="before"), (1, 2), (0,)),
    "hidden after": (Variant(1, 3, hide="after"), (1, 2), (3,)),
    "last token open": (Variant(1, 3, write="nothing", open="last_token"), (), (1, 2)),
    "sentence open": (Variant(1, 3, write="nothing", open="sentence", closing=CLOSING), (), (1, 2))}


def reference_change(name: str, place: int, last: int):
    """What `loop_states` does before each block for a variant whose placeholder is at `place`."""
    _, blocks_written, blocks_masked = VARIANTS[name]
    q, k = torch.arange(last + 1)[:, None], torch.arange(last + 1)
    within = (torch.minimum(q, k) > place) & (torch.maximum(q, k) <= last - CLOSING)  # both in the sentence
    opened = {"last token open": (k == last) & (q > place), "sentence open": within}
    visible = (k <= q) | opened[name] if name in opened else (k <= q) & ((k != place) | (q == k))
    def change(i, h, block, args, kwargs, states):
        if i in blocks_written:
            value = {"mean": h[:, place + 1 :].mean(dim=1), "older": states[i - 1][None, -1] if i else None}
            if name == "same":
                output = block(h, *args, **kwargs)
                value["same"] = (output[0] if isinstance(output, tuple) else output)[:, -1]
            h[:, place] = value.get(name, h[:, -1])
        if i in blocks_masked:
            kwargs["attention_mask"] = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        return h, kwargs
    return change


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("share_prefix", [True, False])
def test_variants_equal_a_plain_loop(backbone, name, share_prefix):
    (variant, *_), layers = VARIANTS[name], range(1, LAYERS + 1)
    assert closing_tokens(backbone, PROMPT) == CLOSING
    states = SentenceEncoder(backbone, PROMPT, variant, share_prefix=share_prefix).encode_layers(FEW, layers)
    for row, sentence in enumerate(FEW):
        ids = tiny.prompt_ids(backbone, sentence, variant, PROMPT)
        change = reference_change(name, ids.index(SPARE_TOKEN), len(ids) - 1)
        expected = loop_states(backbone, ids, vector=variant.initial_vector(backbone), change=change)
        for layer in layers:
            assert_same(states[layer][row], expected[layer][-1], f"state {layer}, {sentence!r}")


def test_variants_differ_from_each_other(backbone):
    found = {str(v.describe()): SentenceEncoder(backbone, PROMPT, v).encode(FEW) for v, *_ in VARIANTS.values()}
    assert len(found) == len(VARIANTS)
    for a, b in itertools.combinations(found, 2):
        assert not np.allclose(found[a], found[b], rtol=1e-4, atol=1e-5), (a, b)
