"""Half precision, models spread over devices, memory that runs out, and weights that could run code."""

import copy
import gc
import os
import pickle
import weakref

import pytest
import torch
from accelerate import dispatch_model
from tiny_models import FAMILIES, LAYERS, assert_same, build_tokenizer, cosines, tiny_backbone

from lib.core.backbone import Backbone, ModelNotFoundError, load_backbone
from lib.core.batches import halves, is_out_of_memory
from lib.core.encoder import SentenceEncoder
from lib.core.forward import read_states
from lib.core.token_prepending import TokenPrepending

SENTENCES = ["A man is playing a large flute.", "The plane takes off.", "No.", "Three children, who are cold, run across the field!"]
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


def in_float16(backbone: Backbone) -> Backbone:
    return Backbone.from_model(copy.deepcopy(backbone.model).half(), backbone.tokenizer, f"{backbone.name}-float16")


@pytest.mark.parametrize("family", FAMILIES)
def test_float16_gives_the_float32_embeddings(family):
    backbone = tiny_backbone(family)
    expected = SentenceEncoder(backbone, method=TP).encode_layers(SENTENCES, ENDS)
    actual = SentenceEncoder(in_float16(backbone), method=TP).encode_layers(SENTENCES, ENDS)
    for layer in ENDS:
        assert cosines(actual[layer], expected[layer]).min() > 0.999, layer


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_sums_beyond_float16_do_not_overflow(family):
    large = with_large_activations(family)
    half = in_float16(large)
    ids = torch.tensor([build_tokenizer()(" ".join(SENTENCES))["input_ids"]])
    with torch.inference_mode():
        plain = half.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert not all(torch.isfinite(states).all() for states in plain), "the model is too tame for this test"
    expected = SentenceEncoder(large, method=TP).encode_layers(SENTENCES, ENDS)
    actual = SentenceEncoder(half, method=TP).encode_layers(SENTENCES, ENDS)
    for layer in ENDS:
        assert cosines(actual[layer], expected[layer]).min() > 0.999, layer


def test_a_product_beyond_float16_is_an_error_that_says_what_to_do():
    backbone = tiny_backbone()
    model = copy.deepcopy(backbone.model).half()
    model.model.layers[2].mlp.down_proj.weight.fill_(60000)
    with pytest.raises(FloatingPointError, match="load it with dtype='float32'"):
        Backbone.from_model(model, backbone.tokenizer, "too large")


@pytest.mark.parametrize("first", range(LAYERS + 1))
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_blocks_on_other_devices(first, place, tmp_path):
    """Blocks from `first` on are off the device: on disk, so that their weights are on `meta` until they run, or elsewhere."""
    backbone = tiny_backbone()
    model = copy.deepcopy(backbone.model)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": place, "lm_head": place}
    places |= {f"model.layers.{i}": "cpu" if i < first else place for i in range(LAYERS)}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if place == "disk":
        assert model.model.norm.weight.device.type == "meta"
    spread = Backbone.from_model(model, backbone.tokenizer, "spread")
    for tp in (None, TP):
        expected = SentenceEncoder(backbone, method=tp).encode_layers(SENTENCES, ENDS)
        actual = SentenceEncoder(spread, method=tp).encode_layers(SENTENCES, ENDS)
        for layer in ENDS:
            assert_same(actual[layer], expected[layer], f"layer {layer}")
    assert spread.describe()["device_map"] == sorted({*places.values()})


def test_embeddings_that_are_off_the_device(tmp_path):
    """Even the embedding matrix on `meta`: token ids go where it runs, and the placeholder can still be a token's row."""
    backbone = tiny_backbone()
    places = {"model": "disk", "lm_head": "disk"}
    model = dispatch_model(copy.deepcopy(backbone.model), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    spread = Backbone.from_model(model, backbone.tokenizer, "spread")
    assert spread.embeddings.weight.device.type == "meta" and spread.device.type == "cpu"
    tp = TokenPrepending(0, 2, init="space")
    expected = SentenceEncoder(backbone, method=tp).encode(SENTENCES)
    assert_same(SentenceEncoder(spread, method=tp).encode(SENTENCES), expected)


class Memory:
    """Stands for `SentenceEncoder.forward` on a machine where only so many rows fit."""

    def __init__(self, encoder: SentenceEncoder, rows: int, error: Exception):
        self.run, self.rows, self.error, self.sizes = encoder.forward, rows, error, []

    def __call__(self, batch, layers, prefix):
        self.sizes.append(len(batch.ids))
        if len(batch.ids) > self.rows:
            raise self.error
        return self.run(batch, layers, prefix)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
])
def test_out_of_memory_halves_the_batches_and_says_so(error):
    sentences = [f"The plane number {i} takes off." for i in range(22)]
    encoder = SentenceEncoder(tiny_backbone(), method=TP)
    expected = encoder.encode(sentences, batch_size=11)
    encoder.forward = memory = Memory(encoder, 3, error)
    with pytest.warns(UserWarning, match="Out of memory with 11 sentences") as warned:
        actual = encoder.encode(sentences, batch_size=11)
    assert_same(actual, expected)
    assert memory.sizes[:3] == [11, 6, 3] and max(memory.sizes[3:]) <= 3, "batches that still wait are halved too"
    assert len(warned) == 2


def test_out_of_memory_with_one_sentence_and_other_errors_are_raised():
    encoder = SentenceEncoder(tiny_backbone())
    encoder.forward = Memory(encoder, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        encoder.encode(SENTENCES)
    encoder.forward = memory = Memory(SentenceEncoder(tiny_backbone()), 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        encoder.encode(SENTENCES)
    assert len(memory.sizes) == 1


def test_a_real_allocation_that_fails_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert halves([1, 2, 3]) == [[3], [1, 2]] and halves([1]) == [[1]]


def test_activations_are_freed_after_an_early_exit():
    """The exception that ends a pass must not keep its tensors: on a full GPU that is the next batch's memory."""
    backbone, seen = tiny_backbone(), []
    gc.disable()
    try:
        read_states(backbone, torch.tensor([[5, 6, 7]]), [2], read=lambda states: seen.append(weakref.ref(states)))
        assert seen[0]() is None
    finally:
        gc.enable()


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def save_tiny(folder, safe: bool):
    backbone = tiny_backbone()
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    if not safe:
        (folder / "model.safetensors").unlink()
    return backbone


def test_an_old_bin_file_is_read_and_one_that_runs_code_is_refused(tmp_path):
    backbone = save_tiny(tmp_path / "model", safe=False)
    weights = tmp_path / "model" / "pytorch_model.bin"
    torch.save(backbone.model.state_dict(), weights)
    loaded = load_backbone(str(tmp_path / "model"), "float32", "cpu")
    assert_same(SentenceEncoder(loaded).encode(SENTENCES), SentenceEncoder(backbone).encode(SENTENCES))
    torch.save({**backbone.model.state_dict(), "lm_head.weight": Exploit(str(tmp_path / "pwned"))}, weights)
    with pytest.raises((ModelNotFoundError, pickle.UnpicklingError)):
        load_backbone(str(tmp_path / "model"), "float32", "cpu")
    assert not (tmp_path / "pwned").exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    save_tiny(tmp_path, safe=True)
    config = (tmp_path / "config.json").read_text().replace('"llama"', '"own_kind"')
    (tmp_path / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoConfig": "own.Own"},', 1))
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\nOwn = None\n")
    with pytest.raises(ModelNotFoundError, match="trust_remote_code"):
        load_backbone(str(tmp_path), "float32", "cpu")
    assert not (tmp_path / "pwned").exists()
