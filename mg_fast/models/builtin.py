"""Checkpoints that ship with the package, by name: `mg_fast.load("nano")`."""

import os
import re
from pathlib import Path

from ..errors import CheckpointError, quoted

_PACKAGE = Path(__file__).parent.parent
# A bare word. Hub ids also have an owner.
_NAME = re.compile(r"[\w-][\w.-]*")


def names() -> list[str]:
    """The names of the checkpoints that ship with the package, sorted."""
    return sorted(config.parent.name for config in _PACKAGE.glob("*/config.json"))


def resolve(name_or_path: str | os.PathLike) -> str | os.PathLike:
    """The package's folder, where the name is that of a checkpoint in the package; other paths and hub ids unchanged.

    A local checkpoint of the same name takes precedence.

    Raises:
        CheckpointError: the name is a bare word and neither a folder nor a checkpoint of the package; hub ids have an
            owner.
    """
    name = os.fspath(name_or_path)
    if not _NAME.fullmatch(name) or os.path.isfile(Path(name) / "config.json"):
        return name_or_path
    if name in names():
        return _PACKAGE / name
    if os.path.isdir(name):
        return name_or_path
    raise CheckpointError(
        f"{quoted(name)} is neither a folder here nor a checkpoint of the package ({', '.join(names())}): "
        "a hub id has the form owner/name"
    )
