"""Measures time and peak memory of the stages of one answer."""

import contextlib
import ctypes
import time
from pathlib import Path
from typing import NamedTuple

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class StageTime(NamedTuple):
    """The measurement of one stage.

    Attributes:
        name: of the stage.
        seconds: wall-clock time.
        peak_mib: MiB that the peak rose above what was held at the start; None where it cannot be measured.
    """

    name: str
    seconds: float
    peak_mib: float | None


class Meter:
    """Measures stages one after another.

    Measuring itself takes a little time: freed memory is returned before every stage and has to be allocated again. On
    CUDA the device is synchronised at both ends and the allocator's peak is read; on Linux CPUs it is the process's
    peak resident memory.
    """

    def __init__(self, device: torch.device | str):
        self.cuda = torch.device(device).type == "cuda"
        self.stages: list[StageTime] = []
        self._open: tuple[str, float, float | None] | None = None

    def start(self, name: str) -> None:
        """Ends the running stage, if there is one, and begins another."""
        self.stop()
        held = self._reset_peak()
        self._open = (name, time.perf_counter(), held)

    def stop(self) -> None:
        if self._open is None:
            return
        if self.cuda:
            torch.cuda.synchronize()
        name, began, held = self._open
        seconds, peak = time.perf_counter() - began, self._peak()
        above = None if held is None or peak is None else max(0.0, peak - held)
        self.stages.append(StageTime(name, seconds, above))
        self._open = None

    @contextlib.contextmanager
    def stage(self, name: str):
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def _reset_peak(self) -> float | None:
        """Resets the peak and returns the MiB held now."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / 2**20
        _release_freed()
        try:
            # "5" resets the peak resident size (proc(5)); the kernel forbids that in some containers.
            _CLEAR_REFS.write_text("5")
        except OSError:
            return None
        return _status_mib("VmRSS")

    def _peak(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else _status_mib("VmHWM")


def _release_freed() -> None:
    """Returns freed heap to the system, where glibc can; a stage that reuses it would otherwise seem to take none."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status_mib(field: str) -> float | None:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) / 1024


def format_stages(stages: list[StageTime]) -> str:
    """The stages as a plain-text table."""
    rows = [("stage", "time", "peak memory above start")]
    for name, seconds, peak in stages:
        shown = f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"
        rows.append((name, shown, "not measured here" if peak is None else f"{peak:.1f} MiB"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
