"""TP settings per model and prompt: `configs/settings/<model>.yaml`, chosen on STS-B dev and read by the notebooks.

A new model gets its file with one command:

    python -m lib.studies.settings MODEL
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from datasets import Dataset

from lib.data.sts import cap_rows, find_source, load_sts
from lib.core.backbone import Backbone, load_backbone
from lib.core.prompts import PROMPTS, get_prompt
from lib.core.store import ROOT, STORE, write_atomically
from lib.studies.sweep import score_settings
from lib.core.token_prepending import TokenPrepending

FOLDER = ROOT / "configs" / "settings"

# The search. First round, on few pairs: these spans. Second round: the best few of them and the plain model, on all pairs.
# No span starts late: there the score hangs on the placeholder's random vector (notebook 03), so the choice would be luck.
SPANS = ((1, 2), (1, 3), (1, 4), (1, 6), (1, 8), (0, 1), (2, 3), (2, 6))
COARSE_SPANS = ((1, 2), (1, 8))
FIRST_PAIRS, FINALISTS = 60, 2
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
        command = f"python -m lib.studies.settings {model}"
        raise FileNotFoundError(f"No TP settings for {model}: {path.name} is not there. Make it with: {command}")
    prompts = yaml.safe_load(path.read_text())["prompts"]
    return {name: Setting(TokenPrepending(s["start"], s["end"]), s["exit"]) for name, s in prompts.items()}


def search(backbone: Backbone, prompt: str, data: Dataset) -> pd.DataFrame:
    """The scores of the search's second round for one prompt, in the columns of `score_settings`.

    The exit layers are the last third. A prompt of many templates costs as many passes, so its search is coarser: two
    spans, on the first round's pairs only.
    """
    last, coarse = backbone.num_layers, len(get_prompt(prompt).templates) > 2
    layers = range(last - last // 3, last + 1)
    few = cap_rows(data, FIRST_PAIRS, seed=0)
    tried = [TokenPrepending(*span) for span in (COARSE_SPANS if coarse else SPANS) if span[1] <= last]
    first = score_settings(backbone, prompt, tried, few, layers, STORE)
    spans = first.groupby(["start", "end"])["score"].max().nlargest(FINALISTS).index
    finalists = [None, *(TokenPrepending(int(start), int(end)) for start, end in spans)]
    return score_settings(backbone, prompt, finalists, few if coarse else data, layers, STORE)


def best(scores: pd.DataFrame) -> pd.Series:
    """The row with the highest score; among equals the one with the fewest blocks, then the shortest span."""
    return scores.sort_values(["score", "exit", "end", "start"], ascending=[False, True, True, True]).iloc[0]


def choose(backbone: Backbone, prompts: Iterable[str], pairs: int) -> Path:
    """Search every prompt on `pairs` STS-B dev pairs and write its line in the model's settings file at once."""
    path, source = settings_file(backbone.name), find_source()
    data = cap_rows(load_sts("sample" if source.is_sample else "STS-B", "dev"), pairs, seed=0)
    about = {
        "model": backbone.name,
        "revision": backbone.revision,
        "numbering": "start, end: 0-based blocks, end exclusive; exit: Hugging Face state, the last is after the final norm",
        "chosen_by": f"highest Spearman x 100 on pairs of STS-B dev ({source.label}), drawn with seed 0; "
        f"tried first on {FIRST_PAIRS} of them, the best {FINALISTS} settings again on dev_pairs",
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
    plain = scores[scores["end"] < 0]
    tp, vanilla = best(scores[scores["end"] > 0]), best(plain)
    return {name: int(tp[name]) for name in ("start", "end", "exit")} | {
        "dev_tp": round(float(tp["score"]), 2),
        "dev_vanilla_same_exit": round(plain.loc[plain["exit"] == tp["exit"], "score"].item(), 2),
        "dev_vanilla_best": round(float(vanilla["score"]), 2),
        "dev_vanilla_best_exit": int(vanilla["exit"]),
        "dev_pairs": int(tp["pairs"]),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose TP settings (start, end, exit) for a model on STS-B dev.")
    parser.add_argument("model")
    parser.add_argument("--prompts", nargs="+", default=TP_PROMPTS, choices=TP_PROMPTS)
    parser.add_argument("--pairs", type=int, default=500)
    arguments = parser.parse_args()
    print("written:", choose(load_backbone(arguments.model), arguments.prompts, arguments.pairs).relative_to(ROOT))


if __name__ == "__main__":
    main()
