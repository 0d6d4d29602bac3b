"""The functional API: every operation checks its inputs, chooses a backend and calls it; kernels are operators of
torch.

Every file of this folder is imported, and the names in its `__all__` are names of this package: a new operation is a
new file, and its function is called `mg_fast.ops.<operation>`.
"""

import importlib
import pkgutil

__all__ = []

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    for _name in getattr(_module, "__all__", ()):
        # A function takes the place of the module of the same name.
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
