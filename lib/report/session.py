"""The one object that a notebook talks to: its model, data source and settings, stored results, tables and figures."""

from __future__ import annotations

import atexit
import functools
import inspect
import io
import json
import os.path
import resource
import sys
from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from lib.core import processes
from lib.core.backbone import load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.store import ROOT, EmbeddingStore, fingerprint, write_atomically
from lib.data import sources
from lib.data.sources import EvaluationData
from lib.report.figures import set_style
from lib.report.results import describe, environment, run_or_load
from lib.report.settings import Setting, load_settings

FIGURES = ROOT / "figures"
LONGEST = 40  # rows of a table in a notebook
ABOUT = (
    "How the tables and figures of this folder came about, notebook by notebook. @... is the entry of that name under "
    "shared. results_read: how many of the notebook's results had been read when it made the table or figure. "
    "Layers are numbered as by Hugging Face: the last state is after the final norm, all others are before it."
)


def start(notebook: str, profile: str, model: str, dtype: str = "auto", context: dict | None = None) -> Session:
    """Load the model, find the data, set the style of figures: the beginning of every notebook.

    Args:
        notebook, profile: their names, for the provenance and the folder under `figures/`.
        model, dtype: as of `load_backbone`.
        context: what the runner hands over. fresh_since: results and embeddings stored before this time (seconds of
            the epoch) do not count. log: a file that is told what was reused and how much memory it took.
            hub_unreachable: why not to ask the hub. meeting: the file by which processes meet. parameters: all given.
    """
    return Session(notebook, profile, model, dtype, context or {})


class Session:
    """See `start`. Attributes: profile, backbone, source, settings, store and where: model, dtype and data in words."""

    def __init__(self, notebook: str, profile: str, model: str, dtype: str, context: dict):
        if context.get("meeting"):
            processes.join(context["meeting"])
        if context.get("hub_unreachable"):
            sources.assume_hub_unreachable(context["hub_unreachable"])
        self._log_file = context.get("log")
        atexit.register(self._log_memory)
        set_style()
        self.notebook, self.profile = notebook, profile
        self.backbone, self.source = load_backbone(model, dtype), sources.find_source()
        self.store = EmbeddingStore(fresh_since=float(context.get("fresh_since") or 0))
        self.where = f"{self.backbone.title}, {self.backbone.describe()['dtype']}; {self.source.label}"
        self._section = {"about": {}, "artefacts": {}, "results": [], "shared": {}}
        given = {"profile": profile, "model": model, "dtype": dtype} | context.get("parameters", {})
        about = {"parameters": given, "model": self.backbone.describe(), "blocks": self.backbone.num_layers}
        about |= {"source": self.source.describe(), "environment": environment()}
        self._section["about"] = {key: self._compact(value) for key, value in about.items()}

    @property
    def settings(self) -> dict[str, Setting]:
        """Prompt -> what was chosen for it. Raises `FileNotFoundError` with the command that chooses."""
        return load_settings(self.backbone.name, self.source.is_sample, self.profile)

    def encoder(self, prompt="prompteol", method=None, exit_layer=-1, pooling=None, **options) -> SentenceEncoder:
        """A `SentenceEncoder` on the session's model and store."""
        options = {"store": self.store} | options
        return SentenceEncoder(self.backbone, prompt, method, exit_layer, pooling, **options)

    def stored(self, name: str, compute: Callable[..., pd.DataFrame], *arguments, **settings) -> pd.DataFrame:
        """`compute(*arguments, **settings)`, a function of `lib`, from the result store where it has that.

        The key is `name`, what `describe` says of the arguments (defaults included), and the code: see `run_or_load`.
        """
        bound = inspect.signature(compute).bind(*arguments, **settings)
        bound.apply_defaults()
        described = {"computed by": describe(compute), **describe(dict(bound.arguments))}
        computation = functools.partial(compute, *arguments, **settings)
        result = run_or_load(name, described, computation, self.store.fresh_since)
        self._log(name=name, reused=result.reused)
        self._remember(name, **result.provenance)
        return result.value

    def note(self, name: str, **used) -> None:
        """Put into the provenance which encoders and texts are used without the result store."""
        self._remember(name, describe(used), environment(), None)

    def sts(self, encoder, data: dict[str, EvaluationData], layers: Iterable[int] | None = None) -> pd.DataFrame:
        """`sts_pairs` through the result store."""
        from lib.evaluation.sts import sts_pairs

        return self._by_task("sts", sts_pairs, encoder, data, layers)

    def transfer(self, encoder, data: dict[str, EvaluationData], layers: Iterable[int] | None = None) -> pd.DataFrame:
        """`transfer_predictions` through the result store."""
        from lib.evaluation.transfer import transfer_predictions  # here: scikit-learn takes long to import

        return self._by_task("transfer", transfer_predictions, encoder, data, layers)

    def _by_task(self, name: str, compute: Callable, encoder, data: dict, layers) -> pd.DataFrame:
        """A result a task, encoded by itself, so that a task has the same batches and scores in whatever company."""
        layers = _indices(encoder, layers)
        tables = [self.stored(f"{name}-{task}", compute, encoder, {task: of}, layers) for task, of in data.items()]
        return pd.concat(tables, ignore_index=True)

    def show(
        self, shown: pd.DataFrame | Figure, name: str, caption: str, digits: int = 2, detail: str = "", where: str = ""
    ) -> None:
        """Write a table (`.csv`, `.md`) or figure (`.png`) to `figures/<profile>/` with its provenance; display it.

        Args:
            caption: what it is; `where` is added (by default model, dtype and data).
            digits: of the numbers in the notebook and in the `.md`; the CSV has six.
            detail: a `DataFrame.query`: only these rows are displayed, and never more than 40.
        """
        caption = f"{caption.rstrip('.')}. {where or self.where}"
        if isinstance(shown, pd.DataFrame):
            table = shown if shown.index.names == [None] else shown.reset_index()
            part = (table.query(detail) if detail else table).head(LONGEST)
            tables = (t.astype(object).to_markdown(index=False, floatfmt=f".{digits}f") for t in (table, part))
            texts = [f"**{caption}**\n\n{text}\n" for text in tables]
            if len(part) < len(table):
                texts[1] += f"\n{len(part)} of {len(table)} rows; all are in `figures/{self.profile}/{name}.csv`.\n"
            csv = table.to_csv(index=False, float_format="%.6f", lineterminator="\n")
            self._publish({f"{name}.md": texts[0].encode(), f"{name}.csv": csv.encode()}, caption)
            display(Markdown(texts[1]))
        elif isinstance(shown, Figure):
            shown.text(0.008, -0.01, caption, va="top", fontsize=8, color="0.3", wrap=True, parse_math=False)
            picture = io.BytesIO()
            # Without a software version and a date in it, the same picture is the same file.
            shown.savefig(picture, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
            self._publish({f"{name}.png": picture.getvalue()}, caption)
            display(shown)
            plt.close(shown)  # or the notebook would show it again at the end of the cell
        else:
            raise TypeError(f"{name} is neither a table nor a figure but {type(shown).__name__}.")

    def _publish(self, files: dict[str, bytes], caption: str) -> None:
        """Write the files of a table or figure, and this notebook's section of the profile's `provenance.json`."""
        folder = FIGURES / self.profile
        for name, content in files.items():
            write_atomically(folder / name, content)
        self._section["artefacts"][name] = {"caption": caption, "results_read": len(self._section["results"])}
        path = folder / "provenance.json"
        others = json.loads(path.read_text()) if path.exists() else {}
        whole = {"about": ABOUT} | others | {self.notebook: self._section}
        write_atomically(path, f"{_lines(whole, 3)}\n".encode())

    def _remember(self, name: str, settings: dict, environment: dict, seconds: float | None) -> None:
        entry = {"name": name, **settings, "environment": environment, "seconds": seconds}
        self._section["results"].append({key: self._compact(value) for key, value in entry.items()})

    def _compact(self, value):
        """`value` with references to its longer parts, which are kept once each, and without paths of this machine."""
        if isinstance(value, str):
            return os.path.basename(value.rstrip("/")) if os.path.isabs(value) and os.path.exists(value) else value
        if isinstance(value, (list, tuple)):
            return [self._compact(item) for item in value]
        if not isinstance(value, dict):
            return value
        value = {key: self._compact(item) for key, item in value.items()}
        if len(value) <= 3:
            return value
        name = f"@{fingerprint(value)[:8]}"
        self._section["shared"][name] = value
        return name

    def _log(self, **entry) -> None:
        if self._log_file:
            with open(self._log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _log_memory(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = max(peak, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
        self._log(peak_gb=round(peak / 1e9, 1))


def _indices(encoder, layers: Iterable[int] | None) -> list[int]:
    return sorted({encoder.backbone.layer_index(n) for n in ([encoder.exit_layer] if layers is None else layers)})


def _lines(value, depth: int) -> str:
    """JSON with a line for each entry down to this depth."""
    if not depth or not value or not isinstance(value, (dict, list)):
        return json.dumps(value, default=str)
    if isinstance(value, list):
        return "[\n" + ",\n".join(_lines(item, depth - 1) for item in value) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(item, depth - 1)}" for key, item in value.items()) + "\n}"
