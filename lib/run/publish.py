"""Turn an executed notebook into the copy that is committed: results kept, everything that differs between runs removed."""

from __future__ import annotations

import base64
import hashlib
import json
from io import BytesIO
from pathlib import Path

import nbformat
from PIL import Image

from lib.core.store import ROOT, write_atomically

KEPT_CELL_METADATA = ("tags",)
WIDGET = "application/vnd.jupyter.widget-view+json"


def publish(executed: Path, target: Path) -> None:
    """Write `target` from an executed copy: no timings, machine paths, widget state, progress bars or papermill metadata.

    The runner's record beside the copy (`lib.run.write_record`) goes into the notebook's metadata, and in words into a
    cell after the first. Raises `ValueError` if the copy holds an error output.
    """
    notebook = nbformat.read(executed, as_version=4)
    record = json.loads(executed.with_suffix(".json").read_text())
    kept = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}, "run": record}
    notebook.metadata = nbformat.from_dict(kept)
    notebook.cells = [c for c in notebook.cells if not {"injected-parameters", "run"} & set(c.metadata.get("tags", []))]
    count = 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: cell.metadata[k] for k in KEPT_CELL_METADATA if cell.metadata.get(k)})
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            kept = [o for o in cell.outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
            cell.outputs = [clean_output(output, count, executed) for output in kept]
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell(describe(record), id="run", metadata={"tags": ["run"]}))
    write_atomically(target, (nbformat.writes(notebook) + "\n").encode())


def code_hash(path: Path) -> str:
    """SHA-256 of a notebook's own code: what its outputs come from, beside `lib`, data and parameters."""
    cells = nbformat.read(path, as_version=4).cells
    own = [c.source for c in cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
    return hashlib.sha256("\n\n".join(own).encode()).hexdigest()


def describe(record: dict) -> str:
    """A record of the runner in words."""
    given, took = record["parameters"], record["took"]
    cost = "time and memory not measured"
    if took:
        minutes = max(took["seconds"] / 60, 0.1)
        cost = f"{minutes:.1f} minutes and {took['peak_gb']} GB when nothing is stored, on {took['processors']} CPU cores"
    model = f"model `{given['model']}`, " if "model" in given else ""
    return f"**Run shown:** profile `{given['profile']}`, {model}{record['data']}, {record['date']}; {cost}."


def clean_output(output, count: int, path: Path):
    """An output without its own execution count and the project's absolute path."""
    if output.output_type == "error":
        raise ValueError(f"{path} holds an error ({output.ename}: {output.evalue}); it is not published.")
    if "execution_count" in output:
        output.execution_count = count
    if "data" in output:
        output.metadata = nbformat.from_dict({})
    if "image/png" in output.get("data", {}):
        output.data["image/png"] = fewer_colours(output.data["image/png"])
    for holder, key in ((output, "text"), (output.get("data", {}), "text/plain"), (output.get("data", {}), "text/html")):
        if isinstance(holder.get(key), str):
            holder[key] = holder[key].replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    return output


def fewer_colours(png: str) -> str:
    """A picture (base64) in at most 256 colours: plots look the same and take a third of the bytes."""
    picture, small = Image.open(BytesIO(base64.b64decode(png))).convert("RGB"), BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()
