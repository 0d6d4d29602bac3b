"""Finds the files of a checkpoint by folder or hub id and lists their tensors from the headers, executing nothing."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open

from ..errors import LONGEST_MESSAGE, CheckpointError, quoted, shortened

ADAPTER_FILE = "mm_projector.bin"
HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
# The files that hold the weights of a whole model, or that list the files which do.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_SMALL_FILES = ["*.json", "*.yaml", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its file, its name in that file and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


Table = dict[str, TensorInfo]


def resolve_folder(name_or_path: str | os.PathLike, *, weights: bool = True, **hub) -> Path:
    """The local folder of a checkpoint. The files of a hub id are downloaded, or found in the cache, as needed."""
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    # os.path is used because Path's own methods raise where the name is too long for a file system.
    if os.path.isdir(path):
        check_whole_model(path)
        return path
    if os.path.exists(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} is not a folder: expected a checkpoint folder or a hub id (owner/name)")
    try:
        folder = Path(snapshot_download(name, allow_patterns=_SMALL_FILES, **hub))
        if weights:
            _download_weights(name, folder, hub)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a folder nor a hub id that can be loaded: {first_line(error)}"
        ) from error
    check_whole_model(folder)
    return folder


def check_whole_model(folder: Path) -> None:
    """Refuses the folder of a LoRA or another peft adapter, which holds differences to a model's weights and no model.

    Raises:
        CheckpointError: the folder holds an adapter. The message names its base model and how to load the two.
    """
    described = folder / "adapter_config.json"
    if not described.is_file() or any((folder / name).is_file() for name in _WEIGHTS):
        return
    try:
        base = json.loads(described.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    beside = ""
    if (folder / ADAPTER_FILE).is_file():
        beside = f"; {ADAPTER_FILE} holds mining and projector, which docs/training.md tells how to load"
    raise CheckpointError(
        f"{shortened(str(folder), 120)} holds a LoRA or another adapter (adapter_config.json) and no model: "
        f"load its base model{f' {quoted(base)}' if base else ''} first, as with pipeline = mg_fast.load(...), "
        f"then add the adapter with pipeline.model.load_adapter(folder){beside}"
    )


def _download_weights(name: str, folder: Path, hub: dict) -> None:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            for shard in sorted(set(read_index(folder / index).values())):
                hf_hub_download(name, shard, **hub)
            return
    unreachable = None
    for single in ("model.safetensors", "pytorch_model.bin", ADAPTER_FILE):
        try:
            hf_hub_download(name, single, **hub)
            return
        except LocalEntryNotFoundError as error:
            # The file is not in the cache and the hub could not be reached, but another of the files may be cached.
            unreachable = error
        except EntryNotFoundError:
            continue
    if unreachable is not None:
        raise unreachable


def read_index(path: Path) -> dict[str, str]:
    """The file of every tensor, by the tensor's name, from a weight index."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a weight index: {quoted(error)}") from None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path} is not a weight index: its weight_map does not map tensor names to files")
    return files


def read_table(folder: Path, *, partial: bool = False) -> Table:
    """Every tensor of a folder's weights by its published name, read from the files' headers.

    The table is empty where there are no weights.

    The search order is that of transformers: safetensors before .bin, a single file before shards.

    Args:
        folder: a local folder.
        partial: skip shards that are missing.
    """
    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (folder / kind).is_file():
            return read_file(folder / kind)
        index = folder / f"{kind}.index.json"
        if index.is_file():
            table: Table = {}
            named = read_index(index)
            for shard in sorted(set(named.values())):
                if os.path.isfile(folder / shard):
                    table |= read_file(folder / shard)
                elif not partial:
                    raise CheckpointError(f"{index} names {shortened(shard, 80)}, which is not there")
            if absent := sorted(named.keys() - table.keys()) if not partial else []:
                raise CheckpointError(f"{index} names {len(absent)} tensors that no shard holds: {some_names(absent)}")
            return table
    return {}


def read_file(path: Path) -> Table:
    """The names and shapes of one file's tensors. The weights stay on disk."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as f:
                names = f.keys()
                return {name: TensorInfo(path, name, tuple(f.get_slice(name).get_shape())) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is corrupt or not a safetensors file: {error}") from None
    return {name: TensorInfo(path, name, tuple(tensor.shape)) for name, tensor in _load_bin(path).items()}


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin file, memory-mapped. Only tensors are unpickled, never code."""
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files written before torch 1.6 cannot be memory-mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises loading the file unsafely. Only the name in it is useful.
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it calls for {named.group(1)}" if named else "it holds something else, or is corrupt"
        raise CheckpointError(f"{path} is refused: expected tensors and nothing else, {found}") from None
    except Exception as error:  # Bytes that are not a pickle can raise any kind of error.
        raise CheckpointError(f"{path} is corrupt or not a PyTorch file: {first_line(error)}") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
    ):
        raise CheckpointError(f"{path}: expected a flat dictionary of tensors, got {type(loaded).__name__}")
    return loaded


@contextlib.contextmanager
def blaming(path: Path):
    """Names the file whose content made transformers or this package fail."""
    try:
        yield
    except CheckpointError:
        raise
    except (
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{path} holds content that cannot be used: {' '.join(str(error).split())}") from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_tensors(table: Table):
    """Yields (published name, tensor) for every tensor of a table, opening each file once."""
    by_file: dict[Path, list[tuple[str, TensorInfo]]] = {}
    for name, info in table.items():
        by_file.setdefault(info.file, []).append((name, info))
    for path, entries in by_file.items():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                for name, info in entries:
                    yield name, f.get_tensor(info.name)
        else:
            loaded = _load_bin(path)
            for name, info in entries:
                yield name, loaded[info.name]


def compare_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    where: Path,
    source: str = "config.json",
) -> None:
    """Compares the shapes of a checkpoint's tensors, by name, with those that its configuration calls for.

    Args:
        expected, found: shapes by name.
        where: what the message names as the place of the tensors.
        source: what it names as the configuration.

    Raises:
        CheckpointError: they differ. The message names every kind of difference and a few tensors of each.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    wrong = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])
    wrong = [f"{name} {list(found[name])}, expected {list(expected[name])}" for name in wrong]
    kinds = {
        kind: names
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", wrong))
        if names
    }
    if kinds:
        holder = shortened(str(where), 120)
        # The message must name every kind of difference without being cut.
        room = (LONGEST_MESSAGE - 60 - len(holder)) // len(kinds) - 40
        told = "; ".join(f"{len(names)} {kind}: {some_names(names, room=room)}" for kind, names in kinds.items())
        raise CheckpointError(f"{holder} does not hold the tensors its {source} calls for. {told}")


def some_names(names: list[str], *, most: int = 4, room: int = 320) -> str:
    """Lists the first names and counts the rest: at least one name, and at most as many as `room` characters hold."""
    shown: list[str] = []
    for name in names[:most]:
        name = shortened(name, room)
        if shown and len(", ".join([*shown, name])) > room:
            break
        shown.append(name)
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
