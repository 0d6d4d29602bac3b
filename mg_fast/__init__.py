"""mg_fast: high-resolution vision-language inference at the speed of the hardware."""

import importlib

from . import auto

__version__ = "0.1.0"

# name -> module; imported on first use, so that `import mg_fast` itself needs neither torch nor triton
_PUBLIC = {
    "MiniGeminiForConditionalGeneration": ".mini_gemini.modeling",
    "MiniGeminiProcessor": ".mini_gemini.processing",
    "MiniGeminiConfig": ".mini_gemini.configuration",
    "Pipeline": ".pipeline",
    "load": ".pipeline",
    "Explanation": ".explain",
    "use_backend": ".backend",
    "accelerate": ".swap",
    "MgFastError": ".errors",
    "CheckpointError": ".errors",
    "PictureError": ".errors",
    "PromptError": ".errors",
    "BackendError": ".errors",
}
_MODULES = ("backend", "conversation", "kernels", "mini_gemini", "modules", "ops", "pipeline", "reference", "swap")

__all__ = ["__version__", *_PUBLIC, *_MODULES]

auto.register_when_imported()


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(set(globals()) | set(__all__))
