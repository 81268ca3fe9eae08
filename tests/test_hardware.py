"""Half precision, models spread over devices, and memory that runs out."""

import copy
import gc
import warnings
import weakref
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from accelerate import dispatch_model
from tiny_models import FAMILIES, LAYERS, assert_same, build_tokenizer, cosines, tiny_backbone

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.core.forward import read_states
from lib.core.token_prepending import TokenPrepending

SENTENCES = ["A man is playing a flute.", "The plane takes off.", "No.", "Three children run across a cold field!"]
TP = TokenPrepending(1, 3)
ENDS = [0, 2, LAYERS]


def with_large_activations(family: str) -> Backbone:
    """A model whose embeddings and blocks each add up to 50,000 to the sum of states: float16 ends at 65,504."""
    backbone = tiny_backbone(family)
    model = copy.deepcopy(backbone.model)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= 3000
    model.get_input_embeddings().weight.data *= 14000
    return Backbone.from_model(model, backbone.tokenizer, f"large-{family}")


def in_float16(backbone: Backbone, dtype: torch.dtype = torch.float16) -> Backbone:
    return Backbone.from_model(copy.deepcopy(backbone.model).to(dtype), backbone.tokenizer, f"{backbone.name}-{dtype}")


def assert_close(half: Backbone, full: Backbone, least: float = 0.999, **choices) -> None:
    actual, expected = (SentenceEncoder(b, **choices).encode_layers(SENTENCES, ENDS) for b in (half, full))
    for layer in ENDS:
        assert cosines(actual[layer], expected[layer]).min() > least and actual[layer].dtype == "float32", layer


@pytest.mark.parametrize("family", FAMILIES)
def test_float16_gives_the_float32_embeddings(family):
    assert_close(in_float16(tiny_backbone(family)), tiny_backbone(family), method=TP)


@pytest.mark.parametrize("choices", [{"method": TP}, {"prompt": "echo"}])
def test_bfloat16_stays_close(choices):
    assert_close(in_float16(tiny_backbone(), torch.bfloat16), tiny_backbone(), 0.98, **choices)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_sums_beyond_float16_do_not_overflow(family):
    large = with_large_activations(family)
    half = in_float16(large)
    ids = torch.tensor([build_tokenizer()(" ".join(SENTENCES))["input_ids"]])
    with torch.inference_mode():
        states = half.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert not all(torch.isfinite(state).all() for state in states), "the model is too tame for this test"
    assert_close(half, large, method=TP)


def test_a_product_beyond_float16_is_an_error_that_says_what_to_do():
    backbone = tiny_backbone()
    model = copy.deepcopy(backbone.model).half()
    model.model.layers[2].mlp.down_proj.weight.fill_(60000)
    with pytest.raises(FloatingPointError, match="load it with dtype='float32'"):
        Backbone.from_model(model, backbone.tokenizer, "too large")


@pytest.mark.parametrize("first", [None, *range(LAYERS + 1)])
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_blocks_on_other_devices(first, place, tmp_path):
    """Blocks from `first` on, or all of the model, are elsewhere: on disk, weights are on `meta` until they run."""
    backbone = tiny_backbone()
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": place, "lm_head": place}
    places |= {f"model.layers.{i}": "cpu" if i < (first or 0) else place for i in range(LAYERS)}
    places = {"model": place, "lm_head": place} if first is None else places
    model = dispatch_model(copy.deepcopy(backbone.model), places, "cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.lm_head.weight.device.type == {"disk": "meta", "cpu": "cpu"}[place]
    spread = Backbone.from_model(model, backbone.tokenizer, "spread")
    assert spread.device.type == "cpu" and spread.describe()["device_map"] == sorted({*places.values()})
    for tp in (None, TP, TokenPrepending(0, 2, init="space")):
        expected = SentenceEncoder(backbone, method=tp).encode_layers(SENTENCES, ENDS)
        actual = SentenceEncoder(spread, method=tp).encode_layers(SENTENCES, ENDS)
        for layer in ENDS:
            assert_same(actual[layer], expected[layer], f"layer {layer}")


def limit_memory(encoder: SentenceEncoder, rows: int, fail) -> list[int]:
    """Let the encoder fail as on a machine where only so many rows fit; returns the rows of each try, as they come."""
    run, tries = encoder.forward, []

    def forward(batch, *rest):
        tries.append(len(batch.ids))
        return run(batch, *rest) if len(batch.ids) <= rows else fail()

    encoder.forward = forward
    return tries


ON_CUDA = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
ON_CPU = partial(torch.empty, 2**58, dtype=torch.uint8)


@pytest.mark.parametrize("fail", [ON_CUDA, ON_CPU])
def test_out_of_memory_halves_the_batches_and_says_so(fail):
    sentences = [f"The plane number {i} takes off." for i in range(22)]
    encoder = SentenceEncoder(tiny_backbone(), method=TP)
    expected = encoder.encode(sentences, batch_size=11)
    sizes = limit_memory(encoder, 3, fail)
    with pytest.warns(UserWarning, match="Out of memory") as warned:
        actual = encoder.encode(sentences, batch_size=11)
    assert_same(actual, expected)
    assert sizes[:3] == [11, 6, 3] and max(sizes[3:]) <= 3, "batches that still wait are halved too"
    assert len(warned) == 2


@pytest.mark.parametrize("fail, tries", [(ON_CUDA, 3), (Mock(side_effect=RuntimeError("shapes")), 1)])
def test_out_of_memory_with_one_sentence_and_other_errors_are_raised(fail, tries):
    encoder = SentenceEncoder(tiny_backbone())
    sizes = limit_memory(encoder, 0, fail)
    with pytest.raises(RuntimeError), warnings.catch_warnings(action="ignore"):
        encoder.encode(SENTENCES)
    assert len(sizes) == tries


def test_activations_are_freed_after_an_early_exit():
    """The exception that ends a pass must not keep its tensors: on a full GPU that is the next batch's memory."""
    backbone, seen = tiny_backbone(), []
    gc.disable()
    try:
        read_states(backbone, torch.tensor([[5, 6, 7]]), [2], read=lambda states: seen.append(weakref.ref(states)))
        assert seen[0]() is None
    finally:
        gc.enable()
