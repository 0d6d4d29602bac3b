"""Teaches transformers' Auto classes about the models of mg_fast without importing transformers.

Registering needs transformers' auto modules, whose import takes seconds and brings in torch. Therefore an import hook
waits for them: when anyone imports one of them, it also imports the module of mg_fast that registers itself there.

That cannot always be done at once. `from transformers import LlamaForCausalLM` imports an auto module while half of
what the module of mg_fast needs is still missing. Then the registry table imports it when it is first looked into.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

# transformers' module, and the modules of mg_fast that register themselves there when they are imported.
_REGISTRANTS = {
    "transformers.models.auto.configuration_auto": (
        "mg_fast.models.mini_gemini.configuration",
        "mg_fast.models.mm_interleaved.configuration",
    ),
    "transformers.models.auto.modeling_auto": (
        "mg_fast.models.mini_gemini.modeling",
        "mg_fast.models.mm_interleaved.modeling",
    ),
    "transformers.models.auto.processing_auto": (
        "mg_fast.models.mini_gemini.processing",
        "mg_fast.models.mm_interleaved.processing",
    ),
    "transformers.models.auto.tokenization_auto": ("mg_fast.models.mm_interleaved.tokenization",),
}
# For those that may have to wait: the table in transformers' module that lists what others have registered.
_TABLES = {
    "transformers.models.auto.modeling_auto": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "transformers.models.auto.processing_auto": "PROCESSOR_MAPPING",
    "transformers.models.auto.tokenization_auto": "TOKENIZER_MAPPING",
}


class _Loader(importlib.abc.Loader):
    """The real loader, followed by the registration of mg_fast."""

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
    waiting = []
    for ours in _REGISTRANTS[auto_module]:
        # The module may be there already, or its own import brought in the auto module. It registers itself at its end.
        if ours in sys.modules:
            continue
        if auto_module in _TABLES and _being_imported(besides=auto_module):
            waiting.append(ours)
        else:
            # The configuration needs nothing that may be half imported at this point.
            importlib.import_module(ours)
    if waiting:
        table = getattr(sys.modules[auto_module], _TABLES[auto_module])
        if not isinstance(table._extra_content, _RegisteredOnUse):
            table._extra_content = _RegisteredOnUse(table._extra_content, waiting)


class _RegisteredOnUse(dict):
    """The table of what was registered with an Auto class. A look into it imports our modules, which add themselves.

    Args:
        registered: the entries so far.
        waiting: the names of the modules of mg_fast.
    """

    def __init__(self, registered: dict, waiting: list[str]):
        super().__init__(registered)
        self._waiting = waiting

    def _look(self) -> None:
        for ours in self._waiting:
            if ours not in sys.modules and not _being_imported():
                importlib.import_module(ours)

    def __contains__(self, key) -> bool:
        self._look()
        return super().__contains__(key)

    def __iter__(self):
        self._look()
        return super().__iter__()

    def __len__(self) -> int:
        self._look()
        return super().__len__()

    def keys(self):
        self._look()
        return super().keys()

    def values(self):
        self._look()
        return super().values()

    def items(self):
        self._look()
        return super().items()


def _being_imported(besides: str | None = None) -> bool:
    """Whether any module of transformers except `besides` is half imported now."""
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "transformers" and name != besides
    )


def register_when_imported() -> None:
    """Registers with the modules that are imported already, and with the others when they are. Safe to call again."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _REGISTRANTS:
        if name in sys.modules:
            _register(name)
