"""The parts of the painter: an SDXL pipeline in miniature, with a vocabulary made of nano's words."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline

from mg_fast.drawing import NEGATIVE_PROMPT
from mg_fast.drawing.sources import RECOMMENDED
from mg_fast.testing.random_pipelines import sdxl_parts

from .vocabulary import make_tokenizer
from .wishes import SIDE

# The most tokens of a prompt. Six shapes on a background with a number take 40.
TOKENS = 48
# The side of a latent, and the pixels per side that each of its positions stands for.
FACTOR = 2
LATENT_SIDE = SIDE // FACTOR
CHANNELS = 4
# An autoencoder without normalisation: group normalisation takes the colour of a flat picture away, and with it the
# loss fell more slowly.
_AUTOENCODER = {
    "latent_channels": CHANNELS,
    "encoder_block_out_channels": (24, 24),
    "decoder_block_out_channels": (24, 24),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}
_TEXT = {"max_position_embeddings": TOKENS, "hidden_act": "gelu"}
_WIDTHS = (64, 128)
_TIME_WIDTH = 8
# How pictures are drawn where the caller does not say. With SDXL's own guidance of 5.0, outlines bend.
DRAWING = {"steps": 30, "guidance": 2.0}


def settings(vocabulary: int) -> Mapping[str, Mapping[str, object]]:
    """The sizes of the UNet and the text encoders, for `mg_fast.testing.random_pipelines.sdxl_parts`."""
    first, second = _WIDTHS
    return {
        "unet": {
            "sample_size": LATENT_SIDE,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "block_out_channels": (16, 40, 80, 112),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": 1,
            "attention_head_dim": (1, 1, 4, 4),
            "norm_num_groups": 4,
            "cross_attention_dim": first + second,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _TIME_WIDTH,
            # Six numbers of sizes and crops, and the pooled text.
            "projection_class_embeddings_input_dim": 6 * _TIME_WIDTH + second,
        },
        "text_encoder": {
            **_TEXT,
            "hidden_size": first,
            "intermediate_size": 2 * first,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": first,
            "vocab_size": vocabulary,
        },
        "text_encoder_2": {
            **_TEXT,
            "hidden_size": second,
            "intermediate_size": 2 * second,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "projection_dim": second,
            "vocab_size": vocabulary,
        },
    }


def make_scheduler() -> DDIMScheduler:
    """The noise schedule: cosine, down to pure noise, and a network that predicts velocities.

    Sources: Nichol and Dhariwal 2021 (cosine), Salimans and Ho 2022 (velocity), Lin et al. 2023 (pure noise at the end,
    without which the mean colour of a picture cannot be chosen freely).
    """
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def make_parts(texts: Iterable[str], seed: int) -> dict[str, object]:
    """All parts of the pipeline with random weights, by their names in it."""
    tokenizer = make_tokenizer([*texts, NEGATIVE_PROMPT.split(",")[0]], TOKENS)
    torch.manual_seed(seed)
    parts = dict(sdxl_parts(settings(len(tokenizer))))
    parts["vae"] = AutoencoderTiny(**_AUTOENCODER).eval()
    return parts | {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "scheduler": make_scheduler()}


def assemble(parts: Mapping[str, object]) -> StableDiffusionXLPipeline:
    """The pipeline of these parts. An empty prompt is read as a text, as it was in training."""
    return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=False, add_watermarker=False)


def embed(parts: Mapping[str, object], prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline makes of prompts: their tokens' states [n, tokens, 192], and their pooled states [n, 128]."""
    tokenizer = parts["tokenizer"]
    ids = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    ids = ids.to(parts["unet"].device)
    first = parts["text_encoder"](ids, output_hidden_states=True)
    second = parts["text_encoder_2"](ids, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def save(parts: Mapping[str, object], folder: Path) -> None:
    """Writes the pipeline in half precision, with the settings with which it draws best."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.half()
    assemble(parts).save_pretrained(folder)
    # AutoencoderTiny writes a setting of its own that it warns of when it reads it, and works it out again.
    settings_file = folder / "vae" / "config.json"
    kept = json.loads(settings_file.read_text())
    del kept["block_out_channels"]
    settings_file.write_text(json.dumps(kept, indent=2) + "\n")
    (folder / RECOMMENDED).write_text(json.dumps(DRAWING) + "\n")
