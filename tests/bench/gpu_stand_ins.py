"""A stand-in for the benchmark's own program in tests of `bench gpu`: the real code around toy cases that can fail.

    python -m tests.bench.gpu_stand_ins step NAME --plan full ...     # as `python -m bench step`
    python -m tests.bench.gpu_stand_ins text NAME                     # a step whose output is text

STAND_INS names a JSON file: `cases`, from a case's name to its providers; `faults`, from a step's name to a list of
faults, each a kind and, for a step of cases, the case and the provider that has it.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from bench.registry import Case


def settings() -> dict:
    return json.loads(Path(os.environ["STAND_INS"]).read_text())


def fail(kind: str) -> None:
    if kind == "hang":
        # This sleeps in C and holds the interpreter's lock, like a compiler or a driver that never comes back.
        # No signal interrupts it.
        ctypes.PyDLL(None).sleep(600)
    elif kind == "crash":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    else:
        # It is slow until it is interrupted.
        time.sleep(600)


def stand_ins(cases: dict[str, list[str]], faults: list[list[str]]) -> "dict[str, Case]":
    """Cases of these names and providers that multiply two small matrices."""
    # These are imported here, since a step of text needs none of it.
    import torch

    from bench.registry import Case

    def case(name: str, providers: list[str]) -> "Case":
        def build(provider: str):
            def make(x: "torch.Tensor"):
                def call():
                    for kind, *where in faults:
                        if where == [name, provider]:
                            fail(kind)
                    return x @ x, [1.0]

                return call

            return make

        return Case(
            name,
            lambda device: torch.ones(4, 4),
            {p: build(p) for p in providers},
            lambda x: (x @ x).double(),
            clocked=True,
        )

    return {name: case(name, providers) for name, providers in cases.items()}


def main(words: list[str]) -> int:
    found = settings()
    faults = found["faults"].get(words[1], [])
    if words[0] == "text":
        print(f"the beginning of {words[1]}, passed before: {os.environ['MG_FAST_PASSED_BEFORE']}", flush=True)
        for [kind] in faults:
            fail(kind)
        print(f"the end of {words[1]}")
        return 0
    from bench import __main__ as program
    from bench.gpu import command

    command.all_cases = lambda: stand_ins(found["cases"], faults)
    return program.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
