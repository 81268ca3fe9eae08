"""TP settings per model and prompt: `configs/settings/<model>.yaml`, chosen on STS-B dev and read by the notebooks.

A new model gets its file with one command:

    python -m lib.settings MODEL
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from datasets import Dataset

from lib.data import cap_rows, find_source, load_sts
from lib.encoder import SentenceEncoder
from lib.models import Backbone, load_backbone
from lib.prompts import PROMPTS, get_prompt
from lib.store import ROOT, STORE, write_atomically
from lib.sts import ALL, stored_pairs, sts_scores
from lib.token_prepending import TokenPrepending

FOLDER = ROOT / "configs" / "settings"

# The search: TP before blocks start..end-1. First all ends with the paper's start, then other starts with the best end.
START, OTHER_STARTS = 1, (0, 2, 3)
ENDS = (2, 3, 4, 5, 6, 7, 8, 10)
COARSE_PAIRS = 150
TP_PROMPTS = tuple(name for name, prompt in PROMPTS.items() if prompt.pooling == "last")


@dataclass(frozen=True)
class Setting:
    """What was chosen for one prompt: TP, and the layer at which the embedding is read."""

    tp: TokenPrepending
    exit_layer: int


def settings_file(model: str) -> Path:
    """Where the settings of a model lie; a hub id's slash becomes two dashes."""
    return FOLDER / f"{model.strip('/').replace('/', '--')}.yaml"


def load_settings(model: str) -> dict[str, Setting]:
    """Prompt name -> its setting. Raises `FileNotFoundError` with the command that makes the file."""
    path = settings_file(model)
    if not path.exists():
        raise FileNotFoundError(f"No TP settings for {model}: {path.name} is not there. Make it with: python -m lib.settings {model}")
    prompts = yaml.safe_load(path.read_text())["prompts"]
    return {name: Setting(TokenPrepending(s["start"], s["end"]), s["exit"]) for name, s in prompts.items()}


def score_layers(backbone: Backbone, prompt: str, tp: TokenPrepending | None, data: Dataset, layers: Iterable[int]) -> pd.DataFrame:
    """STS-B dev score at each layer, from one pass: prompt, start, end, exit, score, pairs (start, end -1 without TP)."""
    encoder = SentenceEncoder(backbone, prompt, tp, store=STORE)
    scores = sts_scores(stored_pairs(encoder, {"dev": data}, layers).value)
    scores = scores[(scores["task"] == "dev") & (scores["subset"] == ALL)]
    start, end = (tp.start, tp.end) if tp else (-1, -1)
    named = {"prompt": prompt, "start": start, "end": end, "exit": scores["layer"]}
    return pd.DataFrame(named | {"score": scores["score"], "pairs": scores["pairs"]})


def search(backbone: Backbone, prompt: str, data: Dataset) -> pd.DataFrame:
    """All scores of the search for one prompt, in the columns of `score_layers`; the exit layers are the last third."""
    last = backbone.num_layers
    layers = range(last - last // 3, last + 1)
    # A prompt of many templates costs as many passes, so it gets a coarser search on fewer pairs.
    coarse = len(get_prompt(prompt).templates) > 2
    if coarse:
        data = cap_rows(data, COARSE_PAIRS, seed=0)
    tables = [score_layers(backbone, prompt, None, data, layers)]
    ends = [end for end in (ENDS[::3] if coarse else ENDS) if end <= last]
    tables += [score_layers(backbone, prompt, TokenPrepending(START, end), data, layers) for end in ends]
    if not coarse:
        end = int(best(pd.concat(tables[1:]))["end"])
        starts = [start for start in OTHER_STARTS if start < end]
        tables += [score_layers(backbone, prompt, TokenPrepending(start, end), data, layers) for start in starts]
    return pd.concat(tables, ignore_index=True)


def best(scores: pd.DataFrame) -> pd.Series:
    """The row with the highest score; among equals the one with the fewest blocks, then the shortest span."""
    return scores.sort_values(["score", "exit", "end", "start"], ascending=[False, True, True, True]).iloc[0]


def choose(model: str, prompts: Iterable[str], pairs: int, seed: int = 0) -> Path:
    """Search every prompt on `pairs` seeded STS-B dev pairs and write its line in the model's settings file at once."""
    backbone, path, source = load_backbone(model), settings_file(model), find_source()
    data = cap_rows(load_sts("sample" if source.is_sample else "STS-B", "dev"), pairs, seed)
    about = {
        "model": model,
        "revision": backbone.revision,
        "numbering": "start, end: 0-based blocks, end exclusive; exit: Hugging Face state, the last is after the final norm",
        "chosen_by": f"highest Spearman x 100 on pairs of STS-B dev ({source.label}), drawn with seed {seed}",
    }
    for prompt in prompts:
        chosen = yaml.safe_load(path.read_text())["prompts"] if path.exists() else {}
        chosen[prompt] = choose_prompt(backbone, prompt, data)
        print(prompt, chosen[prompt], flush=True)
        write_atomically(path, yaml.safe_dump(about | {"prompts": chosen}, sort_keys=False, width=120).encode())
    return path


def choose_prompt(backbone: Backbone, prompt: str, data: Dataset) -> dict:
    """The best setting of a prompt, with the scores that it was chosen by and those of the plain model."""
    scores = search(backbone, prompt, data)
    plain, tp = scores[scores["end"] < 0], best(scores[scores["end"] > 0])
    return {
        "start": int(tp["start"]),
        "end": int(tp["end"]),
        "exit": int(tp["exit"]),
        "dev_tp": round(float(tp["score"]), 2),
        "dev_vanilla_same_exit": round(plain.loc[plain["exit"] == tp["exit"], "score"].item(), 2),
        "dev_vanilla_best": round(float(best(plain)["score"]), 2),
        "dev_vanilla_best_exit": int(best(plain)["exit"]),
        "dev_pairs": int(tp["pairs"]),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose TP settings (start, end, exit) for a model on STS-B dev.")
    parser.add_argument("model")
    parser.add_argument("--prompts", nargs="+", default=TP_PROMPTS, choices=TP_PROMPTS)
    parser.add_argument("--pairs", type=int, default=500)
    arguments = parser.parse_args()
    print("written:", choose(arguments.model, arguments.prompts, arguments.pairs).relative_to(ROOT))


if __name__ == "__main__":
    main()
