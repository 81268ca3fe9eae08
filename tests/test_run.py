"""The runner: what it refuses, what it passes on, how it fails; and the smoke profile through every notebook."""

import base64
import json
import threading
import time
from io import BytesIO

import nbformat
import numpy as np
import pytest
from PIL import Image

from lib.run import __main__ as runner
from lib.run.publish import code_hash, fewer_colours, publish
from lib.run import UsageError, choose_notebooks, parameters_of, read_profile


def write_notebook(path, *sources, parameters="profile = 'x'\nseed = 1  # a seed"):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name in ("notebooks", "configs", "runs"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(runner, name.upper(), tmp_path / name)
    (tmp_path / "configs" / "tiny.yaml").write_text("description: d\nparameters:\n  seed: 7\n")
    write_notebook(tmp_path / "notebooks" / "00_first.ipynb", "print('seed', seed, profile)")
    write_notebook(tmp_path / "notebooks" / "01_second.ipynb", "print(other)", parameters="profile = ''\nother = 2")
    monkeypatch.delenv("TP_DATA_DIR", raising=False)
    monkeypatch.setenv("TP_HUB_UNREACHABLE", "1")
    monkeypatch.setenv("TP_RUN_LOG", "")
    return tmp_path


def test_unknown_names_are_refused_with_what_exists(project):
    with pytest.raises(UsageError, match="tiny"):
        read_profile("huge")
    with pytest.raises(UsageError, match="00_first, 01_second"):
        choose_notebooks(["7"])
    assert [p.stem for p in choose_notebooks(["01", "00_first"])] == ["00_first", "01_second"]
    both = choose_notebooks([])
    with pytest.raises(UsageError, match="'typo'.*other"):
        parameters_of("tiny", {"parameters": {"typo": 1}}, both, {})
    with pytest.raises(UsageError, match="00_first has no parameter 'other'"):
        parameters_of("tiny", {"notebooks": {"00_first": {"other": 1}}}, both, {})
    with pytest.raises(UsageError, match="'09_none'"):
        parameters_of("tiny", {"notebooks": {"09_none": {}}}, both, {})
    with pytest.raises(UsageError, match="none of 00_first"):
        parameters_of("tiny", {}, both[:1], {"other": 3})


def test_parameters_reach_the_notebooks_that_have_them(project):
    given = parameters_of("tiny", {"parameters": {"seed": 7}, "notebooks": {"01_second": {"other": 5}}}, choose_notebooks([]), {})
    assert given == {"00_first": {"profile": "tiny", "seed": 7}, "01_second": {"profile": "tiny", "other": 5}}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_failing_cell_stops_the_run_and_is_named(project, capfd):
    write_notebook(project / "notebooks" / "00_first.ipynb", "x = 1", "1 / 0")
    assert runner.main(["tiny"]) == 1
    captured = capfd.readouterr()
    assert "FAILED: 00_first, cell" in captured.err and "ZeroDivisionError" in captured.err
    assert not (project / "runs" / "tiny" / "01_second.ipynb").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_usage_errors_exit_with_2(project, capfd):
    assert runner.main(["huge"]) == 2 and "unknown profile 'huge'" in capfd.readouterr().err
    assert runner.main(["tiny", "-p", "nothing", "1"]) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_run_and_publish(project, monkeypatch, capfd):
    monkeypatch.setenv("TP_FRESH_SINCE", "0")  # as --fresh sets it
    assert runner.main(["tiny", "00", "-p", "seed", "9", "--publish"]) == 0
    published = nbformat.read(project / "notebooks" / "00_first.ipynb", as_version=4)
    code = [c for c in published.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == [1, 2]
    assert code[1].outputs[0].text == "seed 9 tiny\n"
    assert "papermill" not in json.dumps(published)
    record = published.metadata["run"]
    assert record["code"] == code_hash(project / "notebooks" / "00_first.ipynb")
    assert record["parameters"] == {"profile": "tiny", "seed": 9} and record["took"]["seconds"] >= 0
    [said] = [c.source for c in published.cells if c.metadata.get("tags") == ["run"]]
    assert said.startswith("**Run shown:** profile `tiny`, sample data") and "minutes" in said
    assert runner.main(["tiny", "00", "--publish"]) == 0
    again = nbformat.read(project / "notebooks" / "00_first.ipynb", as_version=4)
    assert len(again.cells) == len(published.cells), "one cell says what was run"
    assert "00_first" in capfd.readouterr().out


def test_the_record_keeps_the_cost_of_the_last_fresh_run(project, monkeypatch):
    notebook, file = project / "notebooks" / "00_first.ipynb", project / "runs" / "00_first.json"

    def record(seconds):
        runner.write_record(file, notebook, {"profile": "tiny"}, runner.Outcome("00_first", seconds, 1.5, 3, 0), "sample data")
        return json.loads(file.read_text())["took"]

    assert record(9) is None, "what a run from the store took says nothing of the whole"
    with monkeypatch.context() as fresh:
        fresh.setenv("TP_FRESH_SINCE", "0")
        assert record(60)["seconds"] == 60
    assert record(9)["seconds"] == 60
    write_notebook(notebook, "print('another')")
    assert record(9) is None


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


def executed(folder, *cells):
    """An executed notebook and the runner's record of it."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *cells], metadata=kernel), folder / "a.ipynb")
    record = {"code": "x", "parameters": {"profile": "tiny"}, "data": "sample data", "date": "2026-01-01", "took": None}
    (folder / "a.json").write_text(json.dumps(record))
    return folder / "a.ipynb"


def test_publish_drops_progress_bars(tmp_path):
    bar = {"text/plain": "Loading: 0%", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    outputs = [nbformat.v4.new_output("display_data", data=bar), nbformat.v4.new_output("display_data", data={"text/plain": "kept"}),
               nbformat.v4.new_output("stream", name="stderr", text="10%|#")]
    publish(executed(tmp_path, nbformat.v4.new_code_cell("1", outputs=outputs)), tmp_path / "b.ipynb")
    title, said, cell = nbformat.read(tmp_path / "b.ipynb", as_version=4).cells
    assert said.source.endswith("sample data, 2026-01-01; time and memory not measured.")
    assert [output.data["text/plain"] for output in cell.outputs] == ["kept"]


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
