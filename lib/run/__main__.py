"""Run the notebooks under a profile and regenerate every table and figure."""

import argparse
import ast
import io
import json
import os
import sys
import time
from pathlib import Path

import filelock
import papermill
import yaml

from lib.core import processes
from lib.core.store import ROOT, write_atomically
from lib.run import kernels
from lib.run.publish import code_hash, publish

NOTEBOOKS, CONFIGS, RUNS = ROOT / "notebooks", ROOT / "configs", ROOT / "runs"
NOT_SHARED = "05_cost_measurement"  # measures time, so it runs alone
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]  # stops all processes when one fails

PARSER = argparse.ArgumentParser("./run_all.sh", description=__doc__)
PARSER.epilog = "Example: TP_DATA_DIR=/path/to/data ./run_all.sh default 00 01"
option = PARSER.add_argument
option("profile", nargs="?", default="default", help="a file in configs/ (default: default)")
option("notebooks", nargs="*", help="names or numbers of notebooks (default: all)")
option("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
       help="override a notebook parameter, for example -p model Qwen/Qwen2-0.5B")  # fmt: skip
option("--fresh", action="store_const", const=time.time(), default=0.0, help="ignore stored results and embeddings")
option("--processes", type=int, default=1, metavar="N", help="share the encoding between N processes, one a GPU")
option("--publish", action="store_true", help="afterwards write the executed copies to notebooks/")
option("--list", action="store_true", help="show profiles, notebooks and their parameters")
option("--fresh-since", dest="fresh", type=float, help=argparse.SUPPRESS)  # one moment for all processes


def main(arguments: list[str]) -> int:
    """The command; 0 if all is well, 1 after a failure, 2 (`SystemExit`) for a wrong call, 130 after an interrupt."""
    options = PARSER.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    chain = [*read_profile(options.profile)["first"], options.profile]
    parameters = {name: parameters_of(name, options.notebooks, dict(options.parameter)) for name in chain}
    if options.processes > processes.count() == 1:  # become these processes, which run this same command
        print(f"{NOT_SHARED} is left out: it measures time and must run alone.", flush=True)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // options.processes)))
        command = [sys.executable, *LAUNCHER, str(options.processes), "-m", "lib.run", *arguments]
        os.execv(sys.executable, [*command, "--fresh-since", str(options.fresh)])
    return next(filter(None, (run_profile(name, of, options) for name, of in parameters.items())), 0)


def run_profile(name: str, parameters: dict[str, dict], options: argparse.Namespace) -> int:
    """Run a profile's notebooks, and publish them if that is asked for; an exit status as of `main`."""
    folder = RUNS / name
    if options.processes > 1:
        parameters.pop(NOT_SHARED, None)
    if not processes.is_main():
        folder, sys.stdout = folder / f"process-{processes.index()}", io.StringIO()
    with only_run_in(folder):
        status = run(parameters, folder, options.fresh, read_profile(name)["minutes"])
        print(f"Tables and figures: figures/{folder.name}/   Executed notebooks: runs/{folder.name}/")
        if options.publish and status == 0 and processes.is_main():
            for stem in parameters:
                publish(folder / f"{stem}.ipynb", NOTEBOOKS / f"{stem}.ipynb")
            print("Published: the executed copies are in notebooks/")
    return status


def declared() -> dict[str, dict[str, dict]]:
    """Notebook -> parameter -> what papermill says of it, without `context`, which only the runner gives."""
    found = {path.stem: papermill.inspect_notebook(path) for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    return {stem: {name: about[name] for name in about if name != "context"} for stem, about in found.items()}


def read_profile(name: str) -> dict:
    """A profile: `description`, `parameters` (for every notebook that has them), `notebooks` (for one each), `first`
    (profiles that are run before it), and `minutes` that its notebooks took (for an estimate)."""
    must_exist([name], known := {path.stem: path for path in CONFIGS.glob("*.yaml")}, "profile")
    try:
        empty = {"description": "", "parameters": {}, "notebooks": {}, "first": [], "minutes": {}}
        return empty | yaml.safe_load(known[name].read_text())
    except (yaml.YAMLError, TypeError) as error:
        PARSER.error(f"profile {name} (configs/{name}.yaml) is empty or broken: {' '.join(str(error).split())}")


def listing() -> str:
    """All profiles, and all notebooks with their parameters."""
    about = {path.stem: read_profile(path.stem)["description"] for path in sorted(CONFIGS.glob("*.yaml"))}
    lines = ["Profiles (configs/):", *(f"  {n:<14}{said}" for n, said in about.items()), "Notebooks, with parameters:"]
    for stem, own in declared().items():
        lines += [f"  {stem}", *(f"    {p['name']} = {p['default']}  {p['help']}".rstrip() for p in own.values())]
    return "\n".join(lines)


def parse(text: str, name: str, about: dict):
    """A parameter's value from the command line, as its default is: a number, text or a list (with commas between; an
    empty one takes words if its comment has quotes), and None where that says so. What does not fit: status 2."""
    default = ast.literal_eval(about["default"])
    if text in ("None", "null") and "None" in about["help"]:
        return None
    try:
        if not isinstance(default, list):
            return type(default)(text)
        words = [word.strip(" '\"") for word in text.strip(" []").split(",") if word.strip()]
        return words if (isinstance(default[0], str) if default else '"' in about["help"]) else list(map(int, words))
    except ValueError:
        PARSER.error(f"parameter {name}: {text!r} does not fit; its default is {about['default']} {about['help']}")


def parameters_of(profile: str, notebooks: list[str], given: dict[str, str]) -> dict[str, dict]:
    """Notebook -> parameters, for those called by name, file name or number (by default for all), in their order: the
    profile's, and over them the texts that are given. What does not exist is an error; papermill would only warn."""
    content, known = read_profile(profile), declared()
    shared, own = content["parameters"], content["notebooks"]
    called = {name: stem for stem in known for name in (stem, f"{stem}.ipynb", stem[:2])}
    must_exist(notebooks, called, "notebook")
    must_exist(own, known, f"notebook in profile {profile}")
    chosen = sorted({called[name] for name in notebooks or called})
    for names, stems in [(shared, known), (given, chosen), *((own[stem], [stem]) for stem in own)]:
        must_exist(names, set().union(*(known[stem] for stem in stems)), f"parameter of {', '.join(stems)}")
    wanted = {stem: {"profile": profile} | shared | own.get(stem, {}) for stem in chosen}
    return {stem: {name: value for name, value in wanted[stem].items() if name in known[stem]}
            | {name: parse(text, name, known[stem][name]) for name, text in given.items() if name in known[stem]}
            for stem in chosen}


def must_exist(names, known, kind: str) -> None:
    """Ends the program with a list of what there is if one of the names is not among it."""
    if unknown := [name for name in names if name not in known]:
        PARSER.error(f"unknown {kind} {unknown[0]!r}; there are {', '.join(sorted(known))}")


def only_run_in(folder: Path):
    """Waits while another run of the same profile works in this folder; a run that was killed holds no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        return lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f"Another run is at work in {folder.relative_to(RUNS.parent)}; waiting for it.", flush=True)
        return lock.acquire()


def run(parameters: dict[str, dict], folder: Path, fresh_since: float, minutes: dict[str, float]) -> int:
    """Execute notebooks in order, to copies in `folder`, until one fails. Of several processes each does so. `minutes`
    are expected for a notebook of which nothing is stored."""
    kernels.preload()
    from lib.core.bundled import install_missing  # takes seconds, in which the process behind the kernels imports too
    from lib.data import sources
    install_missing({given.get("model") for given in parameters.values()})
    try:
        data = sources.find_source().label
    except sources.DataError as error:
        PARSER.error(str(error))
    context = {"fresh_since": fresh_since, "hub_unreachable": sources.hub_unreachable}
    print(f"{len(parameters)} notebooks on {data}\n{'notebook':<28}{'seconds':>8}  results computed / reused")
    try:
        for stem, given in parameters.items():
            if left := sum(minutes.get(other, 0) for other in parameters if other >= stem):
                print(f"{time.strftime('%H:%M')}: {stem}; from here on about {left:.0f} minutes", flush=True)
            execute(NOTEBOOKS / f"{stem}.ipynb", given, folder / f"{stem}.ipynb", context, data)
        return 0
    except (papermill.exceptions.PapermillException, RuntimeError) as error:  # of a cell, or of a kernel that died
        print(f"\nFAILED: {stem}\n{error}\nLook at {folder.relative_to(RUNS.parent)}/{stem}.ipynb", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What is stored is kept: the same command goes on from here.", file=sys.stderr)
        return 130


def execute(path: Path, given: dict, copy: Path, context: dict, data: str) -> None:
    """One notebook through papermill, with what is given and, in its parameter `context`, with this and more (see
    `lib.report.session`). Writes a copy, and beside it a record for `lib.run.publish`. Prints what it took."""
    log, record = copy.with_suffix(".log"), copy.with_suffix(".json")
    log.unlink(missing_ok=True)
    defaults = {name: ast.literal_eval(about["default"]) for name, about in declared()[path.stem].items()}
    context = context | {"log": str(log), "parameters": defaults | given}
    if processes.count() > 1:  # their kernels meet in the folder that torch's launcher made for this run
        context["meeting"] = str(Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / path.stem)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this environment, not one of the user's,
    os.environ.pop("JUPYTER_PATH", None)  # which would come before it
    screen = sys.stderr if sys.stderr.isatty() else None
    options = {"kernel_name": "python3", "cwd": ROOT, "progress_bar": bool(screen), "stderr_file": screen}
    options["extra_arguments"] = ["--log-level=ERROR"]  # of kernels, which warn at every start that they use TCP
    done = papermill.execute_notebook(path, copy, given | {"context": context}, **options)
    seconds = round(done.metadata.papermill.duration)
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    reused = [entry["reused"] for entry in entries if "reused" in entry]
    print(f"{path.stem:<28}{seconds:>8}  {reused.count(False)} / {reused.count(True)}", flush=True)
    about = {"code": code_hash(path), "parameters": given, "data": data, "date": time.strftime("%Y-%m-%d")}
    before = json.loads(record.read_text()) if record.exists() else {}
    took = before["took"] if before.get("code") == about["code"] else None
    if context["fresh_since"]:  # a run that finds results in the store says nothing of the whole
        peak_gb = max(entry.get("peak_gb", 0) for entry in [{}, *entries])
        took = {"seconds": seconds, "peak_gb": peak_gb, "processors": os.cpu_count()}
    write_atomically(record, json.dumps(about | {"took": took}, indent=1).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
