"""Clock rates, power and temperature of a GPU while it works: without them a slow clock looks like a slow kernel."""

import contextlib
import statistics
import subprocess
import threading
import time

QUERIES = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
EVERY_MS = 100
COMMAND = ("nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader,nounits")
COMMAND += (f"--loop-ms={EVERY_MS}",)


class ClockLog:
    """Reads the first GPU's clocks ten times a second, in a process of its own, while the block runs.

    Where there is no GPU, or no nvidia-smi, nothing is read, and `since` returns None. `command` prints a line of
    comma-separated numbers for every reading.
    """

    def __init__(self, device: str, command: tuple[str, ...] = COMMAND):
        self._command = command if device == "cuda" else None
        self._readings: list[tuple[float, tuple[float, ...]]] = []
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "ClockLog":
        if self._command is not None:
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                threading.Thread(target=self._follow, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _follow(self, lines) -> None:
        for line in lines:
            # A card that does not tell a number prints "[N/A]".
            with contextlib.suppress(ValueError):
                numbers = tuple(float(word) for word in line.split(","))
                if len(numbers) == len(QUERIES):
                    self._readings.append((time.monotonic(), numbers))

    def since(self, began: float) -> dict | None:
        """What was read since a time of `time.monotonic`.

        Returns:
            `sm_mhz`: lowest, median and highest clock of the multiprocessors; `memory_mhz`: the median; `power_w` and
            `temperature_c`: the highest; `readings`: how many there were. None where there were none.
        """
        found = [numbers for at, numbers in list(self._readings) if at >= began]
        if not found:
            return None
        sm, memory, power, temperature = zip(*found)
        return {
            "sm_mhz": [min(sm), statistics.median(sm), max(sm)],
            "memory_mhz": statistics.median(memory),
            "power_w": max(power),
            "temperature_c": max(temperature),
            "readings": len(found),
        }
