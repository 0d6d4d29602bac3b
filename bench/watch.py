"""What a measuring process is doing, so that it can be told from outside after the process crashed or hung."""

import faulthandler
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Doing:
    """What a process was doing, for one provider of a case, or for all of them while the case's inputs are made.

    Attributes:
        what: in words, for the row that will say why there is no figure.
        limit_s: seconds after which the process ends itself; None: never.
    """

    case: str
    providers: tuple[str, ...]
    what: str
    limit_s: float | None


class Watchdog:
    """Keeps in a file what this process is doing, and ends the process where one thing takes too long.

    A call that never comes back from the GPU cannot be interrupted from within Python. The limit is therefore kept by
    `faulthandler`, in a thread that needs no lock of the interpreter: it prints where every thread stands, and ends the
    process. The program that started the process reads the file and goes on with everything else.

    Args:
        path: the file; it is there only while something is being done. None: nothing is kept.
        limit_s: the most seconds for one thing. None: no limit.
        compiling_limit_s: the same for providers that a compiler has to work for first.
    """

    def __init__(self, path: Path | None = None, limit_s: float | None = None, compiling_limit_s: float | None = None):
        self.path, self.limit_s, self.compiling_limit_s = path, limit_s, compiling_limit_s

    def begin(self, case: str, providers: Sequence[str], what: str) -> None:
        """Records what the process begins to do now, and starts its time limit."""
        if self.path is None:
            return
        limit = self.compiling_limit_s if any(map(compiles, providers)) else self.limit_s
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(asdict(Doing(case, tuple(providers), what, limit))), encoding="utf-8")
        os.replace(part, self.path)
        if limit is not None:
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)

    def end(self) -> None:
        """Records that the process is doing nothing that could hang."""
        if self.path is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self.path.unlink(missing_ok=True)


def compiles(provider: str) -> bool:
    """Whether a compiler works for seconds or minutes before a provider's first call is done."""
    return any(word in provider for word in ("compiled", "max-autotune", "static cache"))


def read(path: Path) -> Doing | None:
    """What a process was doing when it ended; None where it had nothing left to do."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Doing(**found | {"providers": tuple(found["providers"])})
