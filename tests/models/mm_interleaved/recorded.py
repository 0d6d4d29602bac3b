"""The recorded answers of MM-Interleaved's original code on tiny checkpoints, and how parts of them are read."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mg_fast.models.mm_interleaved.configuration import MMInterleavedConfig
from tests.paths import original_golden

NAMES = ["mmi-tiny", "mmi-wide"]


def folder_of(name: str) -> Path:
    """The folder of a tiny checkpoint; the test is skipped where this machine has none."""
    golden = original_golden()
    if golden is None or not (golden / name).is_dir():
        pytest.skip(f"the original's outputs ({name}) are not here: MG_FAST_GOLDEN names their folder")
    return golden / name


def read_config(name: str) -> MMInterleavedConfig:
    """A tiny checkpoint's configuration, put together here without the project's own reading of it."""
    folder = folder_of(name)
    both = yaml.safe_load((folder / "config.yaml").read_text())
    model, constants = both["model"], both["constants"]
    visual, drawing = model["visual_tokenizer_config"], model["image_decoder_config"]
    diffusion = folder / drawing["pretrained_model_name_or_path"]

    def read(path: Path) -> dict:
        return json.loads(path.read_text())

    return MMInterleavedConfig(
        text_config={**read(folder / model["llm_model_path"] / "config.json"), "vocab_size": model["txt_vocab_size"]},
        vision_config=read(folder / visual["encoder_model_path"] / "config.json"),
        unet_config=read(diffusion / "unet" / "config.json"),
        vae_config=read(diffusion / "vae" / "config.json"),
        scheduler_config=read(diffusion / "scheduler" / "scheduler_config.json"),
        visual_perceiver=visual["perceiver_config"],
        image_perceiver=drawing["perceiver_config"],
        image_size=drawing["image_size"],
        condition_length=drawing["seq_len"],
        condition_width=drawing["embed_dim"],
        sd_base_seed=drawing["sd_base_seed"],
        **{
            name: model[name]
            for name in ("num_img_token", "cross_attention_frequency", "image_embed_dim", "spatial_shapes", "seq_len")
        },
        **model["special_token_dict"],
        **constants,
    )


def state(name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under a prefix, without it, in float32 (whole numbers stay as they are)."""
    found = {}
    for file in sorted((folder_of(name) / "checkpoint").glob("*.bin")):
        for key, tensor in torch.load(file, weights_only=True).items():
            if key.startswith(prefix):
                found[key.removeprefix(prefix)] = tensor.float() if tensor.is_floating_point() else tensor
    return found


def requests(name: str) -> dict:
    """What was asked: the content of expected.json."""
    return json.loads((folder_of(name) / "expected.json").read_text())


def answers(name: str) -> dict[str, torch.Tensor]:
    """What the original answered, by key."""
    return load_file(folder_of(name) / "expected.safetensors")


def pixels(name: str, pictures: list, recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    """Pictures [n, 3, 224, 224] in 0..1 for numbers of pictures and the word "grey"."""
    return torch.stack(
        [
            torch.full((3, 224, 224), 0.5) if picture == "grey" else recorded[f"image{picture}.pixels"].float() / 255
            for picture in pictures
        ]
    )
