"""What a figure was measured on: the name of the processor, threads, versions, date."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch


def machine_name(device: str | torch.device = "cpu") -> str:
    """The name of the GPU for a CUDA device, else that of the CPU with its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def describe_environment(device: str | torch.device = "cpu", packages: tuple[str, ...] = ("sdlearn", "torch")) -> dict:
    """Machine, threads, date and versions, as they are written into files of measurements."""
    return {"machine": machine_name(device), "threads": torch.get_num_threads(), "date": date.today().isoformat(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages}}
