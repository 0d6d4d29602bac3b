"""Random MM-Interleaved checkpoints in the published layout, for tests and timings without real weights.

python -m mg_fast.testing.random_interleaved FOLDER --size tiny
python -m mg_fast.testing.random_interleaved FOLDER --size 13b --dtype bfloat16    # 30 GB: the published model's size
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
import torch
import yaml
from sentencepiece import sentencepiece_model_pb2
from transformers.utils import logging as transformers_logging

from mg_fast.models.mm_interleaved.configuration import MMInterleavedConfig
from mg_fast.models.mm_interleaved.modeling import MMInterleavedForConditionalGeneration
from mg_fast.models.mm_interleaved.published import CONSTANTS

_BLOCKS = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "use_linear_projection": True,
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "_class_name": "UNet2DConditionModel",
}
_VAE_BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "sample_size": 768,
    "force_upcast": True,
    "scaling_factor": 0.18215,
    "_class_name": "AutoencoderKL",
}
_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
_CLIP = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu"}
# The arguments of MMInterleavedConfig for every size.
SIZES = {
    # The initial spread of the language model is wider than usual. Otherwise small random models repeat one token.
    "tiny": dict(
        text_config=dict(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=386,
            initializer_range=0.1,
        ),
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=24, num_attention_heads=2),
        unet_config=dict(
            block_out_channels=[16, 16, 32, 32],
            attention_head_dim=[2, 2, 4, 4],
            cross_attention_dim=32,
            norm_num_groups=8,
        ),
        vae_config=dict(block_out_channels=[8, 16, 16, 16], layers_per_block=1, norm_num_groups=4),
        num_img_token=8,
        cross_attention_frequency=2,
        image_embed_dim=32,
        pad_token_id=383,
        soi_token_id=384,
        image_token_id=385,
        visual_perceiver=dict(
            num_queries=8,
            hidden_size=48,
            encoder_hidden_size=32,
            cross_attention_frequency=2,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            qk_normalization=True,
        ),
        image_perceiver=dict(
            num_queries=12,
            hidden_size=32,
            encoder_hidden_size=64,
            cross_attention_frequency=1,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=96,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        image_size=64,
        condition_length=12,
        condition_width=32,
        spm_inplane=16,
        unet_mmfs_width=64,
    ),
    "13b": dict(
        text_config=dict(
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            vocab_size=32002,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
        ),
        vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
        unet_config=dict(
            block_out_channels=[320, 640, 1280, 1280], attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024
        ),
        vae_config=dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2),
        visual_perceiver=dict(
            num_queries=64,
            hidden_size=768,
            encoder_hidden_size=1024,
            cross_attention_frequency=2,
            num_hidden_layers=12,
            num_attention_heads=12,
            qk_normalization=True,
        ),
        image_perceiver=dict(
            num_queries=77,
            hidden_size=1024,
            encoder_hidden_size=5120,
            cross_attention_frequency=1,
            num_hidden_layers=1,
            num_attention_heads=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    ),
}
# Parameters that the original initialises so that a part has no effect before it is trained.
_WITHOUT_EFFECT = (".gate", ".gamma", ".conv.weight", "head_new.weight", ".sampling_offsets.weight")


def make_interleaved_config(size: str = "tiny") -> MMInterleavedConfig:
    """Returns the configuration of one of `SIZES`; `13b` is the published model's."""
    arguments = dict(SIZES[size])
    arguments["text_config"] = {"model_type": "llama", **arguments["text_config"]}
    arguments["vision_config"] = {**_CLIP, **arguments["vision_config"]}
    arguments["unet_config"] = {**_BLOCKS, **arguments["unet_config"]}
    arguments["vae_config"] = {**_VAE_BLOCKS, **arguments["vae_config"]}
    return MMInterleavedConfig(scheduler_config=dict(_SCHEDULER), **arguments)


def make_interleaved_model(
    config: MMInterleavedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> MMInterleavedForConditionalGeneration:
    """Returns a model with seeded random weights, in which every part has an effect."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = MMInterleavedForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("ignore_token", "pos_embed")):
                # These are not trained.
                continue
            if name.endswith(_WITHOUT_EFFECT):
                parameter.add_(torch.randn_like(parameter) * 0.1).add_(0.3 if parameter.dim() == 1 else 0.0)
            elif parameter.dim() == 1 or name.endswith(("soi_token", "neg_prompt_embeds")):
                # Zero biases and unit gains would hide one that the code forgets to apply.
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # The original starts with logits of the two new tokens that are far below all others.
        model.text_decoder.head.bias[-2:] = 0
        model.text_decoder.head_new.bias.zero_()
    return model


def make_llama_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a sentencepiece tokenizer as Vicuna ships it, with exactly `vocab_size` pieces.

    It is trained on the licence. Pieces beyond the 512 that this text is enough for never occur in a text.
    """
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.strip() for line in text.splitlines() if line.strip()]),
        model_writer=trained,
        vocab_size=min(vocab_size, 512),
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        unk_id=0,
        bos_id=1,
        eos_id=2,
    )
    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.ParseFromString(trained.getvalue())
    for i in range(len(pieces.pieces), vocab_size):
        pieces.pieces.add(piece=f"\u2581unused\u2581{i}", score=-1e9)
    (folder / "tokenizer.model").write_bytes(pieces.SerializeToString())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
    }
    _write_json(folder / "tokenizer_config.json", config)


def build_interleaved(
    folder: str | Path, *, size: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32, shards: int = 1
) -> Path:
    """Writes a random checkpoint as the original publishes it and returns its folder."""
    model = make_interleaved_model(make_interleaved_config(size), seed=seed, dtype=dtype)
    return save_interleaved(model, folder, shards=shards)


def save_interleaved(model: MMInterleavedForConditionalGeneration, folder: str | Path, *, shards: int = 1) -> Path:
    """Writes a model in the published layout, with a small tokenizer, and returns the folder."""
    folder, config = Path(folder), model.config
    for place in (
        "checkpoint",
        "vicuna-random",
        "clip-random",
        "sd-random/unet",
        "sd-random/vae",
        "sd-random/scheduler",
    ):
        (folder / place).mkdir(parents=True, exist_ok=True)
    text = config.text_config.to_dict() | {"vocab_size": config.text_config.vocab_size - 2}
    _write_json(folder / "vicuna-random" / "config.json", text)
    _write_json(folder / "clip-random" / "config.json", config.vision_config.to_dict())
    _write_json(folder / "sd-random/unet/config.json", config.unet_config)
    _write_json(folder / "sd-random/vae/config.json", config.vae_config)
    _write_json(folder / "sd-random/scheduler/scheduler_config.json", config.scheduler_config)
    make_llama_tokenizer(folder / "vicuna-random", text["vocab_size"])
    content = {
        "model": {
            "llm_model_path": "vicuna-random",
            "txt_vocab_size": config.text_config.vocab_size,
            "num_img_token": config.num_img_token,
            "cross_attention_frequency": config.cross_attention_frequency,
            "image_embed_dim": config.image_embed_dim,
            "spatial_shapes": list(config.spatial_shapes),
            "seq_len": config.seq_len,
            "special_token_dict": {
                name: getattr(config, name)
                for name in ("bos_token_id", "eos_token_id", "pad_token_id", "soi_token_id", "image_token_id")
            },
            "visual_tokenizer_config": {
                "encoder_model_path": "clip-random",
                "perceiver_config": config.visual_perceiver,
            },
            "image_decoder_config": {
                "pretrained_model_name_or_path": "sd-random",
                "sd_base_seed": config.sd_base_seed,
                "image_size": config.image_size,
                "seq_len": config.condition_length,
                "embed_dim": config.condition_width,
                "perceiver_config": config.image_perceiver,
            },
        },
        "constants": {name: getattr(config, name) for name in CONSTANTS},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    state = model.published_state()
    names = sorted(state)
    for i in range(shards):
        part = {name: state[name] for name in names[i::shards]}
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / "checkpoint" / file)
    return folder


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--shards", type=int, default=1)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    print(
        build_interleaved(
            args.folder, size=args.size, seed=args.seed, dtype=getattr(torch, args.dtype), shards=args.shards
        )
    )
