"""Which releases of `transformers` does the package work with, and for which families of models?

Each release gets a throw-away venv of its own, in which the project's tests of tiny random models are run: the states
of the baseline and of TP equal the loop over the blocks, at every exit layer, on whole prompts and with a shared
prefix. Run from the project folder (15 minutes on two cores, 3 GB of disk while it runs):

    python -m benchmarks.transformers_matrix
    python -m benchmarks.transformers_matrix --folder DIR --versions 5.0.0 4.57.6     # keeps the venvs, for another run

torch is large and the same for all, so it is installed once, with what else does not depend on the release, in a venv
without `transformers`; a `.pth` file puts that venv's packages behind those of each release.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from string import ascii_lowercase

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "transformers_matrix.csv"
PINS = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
SHARED = [f"{name}=={PINS[name]}" for name in ("torch", "numpy", "tqdm", "PyYAML", "pytest")]
VERSIONS = [PINS["transformers"], "5.17.0", "5.0.0", "4.57.6", "4.56.2", "4.53.3", "4.51.3", "4.48.3", "4.45.2"]


def make_venv(path: Path, packages: list[str], behind: Path | None = None) -> Path:
    """A venv with these packages, made or completed; `behind` is a venv whose packages it finds after its own."""
    if not (path / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
    if behind:
        site, other = (next(venv.glob("lib/python*/site-packages")) for venv in (path, behind))
        (site / "behind.pth").write_text(f"{other}\n")
    subprocess.run([path / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
    return path


def check_families() -> None:
    """In a release's venv: print a line of JSON per family: [family, `yes`, `no: why`, `whole prompts: why` or `-`].

    A model that cannot share a prefix is run on whole prompts by the encoder, so its embeddings are right all the same.
    """
    import test_architectures as tests  # imports all of the package that runs a model
    from tiny_models import FAMILIES, tiny_backbone
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    warnings.filterwarnings("error", message=".*cannot reuse a prompt's prefix")
    steps = {
        "build": tiny_backbone,
        "baseline": tests.test_the_loop_itself_gives_the_states_of_the_model,
        "TP": lambda family: [tests.test_encoder_equals_the_loop(family, name, False) for name in tests.SETTINGS],
        "prefix": lambda family: [tests.test_encoder_equals_the_loop(family, name, True) for name in tests.SETTINGS],
        "early exit": tests.test_early_exit_and_shared_prefix_run_fewer_blocks_on_fewer_tokens,
    }
    for family, (kind, _) in FAMILIES.items():
        outcome = "yes" if kind in CONFIG_MAPPING_NAMES else "-"
        try:
            for step, run in steps.items() if outcome == "yes" else ():
                run(family)
        except UserWarning as warning:
            outcome = f"whole prompts: {warning}".split(";")[0]
        except Exception as error:  # whatever a release does differently is the result
            outcome = f"no: {step}: {type(error).__name__}: {error}"
        print(json.dumps([family, outcome.replace(f"tiny-{family}", "the model")]), flush=True)


def run_release(python: Path, families: list[str]) -> dict[str, str]:
    """Family -> what came out. What stops the whole process is the reason for all families that it did not reach."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [python, "-m", "benchmarks.transformers_matrix", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""
    reason = re.sub(r"\(/[^)]*\)|/\S+", "", last).strip()
    return {family: found.get(family, f"no: {reason or 'not reached'}") for family in families}


def table_text(table: dict[str, dict[str, str]]) -> str:
    """Release -> family -> what came out, as Markdown: families x releases, with letters for the reasons."""
    families = [*next(iter(table.values()))]
    cells = [table[version][family] for family in families for version in table]
    reasons = list(dict.fromkeys(cell for cell in cells if ": " in cell))
    short = {reason: f"{reason.split(':')[0]} ({letter})" for letter, reason in zip(ascii_lowercase, reasons)}
    lines = ["| family | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    lines += ["| " + " | ".join([f, *(short.get(row[f], row[f]) for row in table.values())]) + " |" for f in families]
    lines += ["", "`-`: the release does not have the family. `whole prompts`: right, but without a shared prefix.", ""]
    lines += [f"- {short[r]}: `{r.partition(': ')[2][:200]}`" for r in reasons]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="releases of transformers")
    parser.add_argument("--folder", type=Path, help="where the venvs are kept; a temporary folder without it")
    parser.add_argument("--check", action="store_true", help="check the release that runs this (what each venv does)")
    options = parser.parse_args()
    if options.check:
        return check_families()
    families = re.findall(r'^    "(\w+)": \("', (ROOT / "tests" / "tiny_models.py").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as temporary:
        folder, table = (options.folder or Path(temporary)).resolve(), {}
        shared = make_venv(folder / "shared", SHARED)
        for version in options.versions:
            venv = make_venv(folder / version, [f"transformers=={version}"], behind=shared)
            table[version] = run_release(venv / "bin" / "python", families)
            print(version, sum(cell == "yes" for cell in table[version].values()), "of", len(families), flush=True)
    with open(TABLE, "w", newline="", encoding="utf-8") as file:
        rows = ([family, *(row[family] for row in table.values())] for family in families)
        csv.writer(file, lineterminator="\n").writerows([["family", *table], *rows])
    print(table_text(table))
    print("\n`python -m benchmarks.claims` puts the table into benchmarks/README.md.")


if __name__ == "__main__":
    main()
