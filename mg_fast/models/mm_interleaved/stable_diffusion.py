"""Imports diffusers where it is needed. It is an optional package, and its import takes more than a second."""

from types import ModuleType

from ...errors import BackendError


def import_diffusers() -> ModuleType:
    """The package diffusers.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise BackendError(
            "MM-Interleaved draws pictures with diffusers, which is not installed or cannot be imported: "
            "pip install 'mg_fast[draw]'"
        ) from error
    return diffusers
