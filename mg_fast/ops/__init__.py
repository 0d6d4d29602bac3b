"""The functional API: every operation checks its inputs, chooses a backend and calls it.

The kernels are operators of torch. This package imports every file of its folder and takes over the names in the file's
`__all__`. A new operation is therefore a new file, and its function is called `mg_fast.ops.<operation>`.
"""

import importlib
import pkgutil

__all__ = []

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    for _name in getattr(_module, "__all__", ()):
        # A function replaces the module of the same name.
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
