"""The release of Triton that compiles the kernels."""

import importlib.metadata


def _triton() -> tuple[int, int]:
    """The installed release of Triton, (3, 8) for 3.8; (0, 0) where there is none."""
    try:
        major, minor, *_ = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


# Some tiles depend on it, because other releases of the compiler take other numbers of registers.
TRITON = _triton()
