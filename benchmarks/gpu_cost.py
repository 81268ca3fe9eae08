"""Notebook 05's cost tables on a GPU, for a model of Llama-2-7B's shape with random weights, in bfloat16.

Time does not depend on the weights; quality does, so none is reported. The tokenizer is the bundled model's: the
vocabulary is not Llama-2's, but the embedding is a lookup, and only the reference path runs the LM head. Settings are
the paper's (TP 1 -> 7, read at layer 27). The tables go to data/gpu/, where notebook 05 finds them. Run from the
project folder:

    python -m benchmarks.gpu_cost
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.encode import ReferencePath
from lib.core.backbone import Backbone, load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.hardware import device_name
from lib.core.store import write_atomically
from lib.core.token_prepending import TokenPrepending
from lib.data.sources import find_source
from lib.data.sts import load_sts
from lib.report.results import environment
from lib.report.settings import Setting
from lib.studies.cost import (
    GPU_RESULTS,
    QUARTILES,
    contenders,
    count_flops,
    matmul_peak,
    measure,
    ratio_quartiles,
    run_methods,
)

METHODS = ("mean", "echo", "prompteol", "cot", "ke", "ck", "metaeol")
WITH_TP = METHODS[2:]


def random_llama(tokenizer, layers: int, hidden: int, heads: int, intermediate: int, device: str) -> Backbone:
    """A Llama with random bfloat16 weights, made on the device (`main`'s defaults are Llama-2-7B's shape: 13 GB)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=intermediate, max_position_embeddings=4096,
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


def measure_all(
    backbone: Backbone, setting: Setting, few: list[str], many: list[str], rounds: int
) -> dict[str, pd.DataFrame]:
    """The paper's protocol on `few` sentences, the practical one and the reference path on `many`: name -> table."""
    settings = dict.fromkeys(WITH_TP, setting)
    return {
        "paper": run_methods(backbone, contenders(METHODS, settings, True), few, rounds, one_by_one=True),
        "practical": run_methods(backbone, contenders(METHODS, settings, False), many, rounds, one_by_one=False),
        "reference": against_reference(backbone, setting, many, rounds),
    }


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer; default: the bundled model's")
    for name, default in (("layers", 32), ("hidden", 4096), ("heads", 32), ("intermediate", 11008), ("exit", 27),
                          ("sentences", 24), ("practical-sentences", 512), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--folder", type=Path, default=GPU_RESULTS)
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; nothing was measured")
    folder = options.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder) if folder else load_backbone(device="cpu").tokenizer
    sizes = options.layers, options.hidden, options.heads, options.intermediate
    backbone = random_llama(tokenizer, *sizes, options.device)
    setting = Setting(TokenPrepending(1, min(7, options.exit)), options.exit)
    source = find_source()
    data = load_sts("sample" if source.is_sample else "STS-B")
    sentences = list(dict.fromkeys(data["sentence1"]))
    tables = measure_all(
        backbone, setting, sentences[: options.sentences], sentences[: options.practical_sentences], options.rounds
    )
    device = device_name(backbone.device)
    about = {
        "model": backbone.name, "weights": "random", "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": device, "tp": setting.method.describe(), "exit_layer": setting.exit_layer, "data": source.label,
        "rounds": options.rounds, "environment": environment(),
    }
    path = options.folder / f"{device.lower().replace(' ', '-')}-{options.layers}x{options.hidden}.json"
    split = {name: table.to_dict(orient="split", index=False) for name, table in tables.items()}
    write_atomically(path, (json.dumps({"about": about, "tables": split}, indent=1) + "\n").encode())
    print(f"written: {path.name}")
    print(tables["reference"].to_markdown(index=False, floatfmt=".2f"))
    return path


if __name__ == "__main__":
    main()
