"""TP's settings, chosen on STS-B dev by `lib.studies.layers` and kept in a file a model, in `configs/settings/`. Those
chosen on sample data stay in the folder of the run that chose them, and serve runs on sample data alone."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from lib.core import processes
from lib.core.contrastive import ContrastivePrompting
from lib.core.store import ROOT, write_atomically
from lib.core.token_prepending import TokenPrepending
from lib.core.variants import Variant

FOLDER, RUNS = ROOT / "configs" / "settings", ROOT / "runs"


@dataclass(frozen=True)
class Setting:
    """What was chosen for one prompt: TP, the layer at which the embedding is read, and Contrastive Prompting."""

    method: TokenPrepending
    exit_layer: int
    contrastive: ContrastivePrompting | None = None  # where it was searched for

    def with_placeholder(self, seeds: Iterable[int]) -> dict[str, list[TokenPrepending]]:
        """Row -> methods, one for each seed of the placeholder's vector: TP, and the same with nothing written."""
        tp = [replace(self.method, seed=seed) for seed in seeds]
        return {"placeholder, unwritten": [Variant(**asdict(one), write="nothing") for one in tp], "TP": tp}


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
    contrastive = {name: ContrastivePrompting(**found["cp"]) for name, found in prompts.items() if "cp" in found}
    return {name: Setting(TokenPrepending(found["start"], found["end"]), found["exit"], contrastive.get(name))
            for name, found in prompts.items()}


def save_settings(model: str, prompts: dict, about: dict, sample: bool = False, profile: str = "default") -> Path:
    """Write these parts of prompts' settings (start, end, exit, cp, and why) beside all others; `about` is the head."""
    path = settings_file(model, sample, profile)
    found = yaml.safe_load(path.read_text()) if path.exists() else {"prompts": {}}
    chosen = {name: found["prompts"].get(name, {}) | setting for name, setting in prompts.items()}
    content = found | about | {"prompts": found["prompts"] | chosen}
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, width=120).encode())
    return path
