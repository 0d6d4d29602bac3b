"""Where a painter's pipeline comes from: the folder or hub id of a pipeline of diffusers, checked from small files."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import BackendError, CheckpointError, DrawingError, quoted, shortened
from ..models import builtin
from ..models.tensor_files import first_line, read_file
from .settings import DrawingSettings

INDEX = "model_index.json"
# A file beside the index with the settings that the makers of a pipeline recommend. diffusers has no place for them.
RECOMMENDED = "drawing_config.json"


@dataclass(frozen=True)
class PipelineSource:
    """A pipeline that has been found and not been loaded.

    Attributes:
        name: the folder or hub id.
        index: what its model_index.json holds.
        folder: the local folder; None for a hub id.
        recommended: the steps and the guidance in the folder's drawing_config.json, where it has one.
    """

    name: str
    index: dict
    folder: Path | None
    recommended: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        """The name of the pipeline's class in diffusers."""
        return self.index["_class_name"]

    @property
    def parts(self) -> list[str]:
        """The names of the parts that hold weights or settings."""
        return [
            name
            for name, described in self.index.items()
            if isinstance(described, list) and len(described) == 2 and None not in described
        ]

    def variant(self, dtype: torch.dtype) -> str | None:
        """The variant of the files to load: the one of 16 bits where it exists and 16 bits are asked for."""
        if dtype not in (torch.float16, torch.bfloat16):
            return None
        if self.folder is None:
            # The published SDXL has such files. Where a repository has none, loading falls back to the others.
            return "fp16"
        return "fp16" if any(self.folder.glob("*/*.fp16.*")) else None

    def part_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """The bytes of each part's weights in this dtype, from the headers of the files; nothing for a hub id."""
        if self.folder is None:
            return {}
        found = {}
        for part in self.parts:
            # A folder may hold the same weights several times, in variants: the smallest set of files is one of them.
            sets: dict[str, int] = {}
            for file in sorted((self.folder / part).glob("*.safetensors")):
                kind = "fp16" if ".fp16." in file.name else "non_ema" if "non_ema" in file.name else ""
                sets[kind] = sets.get(kind, 0) + sum(math.prod(info.shape) for info in read_file(file).values())
            if sets:
                found[part] = min(sets.values()) * dtype.itemsize
        return found


def find_pipeline(name_or_path: str | os.PathLike) -> PipelineSource:
    """Finds a pipeline of diffusers by folder, hub id or name in the package, and reads its index.

    Raises:
        CheckpointError: there is none; the message says what was found.
    """
    name_or_path = builtin.resolve_painter(name_or_path)
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if os.path.isdir(path):
        if not (path / INDEX).is_file():
            raise CheckpointError(
                f"{shortened(name, 120)} is no pipeline of diffusers: expected a folder with {INDEX}, which names its "
                "parts (a UNet, a VAE, text encoders, a scheduler)"
            )
        source = PipelineSource(name, _read_index(path / INDEX), path, _read_recommended(path / RECOMMENDED))
        _check_parts(source)
        return source
    if os.path.exists(path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"{shortened(name, 120)} is not a folder: expected a pipeline's folder or hub id (owner/name)"
        )
    try:
        index = Path(hf_hub_download(name, INDEX))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise CheckpointError(f"{name} cannot be fetched: {first_line(error)}") from error
        raise CheckpointError(f"{name} is no pipeline of diffusers: it has no {INDEX}") from None
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a folder nor a hub id that can be loaded: {first_line(error)}"
        ) from error
    return PipelineSource(name, _read_index(index), None)


def free_bytes(device: torch.device) -> int | None:
    """The bytes that torch can still use on a GPU, also those that it holds without using them; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_room(source: PipelineSource, dtype: torch.dtype, free: int | None, offload: str) -> None:
    """Raises BackendError where the weights of a pipeline cannot fit the device, before any of them is read.

    Args:
        free: the bytes that the device has; None: there is no limit.
    """
    parts = source.part_bytes(dtype)
    if free is None or not parts or offload == "sequential":
        return
    needed = max(parts.values()) if offload == "model" else sum(parts.values())
    if needed > free:
        raise BackendError(
            f"{shortened(source.name, 120)} needs {needed / 2**30:.1f} GiB for its weights in {str(dtype)[6:]}, but "
            f"{free / 2**30:.1f} GiB are free on the device: "
            + ('offload="model" keeps one part there at a time' if offload == "none" else 'try offload="sequential"')
        )


def _check_parts(source: PipelineSource) -> None:
    """Raises CheckpointError where a part has no folder, or settings of a model but no weights."""
    for part in source.parts:
        folder = source.folder / part
        if not folder.is_dir():
            raise CheckpointError(
                f"{shortened(source.name, 120)}: {INDEX} names the part {quoted(part)}, but there is no such folder"
            )
        if (folder / "config.json").is_file() and not any(
            file.suffix in (".safetensors", ".bin") for file in folder.iterdir()
        ):
            raise CheckpointError(f"{shortened(source.name, 120)}: the part {quoted(part)} has no file of weights")


def _read_recommended(path: Path) -> dict[str, int | float]:
    if not path.is_file():
        return {}
    found = _read_json(path)
    if not isinstance(found, dict) or not set(found) <= {"steps", "guidance"}:
        raise CheckpointError(f"{path}: expected an object with the keys steps and guidance, got {quoted(found)}")
    try:
        DrawingSettings(**found)
    except DrawingError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return found


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {first_line(error)}") from None


def _read_index(path: Path) -> dict:
    index = _read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{path} names no pipeline: expected the key _class_name, got {quoted(index)}")
    return index
