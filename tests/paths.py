"""The places of the test data."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Small cases of this project's own, recorded by make_golden.py.
OWN_GOLDEN = Path(__file__).parent / "golden"


def original_golden() -> Path | None:
    """The folder with the original's outputs, if this machine has one."""
    named = os.environ.get("MG_FAST_GOLDEN")
    folder = Path(named) if named else ROOT.parent / "shared" / "golden"
    return folder if folder.is_dir() else None
