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
    """Dtype and device by names in torch or "auto" (CUDA where there is one, of several processes each its own, else
    the CPU; and its `choose_dtype`), and why this dtype. Raises `ValueError` for an unknown dtype."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"Unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)}.")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    target = torch.device(own if device == "auto" else device)
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
    file = Path("/proc/cpuinfo")
    text = file.read_text() if device.type == "cpu" and file.exists() else ""
    model = re.search(r"^model name\s*:\s*(\S.*?)\s*$", text, re.MULTILINE)
    unnamed = platform.processor() or platform.machine() if device.type == "cpu" else str(device)
    return model[1] if model else unnamed


def token_budget(device: torch.device) -> int:
    """How many tokens a batch may have on this kind of device."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])


def token_batches(lengths: list[int], budget: int, batch_size: int | None = None) -> list[list[int]]:
    """Cut row indices into batches of similar length: rows x longest row <= `budget` (or a single row), and rows <=
    `batch_size`. The longest come first, so that memory runs out at once or not at all."""
    batches, longest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * longest > budget or len(batches[-1]) == batch_size:
            batches.append([])
            longest = max(lengths[i], 1)
        batches[-1].append(i)
    return batches


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised this because an accelerator or the machine had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halves(batch: list[int]) -> list[list[int]]:
    """The two halves of a batch, the later one first; a batch of one stays whole."""
    middle = (len(batch) + 1) // 2
    return [batch[middle:], batch[:middle]] if len(batch) > 1 else [batch]
