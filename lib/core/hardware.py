"""What follows from the hardware: its name, the dtype it multiplies fast, and how many tokens it takes at once."""

import os
import platform
import re
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens in one batch: enough to keep the matrix units busy, few enough for the caches (CPU) and memory (GPU).
BATCH_TOKENS = {"cpu": 512, "cuda": 32768}


def choose(dtype: str, device: str) -> tuple[torch.dtype, torch.device, str]:
    """Dtype and device by names in torch or "auto" (CUDA, of several processes each its own, else the CPU; its dtype
    by `choose_dtype`), and why this dtype. `ValueError` for an unknown dtype and a device that torch does not see."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"Unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)}.")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(own if device == "auto" else device)
    except RuntimeError:
        raise ValueError(f"Unknown device {device!r}; give auto, cpu, cuda, cuda:1 or another name in torch.") from None
    if target.type == "cuda" and not (target.index or 0) < torch.cuda.device_count():
        raise ValueError(f"Device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices.")
    chosen, reason = choose_dtype(target) if dtype == "auto" else (DTYPES[dtype], "asked for")
    return chosen, target, reason


def choose_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The fastest dtype whose range equals float32's where the hardware multiplies it natively, and why."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"CUDA capability {major}.{minor} multiplies bfloat16 natively"
        return torch.float16, f"CUDA capability {major}.{minor} has float16 but no bfloat16 units"
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if found.get(flag):
            return torch.bfloat16, f"this CPU multiplies bfloat16 natively ({label})"
    return torch.float32, f"this {device.type} is not known to multiply a smaller dtype natively"


def device_name(device: torch.device) -> str:
    """A readable name of the hardware behind a torch device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    file = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(\S.*?)\s*$", file.read_text() if file.exists() else "", re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def token_batches(lengths: list[int], device: torch.device, batch_size: int | None = None) -> list[list[int]]:
    """Cut row indices into batches of similar length: rows x longest row <= the device's `BATCH_TOKENS` (or a single
    row), and rows <= `batch_size`. The longest come first, so that memory runs out at once or not at all."""
    batches, longest, budget = [], 0, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * longest > budget or len(batches[-1]) == batch_size:
            batches.append([])
            longest = max(lengths[i], 1)
        batches[-1].append(i)
    return batches
