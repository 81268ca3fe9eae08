"""Parity, cost and scores on a GPU; `benchmarks/gpu.sh` runs it. One result file, data/gpu/<device>.json.

Each part is written as soon as it is there. The exit status is 1 if an embedding differs from the CPU's."""

from __future__ import annotations

import argparse
import csv
import json
import time
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoTokenizer

from benchmarks.gpu_cost import SHAPES, cost_tables, random_llama
from benchmarks.gpu_parity import parity, too_far
from benchmarks.gpu_scores import scores
from lib.core.backbone import load_backbone
from lib.core.bundled import BUNDLED, DEFAULT_MODEL
from lib.core.hardware import device_name
from lib.core.store import ROOT, write_atomically
from lib.core.token_prepending import TokenPrepending
from lib.report.results import environment
from lib.report.settings import RUNS, Setting
from lib.studies.cost import GPU_RESULTS
from tests.tiny_models import build_tokenizer


def read_sentences() -> tuple[list[str], str]:
    """Distinct sentences of STS-B test, or of the sample where the package `datasets` is not installed; and which."""
    if find_spec("datasets"):
        from lib.data.sources import find_source
        from lib.data.sts import load_sts

        source = find_source()
        data = load_sts("sample" if source.is_sample else "STS-B")
        return list(dict.fromkeys(data["sentence1"])), source.label
    with open(ROOT / "data" / "sample" / "sts.tsv", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return list(dict.fromkeys(row["sentence1"] for row in rows)), "sample data"


def read_tokenizer(folder: Path | None) -> tuple:
    """The tokenizer of the folder, of the bundled model, or where that is missing a tiny one; and which. A tiny one
    splits a sentence into more than twice as many tokens, so that batches look better used than they are."""
    if folder:
        return AutoTokenizer.from_pretrained(folder), folder.name
    if not BUNDLED[DEFAULT_MODEL].missing:
        return load_backbone(device="cpu").tokenizer, DEFAULT_MODEL
    return build_tokenizer(), "trained on the prompts, 400 tokens"


def write(path: Path, about: dict, tables: dict[str, pd.DataFrame]) -> None:
    """Put what was measured into the result file."""
    split = {name: json.loads(table.to_json(orient="split", index=False)) for name, table in tables.items()}
    write_atomically(path, (json.dumps({"about": about, "tables": split}, indent=1) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with a model of 8 narrow blocks: a trial run")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer; default: the bundled model's")
    parser.add_argument("--rounds", type=int, help="how often each time is taken; default 5 (in batches 3), tiny 1")
    parser.add_argument("--models", nargs="*", default=[name for name, of in BUNDLED.items() if not of.missing],
                        help="bundled models to score; default: those whose packages are installed")
    parser.add_argument("--folder", type=Path, help="of the result file; default data/gpu/, of a trial run runs/")
    given = parser.parse_args(arguments)
    device = torch.device("cpu" if given.tiny else given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; nothing was measured. A trial run on the CPU: --tiny")
    shape, (sentences, data) = SHAPES["tiny" if given.tiny else "llama-2-7b"], read_sentences()
    about = {
        "device": device_name(device), "trial": given.tiny, "data": data, "environment": environment(),
        "rounds": given.rounds or (1 if given.tiny else 5), "seconds": {},
    }
    name = "trial" if given.tiny else about["device"].lower().replace(" ", "-")
    folder = given.folder or (RUNS if given.tiny else GPU_RESULTS)
    path, tables, begin = folder / f"{name}.json", {}, time.time()

    def done(part: str) -> None:
        about["seconds"][part] = round(time.time() - begin)
        write(path, about, tables)
        print(f"{part}: written to {path.name} after {about['seconds'][part]} s", flush=True)

    tables["parity"] = parity(device)
    print(tables["parity"].groupby("dtype").max(numeric_only=True).to_string(), flush=True)
    done("parity")
    tokenizer, about["tokenizer"] = read_tokenizer(given.tokenizer)
    backbone = random_llama(tokenizer, device, **shape)
    setting = Setting(TokenPrepending(1, 7), 7 if given.tiny else 27)
    about |= {
        "model": backbone.name, "weights": "random", "dtype": str(backbone.dtype).removeprefix("torch."),
        "tp": setting.method.describe(), "exit_layer": setting.exit_layer,
    }
    for name, table in cost_tables(backbone, setting, sentences, about["rounds"], few=2 if given.tiny else 16,
                                   many=3 if given.tiny else 256):
        tables[name] = table
        done(name)
    print(tables["reference"].to_string(index=False), flush=True)
    del backbone
    tables["scores"], about["scores"] = scores(given.models, device)
    done("scores")
    if far := too_far(tables["parity"]):
        print("NOT EQUAL to the CPU:", *far, sep="\n", flush=True)
    return 1 if far else 0


if __name__ == "__main__":
    raise SystemExit(main())
