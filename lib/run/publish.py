"""Turn an executed notebook into the committed one: results kept, everything that differs between runs removed."""

from __future__ import annotations

import base64
import hashlib
import json
from io import BytesIO
from pathlib import Path

import nbformat
from PIL import Image

from lib.core.store import ROOT, write_atomically

WIDGET = "application/vnd.jupyter.widget-view+json"


def publish(executed: Path, target: Path) -> None:
    """Write `target` from an executed copy: no timings, machine paths, widgets, progress bars or injected parameters.

    The record beside the copy (see `execute` in `lib.run`) goes into the notebook's metadata, and in words into a cell
    after the first. Raises `ValueError` if the copy holds an error output.
    """
    from nbconvert.preprocessors import TagRemovePreprocessor  # takes a second

    notebook, record = nbformat.read(executed, as_version=4), json.loads(executed.with_suffix(".json").read_text())
    notebook, _ = TagRemovePreprocessor(remove_cell_tags={"injected-parameters", "run"}).preprocess(notebook, {})
    kept = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}, "run": record}
    notebook.metadata = nbformat.from_dict(kept)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
        for output in cell.outputs:
            if output.output_type == "error":
                raise ValueError(f"{executed} holds an error ({output.ename}: {output.evalue}); it is not published.")
            if "execution_count" in output:
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = fewer_colours(output.data["image/png"])
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell(describe(record), id="run", metadata={"tags": ["run"]}))
    text = nbformat.writes(notebook).replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    write_atomically(target, f"{text}\n".encode())


def code_hash(path: Path) -> str:
    """SHA-256 of a notebook's code, which with `lib`, data and parameters makes its outputs. The first cell does not
    count: it names a release."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"][1:]
    own = [cell.source for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    return hashlib.sha256("\n\n".join(own).encode()).hexdigest()


def describe(record: dict) -> str:
    """A record of the runner in words."""
    given, took, cost = record["parameters"], record["took"], "time and memory not measured"
    if took:
        cost = f"{max(took['seconds'] / 60, 0.1):.1f} minutes and {took['peak_gb']} GB when nothing is stored, "
        cost += f"on {took['processors']} CPU cores"
    model = f"model `{given['model']}`, " if "model" in given else ""
    return f"**Run shown:** profile `{given['profile']}`, {model}{record['data']}, {record['date']}; {cost}."


def fewer_colours(png: str) -> str:
    """A picture (base64) in at most 256 colours: plots look the same and take a third of the bytes."""
    picture, small = Image.open(BytesIO(base64.b64decode(png))).convert("RGB"), BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()
