"""Notebook kernels that are forked from one process which has imported the libraries, so that a run imports them once.
It computes nothing, loads no model and starts no thread: a kernel begins with the modules and nothing else."""

import atexit
import multiprocessing.forkserver
import os
import sys
import threading

from ipykernel.kernelapp import IPKernelApp
from jupyter_client.provisioning import LocalProvisioner

# What takes seconds to import: with the first two most of what `lib` uses, the bundled model's code, and a kernel's.
PRELOADED = ["lib.report.session", "lib.evaluation.transfer", "transformers.models.llama.modeling_llama", __name__]


def preload() -> None:
    """Start the process that imports, and let Jupyter fork its kernels from it. Only on Linux and without a GPU:
    elsewhere not every library survives a fork, and beside a GPU imports cost little."""
    if sys.platform == "linux" and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))):
        multiprocessing.forkserver.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
        LocalProvisioner.launch_kernel = fork_kernel


async def fork_kernel(provisioner: LocalProvisioner, cmd: list[str], **options) -> dict:
    """Stands in for a method that starts a Python. Jupyter then uses the process as it would a `subprocess.Popen`."""
    arguments = cmd[cmd.index("ipykernel_launcher") + 1 :], options.get("cwd") or os.getcwd()
    process = multiprocessing.get_context("forkserver").Process(target=_be_kernel, args=arguments)
    process.start()
    process.poll, process.wait = lambda: process.exitcode, lambda: process.join() or process.exitcode
    process.send_signal = lambda number: os.kill(process.pid, number)
    process.stdin = process.stdout = process.stderr = None
    provisioner.process, provisioner.pid = process, process.pid
    return provisioner.connection_info


def _be_kernel(arguments: list[str], folder: str) -> None:
    """What a forked process does: it is a kernel in this folder until it is shut down or its runner is gone."""
    os.setsid()  # an interrupt from the keyboard goes to the runner alone
    os.chdir(folder)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    # matplotlib is imported already, so that it has to be told that figures are shown in the notebook.
    arguments += [f"--IPKernelApp.parent_handle={os.getppid()}", "--matplotlib=inline"]
    IPKernelApp.launch_instance(arguments)
    atexit._run_exitfuncs()  # multiprocessing would leave them out
