"""What ships with the package, by name: `mg_fast.load("nano", painter="nano")`."""

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
    return _resolved(name_or_path, "config.json", {name: _PACKAGE / name for name in names()}, "checkpoint")


def resolve_painter(name_or_path: str | os.PathLike) -> str | os.PathLike:
    """The same for painters: the folder of a text-to-image pipeline of diffusers in the package.

    Raises:
        CheckpointError: the name is a bare word and neither a folder nor a painter of the package.
    """
    painters = {index.parent.parent.name: index.parent for index in _PACKAGE.glob("*/painter/model_index.json")}
    return _resolved(name_or_path, "model_index.json", painters, "painter")


def _resolved(name_or_path: str | os.PathLike, marker: str, known: dict[str, Path], what: str) -> str | os.PathLike:
    """The folder of a known name; a local folder that holds the marker's file takes precedence."""
    name = os.fspath(name_or_path)
    if not _NAME.fullmatch(name) or os.path.isfile(Path(name) / marker):
        return name_or_path
    if name in known:
        return known[name]
    if os.path.isdir(name):
        return name_or_path
    raise CheckpointError(
        f"{quoted(name)} is neither a folder here nor a {what} of the package ({', '.join(sorted(known))}): "
        "a hub id has the form owner/name"
    )
