"""Runs the vision-language models Mini-Gemini and MM-Interleaved in less time and memory."""

import importlib

from .integrations import transformers_auto

__version__ = "0.1.0"

# Public names and their modules, imported on first use, so that `import mg_fast` itself needs neither torch nor triton.
_PUBLIC = {
    "MiniGeminiForConditionalGeneration": "mg_fast.models.mini_gemini.modeling",
    "MiniGeminiProcessor": "mg_fast.models.mini_gemini.processing",
    "MiniGeminiConfig": "mg_fast.models.mini_gemini.configuration",
    "MMInterleavedForConditionalGeneration": "mg_fast.models.mm_interleaved.modeling",
    "MMInterleavedProcessor": "mg_fast.models.mm_interleaved.processing",
    "MMInterleavedConfig": "mg_fast.models.mm_interleaved.configuration",
    "Pipeline": "mg_fast.pipeline",
    "InterleavedPipeline": "mg_fast.pipeline.mm_interleaved",
    "load": "mg_fast.pipeline",
    "Explanation": "mg_fast.engine.explain",
    "use_backend": "mg_fast.ops.backend",
    "accelerate": "mg_fast.integrations.accelerate",
    "MgFastError": "mg_fast.errors",
    "CheckpointError": "mg_fast.errors",
    "PictureError": "mg_fast.errors",
    "PromptError": "mg_fast.errors",
    "BackendError": "mg_fast.errors",
    "DrawingError": "mg_fast.errors",
}
# Modules that are attributes of the package, and their places.
_MODULES = {
    "drawing": "mg_fast.drawing",
    "errors": "mg_fast.errors",
    "hints": "mg_fast.hints",
    "kernels": "mg_fast.kernels",
    "modules": "mg_fast.modules",
    "ops": "mg_fast.ops",
    "pipeline": "mg_fast.pipeline",
    "templates": "mg_fast.templates",
}

__all__ = ["__version__", *_PUBLIC, *_MODULES]

transformers_auto.register_when_imported()


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(set(globals()) | set(__all__))
