"""Runs a command that must not outlive the process that asked for it.

    python -m bench.gpu.supervise PARENT WORD ...

A measuring process that lives on after its parent was killed would take a part of the GPU from the next measurement.
Linux tells this process when its parent ends, however it ends. It then ends the command and everything that the command
has started, all of which are in its process group. It imports nothing but the standard library, so that it costs next
to no time.
"""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys

# An option of prctl(2): the signal that this process gets when its parent ends.
PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> int:
    parent, command = int(words[0]), words[1:]
    signal.signal(signal.SIGTERM, _end_all)
    # An interrupt is for the command, which is in the same group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Other systems have no such signal, so that the command may live on there.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        # The parent ended before it could be watched.
        return 1
    status = subprocess.Popen(command, preexec_fn=_restore_signals).wait()
    if status < 0:
        # The process that waits for this one should see how the command ended.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _restore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _end_all(number: int, frame: object) -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
