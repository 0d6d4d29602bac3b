"""Resolves a checkpoint: its configuration, where each of its tensors lies, and whether they are the right ones.

Everything is decided from small files and from the headers of the weight files before any weight is read, so that a
missing, unexpected or mis-shaped tensor is named at once.

Two layouts are read:

- The published one: config.yaml, and state dictionaries in `checkpoint/` or `mm_interleaved_pretrain/` (the name in the
  original's repository), of which only one may hold weights. Where neither does, those beside config.yaml count. All
  *.safetensors files of that place are merged, or, if it has none, all of its *.bin files. A tensor may be stored only
  once.
- The one that `save_pretrained` writes: config.json and model*.safetensors, with nothing beside them.
"""

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from ...errors import BackendError, CheckpointError, quoted, shortened
from ...runtime.dtypes import wanted_dtype
from ..families import INTERLEAVED_TYPE, MM_INTERLEAVED, YAML_FILE, is_published_interleaved, model_type, told_family
from ..tensor_files import (
    HUB_ARGUMENTS,
    Table,
    blaming,
    compare_tensors,
    first_line,
    read_file,
    read_index,
    read_table,
    read_tensors,
    resolve_folder,
    some_names,
)
from .configuration import MMInterleavedConfig

# The folders beside config.yaml that may hold the weights of the published layout.
WEIGHT_FOLDERS = ("checkpoint", "mm_interleaved_pretrain")
# What trainers write beside weights under names that end like theirs.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
# Tables that are computed. Files of old or new versions may store them or not.
COMPUTED = re.compile(r"\.position_ids$|\.rotary_emb\.inv_freq$")
# The tensor whose dtype counts as that of a checkpoint: the first one of the language model.
_FIRST_WEIGHT = "mm_decoder.embed_tokens.weight"


@dataclasses.dataclass
class InterleavedCheckpoint:
    """A checkpoint whose files have been found.

    Attributes:
        folder: the local folder with config.yaml or config.json.
        weights_folder: the local folder of the weight files.
        config: the configuration, whose parts fit each other.
        tensors: every tensor by its published name.
        published: whether this is the published layout, and not the one that `save_pretrained` writes.
    """

    folder: Path
    weights_folder: Path
    config: MMInterleavedConfig
    tensors: Table
    published: bool

    def stored_dtype(self) -> torch.dtype:
        """The dtype that `dtype="auto"` means: config.json's, or else that of the stored embedding of words."""
        dtype = self.config.dtype
        if dtype is None:
            dtype = next(tensor.dtype for _, tensor in read_tensors({_FIRST_WEIGHT: self.tensors[_FIRST_WEIGHT]}))
        try:
            return wanted_dtype(dtype)
        except BackendError as error:
            raise CheckpointError(f"{self.folder} has a dtype that weights cannot be loaded in: {error}") from None

    def state(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by published name, as views of their files: they take no memory before they are read."""
        return dict(read_tensors({name: self.tensors[name] for name in names if name in self.tensors}))


def open_interleaved(
    name_or_path: str | os.PathLike, *, config: MMInterleavedConfig | None = None, **options
) -> InterleavedCheckpoint:
    """Finds a checkpoint by folder or hub id and reads the headers of its files.

    Args:
        name_or_path: a folder or a hub id (HF_HUB_OFFLINE is respected).
        config: overrides the folder's own configuration.
        **options: `llm`, `clip` and `diffusion`, as in `MMInterleavedConfig.from_pretrained`, and hub arguments
            (`cache_dir`, `revision`, `token`, `local_files_only`, `force_download`).

    Raises:
        CheckpointError: there is nothing, no configuration, no weights, or a file is unreadable.
    """
    if options.get("subfolder"):
        raise CheckpointError(f"subfolder={quoted(options['subfolder'])} is not supported: name the folder itself")
    hub = {name: options[name] for name in HUB_ARGUMENTS if options.get(name) is not None}
    folder = resolve_folder(name_or_path, weights=False, **hub)
    published = is_published_interleaved(folder)
    if not published and model_type(folder) != INTERLEAVED_TYPE:
        raise CheckpointError(
            f"{shortened(str(folder), 120)} has no {YAML_FILE}, and no config.json with model_type {INTERLEAVED_TYPE}: "
            f"expected an MM-Interleaved checkpoint folder{told_family(folder, MM_INTERLEAVED)}"
        )
    sides = {name: options[name] for name in ("llm", "clip", "diffusion") if options.get(name) is not None}
    if sides and not published:
        raise CheckpointError(
            f"{', '.join(f'{name}=' for name in sides)} is for folders with a {YAML_FILE}; "
            f"{shortened(str(folder), 120)} needs no other folder"
        )
    if config is None:
        with blaming(folder / (YAML_FILE if published else "config.json")):
            config = MMInterleavedConfig.from_pretrained(folder, **sides, **hub)
    config.check(shortened(str(folder), 120))
    if not os.path.isdir(name_or_path):
        _fetch_weights(str(name_or_path), folder, published, hub)
    weights_folder = _weights_folder(folder) if published else folder
    tensors = _read_all(weights_folder) if published else read_table(folder)
    if not tensors:
        raise CheckpointError(f"{folder} holds no weights: expected model.safetensors, with its index if it is sharded")
    return InterleavedCheckpoint(folder, weights_folder, config, tensors, published)


def check_interleaved_names(expected: dict[str, tuple[int, ...]], tensors: Table, *, where: Path) -> None:
    """Compares a checkpoint's tensors with the model's, by published name and shape.

    Raises:
        CheckpointError: tensors differ. The message names every kind of difference and a few tensors of each.
    """
    found = {name: info.shape for name, info in tensors.items() if name in expected or not COMPUTED.search(name)}
    expected = {name: shape for name, shape in expected.items() if name in found or not COMPUTED.search(name)}
    compare_tensors(expected, found, where=where, source="configuration")


def _weights_folder(folder: Path) -> Path:
    """The place that holds the weights of the published layout."""
    places = [folder / name for name in WEIGHT_FOLDERS if _weight_files(folder / name)]
    if len(places) > 1:
        raise CheckpointError(
            f"{shortened(str(folder), 120)}: expected weights in one place, but {' and '.join(WEIGHT_FOLDERS)} "
            "both hold some"
        )
    if not places and not _weight_files(folder):
        raise CheckpointError(
            f"{shortened(str(folder), 120)} holds no weights: expected *.bin or *.safetensors in "
            f"{', in '.join(WEIGHT_FOLDERS)}, or beside {YAML_FILE}"
        )
    return places[0] if places else folder


def _weight_files(folder: Path) -> list[Path]:
    """The weight files right within a folder: those of safetensors, or else the state dictionaries of PyTorch."""
    if not os.path.isdir(folder):
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in _NO_WEIGHTS)
    tensors = [path for path in files if path.suffix == ".safetensors"]
    return tensors or [path for path in files if path.suffix == ".bin"]


def _read_all(folder: Path) -> Table:
    """Every tensor of all weight files of a folder."""
    files = _weight_files(folder)
    for index in sorted(folder.glob("*.index.json")):
        named = set(read_index(index).values())
        if index.name.removesuffix(".index.json").endswith(files[0].suffix) and (
            absent := sorted(named - {path.name for path in files})
        ):
            raise CheckpointError(f"{index} names {shortened(absent[0], 80)}, which is not there")
    table: Table = {}
    for path in files:
        added = read_file(path)
        if twice := sorted(table.keys() & added.keys()):
            raise CheckpointError(
                f"{some_names(twice, room=160)}: stored in {table[twice[0]].file.name} and again in {path}"
            )
        table |= added
    return table


def _fetch_weights(name: str, folder: Path, published: bool, hub: dict) -> None:
    """Fetches the weights of a hub id into the folder of its snapshot."""
    if not published:
        resolve_folder(name, **hub)
        return
    patterns = [f"{place}/*" for place in WEIGHT_FOLDERS]
    patterns = [f"{pattern}.{kind}" for pattern in patterns for kind in ("bin", "safetensors")]
    try:
        snapshot_download(name, allow_patterns=patterns, **hub)
    except Exception as error:  # huggingface_hub raises many kinds of errors, all of which mean the same here.
        raise CheckpointError(f"the weights of {name} cannot be fetched into {folder}: {first_line(error)}") from error
