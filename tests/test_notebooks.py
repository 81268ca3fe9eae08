"""The committed notebooks: thin, clean, made by the code that they show, and without a sentence of evaluation data."""

import functools
import inspect
import json
import os
import re
from pathlib import Path

import nbformat
import pytest

from lib.core.store import ROOT
from lib.core.token_prepending import TokenPrepending
from lib.run.publish import code_hash, describe

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
# The release that pyproject.toml names, in each badge and first cell.
ADDRESS, TAG = re.search(r'github.com/(.+)/tree/(.+)"', (ROOT / "pyproject.toml").read_text()).groups()
BADGE = f"](https://colab.research.google.com/github/{ADDRESS}/blob/{TAG}/notebooks/"
FIRST_CELL = f"""\
import os, sys; sys.path[:0] = [".", "..", "tp"]  # where lib/ is, from here, from notebooks/, on Colab
if "COLAB_RELEASE_TAG" in os.environ:  # on Colab: the release that the badge names, and the packages it needs
    !git clone -q -b {TAG} https://github.com/{ADDRESS} tp; cd tp && python -m lib.colab"""
WORDS = 8


@functools.cache
def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list:
    return [c for c in read(path).cells if c.cell_type == "code"]


@each_notebook
def test_thin_and_begun_as_all_are(path):
    bootstrap, parameters, *cells = code_cells(path)
    assert bootstrap.source == FIRST_CELL, "CONTRIBUTING.md says how a release gets its address"
    assert f"{BADGE}{path.name})" in read(path).cells[0].source
    assert parameters.metadata["tags"] == ["parameters"] and not any("tags" in c.metadata for c in cells)
    lines = parameters.source.splitlines()
    assert all("  # " in line for line in lines), "every parameter has a comment"
    assert {"profile", "model", "dtype", "context"} <= {line.split(" = ")[0] for line in lines}
    lines += [line for cell in cells for line in cell.source.splitlines()]
    assert len(lines) <= 140
    assert all(len(line) <= 120 for line in [*lines, *bootstrap.source.splitlines()])


@each_notebook
def test_clean_and_executed_in_order_without_errors(path):
    notebook, text = read(path), path.read_text()
    nbformat.validate(notebook)
    assert len(text.encode()) < 600_000
    assert set(notebook.metadata) == {"kernelspec", "language_info", "run"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    for trace in ('"papermill"', "widget-view", "/home/", "/tmp/", "/Users/", str(ROOT), str(Path.home())):
        assert trace not in text, trace
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("text/markdown" in output.get("data", {}) for output in outputs), "tables are text that a browser shows"


@each_notebook
def test_the_outputs_are_those_of_the_code(path):
    """If this fails, run `./run_all.sh default NN --publish`: the code was changed after the outputs were made."""
    assert read(path).metadata["run"]["code"] == code_hash(path)


@each_notebook
def test_begins_with_question_answer_and_run_and_ends_with_what_is_next(path):
    head, run, *_, last = read(path).cells
    for part in ("# ", "colab-badge.svg", "**Question.**", "**Method.**", "**Answer"):
        assert part in head.source, part
    assert len(re.findall("^- ", head.source.partition("**Answer")[2], re.M)) <= 6
    assert run.source == describe(read(path).metadata["run"])
    assert "minutes and" in run.source, "time and memory"
    assert last.cell_type == "markdown" and "## Next" in last.source


def test_how_tp_works_in_40_lines_is_the_real_code():
    outputs = [o for c in code_cells(NOTEBOOKS[0]) for o in c.outputs if "def attach(" in str(o.get("data"))]
    [shown] = [re.search(r"```python\n(.*)\n```", o.data["text/markdown"], re.S)[1] for o in outputs]
    parts = (TokenPrepending.attach, TokenPrepending.insert)
    assert shown == "\n".join(inspect.cleandoc(inspect.getsource(part)) for part in parts).strip()
    assert len(shown.splitlines()) <= 40


def grams(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]


def shown_texts() -> dict[str, str]:
    """All text that the repository shows of its results: notebooks' outputs, tables and their provenance."""
    texts = {}
    for path in NOTEBOOKS:
        data = [{k: v for k, v in o.get("data", {}).items() if k != "image/png"} | {"t": o.get("text", "")}
                for c in code_cells(path) for o in c.outputs]  # fmt: skip
        texts[path.name] = json.dumps(data, ensure_ascii=False)
    for path in [*(ROOT / "figures").rglob("*"), *(ROOT / "tests" / "golden").glob("*")]:
        if path.suffix in (".csv", ".md", ".json"):
            texts[str(path.relative_to(ROOT))] = path.read_text()
    return texts


@pytest.mark.skipif("TP_DATA_DIR" not in os.environ, reason="TP_DATA_DIR is not set: no real data to compare with")
def test_no_sentence_of_an_evaluation_set_is_shown():
    """No eight words in a row are those with which a line of the real data goes on from any of its columns."""
    shown = {gram: name for name, text in shown_texts().items() for gram in grams(text)}
    own = {gram for path in (ROOT / "data" / "sample").rglob("*.*") for gram in grams(path.read_text())}
    suffixes = (".txt", ".csv", ".tsv", ".jsonl", ".pos", ".neg", ".label", ".train", ".test", ".all")
    checked = 0
    for path in Path(os.environ["TP_DATA_DIR"]).expanduser().rglob("*"):
        if path.is_file() and path.suffix in suffixes:
            for line in path.read_text(encoding="latin-1").splitlines():
                for field in re.split(r'\t|": "', line):
                    for gram in grams(field)[:1]:
                        checked += 1
                        assert gram not in shown or gram in own, f"{shown[gram]} shows {gram!r} of {path.name}"
    assert checked > 10_000
