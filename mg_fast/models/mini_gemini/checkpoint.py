"""Resolves a checkpoint: its configuration, where each of its tensors lies, and whether they are the right ones.

Everything is decided from file headers before any weight is read, so that a missing, unexpected or mis-shaped tensor is
named at once. Quantized checkpoints store other tensors; for them, transformers' report after loading does this. The
published folder holds all weights. A CLIP or OpenCLIP folder is used only where the checkpoint lacks that tower. A
stage-1 adapter (`mm_projector.bin`) needs its base language model.
"""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers import AutoTokenizer

from ...errors import BackendError, CheckpointError, quoted, shortened
from ...runtime.dtypes import wanted_dtype
from ..families import MINI_GEMINI, told_family
from ..templates import detect_template, get_template
from ..tensor_files import (
    ADAPTER_FILE,
    HUB_ARGUMENTS,
    Table,
    blaming,
    compare_tensors,
    first_line,
    read_file,
    read_table,
    read_tensors,
    resolve_folder,
)
from .configuration import MiniGeminiConfig
from .geometry import CLIP_PREFIX, CONVNEXT_PREFIX, complete_config, tower_folder

logger = logging.getLogger(__name__)

# The towers of every published model, according to issue 51 in the original project's tracker.
_TOWER_HUB_IDS = {
    CLIP_PREFIX: "openai/clip-vit-large-patch14-336",
    CONVNEXT_PREFIX: "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
}
# Older versions of transformers wrote these buffers into checkpoints. They hold no weights.
_LEFTOVERS = re.compile(r"\.position_ids$|\.rotary_emb\.inv_freq$")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint whose files have been found.

    Attributes:
        folder: the local folder with config.json and the tokenizer.
        weights_folder: the local folder that `from_pretrained` reads weights from (the base LLM's, for an adapter).
        config: the configuration, with both towers' geometry filled in from the tensor shapes.
        tensors: every tensor by its published name.
        extra: the part of `tensors` that lies outside `weights_folder`, in an adapter file or a tower folder.
    """

    folder: Path
    weights_folder: Path
    config: MiniGeminiConfig
    tensors: Table
    extra: Table

    def stored_dtype(self) -> torch.dtype:
        """The dtype that `dtype="auto"` means in transformers: config.json's, or else that of the stored weights."""
        dtype = self.config.dtype
        if dtype is None:
            name = "model.norm.weight"
            dtype = next(tensor.dtype for _, tensor in read_tensors({name: self.tensors[name]}))
        try:
            return wanted_dtype(dtype)
        except BackendError as error:
            raise CheckpointError(f"{self.folder} names a dtype that weights cannot have: {error}") from None


def open_checkpoint(
    name_or_path: str | os.PathLike, *, base_model: str | os.PathLike | None = None, config=None, **kwargs
) -> Checkpoint:
    """Finds a checkpoint by folder or hub id and reads the headers of its files.

    Args:
        name_or_path: a folder or a hub id (HF_HUB_OFFLINE is respected).
        base_model: the folder or hub id of the base language model, for a stage-1 adapter.
        config: overrides the folder's config.json.
        **kwargs: hub arguments (`cache_dir`, `revision`, `token`, `local_files_only`, `force_download`).

    Raises:
        CheckpointError: there is nothing, no config.json, no weights, or a file is unreadable.
    """
    if kwargs.get("subfolder"):
        raise CheckpointError(f"subfolder={quoted(kwargs['subfolder'])} is not supported: name the folder itself")
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
    folder = resolve_folder(name_or_path, **hub)
    if told := told_family(folder, MINI_GEMINI):
        raise CheckpointError(f"{shortened(str(folder), 120)} holds no Mini-Gemini checkpoint{told}")
    extra: Table = {}
    weights_folder, tensors = folder, read_table(folder)
    adapter = folder / ADAPTER_FILE
    if not tensors and adapter.is_file():
        if base_model is None:
            raise CheckpointError(
                f"{folder} holds a stage-1 adapter ({ADAPTER_FILE}): name its base language model with base_model="
            )
        extra = read_file(adapter)
        weights_folder = resolve_folder(base_model, **hub)
        tensors = read_table(weights_folder)
    elif base_model is not None:
        raise CheckpointError(
            f"base_model= is for stage-1 adapters; {folder} has no {ADAPTER_FILE} or has weights of its own"
        )
    if not tensors:
        raise CheckpointError(
            f"{weights_folder} holds no weights: "
            "expected *.safetensors or pytorch_model*.bin, with its index if sharded"
        )

    of_base = config is None and not (folder / "config.json").is_file()
    if config is None:
        config = read_config(folder, fallback=weights_folder)
    tensors = {**tensors, **extra}
    extra |= tower_tensors(config, tensors, folder, weights_folder=weights_folder, **hub)
    tensors |= extra
    complete_config(config, tensors, folder, of_base=of_base)
    return Checkpoint(folder, weights_folder, config, tensors, extra)


def tower_tensors(
    config: MiniGeminiConfig, names: Iterable[str], folder: Path, *, weights_folder: Path | None = None, **hub
) -> Table:
    """The tensors of the towers that a checkpoint lacks, from the towers' own files, by their published names.

    Args:
        config: says where the towers lie.
        names: the published names of the tensors that the checkpoint has.
        folder: its local folder.
        weights_folder: the folder of its weights, for the message. Default: `folder`.
        **hub: hub arguments, as in `open_checkpoint`.

    Raises:
        CheckpointError: a tower was found nowhere. The message says where it was looked for.
    """
    found: Table = {}
    names = set(names)
    for prefix in (CLIP_PREFIX, CONVNEXT_PREFIX):
        if any(name.startswith(prefix) for name in names):
            continue
        tower = _tower_table(config, prefix, folder, hub)
        if not tower:
            wanted = config.mm_vision_tower if prefix == CLIP_PREFIX else config.mm_vision_tower_aux
            raise CheckpointError(
                f"{weights_folder or folder} has no {prefix}* tensors, and the tower's own weights were not found: "
                f"looked for {' or '.join(_TOWER_FILES[prefix])} in {quoted(wanted)} "
                f"beside {folder} and from the working directory, "
                f"then in the hub's {_TOWER_HUB_IDS[prefix]}"
            )
        found |= tower
    return found


def read_config(folder: Path, fallback: Path | None = None) -> MiniGeminiConfig:
    """The configuration of a local folder, or of `fallback` where an adapter folder has none."""
    if told := told_family(folder, MINI_GEMINI):
        raise CheckpointError(f"{shortened(str(folder), 120)} holds no Mini-Gemini checkpoint{told}")
    source = folder if (folder / "config.json").is_file() or fallback is None else fallback
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json: expected a Mini-Gemini checkpoint folder")
    try:
        given = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{source / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise CheckpointError(f"{source / 'config.json'}: expected a JSON object, got {type(given).__name__}")
    if source == folder:
        for key in ("image_size_aux", "mm_vision_select_layer"):
            if key not in given:
                raise CheckpointError(
                    f"{source / 'config.json'} (model_type {quoted(given.get('model_type'))}) has no {key}: "
                    "expected a Mini-Gemini configuration with a high-resolution branch"
                )
    with blaming(source / "config.json"):
        return MiniGeminiConfig.from_pretrained(source)


def geometry_config(folder: Path, base: Path | None = None) -> MiniGeminiConfig:
    """The configuration that a processor needs, from a local folder alone.

    The side of the views is read from the shape of the position embedding where that file is at hand. Otherwise it is
    that of the published towers. `base` is the folder of the base model of a stage-1 adapter.
    """
    config = read_config(folder, fallback=base)
    tensors = read_table(folder, partial=True)
    adapter = folder / ADAPTER_FILE
    if not tensors and adapter.is_file():
        tensors = read_file(adapter)
    if not any(name.startswith(CLIP_PREFIX) for name in tensors):
        tensors |= _tower_table(config, CLIP_PREFIX, folder)
    complete_config(config, tensors, folder, of_base=not (folder / "config.json").is_file())
    return config


_TOWER_FILES = {
    CLIP_PREFIX: ("model.safetensors", "pytorch_model.bin"),
    CONVNEXT_PREFIX: ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
# Names in a tower's own file, and the published names.
_TOWER_RENAMES = {
    CLIP_PREFIX: (("vision_model.", CLIP_PREFIX),),
    CONVNEXT_PREFIX: (
        ("visual.trunk.stem.", CONVNEXT_PREFIX + "vision_stem."),
        ("visual.trunk.stages.", CONVNEXT_PREFIX + "vision_stages."),
    ),
}


def _tower_table(config: MiniGeminiConfig, prefix: str, folder: Path, hub: dict | None = None) -> Table:
    """The tensors of a tower that the checkpoint lacks, by their published names. The table is empty if none are found.

    It looks in the tower's own folder and then, given hub arguments, in the hub repository of the published tower.
    """
    found = tower_folder(config, prefix, folder)
    path = next((found / f for f in _TOWER_FILES[prefix] if (found / f).is_file()), None) if found else None
    if path is None and hub is not None:
        # The checkpoint's own revision has no meaning in another repository.
        hub = {key: value for key, value in hub.items() if key != "revision"}
        for file in _TOWER_FILES[prefix]:
            try:
                path = Path(hf_hub_download(_TOWER_HUB_IDS[prefix], file, **hub))
                break
            except EntryNotFoundError:
                continue
            except (HfHubHTTPError, OSError):
                break
    if path is None:
        return {}
    if hub is not None:
        logger.warning("%s* is not in the checkpoint; taking it from %s", prefix, path)
    return {
        target + name.removeprefix(source): info
        for name, info in read_file(path).items()
        for source, target in _TOWER_RENAMES[prefix]
        if name.startswith(source)
    }


def check_names(expected: dict[str, tuple[int, ...]], tensors: Table, *, tied: bool, where: Path) -> None:
    """Compares a checkpoint's tensors with the model's, by published name and shape.

    Raises:
        CheckpointError: tensors differ. The message names every kind of difference and a few tensors of each.
    """
    found = {name: info.shape for name, info in tensors.items() if not _LEFTOVERS.search(name)}
    if tied and found.get("lm_head.weight") == expected["model.embed_tokens.weight"]:
        # A tied head may be stored a second time. It is the embedding.
        del found["lm_head.weight"]
    compare_tensors(expected, found, where=where)


def load_tokenizer(*folders: Path | None):
    """The tokenizer of the first folder that has one. It pads on the left, as generation needs."""
    present = [folder for folder in dict.fromkeys(folders) if folder is not None]
    holder = next((f for f in present if any((f / name).is_file() for name in _TOKENIZER_FILES)), None)
    if holder is None:
        raise CheckpointError(
            f"no tokenizer in {' or '.join(map(str, present))}: expected {' or '.join(_TOKENIZER_FILES)}"
        )
    try:
        return AutoTokenizer.from_pretrained(holder, padding_side="left")
    except Exception as error:  # The tokenizer libraries raise bare Exceptions on broken files.
        raise CheckpointError(f"the tokenizer in {holder} cannot be loaded: {first_line(error)}") from error


def decide_template(config: MiniGeminiConfig, tokenizer, override: str | None = None) -> str:
    """The prompt template: the override, or the one that the checkpoint saved, or one by text class and tokenizer.

    Where the last is a guess, one warning says so.
    """
    if override is not None:
        get_template(override)
        return override
    if config.conversation_template is not None:
        get_template(config.conversation_template)
        return config.conversation_template
    name, certain = detect_template(config.text_config.model_type, tokenizer)
    if not certain and tokenizer.name_or_path not in _warned_of_template:
        _warned_of_template.add(tokenizer.name_or_path)
        logger.warning(
            "nothing in this checkpoint tells its prompt template: using %s, unless a template is named", name
        )
    return name


_warned_of_template: set[str] = set()
