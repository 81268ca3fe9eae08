"""A copy of the project in which the runner can be started, killed and started again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lib.core.store import ROOT


class Copy:
    """A copy of the project in `folder`, without its results and caches; `models` has those models that are read."""

    def __init__(self, folder: Path, models: Path | None = None):
        self.folder = folder
        for name in ("lib", "notebooks", "configs", "data/sample", "data/paper"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "data" / "official_code.csv", folder / "data")
        if models:
            (folder / "data" / "cache").mkdir()
            (folder / "data" / "cache" / "models").symlink_to(models)

    def start(self, *arguments: str) -> subprocess.Popen:
        """`run_all.sh smoke` with these arguments, on the sample data; on one thread if other tests run beside it."""
        left_out = ("TP_DATA_DIR", "PYTEST_XDIST_WORKER")
        environment = {k: v for k, v in os.environ.items() if k not in left_out} | {"HF_HUB_OFFLINE": "1"}
        if "PYTEST_XDIST_WORKER" in os.environ:
            environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "lib.run", "smoke", *arguments]
        with open(self.folder / "run.log", "ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def log(self) -> str:
        return (self.folder / "run.log").read_text(errors="replace")

    def tables(self, ends=("csv", "md")) -> dict[str, bytes]:
        files = (p for end in ends for p in (self.folder / "figures" / "smoke").glob(f"*.{end}"))
        return {p.name: p.read_bytes() for p in sorted(files)}
