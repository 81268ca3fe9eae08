"""TP's settings, chosen on STS-B dev by `lib.studies.layers` and kept in a file a model, in `configs/settings/`. Those
chosen on sample data stay in the folder of the run that chose them, and serve runs on sample data alone."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from lib.core import processes
from lib.core.store import ROOT, write_atomically
from lib.core.token_prepending import TokenPrepending

FOLDER, RUNS = ROOT / "configs" / "settings", ROOT / "runs"


@dataclass(frozen=True)
class Setting:
    """What was chosen for one prompt: TP, and the layer at which the embedding is read."""

    method: TokenPrepending
    exit_layer: int


def settings_file(model: str, sample: bool = False, profile: str = "default") -> Path:
    """Where a model's settings lie, or those that a profile chose on sample data. A hub id's slash is two dashes."""
    return (RUNS / profile / "settings" if sample else FOLDER) / f"{model.strip('/').replace('/', '--')}.yaml"


def load_settings(model: str, sample: bool = False, profile: str = "default") -> dict[str, Setting]:
    """Prompt -> its setting, on sample data first this profile's own. `FileNotFoundError` says how to choose them."""
    files = [settings_file(model), *([settings_file(model, True, profile)] if sample else [])]
    texts = processes.from_main(lambda: [file.read_text() for file in files if file.exists()])
    if not texts:
        raise FileNotFoundError(f"{files[0].name} is not there. Make it with: python -m lib.studies.layers {model}")
    prompts = {name: chosen for text in texts for name, chosen in yaml.safe_load(text)["prompts"].items()}
    return {name: Setting(TokenPrepending(s["start"], s["end"]), s["exit"]) for name, s in prompts.items()}


def save_settings(model: str, prompts: dict, about: dict, sample: bool = False, profile: str = "default") -> Path:
    """Write these prompts' settings (start, end, exit, and why) beside those of others; `about` is the file's head."""
    path = settings_file(model, sample, profile)
    before = yaml.safe_load(path.read_text())["prompts"] if path.exists() else {}
    content = yaml.safe_dump(about | {"prompts": before | prompts}, sort_keys=False, width=120)
    write_atomically(path, content.encode())
    return path
