"""Describes the machine and the software that a figure was measured on."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import torch


def environment() -> dict:
    """Returns the machine and the stack: gpu, driver, clocks, cpu, threads, memory, load, versions, commit.

    The commit comes from git, or from MG_FAST_COMMIT where the code was copied without its history.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    clocks = "clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu,
        "driver": gpu and _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": gpu and _command("nvidia-smi", f"--query-gpu={clocks}", "--format=csv,noheader"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        # The average number of running processes in the last minute shows what else kept the machine busy.
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        # torch's own string class is refused where a checkpoint of tensors and plain values is read, so a plain one is
        # made.
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "diffusers": _version("diffusers"),
        "commit": _command("git", "describe", "--always", "--dirty", "--abbrev=12") or os.environ.get("MG_FAST_COMMIT"),
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = text.splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return " ".join([model, *(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags)])


def _memory_gib() -> float | None:
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    except (OSError, StopIteration):
        return None
    return round(int(line.split()[1]) / 2**20, 1)


def _version(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
