"""Tells from a folder's small files which family of models its checkpoint belongs to."""

import json
import os
from pathlib import Path

MINI_GEMINI, MM_INTERLEAVED = "Mini-Gemini", "MM-Interleaved"
# The classes that load the checkpoints of each family.
CLASSES = {
    MINI_GEMINI: "mg_fast.MiniGeminiForConditionalGeneration",
    MM_INTERLEAVED: "mg_fast.MMInterleavedForConditionalGeneration",
}
# The original's configuration file, and the type that this project writes into config.json.
YAML_FILE, INTERLEAVED_TYPE = "config.yaml", "mm_interleaved"


def checkpoint_family(folder: str | os.PathLike) -> str | None:
    """The family of a local folder: `MINI_GEMINI`, `MM_INTERLEAVED`, or None where neither can be seen.

    A config.json decides, if it names a family. Otherwise a config.yaml means MM-Interleaved.
    """
    written = _config(folder)
    if model_type(folder) == INTERLEAVED_TYPE:
        return MM_INTERLEAVED
    if "mm_vision_tower_aux" in written or "image_size_aux" in written:
        return MINI_GEMINI
    return MM_INTERLEAVED if os.path.isfile(Path(folder) / YAML_FILE) else None


def model_type(folder: str | os.PathLike) -> str | None:
    """The model type in a local folder's config.json; None where there is none."""
    return _config(folder).get("model_type")


def is_published_interleaved(folder: str | os.PathLike) -> bool:
    """Whether a local folder holds MM-Interleaved in the layout of the original, which has a config.yaml.

    Where `save_pretrained` of this project has written a config.json as well, that file counts.
    """
    published = checkpoint_family(folder) == MM_INTERLEAVED
    return published and model_type(folder) != INTERLEAVED_TYPE


def told_family(folder: Path, expected: str) -> str:
    """The end of a message about a folder that lacks what `expected` needs: which family it belongs to instead.

    The text is empty where the folder shows no other family.
    """
    found = checkpoint_family(folder)
    if found is None or found == expected:
        return ""
    return f"; this is a checkpoint of {found}, which {CLASSES[found]} loads"


def _config(folder: str | os.PathLike) -> dict:
    """The content of a folder's config.json; empty where there is none that can be read."""
    try:
        written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}
