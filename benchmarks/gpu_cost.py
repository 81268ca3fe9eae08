"""Notebook 05's cost tables for a model of Llama-2-7B's shape with random weights, in bfloat16: part of `gpu.sh`.

Time does not depend on the weights; quality does, so none is reported. The vocabulary is not Llama-2's, but the
embedding is a lookup, and only the reference path runs the LM head. Settings are the paper's (TP 1 -> 7, layer 27)."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.encode import ReferencePath
from lib.core.attention_values import AttentionValues
from lib.core.backbone import Backbone
from lib.core.contrastive import ContrastivePrompting
from lib.core.encoder import SentenceEncoder
from lib.report.settings import Setting
from lib.studies.cost import (
    QUARTILES,
    Contender,
    contenders,
    count_flops,
    matmul_peak,
    measure,
    ratio_quartiles,
    run_methods,
)

SHAPES = {
    "llama-2-7b": {"layers": 32, "hidden": 4096, "heads": 32, "intermediate": 11008, "vocabulary": 32000},
    "tiny": {"layers": 8, "hidden": 32, "heads": 4, "intermediate": 48, "vocabulary": 512},
}
METHODS = ("mean", "echo", "prompteol", "cot", "ke", "ck", "metaeol")
WITH_TP = METHODS[2:]
CP = ContrastivePrompting(4)  # the paper's layer 5


def random_llama(
    tokenizer, device, layers: int, hidden: int, heads: int, intermediate: int, vocabulary: int
) -> Backbone:
    """A Llama with random bfloat16 weights, made on the device (Llama-2-7B's shape takes 13 GB)."""
    config = LlamaConfig(
        vocab_size=max(vocabulary, len(tokenizer)), hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=intermediate,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return Backbone.from_model(model, tokenizer, f"random Llama, {layers} blocks of {hidden}", "random weights")


def against_reference(backbone: Backbone, setting: Setting, sentences: list[str], rounds: int) -> pd.DataFrame:
    """PromptEOL and KE with TP: our encoder and the reference path of `benchmarks.encode`, timed in turn."""
    rows = []
    for prompt in ("prompteol", "ke"):
        encoder = SentenceEncoder(backbone, prompt, setting.method, setting.exit_layer)
        paths = {"reference": ReferencePath(encoder), "ours": encoder}
        calls = {name: lambda path=path: path.encode(sentences) for name, path in paths.items()}
        flops = {name: count_flops(call) for name, call in calls.items()}  # also the warm-up
        seconds, peak = measure(calls, rounds), matmul_peak(backbone.dtype, backbone.device)
        for name in paths:
            speed_up, low, high = ratio_quartiles(seconds["reference"], seconds[name])
            rows.append({
                "prompt": f"{prompt} + TP", "path": name, "speed-up": speed_up, **dict(zip(QUARTILES, (low, high))),
                "TFLOP": flops[name] / 1e12, "share of peak": flops[name] / min(seconds[name]) / peak,
                "sentences / s": len(sentences) / min(seconds[name]),
            })
    return pd.DataFrame(rows)


def cost_tables(
    backbone: Backbone, setting: Setting, sentences: list[str], rounds: int, few: int, many: int
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Name and table: the paper's protocol on the first `few` sentences, the practical one and the reference path on
    the first `many`. AlignedWVA and CP are two more rows of PromptEOL, at its exit layer."""
    settings, at = dict.fromkeys(WITH_TP, setting), setting.exit_layer
    newer = [Contender("prompteol", "AlignedWVA", at, None, AttentionValues()), Contender("prompteol", "CP", at, CP)]
    long = min(rounds, 3)
    for name, texts, alone in (("paper", sentences[:few], True), ("practical", sentences[:many], False)):
        rows = contenders(METHODS, settings, alone) + newer
        yield name, run_methods(backbone, rows, texts, rounds if alone else long, alone)
    yield "reference", against_reference(backbone, setting, sentences[:many], long)
