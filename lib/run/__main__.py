"""Regenerate tables and figures: run notebooks with papermill under a profile. This is what ./run_all.sh calls."""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import filelock
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillException

from lib.core import processes
from lib.core.store import ROOT, write_atomically
from lib.run import kernels
from lib.run.publish import code_hash, publish

NOTEBOOKS = ROOT / "notebooks"
CONFIGS = ROOT / "configs"
RUNS = ROOT / "runs"

# Measures time, so it runs alone.
NOT_SHARED = "05_cost_measurement"


def main(arguments: list[str]) -> int:
    """The command; 0 if all is well, 1 after a failure, 2 (`SystemExit`) for a wrong call, 130 after an interrupt."""
    parser = argparse.ArgumentParser(
        "./run_all.sh", description="Run the notebooks under a profile and regenerate every table and figure.",
        epilog="Example: TP_DATA_DIR=/path/to/data ./run_all.sh default 00 01",
    )
    option = parser.add_argument
    option("profile", nargs="?", default="default", help="a file in configs/ (default: default)")
    option("notebooks", nargs="*", help="names or numbers of notebooks (default: all)")
    option("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
           help="override a notebook parameter, for example -p model Qwen/Qwen2-0.5B")
    option("--fresh", action="store_true", help="ignore stored results and embeddings")
    option("--processes", type=int, default=1, metavar="N", help="share the encoding between N processes, one a GPU")
    option("--publish", action="store_true", help="afterwards write the executed copies to notebooks/")
    option("--list", action="store_true", help="show profiles, notebooks and their parameters")
    option("--context", type=json.loads, help=argparse.SUPPRESS)  # what the launching process hands to those it starts
    options = parser.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    try:
        paths = choose(options.notebooks)
        given = {name: yaml.safe_load(value) for name, value in options.parameter}
        parameters = parameters_of(options.profile, paths, given)
    except LookupError as error:
        parser.error(error.args[0])
    context = options.context or ({"fresh_since": time.time()} if options.fresh else {})
    if options.processes > 1:
        paths = [path for path in paths if path.stem != NOT_SHARED]
        if processes.count() == 1:
            print(f"{NOT_SHARED} is left out: it measures time and must run alone.", flush=True)
            launch(options.processes, arguments, context | {"meeting": tempfile.mkdtemp(prefix="token-prepending-")})
    folder = RUNS / options.profile
    if not processes.is_main():
        with redirect_stdout(io.StringIO()):
            return run(paths, parameters, folder / f"process-{processes.index()}", context)
    with only_run_in(folder):
        status = run(paths, parameters, folder, context)
        print(f"Tables and figures: figures/{folder.name}/   Executed notebooks: runs/{folder.name}/")
        if options.publish and not status:
            for path in paths:
                publish(folder / path.name, path)
            print("Published: the executed copies are in notebooks/")
    return status


def listing() -> str:
    """All profiles, and all notebooks with their parameters."""
    lines = ["Profiles (configs/):"]
    lines += [f"  {path.stem:<14}{read_profile(path.stem)['description']}" for path in sorted(CONFIGS.glob("*.yaml"))]
    lines.append("Notebooks and their parameters:")
    for path in existing():
        parameters = declared(path).values()
        lines += [f"  {path.stem}", *(f"    {p['name']} = {p['default']}  {p['help']}".rstrip() for p in parameters)]
    return "\n".join(lines)


def existing() -> list[Path]:
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def choose(names: list[str]) -> list[Path]:
    """Notebooks by name or number, in their own order; all of them if no name is given."""
    called = {name: path for path in existing() for name in (path.stem, path.name, path.stem[:2])}
    _must_exist(names, called, "notebook")
    return [path for path in existing() if not names or path in [called[name] for name in names]]


def read_profile(name: str) -> dict:
    """A profile: `description`, `parameters` (for every notebook that has them), `notebooks` (for one each)."""
    files = {path.stem: path for path in CONFIGS.glob("*.yaml")}
    _must_exist([name], files, "profile")
    return {"description": "", "parameters": {}, "notebooks": {}} | yaml.safe_load(files[name].read_text())


def declared(path: Path) -> dict[str, dict]:
    """The parameters of a notebook by name, without `context`, which only the runner gives."""
    return {name: about for name, about in papermill.inspect_notebook(path).items() if name != "context"}


def parameters_of(profile: str, notebooks: list[Path], given: dict) -> dict[str, dict]:
    """Parameters for each notebook: the profile's, and over them what was given on the command line.

    A profile, notebook or parameter that does not exist is a `LookupError` with those that do; papermill only warns.
    """
    content, known = read_profile(profile), {path.stem: declared(path) for path in existing()}
    shared, own, stems = content["parameters"], content["notebooks"], [path.stem for path in notebooks]
    _must_exist(own, known, f"notebook in profile {profile}")
    _must_exist([*shared, *given], {name for names in known.values() for name in names}, "parameter")
    _must_exist(given, {name for stem in stems for name in known[stem]}, f"parameter of {', '.join(stems)}")
    for notebook, values in own.items():
        _must_exist(values, known[notebook], f"parameter of {notebook}")
    wanted = {stem: {"profile": profile} | shared | own.get(stem, {}) | given for stem in stems}
    return {stem: {name: value for name, value in wanted[stem].items() if name in known[stem]} for stem in stems}


def _must_exist(names, known, kind: str) -> None:
    for name in names:
        if name not in known:
            raise LookupError(f"unknown {kind} {name!r}; there are {', '.join(sorted(known))}")


def launch(count: int, arguments: list[str], context: dict) -> None:
    """Become `count` processes that run this same command; torch's launcher stops all of them when one fails."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // count)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "lib.run"]
    os.execv(sys.executable, [sys.executable, *launcher, *arguments, "--context", json.dumps(context)])


def only_run_in(folder: Path):
    """Waits while another run of the same profile works in this folder; a run that was killed holds no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"Another run is at work in {folder.relative_to(RUNS.parent)}; waiting for it.", flush=True)
        return lock.acquire()


def run(paths: list[Path], parameters: dict[str, dict], folder: Path, context: dict) -> int:
    """Execute notebooks in order, to copies in `folder`, until one fails; of several processes each does so."""
    kernels.preload()
    from lib.data import sources  # takes seconds, in which the process behind the kernels imports too

    source = sources.find_source()
    context = context | {"hub_unreachable": sources.hub_unreachable}
    print(f"{len(paths)} notebooks on {source.label}\n{'notebook':<28}{'seconds':>8}  results computed / reused")
    try:
        for path in paths:
            took = execute(path, parameters[path.stem], folder / path.name, context, source.label)
            print(f"{path.stem:<28}{took}", flush=True)
        return 0
    except (PapermillException, DeadKernelError) as error:
        copy = (folder / path.name).relative_to(RUNS.parent)
        print(f"\nFAILED: {path.stem}\n{error}\nThe executed copy: {copy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What is stored is kept: the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        if "meeting" in context and processes.is_main():
            shutil.rmtree(context["meeting"], ignore_errors=True)


def execute(path: Path, given: dict, copy: Path, context: dict, data: str) -> str:
    """One notebook through papermill. Writes the executed copy and beside it, for `lib.run.publish`, a record of it.

    Args:
        given: values of parameters.
        context: a part of what the notebook gets as the parameter `context` (see `lib.report.session.start`). Here
            `meeting` is a folder, in which each notebook gets a file.
        data: which data this is, for the record.

    Returns what it took, in words. Raises papermill's and nbclient's errors.
    """
    log, record = copy.with_suffix(".log"), copy.with_suffix(".json")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    defaults = {name: ast.literal_eval(about["default"]) for name, about in declared(path).items()}
    context = context | {"log": str(log), "parameters": defaults | given}
    if "meeting" in context:
        context["meeting"] += f"/{path.stem}"
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this environment, not one of the user's
    begin, screen = time.perf_counter(), sys.stderr if sys.stderr.isatty() else None
    parameters = given | {"context": context}
    papermill.execute_notebook(
        path, copy, parameters, kernel_name="python3", cwd=ROOT, progress_bar=bool(screen), stderr_file=screen
    )
    seconds = round(time.perf_counter() - begin)
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    reused = [entry["reused"] for entry in entries if "reused" in entry]
    before, took = json.loads(record.read_text()) if record.exists() else {}, None
    if "fresh_since" in context:
        peak = max((entry.get("peak_gb", 0) for entry in entries), default=0)
        took = {"seconds": seconds, "peak_gb": peak, "processors": os.cpu_count()}
    elif before.get("code") == code_hash(path):
        took = before["took"]  # a run that finds results in the store says nothing of the whole
    about = {"code": code_hash(path), "parameters": given, "data": data, "date": time.strftime("%Y-%m-%d")}
    write_atomically(record, json.dumps(about | {"took": took}, indent=1).encode())
    return f"{seconds:>8}  {reused.count(False)} / {reused.count(True)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
