"""Where a checkpoint's tensors are, whether they are the right ones, and what their shapes say about the towers.

Everything is decided from files' headers before any weight is read: a missing, unexpected or mis-shaped tensor is named at once (quantised
saves store other tensors; there transformers' report after loading must do).
The published folder holds all weights. A CLIP or OpenCLIP folder serves only where it lacks a tower; a stage-1 adapter
(`mm_projector.bin`) needs its base language model.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import pickle
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, CLIPVisionConfig

from ..conversation import detect_template, get_template
from ..errors import CheckpointError
from .configuration import MiniGeminiConfig

logger = logging.getLogger(__name__)

CLIP_PREFIX = "model.vision_tower.vision_tower.vision_model."
CONVNEXT_PREFIX = "model.vision_tower_aux."
# the towers of every published model (issue 51 of the original's tracker)
_TOWER_HUB_IDS = {
    CLIP_PREFIX: "openai/clip-vit-large-patch14-336",
    CONVNEXT_PREFIX: "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
}
ADAPTER_FILE = "mm_projector.bin"
# buffers that older transformers wrote into checkpoints; they hold no weights
_LEFTOVERS = re.compile(r"\.position_ids$|\.rotary_emb\.inv_freq$")
HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: the file it lies in, its name there and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


Table = dict[str, TensorInfo]


@dataclasses.dataclass
class Checkpoint:
    """A resolved checkpoint.

    Attributes:
        folder: local folder with config.json and the tokenizer.
        weights_folder: local folder that `from_pretrained` reads the weights from (the base LLM's, for an adapter).
        config: with both towers' geometry filled in from the tensor shapes.
        tensors: every tensor by its published name.
        extra: those of `tensors` that lie outside `weights_folder`: from an adapter file or a tower folder.
    """

    folder: Path
    weights_folder: Path
    config: MiniGeminiConfig
    tensors: Table
    extra: Table


def open_checkpoint(name_or_path: str | os.PathLike, *, base_model: str | os.PathLike | None = None, config=None, **kwargs) -> Checkpoint:
    """Finds a checkpoint by folder or hub id and reads the headers of its files.

    Args:
        name_or_path: a folder or a hub id (HF_HUB_OFFLINE is respected).
        base_model: folder or hub id of the base language model, for a stage-1 adapter.
        config: overrides the folder's config.json.
        **kwargs: hub arguments (`cache_dir`, `revision`, `token`, `local_files_only`, `force_download`).

    Raises:
        CheckpointError: nothing there, no config.json, an unreadable file, or no weights.
    """
    if kwargs.get("subfolder"):
        raise CheckpointError(f"subfolder={kwargs['subfolder']!r} is not supported: name the folder itself")
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
    folder = resolve_folder(name_or_path, **hub)
    extra: Table = {}
    weights_folder, tensors = folder, read_table(folder)
    adapter = folder / ADAPTER_FILE
    if not tensors and adapter.is_file():
        if base_model is None:
            raise CheckpointError(f"{folder} holds a stage-1 adapter ({ADAPTER_FILE}): name its base language model with base_model=")
        extra = _read_file(adapter)
        weights_folder = resolve_folder(base_model, **hub)
        tensors = read_table(weights_folder)
    elif base_model is not None:
        raise CheckpointError(f"base_model= is for stage-1 adapters; {folder} has no {ADAPTER_FILE} or has weights of its own")
    if not tensors:
        raise CheckpointError(f"{weights_folder} holds no weights: expected *.safetensors or pytorch_model*.bin, with its index if sharded")

    of_base = config is None and not (folder / "config.json").is_file()
    if config is None:
        config = read_config(folder, fallback=weights_folder)
    tensors = {**tensors, **extra}
    for prefix in (CLIP_PREFIX, CONVNEXT_PREFIX):
        if not any(name.startswith(prefix) for name in tensors):
            tower = _tower_table(config, prefix, folder, hub)
            if not tower:
                wanted = config.mm_vision_tower if prefix == CLIP_PREFIX else config.mm_vision_tower_aux
                raise CheckpointError(
                    f"{weights_folder} has no {prefix}* tensors, and the tower's own weights were not found: looked for "
                    f"{' or '.join(_TOWER_FILES[prefix])} in {wanted!r} beside {folder} and from the working directory, "
                    f"then in the hub's {_TOWER_HUB_IDS[prefix]}"
                )
            extra |= tower
    tensors |= extra
    complete_config(config, tensors, folder, of_base=of_base)
    return Checkpoint(folder, weights_folder, config, tensors, extra)


def read_config(folder: Path, fallback: Path | None = None) -> MiniGeminiConfig:
    """The configuration of a local folder; of `fallback` where an adapter folder has none."""
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
                    f"{source / 'config.json'} (model_type {given.get('model_type')!r}) has no {key}: "
                    "expected a Mini-Gemini configuration with a high-resolution branch"
                )
    with _blaming(source / "config.json"):
        return MiniGeminiConfig.from_pretrained(source)


@contextlib.contextmanager
def _blaming(path: Path):
    """Names the JSON file whose content made transformers, or us, stumble."""
    try:
        yield
    except CheckpointError:
        raise
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds something that cannot be: {' '.join(str(error).split())}") from error


def geometry_config(folder: Path, base: Path | None = None) -> MiniGeminiConfig:
    """Configuration of a local folder for its processor, from what lies there; `base` is the base model of a stage-1 adapter.

    The views' side is read from the position embedding's shape where that file is at hand; else it is the published towers'.
    """
    config = read_config(folder, fallback=base)
    tensors = read_table(folder, partial=True)
    adapter = folder / ADAPTER_FILE
    if not tensors and adapter.is_file():
        tensors = _read_file(adapter)
    if not any(name.startswith(CLIP_PREFIX) for name in tensors):
        tensors |= _tower_table(config, CLIP_PREFIX, folder)
    complete_config(config, tensors, folder, of_base=not (folder / "config.json").is_file())
    return config


def resolve_folder(name_or_path: str | os.PathLike, *, weights: bool = True, **hub) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded, or found in the cache, file by file as needed."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} is not a folder: expected a checkpoint folder or a hub id (owner/name)")
    try:
        folder = Path(snapshot_download(name, allow_patterns=_SMALL_FILES, **hub))
        if weights:
            _download_weights(name, folder, hub)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name} is neither a folder nor a hub id that can be loaded: {_reason(error)}") from error
    return folder


def _download_weights(name: str, folder: Path, hub: dict) -> None:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            for shard in sorted(set(_read_index(folder / index).values())):
                hf_hub_download(name, shard, **hub)
            return
    unreachable = None
    for single in ("model.safetensors", "pytorch_model.bin", ADAPTER_FILE):
        try:
            hf_hub_download(name, single, **hub)
            return
        except LocalEntryNotFoundError as error:
            # not in the cache, and the hub could not be asked: another of the files may be cached
            unreachable = error
        except EntryNotFoundError:
            continue
    if unreachable is not None:
        raise unreachable


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a weight index: {error!r}") from None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path} is not a weight index: its weight_map does not map tensor names to files")
    return files


def read_table(folder: Path, *, partial: bool = False) -> Table:
    """Every tensor of a folder's weights by its published name, from the files' headers. Empty where there are no weights.

    Looks where transformers does: safetensors before .bin, single file before sharded.

    Args:
        folder: a local folder.
        partial: pass over shards that are not there.
    """
    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (folder / kind).is_file():
            return _read_file(folder / kind)
        index = folder / f"{kind}.index.json"
        if index.is_file():
            table: Table = {}
            named = _read_index(index)
            for shard in sorted(set(named.values())):
                if (folder / shard).is_file():
                    table |= _read_file(folder / shard)
                elif not partial:
                    raise CheckpointError(f"{index} names {shard}, which is not there")
            if absent := sorted(named.keys() - table.keys()) if not partial else []:
                raise CheckpointError(f"{index} names {len(absent)} tensors that no shard holds: {_some(absent)}")
            return table
    return {}


def _read_file(path: Path) -> Table:
    """Names and shapes of the tensors of one file; its weights stay on disk."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as f:
                names = f.keys()
                return {name: TensorInfo(path, name, tuple(f.get_slice(name).get_shape())) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is corrupt or not a safetensors file: {error}") from None
    return {name: TensorInfo(path, name, tuple(tensor.shape)) for name, tensor in _load_bin(path).items()}


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """A .bin file's tensors, memory-mapped. Only tensors are unpickled, never code."""
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # files written before torch 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file unsafely; only the name in it is of use
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it calls for {named.group(1)}" if named else "it holds something else, or is corrupt"
        raise CheckpointError(f"{path} is refused: expected tensors and nothing else, {found}") from None
    except Exception as error:  # bytes that are no pickle can raise anything
        raise CheckpointError(f"{path} is corrupt or not a PyTorch file: {_reason(error)}") from None
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()):
        raise CheckpointError(f"{path}: expected a flat dictionary of tensors, got {type(loaded).__name__}")
    return loaded


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tower_folder(config: MiniGeminiConfig, prefix: str, folder: Path) -> Path | None:
    """A tower's own folder, beside the checkpoint or by the config's relative path."""
    relative = config.mm_vision_tower if prefix == CLIP_PREFIX else config.mm_vision_tower_aux
    if not relative:
        return None
    candidates = (folder / relative, folder / Path(relative).name, folder.parent / Path(relative).name, Path(relative))
    return next((c for c in candidates if c.is_dir()), None)


_TOWER_FILES = {
    CLIP_PREFIX: ("model.safetensors", "pytorch_model.bin"),
    CONVNEXT_PREFIX: ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
# names in a tower's own file -> published names
_TOWER_RENAMES = {
    CLIP_PREFIX: (("vision_model.", CLIP_PREFIX),),
    CONVNEXT_PREFIX: (
        ("visual.trunk.stem.", CONVNEXT_PREFIX + "vision_stem."),
        ("visual.trunk.stages.", CONVNEXT_PREFIX + "vision_stages."),
    ),
}


def _tower_table(config: MiniGeminiConfig, prefix: str, folder: Path, hub: dict | None = None) -> Table:
    """The tensors of a tower that the checkpoint lacks, by their published names; empty where they are not found.

    Looks in the tower's own folder, then, with hub arguments, in the hub repository of the published models' tower.
    """
    found = _tower_folder(config, prefix, folder)
    path = next((found / f for f in _TOWER_FILES[prefix] if (found / f).is_file()), None) if found else None
    if path is None and hub is not None:
        # the checkpoint's own revision means nothing in another repository
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
        for name, info in _read_file(path).items()
        for source, target in _TOWER_RENAMES[prefix]
        if name.startswith(source)
    }


def complete_config(config: MiniGeminiConfig, tensors: Table, folder: Path, *, of_base: bool = False) -> None:
    """Fills in both towers' geometry, in place: shapes from the tensors, the rest from config.json, the towers' folders or constants.

    Args:
        of_base: the configuration is only the base language model's. A stage-1 adapter without one of its own is taken for a standard
            model: 8x8 high-resolution pixels to a query.

    Raises:
        CheckpointError: the shapes contradict config.json.
    """
    shapes = {name: info.shape for name, info in tensors.items()}
    if not config.towers_given:
        _complete_clip(config, shapes, _tower_folder(config, CLIP_PREFIX, folder))
        _complete_convnext(config, shapes, _tower_folder(config, CONVNEXT_PREFIX, folder))
    if of_base:
        config.mm_hidden_size = config.vision_config.hidden_size
        config.mm_hidden_size_aux = sum(config.vision_config_aux["dims"])
        config.image_size_aux = 32 * math.isqrt(config.tokens_per_view)
    clip = "the CLIP tower's width" if any(n.startswith(CLIP_PREFIX) for n in shapes) else "no CLIP tensor is at hand and the usual width"
    widths = [("mm_hidden_size", config.vision_config.hidden_size, clip)]
    if config.towers_given or any(name.startswith(CONVNEXT_PREFIX) for name in shapes):
        # a processor may be made where no ConvNeXt tensor is at hand, and has no use for its widths
        widths.append(("mm_hidden_size_aux", sum(config.vision_config_aux["dims"]), "the sum of the ConvNeXt stage widths"))
    for key, expected, source in widths:
        if getattr(config, key) != expected:
            raise CheckpointError(f"{folder}: config.json says {key}={getattr(config, key)}, {source} is {expected}")
    check_geometry(config, folder)


def check_geometry(config: MiniGeminiConfig, folder: Path) -> None:
    """Refuses a configuration whose parts do not fit each other."""
    config.check()
    layers = config.vision_config.num_hidden_layers
    if not -layers - 1 <= config.mm_vision_select_layer <= layers:
        raise CheckpointError(f"{folder}: mm_vision_select_layer={config.mm_vision_select_layer}, the CLIP tower has {layers} layers")
    queries = config.image_grid * math.isqrt(config.tokens_per_view)
    if config.image_size_aux % (4 * queries):
        raise CheckpointError(
            f"{folder}: image_size_aux={config.image_size_aux} does not give every one of {queries}x{queries} queries a whole window "
            f"(a multiple of {4 * queries} is needed)"
        )


def _complete_clip(config: MiniGeminiConfig, shapes: dict[str, tuple[int, ...]], tower: Path | None) -> None:
    known: dict = {}
    least = 0
    if tower is not None and (tower / "config.json").is_file():
        with _blaming(tower / "config.json"):
            stored = CLIPVisionConfig.from_pretrained(tower).to_dict()
            written = json.loads((tower / "config.json").read_text(encoding="utf-8"))
        known = {key: stored[key] for key in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
        # only what is written: a default would say nothing of this tower
        least = written.get("vision_config", written).get("num_hidden_layers", 0)
    positions = shapes.get(CLIP_PREFIX + "embeddings.position_embedding.weight")
    patches = shapes.get(CLIP_PREFIX + "embeddings.patch_embedding.weight")
    ffn = shapes.get(CLIP_PREFIX + "encoder.layers.0.mlp.fc1.weight")
    if positions is None or patches is None or ffn is None:
        return
    width = positions[1]
    # what the caller chose before the shapes were known
    attention = config.vision_config._attn_implementation
    defaults = {"num_attention_heads": max(1, width // 64), "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    config.vision_config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=ffn[0],
        # a tower that lacks its last layers must not pass for a shallower one
        num_hidden_layers=max(_count(shapes, CLIP_PREFIX + r"encoder.layers.(\d+)."), least, 24 if (width, ffn[0]) == (1024, 4096) else 0),
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
    # timm's own default, which only convnext_xxlarge overrides
    norm_eps = 1e-5 if dims == [384, 768, 1536, 3072] else 1e-6
    if tower is not None and (tower / "open_clip_config.json").is_file():
        with _blaming(tower / "open_clip_config.json"):
            vision = json.loads((tower / "open_clip_config.json").read_text(encoding="utf-8")).get("model_cfg", {}).get("vision_cfg", {})
            norm_eps = vision.get("timm_model_kwargs", {}).get("norm_eps", norm_eps)
        depths = _at_least(depths, vision.get("timm_model_kwargs", {}).get("depths"))
    config.vision_config_aux = {"dims": dims, "depths": depths, "norm_eps": norm_eps}


# open_clip's convnext_base_w, convnext_large_d and convnext_xxlarge
_CONVNEXT_DEPTHS = {(128, 256, 512, 1024): (3, 3, 27, 3), (192, 384, 768, 1536): (3, 3, 27, 3), (384, 768, 1536, 3072): (3, 4, 30, 3)}


def _at_least(depths: list[int], known) -> list[int]:
    """Stage depths as counted, or as known where that is more: a stage that lacks its last blocks is then told as such."""
    return [max(pair) for pair in zip(depths, known)] if known and len(known) == len(depths) else depths


def _count(names, pattern: str) -> int:
    found = re.compile(pattern.replace(".", r"\."))
    return len({m.group(1) for m in map(found.match, names) if m})


def check_names(expected: dict[str, tuple[int, ...]], tensors: Table, *, tied: bool, where: Path) -> None:
    """Holds a checkpoint's tensors against the model's, by published name and shape.

    Raises:
        CheckpointError: names every kind of difference, a few tensors of each.
    """
    found = {name: info.shape for name, info in tensors.items() if not _LEFTOVERS.search(name)}
    if tied and found.get("lm_head.weight") == expected["model.embed_tokens.weight"]:
        # a tied head may be stored a second time; it is the embedding
        del found["lm_head.weight"]
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    wrong = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    if wrong:
        parts.append(f"{len(wrong)} mis-shaped: {_some([f'{n} {list(found[n])}, expected {list(expected[n])}' for n in wrong])}")
    if parts:
        raise CheckpointError(f"{where} does not hold the tensors its config.json calls for. " + "; ".join(parts))


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_tensors(table: Table):
    """Yields (published name, tensor) of a table, opening each file once."""
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


def load_tokenizer(*folders: Path | None):
    """The tokenizer of the first folder that has one, padding on the left as generation needs it."""
    present = [folder for folder in dict.fromkeys(folders) if folder is not None]
    holder = next((f for f in present if any((f / name).is_file() for name in _TOKENIZER_FILES)), None)
    if holder is None:
        raise CheckpointError(f"no tokenizer in {' or '.join(map(str, present))}: expected {' or '.join(_TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(holder, padding_side="left")
    except Exception as error:  # the tokenizer libraries raise bare Exceptions on broken files
        raise CheckpointError(f"the tokenizer in {holder} cannot be loaded: {_reason(error)}") from error


def decide_template(config: MiniGeminiConfig, tokenizer, override: str | None = None) -> str:
    """The prompt template: the override, what the checkpoint saved, else decided from text class and tokenizer (said once if a guess)."""
    if override is not None:
        get_template(override)
        return override
    if config.conversation_template is not None:
        get_template(config.conversation_template)
        return config.conversation_template
    name, certain = detect_template(config.text_config.model_type, tokenizer)
    if not certain and tokenizer.name_or_path not in _said:
        _said.add(tokenizer.name_or_path)
        logger.warning("nothing in this checkpoint tells its prompt template: using %s; template= (--template) overrides it", name)
    return name


_said: set[str] = set()
