"""What a figure was measured on, and where it is kept."""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def environment() -> dict:
    """The machine and the stack: gpu, driver, cpu, threads, memory, versions, commit."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if torch.cuda.is_available() else None,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": transformers.__version__,
        "commit": _command("git", "describe", "--always", "--dirty", "--abbrev=12"),
    }


def write(name: str, document: dict) -> Path:
    """Keeps a document under bench/results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def finish(document: dict, table: str, args: argparse.Namespace) -> None:
    """Prints a table to stderr and the document as the last line of stdout; keeps it by the device's name where `args.save` asks for it."""
    print(table, file=sys.stderr)
    if args.save:
        device = document["gpu"].lower().replace(" ", "-") if args.device == "cuda" else "cpu"
        write(f"{document['name']}-{device}", document)
    print(json.dumps(document))


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = text.splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return " ".join([model, *(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags)])


def _memory_gib() -> float | None:
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    except (OSError, StopIteration):
        return None
    return round(int(line.split()[1]) / 2**20, 1)


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
