"""Teaches transformers' Auto classes about Mini-Gemini without importing transformers.

Registering needs transformers' auto modules, which take seconds and torch to import. So an import hook waits for them: the
moment one is imported, by anybody, the module of ours that registers itself there is imported too.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

# transformers' module -> ours, which registers itself when it is imported
_REGISTRANTS = {
    "transformers.models.auto.configuration_auto": "mg_fast.models.mini_gemini.configuration",
    "transformers.models.auto.modeling_auto": "mg_fast.models.mini_gemini.modeling",
    "transformers.models.auto.processing_auto": "mg_fast.models.mini_gemini.processing",
}


class _Loader(importlib.abc.Loader):
    """The real loader, with our registration after it."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        _register(module.__name__)

    def __getattr__(self, name):
        return getattr(self.loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _REGISTRANTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register(auto_module: str) -> None:
    ours = _REGISTRANTS[auto_module]
    # already there, or being imported and the one that pulled the auto module in: it registers itself at its end
    if ours not in sys.modules:
        importlib.import_module(ours)


def register_when_imported() -> None:
    """Registers now with what is imported already, and with the rest when it is. Safe to call again."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _REGISTRANTS:
        if name in sys.modules:
            _register(name)
