"""Turn an executed notebook into the committed one: results kept, everything that differs between runs removed."""

import base64
import hashlib
import json
from io import BytesIO
from pathlib import Path

import nbformat
from PIL import Image

from lib.core.store import ROOT, write_atomically

WIDGET = "application/vnd.jupyter.widget-view+json"
COST = "{minutes:.1f} minutes and {peak_gb} GB when nothing is stored, on {processors} CPU cores"


def publish(executed: Path, target: Path) -> None:
    """Write `target` from an executed copy and the record beside it, without timings, machine paths, widgets, progress
    bars or injected parameters. The record goes into the metadata and, in words, into a cell after the first."""
    notebook, record = nbformat.read(executed, as_version=4), json.loads(executed.with_suffix(".json").read_text())
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}, "run": record}
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
    notebook.cells = [c for c in notebook.cells if not {"injected-parameters", "run"} & {*c.metadata.get("tags", [])}]
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
        for output in cell.outputs:
            if output.output_type == "error":
                raise ValueError(f"{executed} holds an error ({output.ename}: {output.evalue}); it is not published.")
            if output.output_type == "execute_result":
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = fewer_colours(output.data["image/png"])
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell(describe(record), id="run", metadata={"tags": ["run"]}))
    text = nbformat.writes(notebook).replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    write_atomically(target, f"{text}\n".encode())


def code_hash(path: Path) -> str:
    """SHA-256 of a notebook's code, without the first cell, which names a release."""
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code[1:]).encode()).hexdigest()


def describe(record: dict) -> str:
    """A record of the runner in words."""
    given, took = record["parameters"], record["took"]
    cost = COST.format(minutes=max(took["seconds"] / 60, 0.1), **took) if took else "time and memory not measured"
    model = f"model `{given['model']}`, " if "model" in given else ""
    return f"**Run shown:** profile `{given['profile']}`, {model}{record['data']}, {record['date']}; {cost}."


def fewer_colours(png: str) -> str:
    """A picture (base64) in at most 256 colours: plots look the same and take a third of the bytes."""
    picture, small = Image.open(BytesIO(base64.b64decode(png))).convert("RGB"), BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()
