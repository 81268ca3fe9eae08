"""Attention values, Contrastive Prompting and postprocesses against computations by hand."""

import copy
import itertools

import numpy as np
import pytest
import tiny_models as tiny
import torch
from test_hardware import in_float16, with_large_activations
from test_token_prepending import reference_change
from tiny_models import FAMILIES, HIDDEN, LAYERS, SENTENCES, SPARE_TOKEN, assert_same, prompt_ids, tiny_backbone

import lib
from lib import AttentionValues, ContrastivePrompting, EmbedFilter, Prompt, SentenceEncoder, TokenPrepending, Variant

METHODS = {"": None, "tp": TokenPrepending(1, 3), "same": Variant(1, 3, write="same")}
SUPPORTED = sorted(FAMILIES.keys() - {"opt_narrow"})  # which norms the sum of what attention adds and the state
CASES = [*itertools.product(SUPPORTED, ("", "tp"))]
CASES += itertools.product(("llama", "gemma3", "gptj", "bloom"), ["same"])

# Where it is not called as in Llama: what a block calls first with the states to which attention was added, and the
# matrix that ends attention. In the parallel families attention and MLP read the same states.
NEXT = {"gpt2": "ln_2", "gpt_neo": "ln_2", "opt": "final_layer_norm", "olmo2": "mlp"}
NEXT |= dict.fromkeys(("gemma2", "gemma3"), "pre_feedforward_layernorm")
PARALLEL = ("phi", "gptj", "gpt_neox", "falcon", "falcon_alibi")
PROJECTION = {"phi": "self_attn.dense", "gpt2": "attn.c_proj", "gptj": "attn.out_proj", "gpt_neox": "attention.dense"}
PROJECTION |= dict.fromkeys(("falcon", "falcon_alibi", "bloom"), "self_attention.dense")
PROJECTION |= {"gpt_neo": "attn.attention.out_proj", "opt": "self_attn.out_proj"}

CP = ContrastivePrompting(1)
CHOICES = [{"pooling": AttentionValues()}, {"pooling": AttentionValues(1), "method": METHODS["tp"]}, {"method": CP},
           {"method": ContrastivePrompting(1, rule="NR"), "prompt": "ck"}, {"method": CP, "pooling": AttentionValues()}]


def added_by_attention(family: str, block, h, args, kwargs) -> torch.Tensor:
    """What a block's attention adds at the last token; in a parallel family, what it adds less what its MLP returns."""
    seen, parallel = [], family in PARALLEL
    part = block.get_submodule("mlp" if parallel else NEXT.get(family, "post_attention_layernorm"))
    with part.register_forward_hook(lambda _, args, output: seen.append((output if parallel else args[0]).clone())):
        output = block(h.clone(), *args, **kwargs)
    states, output = seen[0].reshape(-1, HIDDEN)[-1], output[0] if isinstance(output, tuple) else output
    return (output[0, -1] - states if parallel else states) - h[0, -1]


def by_hand(family: str, sentence: str, name: str, start: int = 0) -> torch.Tensor:
    """(layers, hidden): for every layer above `start` the sum over the blocks from `start` on, by a plain loop."""
    backbone, method, added = tiny_backbone(family), METHODS[name], []
    ids = prompt_ids(backbone, sentence, method)
    other = reference_change(name, ids.index(SPARE_TOKEN), len(ids) - 1) if method else lambda _, h, *rest: (h, rest[2])
    def change(i, h, block, args, kwargs, states):
        h, kwargs = other(i, h, block, args, kwargs, states)
        added.append(added_by_attention(family, block, h, args, kwargs))
        return h, kwargs
    tiny.loop_states(backbone, ids, vector=method and method.initial_vector(backbone), change=change)
    return torch.stack(added)[start:].cumsum(0)


@pytest.mark.parametrize("family, name", CASES)
def test_attention_values_are_the_sum_of_what_attention_adds(family, name):
    for start in (0, 2):
        encoder = SentenceEncoder(tiny_backbone(family), "prompteol", METHODS[name], pooling=AttentionValues(start))
        found = encoder.encode_layers(SENTENCES, range(start + 1, LAYERS + 1))
        for row, sentence in enumerate(SENTENCES):
            assert_same(np.stack([v[row] for v in found.values()]), by_hand(family, sentence, name, start), sentence)


@pytest.mark.parametrize("family, name", [("gemma3", "post_attention_layernorm"), ("granite", "self_attn.o_proj")])
def test_the_search_is_not_misled_by_a_method_and_finds_the_same_in_half_precision(family, name):
    for method, dtype in itertools.product((METHODS["tp"], CP), (torch.float32, torch.float16, torch.bfloat16)):
        fresh = in_float16(tiny_backbone(family), dtype)  # in which nothing has been looked for
        SentenceEncoder(fresh, "prompteol", method, pooling=AttentionValues()).encode(SENTENCES)
        assert fresh.attention.added == [block.get_submodule(name) for block in fresh.layers]


def test_what_cannot_be_is_refused(backbone):
    values = SentenceEncoder(backbone, pooling=AttentionValues(2))
    for choice in CHOICES:
        with pytest.raises(lib.UnsupportedModelError, match="In tiny-opt_narrow no module is found"):
            SentenceEncoder(tiny_backbone("opt_narrow"), **choice)
    for message, call in {
        "from block 2 on has nothing to sum at layer 2": lambda: values.encode_layers(["No."], [LAYERS, 2]),
        "block=-1": lambda: ContrastivePrompting(-1), "NS or NR.*'NX'": lambda: ContrastivePrompting(rule="NX"),
        "'no'": lambda: ContrastivePrompting(auxiliary="no"), "'echo' is": lambda: CP.templates(lib.PROMPTS["echo"]),
        f"only {LAYERS} blocks": lambda: SentenceEncoder(backbone, "ke", ContrastivePrompting(LAYERS)),
        "size, 32; got 0": lambda: EmbedFilter.fit(backbone, 0), "32; got 33": lambda: EmbedFilter.fit(backbone, 33),
        "has no direction": lambda: lib.MeanDirectionRemoved.fit(np.zeros((3, HIDDEN))),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@torch.inference_mode()
def contrasted_by_hand(family: str, sentence: str, cp: ContrastivePrompting, prompt: Prompt) -> list[torch.Tensor]:
    """Layer, from 1 on -> (hidden,), by two plain calls of the model for each of the prompt's templates."""
    backbone, auxiliary = tiny_backbone(family), []
    projection = backbone.layers[cp.block].get_submodule(PROJECTION.get(family, "self_attn.o_proj"))
    def call(template, hook):
        ids = torch.tensor([prompt_ids(backbone, sentence, prompt=Prompt("", (template,)))])
        with projection.register_forward_pre_hook(hook):
            states = backbone.base(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return [state[0, -1] for state in states[1:]]
    def subtract(_, args):
        values = args[0].clone()
        rest = values[0, -1] - auxiliary[0]
        values[0, -1] = rest * (cp.strength if cp.rule == "NS" else values[0, -1].norm() / rest.norm())
        return (values,)
    call('The irrelevant information of this sentence : "{sentence}" means in one word:"',
         lambda _, args: auxiliary.append(args[0][0, -1].clone()))
    return [sum(states) / len(states) for states in zip(*(call(text, subtract) for text in prompt.templates))]


@pytest.mark.parametrize("family, options, prompt", [
    *((family, {"block": 1}, "prompteol") for family in SUPPORTED),
    *((family, {"block": 2, "rule": "NR"}, "ck") for family in ("llama", "gemma3", "gptj", "bloom")),
    ("llama", {"block": 0, "strength": 0.5}, "ck"), ("gemma3", {"block": 3, "strength": 3.0}, "cot")])
def test_contrastive_prompting_equals_two_calls_by_hand(family, options, prompt):
    encoder, cp = SentenceEncoder(tiny_backbone(family), prompt), ContrastivePrompting(**options)
    plain, found = (e.encode_layers(SENTENCES, range(1, LAYERS + 1)) for e in (encoder, encoder.changed(method=cp)))
    for row, sentence in enumerate(SENTENCES):
        for n, expected in enumerate(contrasted_by_hand(family, sentence, cp, lib.PROMPTS[prompt]), 1):
            assert_same(found[n][row], expected, f"layer {n}, {sentence!r}")
    for n in found:  # else a method that does nothing would pass
        assert (np.abs(found[n] - plain[n]).max() > 1e-2) == (n > cp.block), n


def test_contrastive_prompting_does_not_copy_the_tokenizer_for_each_batch(backbone, monkeypatch):
    copies, deepcopy = [], copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda one: copies.append(one) or deepcopy(one))
    SentenceEncoder(backbone, "prompteol", CP, batch_size=1).encode(SENTENCES)
    assert len(copies) <= 2 < len(SENTENCES)  # the encoder's own and that of the second prompt


def test_no_block_is_run_in_vain_and_a_cut_sentence_is_cut_in_both_passes(backbone, passes):
    for method, pooling, layer, expected in [
        (None, AttentionValues(), 2, [1, 1, 0, 0]), (None, AttentionValues(1), LAYERS, [1, 1, 1, 1]),
        (CP, None, LAYERS, [2, 2, 1, 1]), (ContrastivePrompting(0), None, 3, [2, 1, 1, 0])]:
        encoder = SentenceEncoder(backbone, "cot", method, layer, pooling, share_prefix=False)
        encoder.encode("No.")  # the first call may look for the attention
        runs = []
        with torch.nn.modules.module.register_module_forward_hook(lambda module, *_, runs=runs: runs.append(module)):
            encoder.encode(SENTENCES)
        assert list(map(runs.count, backbone.layers)) == expected
    passes.clear()
    cut = SentenceEncoder(backbone, "prompteol", CP, max_length=60, share_prefix=False)
    with pytest.warns(UserWarning, match="^2 of 4 sentences were cut to [0-9]+ tokens") as caught:
        cut.encode(["No.", "flute " * 500, "flute " * 499, "Yes."])
    assert len(caught) == 1 and 40 < max(tokens for _, tokens in passes) < 75


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_neighbours_the_prefix_and_errors_change_nothing_and_float16_little(backbone, choice):
    encoder = SentenceEncoder(backbone, **choice)
    expected, hooks = encoder.encode(SENTENCES), tiny.hook_ids(backbone.model)
    for part in (backbone.layers[1].self_attn, backbone.layers[3].mlp):  # in CP's first pass and in the second
        with part.register_forward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
            encoder.encode(SENTENCES)
        assert tiny.hook_ids(backbone.model) == hooks
    for share, size in itertools.product((True, False), (1, 2, 64)):
        again = encoder.changed(share_prefix=share).encode(SENTENCES[::-1], batch_size=size)
        assert_same(again, expected[::-1].copy(), f"{share=}, {size=}")
    for full in [*map(tiny_backbone, ("gemma3", "gptj", "granite")), *map(with_large_activations, ("llama", "phi3"))]:
        half, exact = (SentenceEncoder(b, **choice).encode(SENTENCES[1:3]) for b in (in_float16(full), full))
        assert tiny.cosines(half, exact).min() > 0.99 and half.dtype == np.float32, full.name


def test_postprocesses_against_numpy_come_back_from_a_file(tmp_path, backbone):
    data = np.random.default_rng(1).normal(0.3, 1, (50, HIDDEN)).astype(np.float32)
    data.flags.writeable = False
    lengths, mean, unembedding = np.linalg.norm(data, axis=1), data.mean(0), backbone.unembedding.weight.numpy()
    (first, *_), right = (np.linalg.svd(matrix)[2] for matrix in (data, unembedding))
    rest = data - np.outer(data @ mean, mean) / (mean @ mean)
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    expected = {
        lib.MeanRemoved.fit(data, "50 texts"): data - mean, lib.MeanDirectionRemoved.fit(data, "50 texts"): rest,
        lib.ComponentRemoved.fit(data, "50 texts"): data - np.outer(data @ first, first),
        lib.ComponentShifted(first, 2.0): data + 2 * first, lib.Normalise(): data / lengths[:, None]}
    for tau, kept in ((1, slice(0, 32)), (2, slice(8, 24)), (3, slice(11, 21)), (32, slice(15, 16))):
        expected[EmbedFilter.fit(backbone, tau)] = data @ right[kept].T
    for ours, result in expected.items():
        ours.save(tmp_path / "ours.npz")
        again = lib.load_postprocess(tmp_path / "ours.npz")
        assert type(again) is type(ours) and again.describe() == ours.describe()
        for found in (ours(data), again(data)):
            signs = np.sign((found * result).sum(0)) if isinstance(ours, EmbedFilter) else 1  # which are free
            np.testing.assert_allclose(found * signs, result, atol=2e-5)
            assert found.dtype == np.float32
    assert len({str(ours.describe()) for ours in expected}) == len(expected)
    assert SentenceEncoder(backbone, postprocess=EmbedFilter.fit(backbone)).encode("No.").shape == (HIDDEN // 2,)
    type("Other", (lib.MeanRemoved,), {})(mean).save(tmp_path / "ours.npz")
    with pytest.raises(ValueError, match="holds a 'Other'; choose from Normalise, "):
        lib.load_postprocess(tmp_path / "ours.npz")
