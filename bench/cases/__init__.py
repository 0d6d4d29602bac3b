"""The list of all cases: those that users run first come first, stress shapes come last.

Every file of this folder that has `cases()` is found automatically, so a new operation only adds a file.
"""

import importlib
import pkgutil
from types import ModuleType

from mg_fast import ops

from ..registry import Case

FIRST = ("patch_mining", "towers", "dual_resize", "picture")
LAST = ("end_to_end", "interleaved", "stress")


def all_cases() -> dict[str, Case]:
    """Every case by name, in the order in which cases are run."""
    modules = [_module(name) for name in _names()]
    cases = [case for module in modules if hasattr(module, "cases") for case in module.cases()]
    assert len({case.name for case in cases}) == len(cases)
    return {case.name: case for case in cases}


def operation_modules() -> dict[str, ModuleType]:
    """The modules of this folder that are named after a file of mg_fast/ops, by that name (see `operations`).

    No other module is imported, because those about whole models take seconds to import.
    """
    files = {module.name for module in pkgutil.iter_modules(ops.__path__)}
    return {name: _module(name) for name in _names() if name in files}


def _names() -> list[str]:
    between = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in (*FIRST, *LAST))
    return [*FIRST, *between, *LAST]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
