"""Regenerate tables and figures: run notebooks with papermill under a profile. This is what ./run_all.sh calls."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import filelock
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillException, PapermillExecutionError

from lib.core import processes
from lib.data.sts import find_source
from lib.run.publish import code_hash, publish
from lib.core.store import ROOT, write_atomically

NOTEBOOKS = ROOT / "notebooks"
CONFIGS = ROOT / "configs"
RUNS = ROOT / "runs"

# Measures time, so it runs alone.
NOT_SHARED = "05_cost_measurement"


class UsageError(ValueError):
    """Something asked for does not exist; the message lists what does."""


@dataclass
class Outcome:
    """What became of one notebook."""

    name: str
    seconds: float
    peak_gb: float
    computed: int
    reused: int


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./run_all.sh", description="Run the notebooks under a profile and regenerate every table and figure.",
        epilog="Example: TP_DATA_DIR=/path/to/data ./run_all.sh default 00 01",
    )
    parser.add_argument("profile", nargs="?", default="default", help="a file in configs/ (default: default)")
    parser.add_argument("notebooks", nargs="*", help="names or numbers of notebooks (default: all)")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="override a notebook parameter, for example -p model Qwen/Qwen2-0.5B")
    parser.add_argument("--fresh", action="store_true", help="ignore stored results and embeddings")
    parser.add_argument("--processes", type=int, default=1, metavar="N",
                        help="share the encoding between N processes, one a GPU where there are GPUs")
    parser.add_argument("--publish", action="store_true", help="afterwards write the executed copies to notebooks/")
    parser.add_argument("--list", action="store_true", help="show profiles, notebooks and their parameters")
    options = parser.parse_args(arguments)
    try:
        if options.list:
            print(listing())
            return 0
        profile = read_profile(options.profile)
        chosen = choose_notebooks(options.notebooks)
        extra = {name: yaml.safe_load(value) for name, value in options.parameter}
        parameters = parameters_of(options.profile, profile, chosen, extra)
    except UsageError as error:
        print(f"run_all: {error}", file=sys.stderr)
        return 2
    if options.fresh:
        os.environ.setdefault("TP_FRESH_SINCE", str(time.time()))
    if options.processes > 1:
        if processes.count() == 1:
            launch(options.processes, sys.argv[1:] if arguments is None else arguments)
        chosen = [path for path in chosen if path.stem != NOT_SHARED]
        if processes.is_main():
            print(f"{NOT_SHARED} is left out: it measures time and must run alone.")
    if not processes.is_main():
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return run(options.profile, chosen, parameters, RUNS / options.profile / f"process-{processes.index()}")
    folder = RUNS / options.profile
    with only_run_in(folder):
        failed = run(options.profile, chosen, parameters, folder)
        if options.publish and not failed:
            for path in chosen:
                publish(folder / path.name, path)
            print("Published: the executed copies are in notebooks/")
    return failed


def launch(count: int, arguments: list[str]) -> None:
    """Become `count` processes that run this same command; torch's launcher stops all of them when one fails."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // count)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "lib.run"]
    os.execv(sys.executable, [sys.executable, *launcher, *arguments])


@contextmanager
def only_run_in(folder: Path):
    """Waits while another run of the same profile works in this folder; a run that was killed holds no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"Another run is at work in {folder.relative_to(RUNS.parent)}; waiting for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def run(profile: str, notebooks: list[Path], parameters: dict[str, dict], folder: Path) -> int:
    """Execute the notebooks in order, to copies in `folder`; 0 if all of them ran, else 1 (and the rest is not tried)."""
    source = find_source()
    if source.is_sample:
        os.environ["TP_HUB_UNREACHABLE"] = "1"  # the notebooks need not find out again
    print(f"Profile {profile}: {len(notebooks)} notebooks on {source.label}")
    outcomes = []
    for number, path in enumerate(notebooks):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # each notebook's processes meet under a name of their own
        try:
            outcomes.append(execute(path, parameters[path.stem], folder / path.name))
            write_record(folder / f"{path.stem}.json", path, parameters[path.stem], outcomes[-1], source.label)
        except (PapermillException, DeadKernelError) as error:
            print(summary(profile, outcomes))
            print(describe_failure(path, folder, error), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(summary(profile, outcomes))
            print("Interrupted. What is stored is kept: the same command goes on from here.", file=sys.stderr)
            return 130
    print(summary(profile, outcomes))
    return 0


def execute(path: Path, parameters: dict, output: Path) -> Outcome:
    """One notebook through papermill; its executed copy goes to `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    os.environ["TP_RUN_LOG"] = str(log)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this environment, not one of the user's
    print(f"{path.stem}", flush=True)
    begin = time.perf_counter()
    papermill.execute_notebook(
        path, output, parameters=parameters, kernel_name="python3", cwd=ROOT, progress_bar=True,
        stderr_file=sys.stderr if sys.stderr.isatty() else None,
    )
    seconds = time.perf_counter() - begin
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    reused = [entry["reused"] for entry in entries if "reused" in entry]
    peak = max((entry.get("peak_gb", 0) for entry in entries), default=0)
    return Outcome(path.stem, seconds, peak, reused.count(False), reused.count(True))


def write_record(file: Path, path: Path, parameters: dict, outcome: Outcome, data: str) -> None:
    """What `lib.run.publish` says of this run: what was run, on which data, and what it took.

    Time and memory are those of the last run with --fresh, as long as the notebook is the same.
    """
    code = code_hash(path)
    before = json.loads(file.read_text()) if file.exists() else {}
    took = {"seconds": round(outcome.seconds), "peak_gb": outcome.peak_gb, "processors": os.cpu_count()}
    if "TP_FRESH_SINCE" not in os.environ:
        took = before["took"] if before.get("code") == code else None
    record = {"code": code, "parameters": parameters, "data": data, "date": time.strftime("%Y-%m-%d"), "took": took}
    write_atomically(file, json.dumps(record, indent=1).encode())


def describe_failure(path: Path, folder: Path, error: Exception) -> str:
    where = f"\nFAILED: {path.stem}"
    if isinstance(error, PapermillExecutionError):
        where += f", cell {error.cell_index} (execution {error.exec_count})\n{error.ename}: {error.evalue}"
    else:
        where += f"\n{type(error).__name__}: {error}"
    return f"{where}\nThe executed copy with the full traceback: {folder.relative_to(RUNS.parent)}/{path.name}"


def summary(profile: str, outcomes: list[Outcome]) -> str:
    lines = ["", f"{'notebook':<28}{'seconds':>8}  results computed / reused"]
    lines += [f"{o.name:<28}{o.seconds:>8.0f}  {o.computed} / {o.reused}" for o in outcomes]
    return "\n".join([*lines, f"Tables and figures: figures/{profile}/   Executed notebooks: runs/{profile}/"])


def read_profile(name: str) -> dict:
    """The YAML of a profile: `description`, `parameters` (for every notebook that has them), `notebooks` (for one each)."""
    path = CONFIGS / f"{name}.yaml"
    if not path.exists():
        raise UsageError(f"unknown profile {name!r}; there are {', '.join(sorted(p.stem for p in CONFIGS.glob('*.yaml')))}")
    return yaml.safe_load(path.read_text())


def choose_notebooks(names: list[str]) -> list[Path]:
    """Notebooks by name or number, in their own order; all of them if no name is given."""
    existing = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    chosen = set()
    for name in names:
        found = [p for p in existing if name.removesuffix(".ipynb") in (p.stem, p.stem[:2])]
        if not found:
            raise UsageError(f"unknown notebook {name!r}; there are {', '.join(p.stem for p in existing)}")
        chosen.update(found)
    return [p for p in existing if p in chosen or not names]


def parameters_of(name: str, profile: dict, notebooks: list[Path], extra: dict) -> dict[str, dict]:
    """Parameters for each notebook. papermill only warns about one that a notebook does not have; here it is refused."""
    declared = {path.stem: set(papermill.inspect_notebook(path)) for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    shared = {"profile": name, **(profile.get("parameters") or {}), **extra}
    everywhere = set().union(*declared.values())
    own = profile.get("notebooks") or {}
    for notebook in own.keys() - declared.keys():
        raise UsageError(f"profile {name} sets parameters of {notebook!r}; there are {', '.join(declared)}")
    for key in shared.keys() - everywhere:
        raise UsageError(f"unknown parameter {key!r}; there are {', '.join(sorted(everywhere))}")
    for notebook, values in own.items():
        for key in (values or {}).keys() - declared[notebook]:
            raise UsageError(f"{notebook} has no parameter {key!r}; it has {', '.join(sorted(declared[notebook]))}")
    stems = [path.stem for path in notebooks]
    for key in extra:
        if not any(key in declared[stem] for stem in stems):
            raise UsageError(f"none of {', '.join(stems)} has a parameter {key!r}")
    return {
        stem: {k: v for k, v in {**shared, **(own.get(stem) or {}), **extra}.items() if k in declared[stem]} for stem in stems
    }


def listing() -> str:
    lines = ["Profiles (configs/):"]
    for path in sorted(CONFIGS.glob("*.yaml")):
        lines.append(f"  {path.stem:<14}{yaml.safe_load(path.read_text()).get('description', '')}")
    lines.append("Notebooks and their parameters:")
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        lines.append(f"  {path.stem}")
        for parameter in papermill.inspect_notebook(path).values():
            lines.append(f"    {parameter['name']} = {parameter['default']}  {parameter['help']}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
