"""Python processes that begin with their libraries already imported.

Many tests need a process of their own, and importing torch and transformers takes most of the time of such a process.
So one parent imports them once, and every process that is asked for is a fork of it. It has its own arguments,
environment, folder, standard streams and exit status, as any other process has. A test whose subject is the start of
the interpreter (its environment variables, or what is imported first) starts a real one instead, by `subprocess`.

The parent is this file, run as a program: python -m tests.forked_python MODULE...
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from tests.paths import ROOT

# The libraries below mg_fast, without transformers: for tests of the order of imports.
LIBRARIES = ("torch", "torchvision", "timm", "tokenizers", "huggingface_hub", "accelerate", "PIL.Image")
# What a command of mg_fast imports before it has a model.
PACKAGE = (
    *LIBRARIES,
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "transformers.generation",
    "mg_fast.pipeline",
    "mg_fast.cli",
    "mg_fast.models.mini_gemini.modeling",
    "mg_fast.models.mini_gemini.processing",
)


def python(
    *arguments: object,
    imported: tuple[str, ...] = PACKAGE,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` in a process that has imported these modules already, and whose input is empty.

    Args:
        arguments: `-c CODE ...` or `-m MODULE ...`, as on a command line.
        imported: modules that the process finds imported.
        cwd: its folder.
        env: its whole environment. Default: this process' own.

    Returns:
        Its exit status (the negative number of a signal that ended it), stdout and stderr as text.
    """
    with tempfile.TemporaryDirectory(prefix="mg_fast_forked_") as folder:
        streams = [os.devnull, *(str(Path(folder) / name) for name in ("stdout", "stderr"))]
        words = [str(argument) for argument in arguments]
        request = {"words": words, "cwd": str(cwd), "env": dict(os.environ if env is None else env), "streams": streams}
        parent = _parent(imported)
        parent.stdin.write(json.dumps(request) + "\n")
        parent.stdin.flush()
        answer = parent.stdout.readline()
        if not answer:
            raise RuntimeError(f"the parent of forked processes ended with exit status {parent.wait()}")
        out, err = (Path(path).read_text(encoding="utf-8", errors="replace") for path in streams[1:])
    return subprocess.CompletedProcess(words, json.loads(answer), out, err)


@functools.cache
def _parent(imported: tuple[str, ...]) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.forked_python", *imported]
    # NumPy's OpenBLAS would start its threads when it is imported.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    parent = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    atexit.register(parent.kill)
    return parent


def _serve(imported: list[str]) -> dict | None:
    """Forks a process for each line of standard input. Returns the request in a fork, and None at the end of input."""
    for name in imported:
        importlib.import_module(name)
    # A fork has only the thread that called it, so a library that has started threads would wait for them for ever.
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.is_dir() else 1
    if threads != 1:
        raise RuntimeError(f"importing {', '.join(imported)} has started {threads - 1} threads: a fork would lack them")
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return json.loads(line)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(request: dict) -> None:
    """Makes this fork the process that was asked for, and runs its program."""
    for number, (path, flags) in enumerate(zip(request["streams"], (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2))):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    # The parent has read from its own standard input, so this one needs a buffer of its own.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout.reconfigure(encoding="utf-8")
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, target, *rest = request["words"]
    sys.argv = [kind if kind == "-c" else target, *rest]
    sys.path[0] = "" if kind == "-c" else request["cwd"]
    if kind == "-m":
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        exec(compile(target, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def _run(request: dict) -> int:
    """Runs the program that was asked for in this fork; returns its exit status."""
    try:
        _become(request)
        status = 0
    except SystemExit as exit:
        status = exit.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        # Python itself would show the frames of this file, too.
        traceback.print_exc()
        status = 1
    return status or 0


if __name__ == "__main__":
    if (asked := _serve(sys.argv[1:])) is not None:
        code = _run(asked)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        # Taking all imported modules apart, as Python does at its end, would take a second.
        os._exit(code)
