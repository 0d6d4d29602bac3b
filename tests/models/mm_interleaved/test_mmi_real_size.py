"""The published size without its memory: the name and shape of every tensor, on the meta device."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from mg_fast import MMInterleavedConfig, MMInterleavedForConditionalGeneration
from mg_fast.testing.random_interleaved import make_interleaved_config

WIDTH, MAP_WIDTH = 5120, 1024
# Vicuna 13B, CLIP ViT-L/14 and Stable Diffusion 2.1 base, as their publishers describe them.
VICUNA_13B = dict(
    model_type="llama",
    vocab_size=32002,
    hidden_size=WIDTH,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
CLIP_L_14 = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
    image_size=224,
    hidden_act="quick_gelu",
)
UNET_2_1_BASE = dict(
    _class_name="UNet2DConditionModel",
    sample_size=64,
    in_channels=4,
    out_channels=4,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    block_out_channels=[320, 640, 1280, 1280],
    layers_per_block=2,
    attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024,
    use_linear_projection=True,
)
VAE_2_1_BASE = dict(
    _class_name="AutoencoderKL",
    sample_size=768,
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    latent_channels=4,
)
SCHEDULER = dict(_class_name="PNDMScheduler", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
VISUAL_PERCEIVER = dict(
    num_queries=64,
    hidden_size=768,
    encoder_hidden_size=MAP_WIDTH,
    cross_attention_frequency=2,
    num_hidden_layers=12,
    num_attention_heads=12,
    qk_normalization=True,
)
IMAGE_PERCEIVER = dict(
    num_queries=77,
    hidden_size=1024,
    encoder_hidden_size=WIDTH,
    cross_attention_frequency=1,
    num_hidden_layers=1,
    num_attention_heads=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def published_config() -> MMInterleavedConfig:
    return MMInterleavedConfig(
        text_config=VICUNA_13B,
        vision_config=CLIP_L_14,
        unet_config=UNET_2_1_BASE,
        vae_config=VAE_2_1_BASE,
        scheduler_config=SCHEDULER,
        visual_perceiver=VISUAL_PERCEIVER,
        image_perceiver=IMAGE_PERCEIVER,
    )


def affine(*shape: int) -> dict[str, tuple[int, ...]]:
    """A weight of this shape, and the bias of its outputs."""
    return {"weight": shape, "bias": shape[:1]}


def under(prefix: str, **parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of several parts under one prefix. Two underscores in a part's name stand for a dot."""
    return {
        f"{prefix}{part.replace('__', '.')}.{name}": shape
        for part, tensors in parts.items()
        for name, shape in tensors.items()
    }


def vision_tower() -> dict[str, tuple[int, ...]]:
    """CLIP with the adapter, from the original's description."""
    prefix, width = "visual_tokenizer.encoder.vision_model.", 1024
    shapes = {
        f"{prefix}embeddings.class_embedding": (width,),
        f"{prefix}embeddings.patch_embedding.weight": (width, 3, 14, 14),
        f"{prefix}embeddings.position_embedding.weight": (257, width),
        f"{prefix}embeddings.position_ids": (1, 257),
        f"{prefix}adapter_level_embed": (3, width),
    }
    shapes |= under(prefix, pre_layrnorm=affine(width), adapter_up=affine(width, width, 2, 2))
    for i in range(24):
        shapes |= under(
            f"{prefix}encoder.layers.{i}.",
            layer_norm1=affine(width),
            layer_norm2=affine(width),
            **{f"self_attn__{name}_proj": affine(width, width) for name in ("q", "k", "v", "out")},
            mlp__fc1=affine(4096, width),
            mlp__fc2=affine(width, 4096),
        )
    inner, before = 64, 3
    for place in (0, 3, 6):
        shapes[f"{prefix}adapter_spm.stem.{place}.weight"] = (inner, before, 3, 3)
        shapes |= under(f"{prefix}adapter_spm.stem.", **{str(place + 1): affine(inner)})
        before = inner
    for name, before, after in (("conv2", 64, 128), ("conv3", 128, 256), ("conv4", 256, 256)):
        shapes[f"{prefix}adapter_spm.{name}.0.weight"] = (after, before, 3, 3)
        shapes |= under(f"{prefix}adapter_spm.{name}.", **{"1": affine(after)})
    for i, channels in enumerate((64, 128, 256, 256), 1):
        shapes |= under(f"{prefix}adapter_spm.", **{f"fc{i}": affine(width, channels, 1, 1)})

    def attention(levels: int) -> dict[str, dict]:
        """Deformable attention with 16 heads and 4 points, and the norms before it."""
        return {
            "query_norm": affine(width),
            "feat_norm": affine(width),
            "attn__sampling_offsets": affine(16 * levels * 4 * 2, width),
            "attn__attention_weights": affine(16 * levels * 4, width),
            "attn__value_proj": affine(512, width),
            "attn__output_proj": affine(width, 512),
        }

    extractor = attention(1) | {
        "ffn__fc1": affine(256, width),
        "ffn__dwconv__dwconv": affine(256, 1, 3, 3),
        "ffn__fc2": affine(width, 256),
        "ffn_norm": affine(width),
    }
    for i in range(4):
        block = f"{prefix}adapter_interactions.{i}."
        shapes[f"{block}injector.gamma"] = (width,)
        shapes |= under(f"{block}injector.", **attention(3)) | under(f"{block}extractor.", **extractor)
    for i in range(2):
        shapes |= under(f"{prefix}adapter_interactions.3.extra_extractors.{i}.", **extractor)
    return shapes


def perceiver(prefix: str, queries: int, width: int, read: int, layers: int, frequency: int, head: int | None):
    """A Q-Former; `head` is the width of the norms of queries and keys, where it has them."""
    shapes = {f"{prefix}queries": (1, queries, width)} | under(f"{prefix}blip2qformer.", layernorm=affine(width))
    for i in range(layers):
        parts = {"attention": width} | ({"crossattention": read} if i % frequency == 0 else {})
        for part, source in parts.items():
            names = {"query": affine(width, width), "key": affine(width, source), "value": affine(width, source)}
            if head is not None:
                names |= {"q_norm": affine(head), "k_norm": affine(head)}
            at = f"{prefix}blip2qformer.encoder.layer.{i}.{part}."
            shapes |= under(f"{at}attention.", **names)
            shapes |= under(f"{at}output.", dense=affine(width, width), LayerNorm=affine(width))
        shapes |= under(
            f"{prefix}blip2qformer.encoder.layer.{i}.",
            intermediate_query__dense=affine(3072, width),
            output_query__dense=affine(width, 3072),
            output_query__LayerNorm=affine(width),
        )
    return shapes


def synchronizer(prefix: str, width: int, levels: int, pictures: int) -> dict[str, tuple[int, ...]]:
    """The feature synchronizer with 16 heads and 8 points, and one more weight per level for ignoring it."""
    return {f"{prefix}ignore_token": (1, 1, 1, 1024), f"{prefix}query_relpos.weight": (pictures, width)} | under(
        prefix,
        sampling_offsets=affine(256, width),
        dynamic_offset_mask=affine(width, width),
        attention_weights=affine(16 * levels * 9, width),
        value_proj=affine(1024, MAP_WIDTH),
        output_proj=affine(width, 1024),
    )


def language_model() -> dict[str, tuple[int, ...]]:
    shapes = {"mm_decoder.embed_tokens.weight": (32002, WIDTH), "mm_decoder.norm.weight": (WIDTH,)}
    for i in range(40):
        layer = f"mm_decoder.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (13824, WIDTH) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, 13824)
        shapes |= {f"{layer}{norm}.weight": (WIDTH,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if i % 4 == 0:
            at = f"{layer}llama_cross_attn."
            shapes |= {f"{at}gate": (1,), f"{at}norm1.weight": (WIDTH,), f"{at}norm2.weight": (MAP_WIDTH,)}
            shapes |= synchronizer(f"{at}attn.", WIDTH, 3, 50)
    shapes |= under("text_decoder.", head=affine(32002, WIDTH), head_new=affine(2, WIDTH))
    return shapes


def drawing() -> dict[str, tuple[int, ...]]:
    shapes = {"image_decoder.neg_prompt_embeds": (1, 77, 1024)}
    shapes |= perceiver("image_decoder.perceiver_resampler.", 77, 1024, WIDTH, 1, 1, None)
    for name, kind, config in (("vae", AutoencoderKL, VAE_2_1_BASE), ("unet", UNet2DConditionModel, UNET_2_1_BASE)):
        with torch.device("meta"):
            part = kind.from_config(config)
        shapes |= {f"image_decoder.decoder.{name}.{key}": tuple(t.shape) for key, t in part.state_dict().items()}
    widths = [320] * 4 + [640] * 3 + [1280] * 5
    places = [f"mmfs_down_blocks.{i}" for i in range(12)] + ["mmfs_mid_block"]
    for place, width in zip(places, [*widths, 1280]):
        block = f"image_decoder.decoder.mmfs_module.{place}."
        shapes[f"{block}pos_embed"] = (4096, width)
        shapes |= under(block, query_norm=affine(width), feat_norm=affine(MAP_WIDTH), conv=affine(width, width, 1, 1))
        shapes |= synchronizer(f"{block}mmfs.", width, 4, 10)
    return shapes


@pytest.fixture(scope="module")
def shapes():
    return MMInterleavedForConditionalGeneration.published_shapes(published_config())


def numbers(shapes, prefix: str) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def test_every_published_tensor(shapes):
    expected = vision_tower() | language_model() | drawing()
    expected |= {
        "visual_tokenizer.pos_embed": (257, MAP_WIDTH),
        "visual_tokenizer.clip_mean": (1, 3, 1, 1),
        "visual_tokenizer.clip_std": (1, 3, 1, 1),
        "soi_token": (1, WIDTH),
    }
    expected |= under(
        "visual_tokenizer.",
        pos_proj=affine(MAP_WIDTH, MAP_WIDTH),
        pos_ln=affine(MAP_WIDTH),
        post_ln=affine(MAP_WIDTH),
        proj=affine(WIDTH, 768),
    )
    expected |= perceiver("visual_tokenizer.perceiver_resampler.", 64, 768, MAP_WIDTH, 12, 2, 64)
    expected |= under("", context_feat_proj=affine(WIDTH, WIDTH))
    assert {name: (shapes.get(name), shape) for name, shape in expected.items() if shapes.get(name) != shape} == {}
    assert sorted(shapes.keys() - expected.keys()) == []
    assert MMInterleavedForConditionalGeneration.published_shapes(make_interleaved_config("13b")) == shapes


def test_numbers_that_others_published(shapes):
    """The sizes of Stable Diffusion's parts, of Llama 13B, and of the synchronizers in the original's description."""
    decoder = "image_decoder.decoder."
    assert numbers(shapes, f"{decoder}unet.") == 865_910_724
    assert numbers(shapes, f"{decoder}vae.") == 83_653_863
    assert round(numbers(shapes, f"{decoder}mmfs_module.") / 1e6, 1) == 101.6
    tables = sum(math.prod(s) for name, s in shapes.items() if "mmfs_module" in name and name.endswith("pos_embed"))
    assert round(tables / 1e6, 1) == 44.6
    assert round(numbers(shapes, "mm_decoder.layers.4.llama_cross_attn.attn.") / 1e6, 1) == 36.3
    # Llama 13B has 13,015,864,320 numbers with its head. Here the vocabulary is larger by two, and the head has a bias.
    llama = numbers(shapes, "mm_decoder.") - sum(
        numbers(shapes, f"mm_decoder.layers.{i}.llama_cross") for i in range(0, 40, 4)
    )
    assert llama + numbers(shapes, "text_decoder.head.") == 13_015_864_320 + 2 * 2 * WIDTH + 32002


def test_predicted_bytes(shapes):
    """In bfloat16, the weights leave room for pictures, keys and values, and a drawing within 36 GB."""
    predicted = 2 * sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith("position_ids"))
    assert predicted / 1e9 == pytest.approx(30, abs=1), predicted
