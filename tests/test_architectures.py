"""The same tests for every architecture: hooks, early exit, batches and a shared prefix against a plain loop."""

import copy
import functools
import inspect
import itertools
from contextlib import nullcontext

import pytest
import tiny_models as tiny
import torch
from tiny_models import LAYERS, SENTENCES, assert_same, cosines, loop_states, prompt_ids, reference, tiny_backbone
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import lib.core.forward
from lib import Backbone, Placement, SentenceEncoder, TokenPrepending, UnsupportedModelError
from lib.core.forward import read_states, run_prefix, shares_prefix
from lib.core.tokens import MIN_PREFIX

# start=2 lets two blocks read the placeholder's own vector: a norm before the first block hides its length, so that
# with start=1 a wrong scale would not show. end=LAYERS is the last block.
SETTINGS = {"baseline": None, "tp-0-2": TokenPrepending(0, 2), "tp-1-3": TokenPrepending(1, 3)}
SETTINGS |= {"tp-2-4": TokenPrepending(2, LAYERS, place="start"), "three placeholders": TokenPrepending(1, 3, count=3)}

# These four differ most in structure and go through every case; the others through one of TP, prefix and padding each.
FULL = ("llama", "gemma3", "opt_narrow", "falcon_alibi")

families = pytest.mark.parametrize("family", tiny.FAMILIES)


def cases(names: str, every, *some):
    """Of each family in `FULL` all combinations of the values `every`, of each other family the values `some`."""
    rows = [(family, *values) for family in FULL for values in itertools.product(*every)]
    rows += [(family, *values) for family in tiny.FAMILIES if family not in FULL for values in some]
    return pytest.mark.parametrize(f"family, {names}", rows)


@pytest.fixture(autouse=True)
def unchanged(request):
    family = request.getfixturevalue("family") if "family" in request.fixturenames else None
    with tiny.untouched(tiny_backbone(family)) if family else nullcontext():
        yield


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
    ids = prompt_ids(backbone, SENTENCES[0])
    assert len(ids) > 3 * tiny.WINDOW
    model = copy.deepcopy(backbone.base)  # for Transformers puts hooks of its own on it
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
    for ours, theirs in zip(loop_states(backbone, ids), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=0)


@families
def test_the_settings_differ_enough_to_be_told_apart(family):
    """The other tests could not fail if TP, its vector, its first or last block or the sentence made no difference."""
    backbone = tiny_backbone(family)
    # So short that the last token still sees the placeholder through a sliding window.
    ids = prompt_ids(backbone, SENTENCES[2], SETTINGS["tp-1-3"])
    place, vector = [ids.index(tiny.SPARE_TOKEN)], SETTINGS["tp-1-3"].initial_vector(backbone)
    expected = loop_states(backbone, ids, [(1, 3, place)], vector)
    for writes, of in (*(([(start, end, place)], vector) for start, end in ((0, 3), (2, 3), (1, 2), (1, 4))),
                       ([], vector), ([(1, 3, [place[0] + 1])], vector), ([(1, 3, place)], -vector)):
        pairs = [(a[-1], b[-1]) for a, b in zip(expected, loop_states(backbone, ids, writes, of))]
        assert max((a - b).abs().max() / a.abs().max() for a, b in pairs) > 40 * tiny.TOLERANCE, writes
    assert all(cosines(a, b) < 0.999 for a, b in itertools.combinations(last_states(family, "tp-1-3")[LAYERS], 2))


@cases("setting, share_prefix", [SETTINGS, [True, False]], ("tp-1-3", True), ("three placeholders", True))
def test_encoder_equals_the_loop(family, setting, share_prefix):
    encoder = SentenceEncoder(tiny_backbone(family), "prompteol", SETTINGS[setting], share_prefix=share_prefix)
    many, *one = (encoder.encode_layers(of, range(LAYERS + 1)) for of in (SENTENCES, *([s] for s in SENTENCES)))
    for layer, expected in enumerate(last_states(family, setting)):
        assert_same(many[layer], expected, f"batch of many, layer {layer}")
        for found, wanted in zip(one, expected):
            assert_same(found[layer][0], wanted, f"batch of one, layer {layer}")
        alone = encoder.changed(exit_layer=layer)
        assert_same(alone.encode(SENTENCES), expected, f"early exit at layer {layer}")
        assert_same(alone.encode(SENTENCES[0]), expected[0], f"early exit at layer {layer}, one string")


@families
def test_early_exit_and_shared_prefix_run_fewer_blocks_on_fewer_tokens(family):
    backbone, tp, tokens = tiny_backbone(family), SETTINGS["tp-1-3"], {}
    for share in (True, False):
        encoder, runs = SentenceEncoder(backbone, "prompteol", tp, exit_layer=2, share_prefix=share), []
        encoder.encode(SENTENCES)  # the first call may check whether the model can share a prefix
        # The hook comes before the one that exits.
        with nn.modules.module.register_module_forward_pre_hook(lambda *call, runs=runs: runs.append(call)):
            encoder.encode(SENTENCES)
        assert [block in dict(runs) for block in backbone.layers] == [True, True, True, False]
        tokens[share] = [args[0].shape[-1] for module, args in runs if module is backbone.embeddings]
    prefix, rest = tokens[True]
    assert tokens[False] == [prefix + rest] == [max(len(prompt_ids(backbone, s, tp)) for s in SENTENCES)]
    assert prefix >= MIN_PREFIX


@cases("length", [[4, tiny.WINDOW - 1, tiny.WINDOW, 2 * tiny.WINDOW + 3]], (2 * tiny.WINDOW + 3,))
def test_a_prefix_of_any_length_is_shared_exactly(family, length):
    backbone = tiny_backbone(family)
    assert shares_prefix(backbone)
    ids = torch.randint(3, tiny.SPARE_TOKEN, (3, 3 * tiny.WINDOW), generator=torch.Generator().manual_seed(length))
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
    backbone, tp = tiny_backbone(family), SETTINGS[setting]
    rows = [torch.tensor(prompt_ids(backbone, s, tp)) for s in SENTENCES]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    ids, mask = pad(rows, padding_value=2), pad(list(map(torch.ones_like, rows)))
    places = (ids == tiny.SPARE_TOKEN).nonzero()[:, 1].reshape(len(rows), -1)
    last = (mask * torch.arange(ids.shape[1])).argmax(dim=1)
    ids[ids == tiny.SPARE_TOKEN] = 0
    inputs = {"attention_mask": mask}
    if "position_ids" in inspect.signature(backbone.base.forward).parameters:  # Bloom finds them in the mask
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with tp.attach(backbone, Placement(places, last)) if tp else nullcontext():
        final = backbone.base(input_ids=ids, use_cache=False, **inputs).last_hidden_state
        states = read_states(backbone, ids, range(LAYERS + 1), **inputs)
    for k, (expected, real) in enumerate(zip(all_states(family, setting), mask.bool())):
        for layer in range(LAYERS + 1):
            assert_same(states[layer][k, real], expected[layer], f"row {k}, layer {layer}")
        assert_same(final[k, real], expected[LAYERS], f"row {k}, the model's own output")


@pytest.mark.filterwarnings("error")
def test_a_model_that_cannot_share_a_prefix_says_so_once_and_is_run_on_whole_prompts(monkeypatch):
    backbone = Backbone.from_model(tiny_backbone("llama").model, tiny.build_tokenizer(), name="cannot-share")
    # As with a model that has a cache of its own kind: what it read from the prefix is lost.
    monkeypatch.setattr(lib.core.forward, "run_prefix", lambda *_: DynamicCache())
    encoder = SentenceEncoder(backbone, "prompteol", SETTINGS["tp-1-3"], exit_layer=3)
    with pytest.warns(UserWarning, match="cannot-share cannot reuse a prompt's prefix"):
        found = encoder.encode(SENTENCES)
    assert_same(found, last_states("llama", "tp-1-3")[3])
    assert_same(encoder.encode(SENTENCES), found)


def make(kind: str = "llama", **options) -> nn.Module:
    """A random model of two blocks."""
    options |= {"num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    return tiny.random_model(kind, hidden_size=tiny.HIDDEN, **options)


def a_step_after_the_norm(_, __, output):
    output.last_hidden_state = 2 * output.last_hidden_state


# Llama 4's text part has no `base_model` of its own: what stands there is the model with its head.
LLAMA4 = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}


@pytest.mark.parametrize("kind, options, change, reason", [
    ("bert", {"is_decoder": False}, lambda model: model, "not causal"),
    ("llama4_text", LLAMA4, lambda model: model, "without its head"),
    ("llama", {}, lambda model: model.model, "no language-model head"),
    ("llama", {}, lambda model: setattr(model.model, "two", nn.ModuleList([nn.Identity()] * 2)), "layers.*model.two"),
    ("llama", {}, lambda model: setattr(model.config, "num_hidden_layers", 7), "found none"),
    ("llama", {}, lambda model: model.model.layers.__setitem__(0, model.model.layers[1]), "do not run once each"),
    ("llama", {}, lambda model: model.model.register_forward_hook(a_step_after_the_norm) and None, "not its last step"),
])
def test_models_that_break_an_assumption_are_refused(kind, options, change, reason):
    model = change(made := make(kind, **options)) or made
    hooks = tiny.hook_ids(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        Backbone.from_model(model, tiny.build_tokenizer())
    assert tiny.hook_ids(model) == hooks


def test_models_that_look_like_those_but_keep_the_assumptions_are_taken():
    assert Backbone.from_model(make("bert", is_decoder=True), tiny.build_tokenizer()).num_layers == 2
    # Experts are lists within blocks; as many of them as there are blocks must not confuse the search.
    model = make()
    for block in model.model.layers:
        block.experts = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert Backbone.from_model(model, tiny.build_tokenizer()).layers is model.model.layers
