"""Draws pictures from text with diffusers' pipelines, which are imported when the first picture is drawn.

`load_painter` takes a folder or hub id of any text-to-image pipeline; `find_prompts` finds the prompts in an answer.
"""

import importlib

_PUBLIC = {
    "Painter": "mg_fast.drawing.painter",
    "load_painter": "mg_fast.drawing.painter",
    "NEGATIVE_PROMPT": "mg_fast.drawing.calls",
    "find_prompts": "mg_fast.drawing.prompts",
}

__all__ = list(_PUBLIC)


def __dir__():
    return sorted(set(globals()) | set(__all__))


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
