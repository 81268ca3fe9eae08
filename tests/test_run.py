"""The runner: what it refuses, what it hands to notebooks, how it fails, how kernels start; and how copies are published."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from io import BytesIO

import nbformat
import numpy as np
import pytest
from PIL import Image

from lib.core.store import ROOT
from lib.run import __main__ as runner
from lib.run.publish import code_hash, fewer_colours, publish

pytestmark = pytest.mark.filterwarnings("ignore::lib.data.sources.SampleDataWarning")
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = "profile = 'x'\nseed = 1  # a seed\ncontext = {}  # from the runner"


def write_notebook(path, *sources, parameters=PARAMETERS):
    cells = [nbformat.v4.new_code_cell("import os"), nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)


@pytest.fixture
def project(tmp_path, monkeypatch, no_data):
    for name in ("notebooks", "configs", "runs"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(runner, name.upper(), tmp_path / name)
    (tmp_path / "configs" / "tiny.yaml").write_text("description: d\nparameters:\n  seed: 7\n")
    write_notebook(tmp_path / "notebooks" / "00_first.ipynb", "print('seed', seed, profile)")
    write_notebook(tmp_path / "notebooks" / "01_second.ipynb", "print(other)", parameters="profile = ''\nother = 2")
    monkeypatch.setattr(runner.kernels, "preload", lambda: None)
    return tmp_path


def test_unknown_names_are_refused_with_what_exists(project, capsys):
    (project / "configs" / "typo.yaml").write_text("parameters:\n  typo: 1\n")
    (project / "configs" / "own.yaml").write_text("notebooks:\n  00_first:\n    other: 1\n")
    (project / "configs" / "gone.yaml").write_text("notebooks:\n  09_none: {}\n")
    for arguments, said in {
        ("huge",): ("'huge'", "gone, own, tiny, typo"),
        ("tiny", "7"): ("'7'", "00_first", "01_second"),
        ("tiny", "-p", "nothing", "1"): ("'nothing'", "other, profile, seed"),
        ("tiny", "00", "-p", "other", "1"): ("'other'", "00_first", "profile, seed"),
        ("tiny", "-p", "context", "{}"): ("'context'", "other, profile, seed"),
        ("typo",): ("'typo'", "other, profile, seed"),
        ("own",): ("'other'", "00_first", "profile, seed"),
        ("gone",): ("'09_none'", "00_first, 01_second"),
    }.items():
        with pytest.raises(SystemExit, match="2"):
            runner.main(arguments)
        error = capsys.readouterr().err
        assert all(part in error for part in said), (arguments, error)
    assert [path.stem for path in runner.choose(["01", "00_first.ipynb"])] == ["00_first", "01_second"]


def test_the_list_has_profiles_notebooks_and_what_can_be_given(project, capsys):
    assert runner.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["tiny", "d"] and "    seed = 1  a seed" in lines and not any("context" in line for line in lines)


def test_parameters_reach_the_notebooks_that_have_them(project):
    (project / "configs" / "tiny.yaml").write_text("parameters:\n  seed: 7\nnotebooks:\n  01_second:\n    other: 5\n")
    both = runner.choose([])
    assert runner.parameters_of("tiny", both, {}) == {
        "00_first": {"profile": "tiny", "seed": 7}, "01_second": {"profile": "tiny", "other": 5},
    }
    assert runner.parameters_of("tiny", both, {"other": 6})["01_second"]["other"] == 6, "the command line comes before the profile"


def test_a_failing_cell_stops_the_run_and_is_named(project, capfd):
    write_notebook(project / "notebooks" / "00_first.ipynb", "x = 1", "1 / 0")
    assert runner.main(["tiny"]) == 1
    error = capfd.readouterr().err
    assert "FAILED: 00_first" in error and "ZeroDivisionError" in error and "runs/tiny/00_first.ipynb" in error
    assert not (project / "runs" / "tiny" / "01_second.ipynb").exists()


def test_run_record_and_publish(project, capfd):
    notebook = project / "notebooks" / "00_first.ipynb"
    log = 'for entry in ({"name": "a", "reused": True}, {"name": "b", "reused": False}, {"peak_gb": 1.5}):\n'
    log += "    print(__import__('json').dumps(entry), file=open(context['log'], 'a'))"
    write_notebook(notebook, "print('seed', seed, profile, context['parameters'], context['fresh_since'] > 1e9)", log)
    assert runner.main(["tiny", "00", "-p", "seed", "9", "--fresh", "--publish"]) == 0
    published = nbformat.read(notebook, as_version=4)
    code = [c for c in published.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == [1, 2, 3, 4]
    assert code[2].outputs[0].text == "seed 9 tiny {'profile': 'tiny', 'seed': 9} True\n"
    assert not any(word in json.dumps(published) for word in ("papermill", "fresh_since\":", str(project)))
    record = published.metadata["run"]
    assert record["code"] == code_hash(notebook) and record["parameters"] == {"profile": "tiny", "seed": 9}
    assert record["took"]["peak_gb"] == 1.5 and record["took"]["seconds"] >= 0
    [said] = [c.source for c in published.cells if c.metadata.get("tags") == ["run"]]
    assert said.startswith("**Run shown:** profile `tiny`, sample data") and "minutes and 1.5 GB" in said
    assert "1 / 1" in capfd.readouterr().out, "one result computed, one reused"


def test_the_cost_of_the_last_fresh_run_is_kept_while_the_code_is_the_same(project):
    record = project / "runs" / "tiny" / "00_first.json"
    for arguments, code, measured in (([], "1", False), (["--fresh"], "1", True), ([], "1", True), ([], "2", False)):
        write_notebook(project / "notebooks" / "00_first.ipynb", code)
        assert runner.main(["tiny", "00", *arguments]) == 0
        assert bool(json.loads(record.read_text())["took"]) == measured, (arguments, code)


def test_two_runs_of_a_profile_wait_for_each_other(project, capfd):
    order = []

    def second():
        with runner.only_run_in(project / "runs" / "tiny"):
            order.append("second")

    with runner.only_run_in(project / "runs" / "tiny"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(timeout=20)
    assert order == ["first", "second"] and "Another run is at work in runs/tiny" in capfd.readouterr().out


FORKED = """
import sys
from pathlib import Path
from lib.run import __main__ as runner
runner.kernels.PRELOADED = ["ipykernel.kernelapp", "colorsys"]
for name in ("notebooks", "configs", "runs"):
    setattr(runner, name.upper(), Path(sys.argv[1]) / name)
sys.exit(runner.main(["tiny"]))
"""


@pytest.mark.skipif(sys.platform != "linux" or os.path.exists("/dev/nvidiactl"), reason="kernels are forked on Linux, without a GPU")
def test_kernels_share_imports_and_nothing_else_and_end_with_their_runner(project):
    state = "import sys, colorsys\nprint(os.getpid(), os.getppid(), hasattr(colorsys, 'x'), os.getcwd())\ncolorsys.x = 1"
    write_notebook(project / "notebooks" / "00_first.ipynb", state, "import atexit\natexit.register(lambda: open(context['log'], 'w').close())")
    write_notebook(project / "notebooks" / "01_second.ipynb", state, "assert os.path.exists(context['log'].replace('01_second', '00_first'))")
    write_notebook(project / "notebooks" / "02_third.ipynb", "open(context['log'], 'w').write(str(os.getpid()))\n__import__('time').sleep(300)")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen([sys.executable, "-c", FORKED, str(project)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    log = project / "runs" / "tiny" / "02_third.log"
    while run.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    assert run.poll() is None, "it ended before the third notebook"
    kernel = int(log.read_text())
    said = [nbformat.read(project / "runs" / "tiny" / name, 4).cells[-2].outputs[0].text.split() for name in ("00_first.ipynb", "01_second.ipynb")]
    assert said[0][0] != said[1][0] and said[0][1] == said[1][1] and [s[2:] for s in said] == [["False", str(ROOT)]] * 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    for _ in range(200):
        with contextlib.suppress(ProcessLookupError):
            os.kill(kernel, 0)
            time.sleep(0.05)
            continue
        return
    pytest.fail("the kernel outlives its runner")


def executed(folder, *cells):
    """An executed notebook and the runner's record of it."""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *cells], metadata=KERNEL), folder / "a.ipynb")
    record = {"code": "x", "parameters": {"profile": "tiny"}, "data": "sample data", "date": "2026-01-01", "took": None}
    (folder / "a.json").write_text(json.dumps(record))
    return folder / "a.ipynb"


def test_published_cells_hold_results_and_nothing_of_the_machine(tmp_path):
    bar = {"text/plain": "Loading: 0%", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    outputs = [nbformat.v4.new_output("display_data", data=bar),
               nbformat.v4.new_output("display_data", data={"text/plain": f"kept {ROOT}/lib"}),
               nbformat.v4.new_output("stream", name="stderr", text="10%|#")]
    cell = nbformat.v4.new_code_cell("1", outputs=outputs, metadata={"papermill": {"duration": 1}, "tags": ["a"]})
    injected = nbformat.v4.new_code_cell("context = {'log': '/tmp'}", metadata={"tags": ["injected-parameters"]})
    before = nbformat.v4.new_markdown_cell("of another run", metadata={"tags": ["run"]})
    publish(executed(tmp_path, before, injected, cell), tmp_path / "b.ipynb")
    title, said, cell = nbformat.read(tmp_path / "b.ipynb", as_version=4).cells
    assert said.source.endswith("sample data, 2026-01-01; time and memory not measured.")
    assert [output.data["text/plain"] for output in cell.outputs] == ["kept lib"] and cell.metadata == {"tags": ["a"]}


def test_published_pictures_look_the_same_and_are_smaller():
    pixels = np.zeros((300, 300, 3), np.uint8)
    pixels[:, :, 0], pixels[100:200, 50:250] = np.arange(300) % 256, (0, 114, 178)
    picture = BytesIO()
    Image.fromarray(pixels).save(picture, "PNG", compress_level=1)
    small = fewer_colours(base64.b64encode(picture.getvalue()).decode())
    after = np.asarray(Image.open(BytesIO(base64.b64decode(small))).convert("RGB"))
    assert np.abs(after.astype(int) - pixels).mean() < 2 and len(small) < len(picture.getvalue())
    assert fewer_colours(small) == small


def test_publish_refuses_an_error(tmp_path):
    error = nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        publish(executed(tmp_path, nbformat.v4.new_code_cell("1 / 0", outputs=[error])), tmp_path / "b.ipynb")
    assert not (tmp_path / "b.ipynb").exists()
