"""Token Prepending as a method, its context manager, and the token ids and positions it works on."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from tiny_models import (
    BOS,
    HIDDEN,
    LAYERS,
    SPARE_TOKEN,
    assert_same,
    build_tokenizer,
    hook_ids,
    loop_states,
    official_ids,
    tiny_backbone,
)

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.core.forward import read_states
from lib.core.prompts import PLACEHOLDER, PLACES, PROMPTS, Prompt
from lib.core.token_prepending import INITS, Placement, TokenPrepending
from lib.core.tokens import MIN_PREFIX, PromptTokenizer, shared_prefix

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = ["The plane takes off.", "It's the dog's bone; it isn't the cat's!", "No", 'He said "no" . Why?', "", "日本 ☃."]
KINDS = ("bytes", "bytes_bos", "metaspace")


@pytest.fixture
def backbone():
    """A model of its own for each test, so that a test may look for traces."""
    shared = tiny_backbone()
    made = Backbone.from_model(copy.deepcopy(shared.model), build_tokenizer(), name=shared.name)
    hooks, tokenizer = hook_ids(made.model), made.tokenizer.backend_tokenizer.to_str()
    weights = {name: value.clone() for name, value in made.model.state_dict().items()}
    yield made
    assert hook_ids(made.model) == hooks
    assert made.tokenizer.backend_tokenizer.to_str() == tokenizer and PLACEHOLDER not in made.tokenizer.get_vocab()
    assert all(torch.equal(value, weights[name]) for name, value in made.model.state_dict().items())


IDS = [40, 41, 42, SPARE_TOKEN, 43, 44, 45, SPARE_TOKEN, 46, 47]
PLAIN_IDS = torch.tensor([[0 if token == SPARE_TOKEN else token for token in IDS]])
LAST = torch.tensor([len(IDS) - 1])


# The setting


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": 3, "end": 3}, "start=3, end=3"),
        ({"start": 4, "end": 3}, "start=4, end=3"),
        ({"start": -1, "end": 3}, "start=-1"),
        ({"init": "gaussian"}, "Unknown init 'gaussian'.*normal, zeros, ones, uniform, space"),
        ({"place": "middle"}, "Unknown place 'middle'.*before_quote, start, in_quote, after_text"),
        ({"count": 0}, "count=0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenPrepending(**options)


def test_a_setting_for_a_deeper_model_is_refused(backbone):
    tp = TokenPrepending(1, LAYERS + 1)
    with pytest.raises(ValueError, match=f"end={LAYERS + 1}.*only {LAYERS} blocks"):
        SentenceEncoder(backbone, "prompteol", tp)
    with pytest.raises(ValueError, match=f"end={LAYERS + 1}.*only {LAYERS} blocks"):
        with tp.attach(backbone, Placement(torch.tensor([1]), torch.tensor([3]))):
            pytest.fail("the block ran")
    SentenceEncoder(backbone, "prompteol", TokenPrepending(1, LAYERS))


def test_a_setting_is_immutable_hashable_and_comparable():
    tp = TokenPrepending(1, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tp.start = 2
    assert tp == TokenPrepending(1, 3) and hash(tp) == hash(TokenPrepending(1, 3))
    assert len({tp, TokenPrepending(1, 3), TokenPrepending(1, 4), TokenPrepending(1, 3, seed=1)}) == 3
    vector = np.linspace(-1, 1, HIDDEN, dtype=np.float32)
    ours = [TokenPrepending(1, 3, init=kind) for kind in (vector, torch.from_numpy(vector.copy()), tuple(vector.tolist()))]
    assert len(set(ours)) == 1
    before = hash(ours[0])
    vector[:] = 0  # the caller's array is not the setting's
    assert hash(ours[0]) == before and ours[0] == ours[1]
    assert ours[0].describe()["init"] == ours[1].init


# The placeholder's vector


def test_the_seed_gives_one_vector_everywhere(backbone):
    expected = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3407))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert torch.equal(TokenPrepending(1, 3).initial_vector(backbone), expected)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"
    assert torch.equal(TokenPrepending(2, 4, seed=7).initial_vector(backbone),
                       torch.randn(HIDDEN, generator=torch.Generator().manual_seed(7)))


def test_all_inits(backbone):
    def vector(init):
        return TokenPrepending(1, 3, init=init).initial_vector(backbone)

    space = backbone.tokenizer(" ", add_special_tokens=False)["input_ids"]
    assert backbone.tokenizer.convert_ids_to_tokens(space) == ["Ġ"]
    own = torch.linspace(-1, 1, HIDDEN)
    expected = {
        "zeros": torch.zeros(HIDDEN),
        "ones": torch.ones(HIDDEN),
        "uniform": torch.rand(HIDDEN, generator=torch.Generator().manual_seed(3407)),
        "space": backbone.embeddings.weight[space[0]],
        own: own,
    }
    for init, value in expected.items():
        assert vector(init).dtype == torch.float32
        torch.testing.assert_close(vector(init), value, rtol=0, atol=1e-7)
    assert set(INITS) == {"normal", *(init for init in expected if isinstance(init, str))}
    with pytest.raises(ValueError, match=f"5 values.*hidden size {HIDDEN}"):
        vector(torch.ones(5))


@pytest.mark.parametrize("init", INITS)
def test_every_init_is_what_the_model_reads(backbone, init):
    tp = TokenPrepending(2, 3, init=init)
    with tp.attach(backbone, Placement(torch.tensor([3]), LAST)):
        states = read_states(backbone, PLAIN_IDS, range(LAYERS + 1))
    ids = [token if i != 7 else 0 for i, token in enumerate(IDS)]
    expected = loop_states(backbone, ids, [(2, 3, [3])], tp.initial_vector(backbone))
    assert torch.equal(states[0][0], expected[0])
    for layer in range(1, LAYERS + 1):
        assert_same(states[layer][0], expected[layer], f"layer {layer}")


# The context manager


def test_placeholders_of_each_row_and_several_of_them(backbone):
    tp = TokenPrepending(1, 3, count=2)
    rows = [IDS, [SPARE_TOKEN, 50, 51, 52, SPARE_TOKEN, 53, 54, 55, 56, 57]]
    places = torch.tensor([[3, 7], [0, 4]])
    plain = torch.tensor(rows).masked_fill(torch.tensor(rows) == SPARE_TOKEN, 0)
    with tp.attach(backbone, Placement(places, LAST.repeat(2))):
        states = read_states(backbone, plain, range(LAYERS + 1))
    for k, row in enumerate(rows):
        expected = loop_states(backbone, row, [(1, 3, places[k].tolist())], tp.initial_vector(backbone))
        for layer in range(LAYERS + 1):
            assert_same(states[layer][k], expected[layer], f"row {k}, layer {layer}")


def test_an_error_inside_leaves_no_hook(backbone):
    hooks = hook_ids(backbone.model)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            with TokenPrepending(1, 3).attach(backbone, Placement(torch.tensor([3]), LAST)):
                assert hook_ids(backbone.model) != hooks
                backbone.base(input_ids=PLAIN_IDS)
                raise error
        assert hook_ids(backbone.model) == hooks


def test_an_error_in_the_forward_pass_leaves_no_hook(backbone):
    hooks = hook_ids(backbone.model)

    def explode(states):
        raise MemoryError("no room")

    with pytest.raises(MemoryError), TokenPrepending(1, 3).attach(backbone, Placement(torch.tensor([3]), LAST)):
        read_states(backbone, PLAIN_IDS, [2], read=explode)
    assert hook_ids(backbone.model) == hooks
    with pytest.raises(IndexError), TokenPrepending(1, 3).attach(backbone, Placement(torch.tensor([99]), LAST)):
        backbone.base(input_ids=PLAIN_IDS)
    assert hook_ids(backbone.model) == hooks


def test_an_error_while_attaching_leaves_no_hook(backbone, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no hook today")

    monkeypatch.setattr(backbone.layers[2], "register_forward_pre_hook", refuse)
    hooks = hook_ids(backbone.model)
    with pytest.raises(RuntimeError, match="no hook today"):
        with TokenPrepending(1, 3).attach(backbone, Placement(torch.tensor([3]), LAST)):
            pytest.fail("the block ran")
    assert hook_ids(backbone.model) == hooks


def test_foreign_hooks_stay_and_work(backbone):
    seen = []
    handle = backbone.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    tp = TokenPrepending(1, 3)
    with tp.attach(backbone, Placement(torch.tensor([3]), LAST)):
        inside = read_states(backbone, PLAIN_IDS, [1])[1]
    before = read_states(backbone, PLAIN_IDS, [1])[1]
    handle.remove()
    # The foreign hook was there first and keeps what it received: nothing may be written into it afterwards.
    assert len(seen) == 2
    assert not torch.equal(seen[0][0, 3], seen[0][0, -1])
    assert torch.equal(inside[0, 3], inside[0, -1])
    assert not torch.equal(before[0, 3], before[0, -1])


def test_tensors_that_hooks_receive_are_not_written_to(backbone):
    received = {}

    def keep(name):
        return lambda _, args, *output: received.update({name: (output or args)[0]})

    handles = [block.register_forward_pre_hook(keep(i)) for i, block in enumerate(backbone.layers)]
    handles.append(backbone.embeddings.register_forward_hook(keep("embeddings")))
    with torch.inference_mode(), TokenPrepending(0, LAYERS).attach(backbone, Placement(torch.tensor([3]), LAST)):
        backbone.base(input_ids=PLAIN_IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    assert set(received) == {"embeddings", *range(LAYERS)}
    assert torch.equal(received["embeddings"], torch.nn.functional.embedding(PLAIN_IDS, backbone.embeddings.weight))
    for i in range(LAYERS):
        assert not torch.equal(received[i][0, 3], received[i][0, -1]), f"block {i}'s input was written in place"


def test_nested_settings_apply_together_and_end_separately(backbone):
    outer, inner = TokenPrepending(1, 4, seed=1), TokenPrepending(2, 3, seed=1)
    first, second = torch.tensor([3]), torch.tensor([7])
    vector = outer.initial_vector(backbone)
    layers = range(LAYERS + 1)
    plain = read_states(backbone, PLAIN_IDS, layers)
    with outer.attach(backbone, Placement(first, LAST)):
        alone = read_states(backbone, PLAIN_IDS, layers)
        with inner.attach(backbone, Placement(second, LAST)):
            both = read_states(backbone, PLAIN_IDS, layers)
        again = read_states(backbone, PLAIN_IDS, layers)
    after = read_states(backbone, PLAIN_IDS, layers)

    only_first = [token if i != 7 else 0 for i, token in enumerate(IDS)]
    for layer in layers:
        assert_same(alone[layer][0], loop_states(backbone, only_first, [(1, 4, [3])], vector)[layer])
        assert_same(both[layer][0], loop_states(backbone, IDS, [(1, 4, [3]), (2, 3, [7])], vector)[layer])
        assert torch.equal(again[layer], alone[layer]) and torch.equal(after[layer], plain[layer])


def test_two_encoders_on_one_model_do_not_disturb_each_other(backbone):
    settings = [None, TokenPrepending(1, 3), TokenPrepending(0, 2, seed=5, place="start", count=2), TokenPrepending(2, 4)]
    alone = [SentenceEncoder(backbone, "prompteol", tp).encode(SENTENCES) for tp in settings]
    encoders = [SentenceEncoder(backbone, "prompteol", tp) for tp in settings]
    for _ in range(2):
        for i in (2, 0, 3, 1):
            assert np.array_equal(encoders[i].encode(SENTENCES), alone[i])
    for i in range(len(settings)):
        for k in range(i):
            assert not np.allclose(alone[i], alone[k], rtol=1e-3), (settings[i], settings[k])


def test_other_models_are_not_touched(backbone):
    other = tiny_backbone("gpt2")
    before = read_states(other, PLAIN_IDS, [LAYERS])[LAYERS]
    with TokenPrepending(1, 3).attach(backbone, Placement(torch.tensor([3]), LAST)):
        assert torch.equal(read_states(other, PLAIN_IDS, [LAYERS])[LAYERS], before)


# Token ids and positions


def rows_of(kind, template, sentences=SENTENCES, max_length=256, **options):
    return PromptTokenizer(build_tokenizer(kind), max_length)(template, sentences, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["none", "prompteol", "cot", "ke", "metaeol"])
def test_token_ids_are_those_of_a_tokenizer_with_the_placeholder_added(name, place, count, kind):
    prompt, tokenizer = PROMPTS[name], build_tokenizer(kind)
    for template in prompt.with_placeholder(place, count):
        sentences = [prompt.prepare(s) for s in SENTENCES]
        rows = rows_of(kind, template, sentences)
        for i, sentence in enumerate(sentences):
            expected = official_ids(tokenizer, template.replace("{sentence}", sentence))
            places = [k for k, token in enumerate(expected) if token == SPARE_TOKEN]
            assert places == rows.placeholders[i]
            assert rows.ids[i] == [0 if token == SPARE_TOKEN else token for token in expected]
            assert rows.prefix <= rows.placeholders[i][0]


@pytest.mark.parametrize("kind", KINDS)
def test_places_in_the_text(kind):
    """Where each place is, as text, so that it does not depend on the code that puts it there."""
    expected = {
        "before_quote": 'This sentence : <PST> "No." means in one word:"',
        "start": '<PST> This sentence : "No." means in one word:"',
        "in_quote": 'This sentence : "<PST> No." means in one word:"',
        "after_text": 'This sentence : "No. <PST>" means in one word:"',
    }
    tokenizer = build_tokenizer(kind)
    for place in PLACES:
        ids = official_ids(tokenizer, expected[place])
        (template,) = PROMPTS["prompteol"].with_placeholder(place)
        rows = rows_of(kind, template, ["No."])
        assert rows.placeholders == [[ids.index(SPARE_TOKEN)]]
        assert rows.ids == [[0 if token == SPARE_TOKEN else token for token in ids]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_place_and_count_equals_the_loop(kind, place):
    backbone = tiny_backbone("llama", kind)
    for count in (1, 3):
        tp = TokenPrepending(1, 3, place=place, count=count)
        prompt = PROMPTS["prompteol"]
        found = SentenceEncoder(backbone, prompt, tp).encode_layers(SENTENCES, [2, LAYERS])
        (template,) = prompt.with_placeholder(place, count)
        for i, sentence in enumerate(SENTENCES):
            ids = official_ids(backbone.tokenizer, template.replace("{sentence}", prompt.prepare(sentence)))
            places = [k for k, token in enumerate(ids) if token == SPARE_TOKEN]
            expected = loop_states(backbone, ids, [(1, 3, places)], tp.initial_vector(backbone))
            for layer in (2, LAYERS):
                assert_same(found[layer][i], expected[layer][-1], f"count {count}, layer {layer}, {sentence!r}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["<PST>", "a <PST> b", "<<PST>>", "<s>", "x<s></s> <pad>y", "{sentence}"])
def test_text_that_spells_a_token_stays_text(text, kind):
    tokenizer = build_tokenizer(kind)
    template = PROMPTS["prompteol"].with_placeholder("before_quote")[0]
    for sentences in ([text], [text, "No.", f"{text}{PLACEHOLDER}"]):
        rows = rows_of(kind, template, sentences)
        special = set(tokenizer.all_special_ids)
        for row, (place,), sentence in zip(rows.ids, rows.placeholders, sentences):
            begin = 1 if kind != "bytes" else 0  # the tokenizer's own <s>
            # The placeholder's id is written as 0; beyond it and <s>, no special token.
            assert not special & {token for i, token in enumerate(row) if i != place and i >= begin}
            assert rows.placeholders[0] == [place]
            joined = tokenizer.decode(row[begin:place]) + "*" + tokenizer.decode(row[place + 1 :])
            expected = template.replace(PLACEHOLDER, "*").replace("{sentence}", sentence)
            assert joined.replace(" ", "") == expected.replace(" ", "")


def test_a_sentence_that_spells_the_placeholder_equals_the_loop(backbone):
    sentence, tp = f"He wrote {PLACEHOLDER} and {BOS} there.", TokenPrepending(1, 3)
    template = PROMPTS["prompteol"].with_placeholder("before_quote")[0]
    before, after = template.split(PLACEHOLDER)
    plain = build_tokenizer()
    ids = [
        *plain(before)["input_ids"], SPARE_TOKEN,
        *plain(after.replace("{sentence}", sentence), split_special_tokens=True)["input_ids"],
    ]
    expected = loop_states(backbone, ids, [(1, 3, [ids.index(SPARE_TOKEN)])], tp.initial_vector(backbone))
    encoder = SentenceEncoder(backbone, "prompteol", tp)
    assert_same(encoder.encode(sentence), expected[LAYERS][-1])
    together = encoder.encode([sentence, "No."])
    assert_same(together[0], expected[LAYERS][-1])
    assert_same(together[1], encoder.encode("No."))


def test_the_prefix_ends_before_what_a_sentence_or_the_placeholder_can_change():
    for kind in KINDS:
        for place in PLACES:
            template = PROMPTS["ke"].with_placeholder(place)[0]
            rows = rows_of(kind, template)
            if place == "start":
                assert rows.prefix == 0
                continue
            assert rows.prefix >= MIN_PREFIX
            assert all(row[: rows.prefix] == rows.ids[0][: rows.prefix] for row in rows.ids)
            assert all(rows.prefix <= min(place, len(row) - 1) for row, (place, *_) in zip(rows.ids, rows.placeholders))
    assert rows_of("bytes", "{sentence}", ["same words here and more", "same words here and less"]).prefix == 0
    # All the same up to the last token: one token must remain to be run.
    rows = rows_of("bytes", "one sentence in one word: {sentence}", ["", ""])
    assert 0 < rows.prefix < len(rows.ids[0])


def test_shared_prefix_counts():
    same = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 8]]
    assert shared_prefix(same, 7) == 6
    assert shared_prefix(same, 5) == 5
    assert shared_prefix(same, MIN_PREFIX - 1) == 0
    assert shared_prefix([[1, 2, 3, 9, 9], [1, 2, 3, 8, 9]], 5) == 0
    assert shared_prefix([[1, 2, 3, 4, 5]], -1) == 0


def test_templates_of_ones_own(backbone):
    prompt = Prompt("mine", ("In a word, {sentence} is about:",))
    tp = TokenPrepending(1, 3)
    ids = official_ids(backbone.tokenizer, "In a word, <PST> No. is about:")
    expected = loop_states(backbone, ids, [(1, 3, [ids.index(SPARE_TOKEN)])], tp.initial_vector(backbone))
    assert_same(SentenceEncoder(backbone, prompt, tp).encode("No"), expected[LAYERS][-1])


def test_nothing_is_warned_about_in_ordinary_use(backbone):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SentenceEncoder(backbone, "ck", TokenPrepending(1, 3)).encode(SENTENCES)
