"""Bridge: makes the top-level `kernels/` folder importable as `mg_fast.kernels`.

A module with `__path__` is a package. In an installed wheel the folder lies beside this file as `mg_fast/kernels/`; in
a checkout it is the sibling of `mg_fast/`. The folder is never importable as `kernels`, the name of a PyPI package that
transformers probes for, and so it must not hold an `__init__.py`.
"""

import pathlib

_here = pathlib.Path(__file__).parent
_installed = _here / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _here.parent / "kernels")]
