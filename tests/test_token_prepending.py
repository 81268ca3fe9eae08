"""Token Prepending as a method, its context manager, and the token ids and positions it works on."""

import itertools

import numpy as np
import pytest
import tiny_models as tiny
import torch
from tiny_models import KINDS, LAYERS, SPARE_TOKEN, assert_equals_loop, assert_same, build_tokenizer, loop_states

from lib.core.encoder import SentenceEncoder
from lib.core.forward import read_states
from lib.core.prompts import PLACES, PROMPTS, Prompt
from lib.core.token_prepending import Placement, TokenPrepending
from lib.core.tokens import MIN_PREFIX, PromptTokenizer

SENTENCES = ["The plane takes off.", "It's the dog's bone; it isn't mine!", "No", 'He said "no" . Why?', "", "日本 ☃."]
IDS = [40, 41, 42, SPARE_TOKEN, 43, 44, 45, SPARE_TOKEN, 46, 47]
PLAIN_IDS = torch.tensor([[0 if token == SPARE_TOKEN else token for token in IDS]])
ONE_PLACEHOLDER = [*IDS[:7], 0, *IDS[8:]]


def at(*places: int) -> Placement:
    """One row of `PLAIN_IDS` with placeholders at these positions."""
    return Placement(torch.tensor([places]), torch.tensor([len(IDS) - 1]))


@pytest.mark.parametrize("options", [
    {"start": 3, "end": 3}, {"start": -1}, {"init": "gauss"}, {"place": "middle"}, {"count": 0}], ids=str)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=str(list(options.values())[0])):
        TokenPrepending(**options)


def test_settings_for_a_deeper_or_a_narrower_model_are_refused(backbone):
    tp = TokenPrepending(1, LAYERS + 1)
    with pytest.raises(ValueError, match=f"only {LAYERS} blocks"):
        SentenceEncoder(backbone, "prompteol", tp)
    with pytest.raises(ValueError, match=f"only {LAYERS} blocks"), tp.attach(backbone, at(3)):
        pytest.fail("the block ran")
    with pytest.raises(ValueError, match=f"5 values.*hidden size {tiny.HIDDEN}"):
        TokenPrepending(1, 3, init=torch.ones(5)).initial_vector(backbone)


def test_settings_with_equal_vectors_are_equal_and_hold_a_copy():
    vector = np.linspace(-1, 1, tiny.HIDDEN, dtype=np.float32)
    kinds = (vector, torch.from_numpy(vector.copy()), tuple(vector.tolist()))
    ours = [TokenPrepending(1, 3, init=kind) for kind in kinds]
    vector[:] = 0  # the caller's array is not the setting's
    assert len({*ours, TokenPrepending(1, 3, init=vector)}) == 2


@pytest.mark.parametrize("init, seed, expected", [
    *(("normal", seed, torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))) for seed in (3407, 7)),
    ("uniform", 3407, torch.rand(tiny.HIDDEN, generator=torch.Generator().manual_seed(3407))),
    ("zeros", 0, torch.zeros(tiny.HIDDEN)), ("ones", 0, torch.ones(tiny.HIDDEN)), ("space", 0, None),
    (torch.linspace(-1, 1, tiny.HIDDEN), 0, torch.linspace(-1, 1, tiny.HIDDEN)),
])
def test_the_placeholder_s_vector_is_what_it_says_and_what_the_model_reads(backbone, init, seed, expected):
    if init == "space":
        expected = backbone.embeddings.weight[backbone.tokenizer.convert_tokens_to_ids("Ġ")]
    tp, state = TokenPrepending(2, 3, init=init, seed=seed), torch.random.get_rng_state()
    torch.testing.assert_close(tp.initial_vector(backbone), expected, rtol=0, atol=1e-7)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"
    with tp.attach(backbone, at(3)):
        states = read_states(backbone, PLAIN_IDS, range(LAYERS + 1))
    wanted = loop_states(backbone, ONE_PLACEHOLDER, [(2, 3, [3])], expected)
    assert torch.equal(states[0][0], wanted[0])
    for layer in range(1, LAYERS + 1):
        assert_same(states[layer][0], wanted[layer], f"layer {layer}")


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
    vector, both = outer.initial_vector(backbone), [(1, 4, [3]), (2, 3, [7])]

    def states():
        return read_states(backbone, PLAIN_IDS, [LAYERS])[LAYERS][0]

    plain = states()
    with outer.attach(backbone, at(3)):
        alone = states()
        with inner.attach(backbone, at(7)):
            assert_same(states(), loop_states(backbone, IDS, both, vector)[LAYERS])
        assert torch.equal(states(), alone)
    assert_same(alone, loop_states(backbone, ONE_PLACEHOLDER, both[:1], vector)[LAYERS])
    assert torch.equal(states(), plain)


def rows_of(kind, template, sentences=SENTENCES):
    return PromptTokenizer(build_tokenizer(kind), 256)(template, sentences)


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_those_of_a_tokenizer_with_the_placeholder_added(kind):
    tokenizer = build_tokenizer(kind)
    for name, place, count in itertools.product(("none", "prompteol", "cot", "ke", "metaeol"), PLACES, (1, 2, 3)):
        sentences = [PROMPTS[name].prepare(s) for s in SENTENCES]
        for template in PROMPTS[name].with_placeholder(place, count):
            rows = rows_of(kind, template, sentences)
            for i, sentence in enumerate(sentences):
                expected = tiny.official_ids(tokenizer, template.replace("{sentence}", sentence))
                assert [k for k, token in enumerate(expected) if token == SPARE_TOKEN] == rows.placeholders[i], template
                assert [0 if token == SPARE_TOKEN else token for token in expected] == rows.ids[i], template


# Where each place is, as text, so that the tests do not depend on the code that puts the placeholder there.
PLACED = {
    "before_quote": 'This sentence : <PST> "No." means in one word:"',
    "start": '<PST> This sentence : "No." means in one word:"',
    "in_quote": 'This sentence : "<PST> No." means in one word:"',
    "after_text": 'This sentence : "No. <PST>" means in one word:"',
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_and_count_equals_the_loop(kind, place):
    backbone = tiny.tiny_backbone("llama", kind)
    (template,) = PROMPTS["prompteol"].with_placeholder(place)
    assert template.replace("{sentence}", "No.") == PLACED[place]
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
