"""What the frozen towers compute of pictures, kept on disk from one epoch to the next."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mg_fast.errors import quoted
from mg_fast.models.mini_gemini.configuration import MiniGeminiConfig
from mg_fast.models.mini_gemini.frozen_towers import FrozenTowers, TowerFeatures
from mg_fast.models.mini_gemini.image_processing import MiniGeminiImageProcessor

from .config import ConfigError

logger = logging.getLogger(__name__)


def feature_bytes(config: MiniGeminiConfig, dtype: torch.dtype) -> int:
    """Bytes of the features of one picture: 27.7 MB in bfloat16 for the published models, 112 MB in HD."""
    queries = config.tokens_per_picture * config.mm_hidden_size
    side, dims = config.image_size_aux // 4, config.vision_config_aux["dims"]
    return (queries + sum((side >> s) ** 2 * c for s, c in enumerate(dims))) * dtype.itemsize


class FeatureCache:
    """A folder with the features of pictures, by the content of a picture and by everything that they depend on.

    That is the towers' weights and settings, their dtype, and how pictures are made square and resized: a folder within
    the folder. Processes may share it.

    Args:
        folder: it is made if it is missing.
        towers: what computes the features.
        images: what makes the pixels.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, towers: FrozenTowers, images: MiniGeminiImageProcessor):
        self._state = _state(towers, images)
        self.folder = folder / self._state.hex()[:16]
        self._names = {"queries", *(f"map{s}" for s in range(len(towers.config.vision_config_aux["dims"])))}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"feature_cache: {folder} cannot be made: {error.strerror or error}") from None

    def key(self, digest: bytes) -> str:
        """The key of a picture by the digest of its content."""
        return hashlib.sha256(self._state + digest).hexdigest()

    def read(self, key: str) -> TowerFeatures | None:
        """The features under a key, without the dimension of pictures; None where there are none."""
        path = self._path(key)
        try:
            found = load_file(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            # A machine that lost power may leave half a file.
            logger.warning("%s cannot be read and is made anew: %s", path, error)
            return None
        if found.keys() != self._names:
            logger.warning("%s is made anew: expected %s, got %s", path, sorted(self._names), quoted(sorted(found)))
            return None
        return TowerFeatures(found.pop("queries"), [found[f"map{s}"] for s in range(len(found))])

    def write(self, key: str, features: TowerFeatures) -> None:
        """Keeps the features of one picture, given without the dimension of pictures."""
        path = self._path(key)
        maps = {f"map{s}": level.contiguous().cpu() for s, level in enumerate(features.pyramid)}
        name = None
        try:
            path.parent.mkdir(exist_ok=True)
            # It is written under another name first, so that other processes see whole files only.
            descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            os.close(descriptor)
            save_file({"queries": features.queries.contiguous().cpu(), **maps}, name)
            os.replace(name, path)
        except (OSError, SafetensorError) as error:
            if name is not None:
                with contextlib.suppress(OSError):
                    os.unlink(name)
            raise ConfigError(f"feature_cache: {path} cannot be written: {error}") from None

    def check_room(self, pictures: int, size: int) -> None:
        """Says how many bytes so many pictures take, and refuses where the disk has less.

        Args:
            pictures: the number of different pictures.
            size: bytes of one; see `feature_bytes`.

        Raises:
            ConfigError: there is not enough room.
        """
        held = sum(path.stat().st_size for path in self.folder.glob("??/*.safetensors"))
        wanted, free = pictures * size, shutil.disk_usage(self.folder).free
        told = f"{pictures:,} pictures of {size / 1e6:.1f} MB take {wanted / 1e9:.1f} GB"
        logger.warning("feature_cache: %s; %s has %.1f GB free", told, self.folder, (free + held) / 1e9)
        if wanted > free + held:
            raise ConfigError(
                f"feature_cache: {told}, but {self.folder} has {(free + held) / 1e9:.1f} GB: leave the key out, "
                "or name another folder"
            )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _state(towers: FrozenTowers, images: MiniGeminiImageProcessor) -> bytes:
    """A digest of everything but the picture that features depend on."""
    config = towers.config
    clip = {key: str(value) for key, value in config.vision_config.to_diff_dict().items()}
    settings = {
        "images": list(map(str, images.settings)),
        "select": config.mm_vision_select_layer,
        "clip": clip,
        "convnext": config.vision_config_aux,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(towers.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()
