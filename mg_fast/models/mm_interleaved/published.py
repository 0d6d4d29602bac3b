"""Reads the original's config.yaml, and the configurations of the models that it names.

`model:` holds the arguments of the original's constructor. `constants:`, which may be absent, holds numbers that the
original's code fixes, under the names of `MMInterleavedConfig`. Folders in the file are relative to its own folder. A
key that is absent means the published model's number. Keys that matter only for training have no effect, and a warning
names those that are not known.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from ...errors import CheckpointError, quoted, shortened
from ..families import MM_INTERLEAVED, YAML_FILE, told_family
from ..tensor_files import first_line, resolve_folder

logger = logging.getLogger(__name__)

# Arguments of the original's constructor that are attributes of the configuration under the same names.
_SAME_NAMES = ("num_img_token", "cross_attention_frequency", "image_embed_dim", "spatial_shapes", "seq_len")
_SECTIONS = ("visual_tokenizer_config", "image_decoder_config")
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "soi_token_id", "image_token_id")
# Attributes of the configuration, and their names in the section `image_decoder_config`.
_OF_DRAWING = {
    "image_size": "image_size",
    "condition_length": "seq_len",
    "condition_width": "embed_dim",
    "sd_base_seed": "sd_base_seed",
}
# Further keys of the sections that the original's published files have, which change nothing here.
_WITHOUT_EFFECT = ("dataset_to_ignore_noimage_cond_loss", "sd_use_random_seed", "uncond_prob", "mmfs_feat_levels")
CONSTANTS = (
    "spm_inplane",
    "adapter_points",
    "llm_mmfs_heads",
    "llm_mmfs_points",
    "unet_mmfs_width",
    "unet_mmfs_heads",
    "unet_mmfs_points",
)
# The original enlarges the vocabulary of Vicuna by the two special tokens of pictures.
PUBLISHED_VOCABULARY = 32002
# For every side folder: its argument, the key that names it in the YAML, and the model that the original uses.
_SIDE_FOLDERS = {
    "llm": (("llm_model_path",), "lmsys/vicuna-13b-v1.3"),
    "clip": (("visual_tokenizer_config", "encoder_model_path"), "openai/clip-vit-large-patch14"),
    "diffusion": (
        ("image_decoder_config", "pretrained_model_name_or_path"),
        "stabilityai/stable-diffusion-2-1-base",
    ),
}
# Keys of a side model's config.json that describe its own files.
_OF_FILES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def read_published(
    folder: str | os.PathLike,
    *,
    llm: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    diffusion: str | os.PathLike | None = None,
    **hub,
) -> dict:
    """The arguments of MMInterleavedConfig for a local folder in the published layout.

    Args:
        folder: holds config.yaml.
        llm, clip, diffusion: folders or hub ids of the language model, the vision tower and Stable Diffusion, for those
            that are not where config.yaml says. Only their small files are read or fetched.
        **hub: hub arguments (`cache_dir`, `token`, `local_files_only`, `force_download`).

    Raises:
        CheckpointError: a file or key is absent, unreadable or of another kind than expected.
    """
    folder = Path(folder)
    model, constants = read_sections(folder)
    _warn_of_unknown(folder / YAML_FILE, model)
    given = {"llm": llm, "clip": clip, "diffusion": diffusion}
    sides = {name: side_folder(folder, name, given[name], model=model, **hub) for name in _SIDE_FOLDERS}
    where = folder / YAML_FILE
    visual = _section(model, "visual_tokenizer_config", where)
    drawing = _section(model, "image_decoder_config", where)
    text = _read_json(sides["llm"] / "config.json", "model_type", ("llama",))
    vision = _read_json(sides["clip"] / "config.json", "model_type", ("clip", "clip_vision_model"))
    if isinstance(vision.get("vision_config"), dict):
        # The folder holds the whole of CLIP.
        vision = {**vision["vision_config"], "model_type": "clip_vision_model"}
    found = {
        "text_config": {**_without_files(text), "vocab_size": model.get("txt_vocab_size", PUBLISHED_VOCABULARY)},
        "vision_config": _without_files(vision),
        "unet_config": _read_json(
            sides["diffusion"] / "unet" / "config.json", "_class_name", ("UNet2DConditionModel",)
        ),
        "vae_config": _read_json(sides["diffusion"] / "vae" / "config.json", "_class_name", ("AutoencoderKL",)),
        "scheduler_config": _read_json(sides["diffusion"] / "scheduler" / "scheduler_config.json"),
        "visual_perceiver": _section(visual, "perceiver_config", where),
        "image_perceiver": _section(drawing, "perceiver_config", where),
    }
    found |= {name: model[name] for name in _SAME_NAMES if name in model}
    tokens = _section(model, "special_token_dict", where) if "special_token_dict" in model else {}
    found |= {name: tokens[name] for name in _SPECIAL_TOKENS if name in tokens}
    found |= {ours: drawing[theirs] for ours, theirs in _OF_DRAWING.items() if theirs in drawing}
    return found | constants


def _warn_of_unknown(path: Path, model: Mapping) -> None:
    """Warns of keys that have no effect here and that the published files do not have, such as misspelled ones."""
    known = {
        "": {*_SAME_NAMES, "llm_model_path", "txt_vocab_size", "special_token_dict", *_SECTIONS},
        "visual_tokenizer_config": {"encoder_model_path", "perceiver_config"},
        "image_decoder_config": {"pretrained_model_name_or_path", "perceiver_config", *_OF_DRAWING.values()},
        "special_token_dict": set(_SPECIAL_TOKENS),
    }
    unknown = []
    for section, names in known.items():
        content = model.get(section) if section else model
        prefix = f"{section}." if section else ""
        if isinstance(content, Mapping):
            unknown += [f"model.{prefix}{key}" for key in content if key not in names and key not in _WITHOUT_EFFECT]
    if unknown:
        logger.warning("%s: not known here, and without effect: %s", path, ", ".join(unknown))


def side_folder(
    folder: str | os.PathLike,
    name: str,
    given: str | os.PathLike | None = None,
    *,
    model: Mapping | None = None,
    **hub,
) -> Path:
    """The local folder of one of the models that config.yaml names.

    Args:
        folder: holds config.yaml.
        name: `llm`, `clip` or `diffusion`.
        given: a folder or hub id that overrides the file. Of a hub id, the small files are fetched.
        model: the file's `model:` section, if it has been read.
        **hub: hub arguments.

    Raises:
        CheckpointError: there is no such folder. The message names the argument that can replace it.
    """
    folder, (keys, usual) = Path(folder), _SIDE_FOLDERS[name]
    if given is not None:
        # The revision of the checkpoint has no meaning in another repository.
        return resolve_folder(given, weights=False, **{key: hub[key] for key in hub if key != "revision"})
    named = read_sections(folder)[0] if model is None else model
    for key in keys:
        named = named.get(key) if isinstance(named, Mapping) else None
    advice = f"pass {name}= a folder or hub id (the original uses {usual})"
    if not isinstance(named, str):
        raise CheckpointError(f"{folder / YAML_FILE} has no model.{'.'.join(keys)}: {advice}")
    found = folder / Path(named).expanduser()
    if not os.path.isdir(found):
        raise CheckpointError(
            f"{folder / YAML_FILE} names {quoted(named)} as model.{'.'.join(keys)}, and there is no such folder beside "
            f"it: {advice}"
        )
    return found


def read_sections(folder: Path) -> tuple[dict, dict]:
    """The sections `model` and `constants` of a folder's config.yaml.

    Raises:
        CheckpointError: the file is absent, is not YAML, or has other content than expected.
    """
    path = folder / YAML_FILE
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{shortened(str(folder), 120)} has no {YAML_FILE}: expected an MM-Interleaved checkpoint folder"
            f"{told_family(folder, MM_INTERLEAVED)}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid YAML: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected sections by name, got {type(content).__name__}")
    model = _section(content, "model", path)
    constants = content.get("constants") or {}
    if not isinstance(constants, dict) or (unknown := sorted(map(str, constants.keys() - set(CONSTANTS)))):
        told = quoted(constants) if not isinstance(constants, dict) else f"it has {', '.join(unknown)}"
        raise CheckpointError(f"{path}: constants may hold {', '.join(CONSTANTS)}; {told}")
    return model, constants


def _section(parent: Mapping, name: str, path: Path) -> dict:
    section = parent.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{path}: expected a section {name}, got {quoted(section)}")
    return section


def _read_json(path: Path, key: str | None = None, kinds: tuple[str, ...] = ()) -> dict:
    """The content of a JSON file, in which `key` must have one of the values `kinds`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path} is not there, or cannot be read") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    if key is not None and content.get(key) not in kinds:
        raise CheckpointError(f"{path}: expected {key} {' or '.join(kinds)}, got {quoted(content.get(key))}")
    return content


def _without_files(config: dict) -> dict:
    return {key: value for key, value in config.items() if key not in _OF_FILES}
