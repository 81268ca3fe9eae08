"""The same family of tests for every architecture: hooks, early exit, batches and a shared prefix against a plain loop."""

import functools
import inspect
import itertools
import warnings

import pytest
import torch
from tiny_models import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    ROWS,
    SPARE_TOKEN,
    TOLERANCE,
    WINDOW,
    assert_same,
    build_tokenizer,
    hook_ids,
    loop_states,
    official_ids,
    randomise,
    tiny_backbone,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

import lib.core.forward
import lib.core.tokens
from lib.core.backbone import Backbone, UnsupportedModelError
from lib.core.encoder import SentenceEncoder
from lib.core.forward import read_states, run_prefix, shares_prefix
from lib.core.prompts import PROMPTS
from lib.core.token_prepending import Placement, TokenPrepending

# Short enough that the last token still sees the placeholder through a sliding window.
SHORT = "No."
SENTENCES = [
    "A man is playing a large flute on the street, and nobody who walks by that morning seems to hear him at all.",
    "The plane takes off.",
    SHORT,
    'She said "nothing at all" about it?',
    "Three children run across the field!",
]

# Each start and end differs from its neighbours; start=2 lets two blocks read the placeholder's own vector (a norm
# before the first block hides its length, so with start=1 a wrong scale would not show); end=LAYERS is the last block.
SETTINGS = {
    "baseline": None,
    "tp-0-2": TokenPrepending(0, 2),
    "tp-1-3": TokenPrepending(1, 3),
    "tp-2-4": TokenPrepending(2, LAYERS, place="start"),
}

# Families whose blocks find the positions in the attention mask alone: their models take no position ids.
POSITIONS_FROM_MASK = {
    "bloom": "ALiBi is computed from the attention mask; the model has no argument position_ids",
}

# Families in which padding on the left cannot give the states of the unpadded prompt, with the structural reason.
NO_LEFT_PADDING: dict[str, str] = {}

# These four differ most in structure and go through every case; the others through one of TP, prefix and padding each.
FULL = ("llama", "gemma3", "opt_narrow", "falcon_alibi")

families = pytest.mark.parametrize("family", FAMILIES)


def cases(names: str, every, one):
    """Of each family in `FULL` all combinations of the values `every`, of each other family the values `one`."""
    rows = [(family, *values) for family in FULL for values in itertools.product(*every)]
    return pytest.mark.parametrize(f"family, {names}", rows + [(f, *one) for f in FAMILIES if f not in FULL])


@pytest.fixture(autouse=True)
def unchanged(request, one_thread):
    """After every test: the hooks that were there before, the same parameters bit by bit, no new embedding row."""
    backbone = tiny_backbone(request.getfixturevalue("family")) if "family" in request.fixturenames else None
    if backbone is None:
        yield
        return
    hooks = hook_ids(backbone.model)
    parameters = {name: p.detach().clone() for name, p in backbone.model.state_dict().items()}
    yield
    assert hook_ids(backbone.model) == hooks
    after = backbone.model.state_dict()
    assert list(after) == list(parameters)
    assert all(torch.equal(after[name], parameters[name]) for name in parameters)
    assert backbone.embeddings.weight.shape[0] == backbone.model.config.vocab_size == ROWS


def prompt_ids(backbone: Backbone, sentence: str, tp: TokenPrepending | None) -> list[int]:
    """The whole PromptEOL prompt as the official code would tokenise it."""
    prompt = PROMPTS["prompteol"]
    template = prompt.with_placeholder(tp.place, tp.count)[0] if tp else prompt.templates[0]
    return official_ids(backbone.tokenizer, template.replace("{sentence}", prompt.prepare(sentence)))


def reference(backbone: Backbone, ids: list[int], tp: TokenPrepending | None) -> list[torch.Tensor]:
    """All states of one prompt by the loop over the blocks."""
    if tp is None:
        return loop_states(backbone, ids)
    places = [i for i, token in enumerate(ids) if token == SPARE_TOKEN]
    assert len(places) == tp.count
    return loop_states(backbone, ids, [(tp.start, tp.end, places)], tp.initial_vector(backbone))


@functools.cache
def all_states(family: str, setting: str) -> list[list[torch.Tensor]]:
    """Sentence -> layer -> (tokens, hidden), by the loop."""
    backbone, tp = tiny_backbone(family), SETTINGS[setting]
    return [reference(backbone, prompt_ids(backbone, s, tp), tp) for s in SENTENCES]


def last_states(family: str, setting: str) -> list[torch.Tensor]:
    """Layer -> (sentences, hidden): the last token's states of all `SENTENCES` by the loop."""
    return [torch.stack([row[n][-1] for row in all_states(family, setting)]) for n in range(LAYERS + 1)]


@families
def test_the_loop_itself_gives_the_states_of_the_model(family):
    backbone = tiny_backbone(family)
    ids = prompt_ids(backbone, SENTENCES[0], None)
    assert len(ids) > 3 * WINDOW
    loop_states(backbone, ids, check=True)


@families
def test_the_settings_differ_enough_to_be_told_apart(family):
    """The other tests could not fail if TP, its vector, its first or its last block made no difference."""
    backbone = tiny_backbone(family)
    ids = prompt_ids(backbone, SHORT, SETTINGS["tp-1-3"])
    place = [ids.index(SPARE_TOKEN)]
    vector = SETTINGS["tp-1-3"].initial_vector(backbone)

    def largest_difference(writes, vector=vector):
        pairs = [(a[-1], b[-1]) for a, b in zip(expected, loop_states(backbone, ids, writes, vector))]
        return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)

    expected = loop_states(backbone, ids, [(1, 3, place)], vector)
    others = [(), [(0, 3, place)], [(2, 3, place)], [(1, 2, place)], [(1, 4, place)], [(1, 3, [place[0] + 1])]]
    for writes in others:
        assert largest_difference(writes) > 50 * TOLERANCE, writes
    assert largest_difference([(1, 3, place)], -vector) > 50 * TOLERANCE


@cases("setting, share_prefix", [SETTINGS, [True, False]], ("tp-1-3", True))
def test_encoder_equals_the_loop(family, setting, share_prefix):
    backbone, tp = tiny_backbone(family), SETTINGS[setting]
    expected = last_states(family, setting)
    encoder = SentenceEncoder(backbone, "prompteol", tp, share_prefix=share_prefix)

    many = encoder.encode_layers(SENTENCES, range(LAYERS + 1))
    for layer in range(LAYERS + 1):
        assert_same(many[layer], expected[layer], f"batch of many, layer {layer}")
    for i, sentence in enumerate(SENTENCES):
        one = encoder.encode_layers([sentence], range(LAYERS + 1))
        for layer in range(LAYERS + 1):
            assert_same(one[layer][0], expected[layer][i], f"batch of one, layer {layer}, {sentence!r}")
    for layer in range(LAYERS + 1):
        alone = SentenceEncoder(backbone, "prompteol", tp, exit_layer=layer, share_prefix=share_prefix)
        assert_same(alone.encode(SENTENCES), expected[layer], f"early exit at layer {layer}")
        assert_same(alone.encode(SENTENCES[0]), expected[layer][0], f"early exit at layer {layer}, one string")


@families
def test_early_exit_and_shared_prefix_run_fewer_blocks_on_fewer_tokens(family):
    backbone = tiny_backbone(family)
    runs = []
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: runs.append((i, (args[0] if args else kwargs["hidden_states"]).shape[1])),
            with_kwargs=True,
        )
        for i, block in enumerate(backbone.layers)
    ]
    tokens = {}
    try:
        for share in (True, False):
            encoder = SentenceEncoder(backbone, "prompteol", SETTINGS["tp-1-3"], exit_layer=2, share_prefix=share)
            encoder.encode(SENTENCES)  # the first call may check whether the model can share a prefix
            runs.clear()
            encoder.encode(SENTENCES)
            # Forward pre-hooks run in the order they were registered: ours sees block 2's input before the exit.
            assert {i for i, _ in runs} == {0, 1, 2}
            tokens[share] = [n for i, n in runs if i == 0]
    finally:
        for handle in handles:
            handle.remove()
    whole = max(len(prompt_ids(backbone, s, SETTINGS["tp-1-3"])) for s in SENTENCES)
    assert tokens[False] == [whole]
    prefix, rest = tokens[True]
    assert prefix + rest == whole and prefix >= lib.core.tokens.MIN_PREFIX


@cases("length", [[4, WINDOW - 1, WINDOW, 2 * WINDOW + 3]], (2 * WINDOW + 3,))
def test_a_prefix_of_any_length_is_shared_exactly(family, length):
    backbone = tiny_backbone(family)
    assert shares_prefix(backbone)
    ids = torch.randint(3, SPARE_TOKEN, (3, 3 * WINDOW), generator=torch.Generator().manual_seed(length))
    ids[:, :length] = ids[0, :length]
    whole = read_states(backbone, ids, range(LAYERS + 1))
    prefix = run_prefix(backbone, ids[0, :length], LAYERS)
    for _ in range(2):  # the prefix serves any number of batches
        rest = read_states(backbone, ids[:, length:], range(LAYERS + 1), prefix=prefix)
        for layer in range(LAYERS + 1):
            assert_same(rest[layer], whole[layer][:, length:], f"layer {layer}")
        assert prefix.get_seq_length() == length


@cases("setting, side", [SETTINGS, ["left", "right"]], ("tp-2-4", "left"))
def test_direct_use_on_padded_batches_equals_the_loop(family, setting, side):
    """`attach` around the model's own forward, with padding and an attention mask: all states of all real tokens."""
    if side == "left" and family in NO_LEFT_PADDING:
        pytest.skip(NO_LEFT_PADDING[family])
    backbone, tp = tiny_backbone(family), SETTINGS[setting]
    rows = [prompt_ids(backbone, s, tp) for s in SENTENCES]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 2)
    mask = torch.zeros_like(ids)
    begins = [width - len(row) if side == "left" else 0 for row in rows]
    for k, (row, begin) in enumerate(zip(rows, begins)):
        ids[k, begin : begin + len(row)] = torch.tensor([0 if token == SPARE_TOKEN else token for token in row])
        mask[k, begin : begin + len(row)] = 1
    inputs = {"attention_mask": mask}
    if family not in POSITIONS_FROM_MASK:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    last = torch.tensor([begin + len(row) - 1 for begin, row in zip(begins, rows)])

    if tp is None:
        states = read_states(backbone, ids, range(LAYERS + 1), **inputs)
        final = backbone.base(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    else:
        places = torch.tensor([begin + row.index(SPARE_TOKEN) for begin, row in zip(begins, rows)])
        with tp.attach(backbone, Placement(places, last)):
            states = read_states(backbone, ids, range(LAYERS + 1), **inputs)
            final = backbone.base(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    for k, (row, begin) in enumerate(zip(rows, begins)):
        expected = all_states(family, setting)[k]
        for layer in range(LAYERS + 1):
            assert_same(states[layer][k, begin : begin + len(row)], expected[layer], f"row {k}, layer {layer}")
        assert_same(final[k, begin : begin + len(row)], expected[LAYERS], f"row {k}, the model's own output")


@families
def test_tables_of_exceptions_are_true(family):
    backbone = tiny_backbone(family)
    takes = "position_ids" in inspect.signature(backbone.base.forward).parameters
    assert takes == (family not in POSITIONS_FROM_MASK)
    assert set(POSITIONS_FROM_MASK) | set(NO_LEFT_PADDING) <= set(FAMILIES)


@families
def test_several_placeholders(family):
    backbone, tp = tiny_backbone(family), TokenPrepending(1, 3, count=3)
    found = SentenceEncoder(backbone, "prompteol", tp).encode_layers(SENTENCES, range(LAYERS + 1))
    for i, sentence in enumerate(SENTENCES):
        expected = reference(backbone, prompt_ids(backbone, sentence, tp), tp)
        for layer in range(LAYERS + 1):
            assert_same(found[layer][i], expected[layer][-1], f"layer {layer}, {sentence!r}")


@families
def test_backbone_finds_the_parts(family):
    backbone = tiny_backbone(family)
    assert backbone.num_layers == len(backbone.layers) == LAYERS
    assert (backbone.final_norm is None) == (family == "opt_narrow")
    if backbone.final_norm is not None:
        ids = torch.tensor([prompt_ids(backbone, SENTENCES[0], None)])
        states = loop_states(backbone, ids[0].tolist())
        block_output = {}
        handle = backbone.layers[-1].register_forward_hook(lambda _, __, output: block_output.update(last=output))
        with torch.inference_mode():
            logits = backbone.model(input_ids=ids, use_cache=False).logits
        handle.remove()
        last = block_output["last"]
        last = last[0] if isinstance(last, tuple) else last
        assert_same(backbone.final_norm(last)[0], states[LAYERS], "final norm")
        with torch.inference_mode():
            ours = backbone.unembedding(states[LAYERS])
        cap = getattr(backbone.model.config, "final_logit_softcapping", None)
        assert_same(torch.tanh(ours / cap) * cap if cap else ours, logits[0], "unembedding")


@families
def test_every_prompt_runs(family):
    backbone = tiny_backbone(family)
    for name, prompt in PROMPTS.items():
        tp = SETTINGS["tp-1-3"] if prompt.pooling == "last" else None
        found = SentenceEncoder(backbone, name, tp, exit_layer=2).encode(SENTENCES)
        assert found.shape == (len(SENTENCES), HIDDEN) and found.dtype == "float32"
        whole = SentenceEncoder(backbone, name, tp, exit_layer=2, share_prefix=False).encode(SENTENCES)
        assert_same(found, whole, name)


def test_a_model_that_cannot_share_a_prefix_says_so_and_is_run_on_whole_prompts(monkeypatch):
    shared = tiny_backbone("llama")
    backbone = Backbone.from_model(shared.model, build_tokenizer(), name="cannot-share")
    # As a model with a cache of its own kind would: what it read from the prefix is lost.
    monkeypatch.setattr(lib.core.forward._Prefix, "update", lambda self, keys, values, *_, **__: (keys, values))
    encoder = SentenceEncoder(backbone, "prompteol", SETTINGS["tp-1-3"], exit_layer=3)
    with pytest.warns(UserWarning, match="cannot-share cannot reuse a prompt's prefix"):
        found = encoder.encode(SENTENCES)
    assert_same(found, last_states("llama", "tp-1-3")[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        encoder.encode(SENTENCES)


def test_bidirectional_models_are_refused():
    options = dict(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=ROWS)
    model = BertLMHeadModel(BertConfig(is_decoder=False, **options))
    randomise(model)
    hooks = hook_ids(model)
    with pytest.raises(UnsupportedModelError, match="tiny-bert is not causal"):
        Backbone.from_model(model, build_tokenizer(), name="tiny-bert")
    assert hook_ids(model) == hooks
    # The same class with causal attention passes, so the check looks at what the model does and not at its name.
    causal = BertLMHeadModel(BertConfig(is_decoder=True, **options))
    randomise(causal)
    assert Backbone.from_model(causal, build_tokenizer(), name="causal-bert").num_layers == 2


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    options = dict(num_attention_heads=4, intermediate_size=48, num_hidden_layers=layers)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, hidden_size=HIDDEN, **options))
    randomise(model)
    return model


def test_models_without_a_head_or_with_two_lists_of_blocks_are_refused():
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        Backbone.from_model(tiny_llama().model, build_tokenizer())
    two = tiny_llama()
    two.model.second_tower = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(UnsupportedModelError, match="model.layers.*model.second_tower"):
        Backbone.from_model(two, build_tokenizer())
    none = tiny_llama()
    none.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match="list of 7 decoder blocks in LlamaForCausalLM, found none"):
        Backbone.from_model(none, build_tokenizer())
    # Experts are lists within blocks; as many of them as there are blocks must not confuse the search.
    experts = tiny_llama()
    for block in experts.model.layers:
        block.experts = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert Backbone.from_model(experts, build_tokenizer()).layers is experts.model.layers


def test_models_that_do_not_run_their_blocks_once_and_in_order_are_refused():
    for i, k in [(0, 1), (1, 0)]:
        model = tiny_llama()
        model.model.layers[i] = model.model.layers[k]  # one block at two depths
        hooks = hook_ids(model)
        with pytest.raises(UnsupportedModelError, match="do not run once each, in order"):
            Backbone.from_model(model, build_tokenizer())
        assert hook_ids(model) == hooks


def test_models_whose_norm_is_not_their_last_step_are_refused():
    model = tiny_llama()

    def scale(_, __, output):
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    model.model.register_forward_hook(scale)
    with pytest.raises(UnsupportedModelError, match="not its last step"):
        Backbone.from_model(model, build_tokenizer())


def test_models_whose_head_cannot_be_left_away_are_refused():
    """The text part of Llama 4 has no `base_model` of its own: what stands there is the model with its head."""
    options = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48, intermediate_size_mlp=48)
    config = AutoConfig.for_model(
        "llama4_text", vocab_size=ROWS, hidden_size=HIDDEN, num_hidden_layers=2, num_local_experts=2, **options
    )
    with pytest.raises(UnsupportedModelError, match="without its head gives .* which has no states"):
        Backbone.from_model(AutoModelForCausalLM.from_config(config), build_tokenizer())
