"""Half precision, models spread over devices, memory that runs out, and several processes."""

import copy
import gc
import os
import socket
import subprocess
import sys
import weakref
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from tiny_models import FAMILIES, LAYERS, TP, assert_same, build_tokenizer, cosines, tiny_backbone

from lib import Backbone, EmbeddingStore, SentenceEncoder, TokenPrepending
from lib.core.forward import read_states
from lib.core.store import ROOT

SENTENCES = ["A man is playing a flute.", "The plane takes off.", "No.", "Three children run across a cold field!"]
ENDS = [0, 2, LAYERS]
ON_CUDA = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
ON_CPU = partial(torch.empty, 2**58, dtype=torch.uint8)


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


@pytest.mark.parametrize("family, dtype, least, choices", [
    *((family, torch.float16, 0.999, {"method": TP}) for family in FAMILIES),
    *(("llama", torch.bfloat16, 0.98, choices) for choices in ({"method": TP}, {"prompt": "echo"}))])
def test_half_precision_stays_close_to_float32(family, dtype, least, choices):
    assert_close(in_float16(tiny_backbone(family), dtype), tiny_backbone(family), least, **choices)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_sums_beyond_float16_do_not_overflow(family):
    large = with_large_activations(family)
    half = in_float16(large)
    with torch.inference_mode():
        ids = build_tokenizer()(" ".join(SENTENCES), return_tensors="pt")["input_ids"]
        states = half.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert not all(torch.isfinite(state).all() for state in states), "the model is too tame for this test"
    assert_close(half, large, method=TP)


def test_a_product_beyond_float16_is_an_error_that_says_what_to_do():
    model = copy.deepcopy(tiny_backbone().model).half()
    model.model.layers[2].mlp.down_proj.weight.fill_(60000)
    with pytest.raises(FloatingPointError, match="load it with dtype='float32'"):
        Backbone.from_model(model, build_tokenizer(), "too large")


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
        expected, actual = (SentenceEncoder(b, method=tp).encode_layers(SENTENCES, ENDS) for b in (backbone, spread))
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


@pytest.mark.parametrize("fail", [ON_CUDA, ON_CPU])
def test_out_of_memory_halves_the_batches_and_says_so(fail):
    sentences = [f"The plane number {i} takes off." for i in range(22)]
    encoder = SentenceEncoder(tiny_backbone(), method=TP)
    expected = encoder.encode(sentences, batch_size=11)
    sizes = limit_memory(encoder, 3, fail)
    with pytest.warns(UserWarning, match="Out of memory") as warned:
        assert_same(encoder.encode(sentences, batch_size=11), expected)
    assert sizes[:3] == [11, 6, 3] and max(sizes[3:]) <= 3, "batches that still wait are halved too"
    assert len(warned) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fail, tries", [(ON_CUDA, 3), (Mock(side_effect=RuntimeError("shapes")), 1)])
def test_out_of_memory_with_one_sentence_and_other_errors_are_raised(fail, tries):
    encoder = SentenceEncoder(tiny_backbone())
    sizes = limit_memory(encoder, 0, fail)
    with pytest.raises(RuntimeError):
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


NUMBERED = [f"{'The plane takes off, ' * (i % 5)}number {i}." for i in range(40)]
# What each process runs; it knows from its environment which one it is.
PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
from test_hardware import NUMBERED, encoder
from pathlib import Path
from lib.core import processes, store
own, ran = encoder("{folder}/store"), []
run = own.forward
own.forward = lambda batch, *rest: ran.append(len(batch.ids)) or run(batch, *rest)
first = own.encode(NUMBERED, batch_size=3)
shares = processes.gather([sum(ran)])  # a batch more or less is no matter
assert sum(shares) == len(NUMBERED) and abs(shares[0] - shares[1]) <= 3, shares
again = encoder("{folder}/store").encode(NUMBERED[::-1], batch_size=3)[::-1]
assert np.array_equal(first, again)
assert processes.gather([processes.index()]) == [0, 1]
assert processes.from_main(lambda: processes.index()) == 0
store.write_atomically(Path(f"{folder}/{{processes.index()}}.written"), b"by the main process alone")
np.save(f"{folder}/{{processes.index()}}-of-{{processes.count()}}.npy", first)
"""


def encoder(store=None) -> SentenceEncoder:
    return SentenceEncoder(tiny_backbone(), method=TP, store=EmbeddingStore(store) if store else None)


def test_two_processes_share_the_batches_and_give_the_embeddings_of_one(tmp_path):
    """`accelerate launch` over gloo."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([*command, program], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = encoder().encode(NUMBERED, batch_size=3)
    for index in range(2):
        assert np.array_equal(np.load(tmp_path / f"{index}-of-2.npy"), expected)
    assert [path.name for path in tmp_path.glob("*.written")] == ["0.written"]
