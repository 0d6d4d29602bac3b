"""Text-to-image pipelines of diffusers with random weights: small ones, and SDXL at its published size."""

from collections.abc import Mapping

import torch

# The parts of the published SDXL (stabilityai/stable-diffusion-xl-base-1.0), as far as they differ from diffusers' and
# transformers' defaults.
SDXL: Mapping[str, Mapping[str, object]] = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
        "vocab_size": 49408,
    },
}
_BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
_TINY_UNET = {
    **_BLOCKS,
    "sample_size": 16,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "use_linear_projection": True,
}
_TINY_VAE = {
    **_BLOCKS,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "sample_size": 32,
}
# The bytes, each also as the last of a word, and the two tokens at the ends.
_TINY_VOCABULARY = 2 * 256 + 2


def _tiny_text(width: int) -> dict[str, object]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": width,
        "vocab_size": _TINY_VOCABULARY,
    }


# The same parts for pictures of 32 x 32 pixels.
TINY_SDXL: Mapping[str, Mapping[str, object]] = {
    "unet": {
        **_TINY_UNET,
        "cross_attention_dim": 16 + 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        # Six numbers of sizes and crops of width 4, and the pooled text.
        "projection_class_embeddings_input_dim": 6 * 4 + 24,
    },
    "vae": _TINY_VAE,
    "text_encoder": _tiny_text(16),
    "text_encoder_2": _tiny_text(24),
}


def sdxl_parts(settings: Mapping[str, Mapping[str, object]] = TINY_SDXL) -> dict[str, torch.nn.Module]:
    """The modules of an SDXL pipeline that have settings, by name, on the default device and in the default dtype."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(name: str) -> CLIPTextConfig:
        size = settings[name]["vocab_size"]
        ends = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
        return CLIPTextConfig(**settings[name], **ends)

    makers = {
        "unet": lambda: UNet2DConditionModel(**settings["unet"]),
        "vae": lambda: AutoencoderKL(**settings["vae"]),
        "text_encoder": lambda: CLIPTextModel(text("text_encoder")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(text("text_encoder_2")),
    }
    return {name: make().eval() for name, make in makers.items() if name in settings}


def random_sdxl(settings: Mapping[str, Mapping[str, object]] = TINY_SDXL, seed: int = 0):
    """A StableDiffusionXLPipeline with random weights; by default a small one, which draws 32 x 32 pixels."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(seed)
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    )
    tokenizers = {"tokenizer": byte_tokenizer(), "tokenizer_2": byte_tokenizer()}
    return StableDiffusionXLPipeline(**sdxl_parts(settings), **tokenizers, scheduler=scheduler)


def random_sd(seed: int = 0):
    """A small StableDiffusionPipeline, of another family than SDXL, that draws pictures of 32 x 32 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    ends = {"bos_token_id": _TINY_VOCABULARY - 2, "eos_token_id": _TINY_VOCABULARY - 1}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**_TINY_VAE).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**_tiny_text(16), **ends)).eval(),
        tokenizer=byte_tokenizer(),
        unet=UNet2DConditionModel(**_TINY_UNET, cross_attention_dim=16).eval(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def random_flux(seed: int = 0):
    """A small FluxPipeline, of a family with a transformer and T5, that draws pictures of 128 x 128 pixels."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    ends = {"bos_token_id": _TINY_VOCABULARY - 2, "eos_token_id": _TINY_VOCABULARY - 1}
    tokenizer = byte_tokenizer()
    longer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<|endoftext|>", model_max_length=512
    )
    t5 = T5Config(vocab_size=_TINY_VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = {"block_out_channels": (4,), "norm_num_groups": 1, "latent_channels": 1, "sample_size": 32}
    vae |= {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0, "scaling_factor": 1.5}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(**vae).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**_tiny_text(16), **ends)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=longer,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ).eval(),
    )


def byte_tokenizer():
    """A CLIP tokenizer that reads every byte of a text as a token of its own."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)
