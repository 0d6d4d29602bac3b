"""Clocks are read while a block runs. The test has a stand-in for nvidia-smi."""

import time

from bench.clocks import ClockLog


def log(script: str, device: str = "cuda") -> ClockLog:
    return ClockLog(device, ("sh", "-c", script))


def readings(clocks: ClockLog, began: float, count: int) -> dict | None:
    """What was read, as soon as there are this many readings."""
    end = time.monotonic() + 30
    while time.monotonic() < end and (clocks.since(began) or {"readings": 0})["readings"] < count:
        time.sleep(0.01)
    return clocks.since(began)


def test_what_was_read():
    began = time.monotonic()
    lines = ("1980, 3201, 120.5, 40", "[N/A], 3201, 1, 1", "1755, 3201, 690.0, 61", "345, 3201, 99, 41")
    with log("".join(f"echo '{line}'; " for line in lines) + "exec sleep 60") as clocks:
        assert readings(clocks, began, 3) == {
            "sm_mhz": [345.0, 1755.0, 1980.0],
            "memory_mhz": 3201.0,
            "power_w": 690.0,
            "temperature_c": 61.0,
            "readings": 3,
        }
        assert clocks.since(time.monotonic()) is None
    assert clocks._process.poll() is not None, "the process that reads them ends with the block"


def test_nothing_to_read():
    with log("echo '1, 2, 3, 4'; exec sleep 60", device="cpu") as clocks:
        assert clocks.since(0.0) is None
    with ClockLog("cuda", ("/nowhere/nvidia-smi",)) as clocks:
        assert clocks.since(0.0) is None
