"""What a process was doing when it crashed or hung can be told from outside."""

import subprocess
import sys

import pytest

from bench import watch
from bench.gpu.plan import ROOT
from bench.watch import Doing, Watchdog

PROGRAM = """
import ctypes, os, sys
from pathlib import Path
from bench.watch import Watchdog
watch = Watchdog(Path(sys.argv[1]), 0.5, 600)
watch.begin("a/case", ["reference", "torch"], "making its inputs")
if sys.argv[2] == "end":
    watch.end()
    raise SystemExit(1)
watch.begin("a/case", ["torch"], "its first call")
if sys.argv[2] == "crash":
    os._exit(77)
# This sleeps in C and holds the interpreter's lock.
ctypes.PyDLL(None).sleep(60)
"""


@pytest.mark.parametrize(
    ("ending", "status", "doing"),
    [
        ("hang", 1, Doing("a/case", ("torch",), "its first call", 0.5)),
        ("crash", 77, Doing("a/case", ("torch",), "its first call", 0.5)),
        ("end", 1, None),
    ],
)
def test_what_a_process_was_doing(ending, status, doing, tmp_path):
    path = tmp_path / "doing.json"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), ending], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, watch.read(path)) == (status, doing), done.stderr
    # The output tells where it stood.
    assert ("Timeout (0:00:00.500000)!" in done.stderr) == (ending == "hang")


def test_a_provider_that_compiles_has_longer(tmp_path):
    watching = Watchdog(tmp_path / "doing.json", None, None)
    watching.limit_s, watching.compiling_limit_s = 3600.0, 7200.0
    for provider, limit in (
        ("torch", 3600),
        ("reference, channels last, compiled", 7200),
        ("auto, static cache", 7200),
    ):
        watching.begin("a/case", [provider], "its first call")
        assert watch.read(tmp_path / "doing.json").limit_s == limit
    watching.end()
    assert watch.read(tmp_path / "doing.json") is None


def test_without_a_file_nothing_is_kept():
    watching = Watchdog()
    watching.begin("a/case", ["torch"], "its first call")
    watching.end()
