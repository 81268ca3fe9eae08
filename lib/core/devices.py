"""What the hardware is called, and which dtype it multiplies fast."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The fastest dtype whose range equals float32's where the hardware multiplies it natively, and why."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"CUDA capability {major}.{minor} multiplies bfloat16 natively"
        return torch.float16, f"CUDA capability {major}.{minor} has float16 but no bfloat16 units"
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
            if found.get(flag):
                return torch.bfloat16, f"this CPU multiplies bfloat16 natively ({label})"
        return torch.float32, "this CPU has no native bfloat16 multiplication"
    return torch.float32, f"float32 is the safe choice on {device.type}"


def device_name(device: torch.device) -> str:
    """A readable name of the hardware behind a torch device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
        return model or platform.machine()
    return str(device)
