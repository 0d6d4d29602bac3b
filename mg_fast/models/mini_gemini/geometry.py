"""Derives the towers' geometry from a checkpoint's tensor shapes, and checks that a configuration's parts fit."""

import json
import math
import os
import re
from pathlib import Path

from transformers import CLIPVisionConfig

from ...errors import CheckpointError
from ..tensor_files import Table, blaming
from .configuration import MiniGeminiConfig

CLIP_PREFIX = "model.vision_tower.vision_tower.vision_model."
CONVNEXT_PREFIX = "model.vision_tower_aux."


def tower_folder(config: MiniGeminiConfig, prefix: str, folder: Path) -> Path | None:
    """The folder of a tower's own files, beside the checkpoint or at the configuration's relative path."""
    relative = config.mm_vision_tower if prefix == CLIP_PREFIX else config.mm_vision_tower_aux
    if not relative:
        return None
    candidates = (folder / relative, folder / Path(relative).name, folder.parent / Path(relative).name, Path(relative))
    # Path.is_dir raises where the name is too long for a file system.
    return next((candidate for candidate in candidates if os.path.isdir(candidate)), None)


def complete_config(config: MiniGeminiConfig, tensors: Table, folder: Path, *, of_base: bool = False) -> None:
    """Fills in the geometry of both towers, in place.

    Shapes come from the tensors, everything else from config.json, the towers' folders or constants.

    Args:
        of_base: the configuration is only that of the base language model. A stage-1 adapter without a configuration
            of its own is taken for a standard model, with 8x8 high-resolution pixels per query.

    Raises:
        CheckpointError: the shapes contradict config.json.
    """
    shapes = {name: info.shape for name, info in tensors.items()}
    if not config.towers_given:
        _complete_clip(config, shapes, tower_folder(config, CLIP_PREFIX, folder))
        _complete_convnext(config, shapes, tower_folder(config, CONVNEXT_PREFIX, folder))
    if of_base:
        config.mm_hidden_size = config.vision_config.hidden_size
        config.mm_hidden_size_aux = sum(config.vision_config_aux["dims"])
        config.image_size_aux = 32 * math.isqrt(config.tokens_per_view)
    clip = (
        "the CLIP tower's width"
        if any(n.startswith(CLIP_PREFIX) for n in shapes)
        else "no CLIP tensor is at hand and the usual width"
    )
    widths = [("mm_hidden_size", config.vision_config.hidden_size, clip)]
    if config.towers_given or any(name.startswith(CONVNEXT_PREFIX) for name in shapes):
        # A processor may be made where no ConvNeXt tensor is at hand, and it does not need the widths.
        widths.append(
            ("mm_hidden_size_aux", sum(config.vision_config_aux["dims"]), "the sum of the ConvNeXt stage widths")
        )
    for key, expected, source in widths:
        if getattr(config, key) != expected:
            raise CheckpointError(f"{folder}: config.json says {key}={getattr(config, key)}, {source} is {expected}")
    check_geometry(config, folder)


def check_geometry(config: MiniGeminiConfig, folder: Path) -> None:
    """Refuses a configuration whose parts do not fit each other."""
    config.check()
    layers = config.vision_config.num_hidden_layers
    if not -layers - 1 <= config.mm_vision_select_layer <= layers:
        raise CheckpointError(
            f"{folder}: mm_vision_select_layer={config.mm_vision_select_layer}, the CLIP tower has {layers} layers"
        )
    queries = config.image_grid * math.isqrt(config.tokens_per_view)
    if config.image_size_aux % (4 * queries):
        raise CheckpointError(
            f"{folder}: image_size_aux={config.image_size_aux} does not give each of {queries}x{queries} queries "
            f"a whole window (a multiple of {4 * queries} is needed)"
        )


def _complete_clip(config: MiniGeminiConfig, shapes: dict[str, tuple[int, ...]], tower: Path | None) -> None:
    known: dict = {}
    least = 0
    if tower is not None and (tower / "config.json").is_file():
        with blaming(tower / "config.json"):
            stored = CLIPVisionConfig.from_pretrained(tower).to_dict()
            written = json.loads((tower / "config.json").read_text(encoding="utf-8"))
        known = {key: stored[key] for key in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
        # Only what the file states counts: a default value would say nothing about this tower.
        least = written.get("vision_config", written).get("num_hidden_layers", 0)
    positions = shapes.get(CLIP_PREFIX + "embeddings.position_embedding.weight")
    patches = shapes.get(CLIP_PREFIX + "embeddings.patch_embedding.weight")
    ffn = shapes.get(CLIP_PREFIX + "encoder.layers.0.mlp.fc1.weight")
    if positions is None or patches is None or ffn is None:
        return
    width = positions[1]
    # The caller chose this before the shapes were known.
    attention = config.vision_config._attn_implementation
    defaults = {"num_attention_heads": max(1, width // 64), "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    config.vision_config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=ffn[0],
        # A tower that lacks its last layers must not be taken for a shallower tower.
        num_hidden_layers=max(
            _count(shapes, CLIP_PREFIX + r"encoder.layers.(\d+)."), least, 24 if (width, ffn[0]) == (1024, 4096) else 0
        ),
        patch_size=patches[-1],
        image_size=math.isqrt(positions[0] - 1) * patches[-1],
        attn_implementation=attention,
        **{**defaults, **known},
    )


def _complete_convnext(config: MiniGeminiConfig, shapes: dict[str, tuple[int, ...]], tower: Path | None) -> None:
    stages = _count(shapes, CONVNEXT_PREFIX + r"vision_stages.(\d+).")
    if stages == 0:
        return
    at = CONVNEXT_PREFIX + "vision_stages."
    dims = [shapes.get(f"{at}{s}.blocks.0.conv_dw.weight", (0,))[0] for s in range(stages)]
    depths = [_count(shapes, rf"{at}{s}.blocks.(\d+).") for s in range(stages)]
    depths = _at_least(depths, _CONVNEXT_DEPTHS.get(tuple(dims)))
    # This is timm's default, which only convnext_xxlarge overrides.
    norm_eps = 1e-5 if dims == [384, 768, 1536, 3072] else 1e-6
    if tower is not None and (tower / "open_clip_config.json").is_file():
        with blaming(tower / "open_clip_config.json"):
            vision = (
                json.loads((tower / "open_clip_config.json").read_text(encoding="utf-8"))
                .get("model_cfg", {})
                .get("vision_cfg", {})
            )
            norm_eps = vision.get("timm_model_kwargs", {}).get("norm_eps", norm_eps)
        depths = _at_least(depths, vision.get("timm_model_kwargs", {}).get("depths"))
    config.vision_config_aux = {"dims": dims, "depths": depths, "norm_eps": norm_eps}


# The depths of open_clip's convnext_base_w, convnext_large_d and convnext_xxlarge, by their widths.
_CONVNEXT_DEPTHS = {
    (128, 256, 512, 1024): (3, 3, 27, 3),
    (192, 384, 768, 1536): (3, 3, 27, 3),
    (384, 768, 1536, 3072): (3, 4, 30, 3),
}


def _at_least(depths: list[int], known) -> list[int]:
    """The stage depths as counted, or the known ones where those are larger.

    A stage that lacks its last blocks is then reported as incomplete.
    """
    return [max(pair) for pair in zip(depths, known)] if known and len(known) == len(depths) else depths


def _count(names, pattern: str) -> int:
    found = re.compile(pattern.replace(".", r"\."))
    return len({m.group(1) for m in map(found.match, names) if m})
