"""The one object that a notebook talks to: its model, data source and settings, stored results, tables and figures."""

import atexit
import inspect
import io
import json
import re
import resource
import sys
from collections.abc import Callable, Iterable
from functools import partial, partialmethod

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown, display

from lib.core import processes
from lib.core.backbone import load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.store import ROOT, EmbeddingStore, fingerprint, write_atomically
from lib.data import sources
from lib.evaluation.sts import sts_pairs
from lib.evaluation.transfer import transfer_predictions
from lib.report.figures import set_style
from lib.report.results import describe, environment, run_or_load
from lib.report.settings import Setting, load_settings

FIGURES = ROOT / "figures"
ABOUT = ("@... is the entry of that name under shared. results_read: how many of the notebook's results had been read "
         "by then. Layers are numbered as by Hugging Face: only the last state is after the final norm.")


class Session:
    """What every notebook begins with: loads the model, finds the data, sets the style of figures. Attributes: profile,
    backbone, source, settings, store, and where: model, dtype and data in words (where_own: of own sentences).
    `notebook` and `profile` name the provenance and the folder under `figures/`; `model`, `dtype` and `device_map`,
    empty for none, are as of `load_backbone`, `encoding` is of encoders (0: none). `context` is the runner's:
    fresh_since, in seconds of the epoch (what was stored before does not count); log, a file that is told what was
    reused and how much memory it took; hub_unreachable, why not to ask it; meeting, the file by which processes meet;
    parameters, all that were given."""

    def __init__(self, notebook: str, profile: str, model: str, dtype: str = "auto", context: dict | None = None,
                 device_map: str = "", **encoding):
        self.notebook, self.profile, self._context = notebook, profile, context or {}
        atexit.register(self._log_memory)
        if meeting := self._context.get("meeting"):
            processes.join(meeting)
        sources.hub_unreachable = self._context.get("hub_unreachable") or sources.hub_unreachable
        set_style()
        self.backbone = load_backbone(model, dtype, device_map=device_map or None)
        self.source, self.encoding = sources.find_source(), {name: value or None for name, value in encoding.items()}
        self.store = EmbeddingStore(fresh_since=float(self._context.get("fresh_since") or 0))
        parameters = {"profile": profile, "model": model, "dtype": dtype} | self._context.get("parameters", {})
        about = {"parameters": parameters, "model": self.backbone.describe(), "blocks": self.backbone.num_layers,
                 "source": self.source.describe(), "environment": environment()}
        self.where, self.where_own = (f"{self.backbone.title}, {about['model']['dtype']}; {text}"
                                      for text in (self.source.label, "own sentences"))
        self._section = {"about": {}, "artefacts": {}, "results": [], "shared": {}}
        self._section["about"] = self._compact(about)

    @property
    def settings(self) -> dict[str, Setting]:
        """Prompt -> what was chosen for it. Raises `FileNotFoundError` with the command that chooses."""
        return load_settings(self.backbone.name, self.source.is_sample, self.profile)

    def encoder(self, prompt="prompteol", method=None, exit_layer=-1, pooling=None, **options) -> SentenceEncoder:
        """A `SentenceEncoder` on the session's model and store."""
        options = {"store": self.store} | self.encoding | options
        return SentenceEncoder(self.backbone, prompt, method, exit_layer, pooling, **options)

    def stored(self, name: str, compute: Callable[..., pd.DataFrame], *arguments, **settings) -> pd.DataFrame:
        """`compute(*arguments, **settings)`, a function of `lib`, from the result store where it has that. The key is
        `name`, what `describe` says of the arguments (defaults included), and the code: see `run_or_load`."""
        bound = inspect.signature(compute).bind(*arguments, **settings)
        bound.apply_defaults()
        described = {"computed by": describe(compute), **describe(dict(bound.arguments))}
        result = run_or_load(name, described, partial(compute, *arguments, **settings), self.store.fresh_since)
        self._log(name=name, reused=result.reused)
        self._remember(name, **result.provenance)
        return result.value

    def _by_task(self, compute: Callable, name: str, encoder, data: dict, layers: Iterable[int] | None = None, **rest):
        """A result a task, encoded by itself, so that a task has the same batches and scores in whatever company."""
        layers = sorted({encoder.backbone.layer_index(n) for n in ([encoder.exit_layer] if layers is None else layers)})
        tables = [self.stored(f"{name}-{of}", compute, encoder, {of: data[of]}, layers, **rest) for of in data]
        return pd.concat(tables, ignore_index=True)

    # Both take an encoder, task -> data, layers (else its exit layer) and more of the function's own arguments.
    sts = partialmethod(_by_task, sts_pairs, "sts")
    transfer = partialmethod(_by_task, transfer_predictions, "transfer")

    def note(self, name: str, **used) -> None:
        """Put into the provenance which encoders and texts are used without the result store."""
        self._remember(name, describe(used), environment=environment())

    def show(self, shown: pd.DataFrame | plt.Figure, name: str, caption: str, digits=2, detail="", where="") -> None:
        """Write a table (`.csv`, `.md`) or figure (`.png`) to `figures/<profile>/`, and its provenance; display it.
        To `caption`, what it is, `where` is added: by default model, dtype and data. Numbers have `digits` decimals, in
        the CSV six. Of a table only the rows that the query `detail` chooses are displayed, at most 40."""
        caption, folder = f"{caption.rstrip('.')}. {where or self.where}", FIGURES / self.profile
        if isinstance(shown, pd.DataFrame):
            table = shown if shown.index.names == [None] else shown.reset_index()
            caption += self._widths(table, f"{name}.csv")
            part = (table.query(detail) if detail else table).head(40)
            texts = (t.round(6).astype(object).to_markdown(index=False, floatfmt=f".{digits}f") for t in (table, part))
            text, digest = (f"**{caption}**\n\n{text}\n" for text in texts)
            if len(part) < len(table):
                digest += f"\n{len(part)} of {len(table)} rows; all are in `figures/{self.profile}/{name}.csv`.\n"
            csv = table.to_csv(index=False, float_format="%.6f", lineterminator="\n")
            files, shown = {f"{name}.md": text.encode(), f"{name}.csv": csv.encode()}, Markdown(digest)
        elif isinstance(shown, plt.Figure):
            shown.text(0.008, -0.01, caption, va="top", fontsize=8, color="0.3", wrap=True, parse_math=False)
            picture = io.BytesIO()
            # Without a software version and a date in it, the same picture is the same file.
            shown.savefig(picture, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
            plt.close(shown)  # or the notebook would show it again at the end of the cell
            files = {f"{name}.png": picture.getvalue()}
        else:
            raise TypeError(f"{name} is neither a table nor a figure but {type(shown).__name__}.")
        for file, content in files.items():
            write_atomically(folder / file, content)
        self._section["artefacts"][file] = {"caption": caption, "results_read": len(self._section["results"])}
        others = json.loads(path.read_text()) if (path := folder / "provenance.json").exists() else {}
        sections = ({"about": ABOUT} | others | {self.notebook: self._section}).items()  # a line each
        content = ",\n".join(f"{json.dumps(name)}: {json.dumps(section)}" for name, section in sections)
        write_atomically(path, f"{{\n{content}\n}}\n".encode())
        display(shown)

    def _widths(self, table: pd.DataFrame, file: str) -> str:
        """How wide its intervals (median of those above 0) are beside those of the same table of complete data."""
        path = FIGURES / f"full-{self.profile}".removesuffix("-default") / file
        if table.filter(regex="high$").empty or not path.exists():
            return ""
        both = [(of.filter(regex="high$").to_numpy() - of.filter(regex="low$")).stack().loc[lambda w: w > 0].median()
                for of in (table, pd.read_csv(path))]
        return f"; intervals {both[0] / both[1]:.1f} times as wide as in figures/{path.parent.name}"

    def _remember(self, name: str, settings: dict, **about) -> None:
        self._section["results"].append(self._compact({"name": name} | settings | about))

    def _compact(self, entry: dict) -> dict:
        """An entry of the provenance. Its longer parts stand once each in `shared`, its files without their folders."""
        def refer(part: dict) -> dict | str:
            if len(part) <= 3:
                return part
            name = f"@{fingerprint(part)[:8]}"
            self._section["shared"][name] = part
            return name

        text = re.sub(r'"/[^"]*/([^"/]+)/?"', r'"\1"', json.dumps([*entry.values()], default=str))
        return dict(zip(entry, json.loads(text, object_hook=refer)))

    def _log(self, **entry) -> None:
        if self._context.get("log"):
            with open(self._context["log"], "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _log_memory(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self._log(peak_gb=round(max(peak, torch.cuda.is_available() and torch.cuda.max_memory_allocated()) / 1e9, 1))


start = Session  # as notebooks write it
