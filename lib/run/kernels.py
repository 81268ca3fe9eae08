"""Notebook kernels that are forked from one process which has imported the libraries, so that a run imports them once.

That process computes nothing, loads no model and starts no thread: a kernel begins with the modules and nothing else.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
from importlib.metadata import EntryPoint
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

# What takes seconds to import: with the first two most of what `lib` uses, and the bundled model's code.
PRELOADED = ["lib.report.session", "lib.evaluation.transfer", "transformers.models.llama.modeling_llama"]
PRELOADED += ["ipykernel.kernelapp"]
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else None)


def preload() -> None:
    """Start the process that imports, and let Jupyter fork its kernels from it.

    Only on Linux and without a GPU: elsewhere not every library survives a fork, and beside a GPU imports cost little.
    """
    if sys.platform == "linux" and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))):
        CONTEXT.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
        factory = KernelProvisionerFactory.instance()
        factory.provisioners["forked"] = EntryPoint("forked", f"{__name__}:ForkedKernel", factory.GROUP_NAME)
        factory.default_provisioner_name = "forked"


class ForkedKernel(LocalProvisioner):
    """Forks a kernel where Jupyter would start a Python."""

    async def launch_kernel(self, cmd: list[str], **options) -> dict:
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        process = CONTEXT.Process(target=_be_kernel, args=(arguments, options.get("cwd") or Path.cwd()))
        process.start()
        self.pid = process.pid
        self.process = SimpleNamespace(  # what Jupyter uses of a subprocess.Popen
            poll=lambda: process.exitcode, wait=lambda: process.join() or process.exitcode, kill=process.kill,
            send_signal=lambda number: os.kill(process.pid, number), terminate=process.terminate,
            stdin=None, stdout=None, stderr=None,
        )
        return self.connection_info


def _be_kernel(arguments: list[str], folder: Path) -> None:
    """What a forked process does: it is a kernel in this folder until it is shut down or its runner is gone."""
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()  # an interrupt from the keyboard goes to the runner alone
    os.chdir(folder)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    # matplotlib is imported already, so that it has to be told that figures are shown in the notebook.
    arguments += [f"--IPKernelApp.parent_handle={os.getppid()}", "--matplotlib=inline", "--log-level=ERROR"]
    IPKernelApp.launch_instance(arguments)
    atexit._run_exitfuncs()  # multiprocessing would leave them out
