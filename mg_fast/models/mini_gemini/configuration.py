"""MiniGeminiConfig: the flat config.json of published checkpoints, and the language model's configuration in it."""

import copy
import dataclasses
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from ...errors import CheckpointError, quoted
from ...runtime.arguments import plain_numbers, whole_number
from ..protocol import CACHE_NAMES
from ..registration import register_configuration
from ..templates import TEMPLATES

# `model_type` as published (the uploads of March 2024 say mini_gemini*), and the bare base models that a folder may
# still name.
TEXT_MODEL_TYPES = {
    "mgm": "llama",
    "mgm_gemma": "gemma",
    "mgm_mixtral": "mixtral",
    "mgm_mistral": "mistral",
    "mini_gemini": "llama",
    "mini_gemini_gemma": "gemma",
    "mini_gemini_mixtral": "mixtral",
    "mini_gemini_mistral": "mistral",
    "llama": "llama",
    "gemma": "gemma",
    "mixtral": "mixtral",
    "mistral": "mistral",
}
PUBLISHED_MODEL_TYPES = {"llama": "mgm", "gemma": "mgm_gemma", "mixtral": "mgm_mixtral", "mistral": "mgm_mistral"}
PUBLISHED_ARCHITECTURES = {
    "llama": "MGMLlamaForCausalLM",
    "gemma": "MGMGemmaForCausalLM",
    "mixtral": "MGMMixtralForCausalLM",
    "mistral": "MGMMistralForCausalLM",
}

# The towers of every published checkpoint. A configuration that does not describe its towers means these.
CLIP_VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CONVNEXT_LARGE = {"dims": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "norm_eps": 1e-6}

# What the original assumes for a key that is absent from a published config.json.
_ABSENT = {"image_aspect_ratio": None, "mm_projector_type": "linear", "tokenizer_model_max_length": None}

# Keys that belong to transformers' own machinery, not to the language model.
_OWN_KEYS = (
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
)


class MiniGeminiConfig(PreTrainedConfig):
    """Configuration of a Mini-Gemini model, read from and written as the flat config.json of published checkpoints.

    The language model's keys (`hidden_size`, `rope_theta`, ...) lie flat beside the `mm_*` and `image_*` keys;
    `text_config` is built from them. This project adds two keys, which are written on save so that a round trip keeps
    what tensor shapes do not tell: `vision_config` (CLIP) and `vision_config_aux` (ConvNeXt: `dims`, `depths`,
    `norm_eps`). Without them, both towers are those of the published models until `from_pretrained` reads the
    checkpoint's own shapes.

    Attributes (named as in config.json; the original specifies them):
        text_config: LlamaConfig, GemmaConfig, MixtralConfig or MistralConfig.
        image_size_aux: side of the high-resolution picture in pixels.
        image_grid: number of LR tiles per side; 2 in HD models.
        image_global: whether a global LR view joins the tiles.
        image_aspect_ratio: `pad` makes pictures square by padding; any other value crops the centre.
        tokenizer_model_max_length: trained context length in tokens, or None.
        conversation_template: prompt template saved with the checkpoint; None decides by the tokenizer.
    """

    model_type = "mgm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    # Trainer's evaluation stacks what every batch returns, but these differ in shape from batch to batch.
    keys_to_ignore_at_inference = [*CACHE_NAMES, "image_hidden_states"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    vision_config_aux: dict | None = None
    mm_vision_tower: str | None = "openai/clip-vit-large-patch14-336"
    mm_vision_tower_aux: str | None = "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup"
    mm_hidden_size: int = 1024
    mm_hidden_size_aux: int = 2880
    mm_projector_type: str = "mlp2x_gelu"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_use_im_start_end: bool = False
    image_size_aux: int = 768
    image_grid: int = 1
    image_global: bool = False
    image_aspect_ratio: str | None = "pad"
    tokenizer_model_max_length: int | None = 2048
    conversation_template: str | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        # Neither the strict checks of transformers nor JSON accept NumPy's numbers.
        kwargs = {key: plain_numbers(value) for key, value in kwargs.items()}
        for key in _field_names(MiniGeminiConfig):
            setattr(self, key, plain_numbers(getattr(self, key)))
        model_type = kwargs.pop("published_model_type", kwargs.pop("model_type", None))
        text = _text_model_type(model_type, self.architectures)
        # Mini-Gemini's own spellings are written back unchanged.
        self.spelled = (model_type, self.architectures)
        kwargs.pop("transformers_version", None)
        hub = {key: kwargs.pop(key) for key in _OWN_KEYS if key in kwargs}
        dtype = kwargs.pop("torch_dtype", None)
        if self.dtype is None:
            self.dtype = dtype

        if kwargs.get("quantization_config"):
            # transformers and `from_pretrained` look here for the settings of a quantized checkpoint.
            self.quantization_config = kwargs.pop("quantization_config")

        # Every other key belongs to the language model, or is passed through a round trip unchanged.
        self.flat = kwargs
        if self.text_config is None:
            rest = copy.deepcopy(kwargs)
            if self.tie_word_embeddings is not None:
                # Where config.json is silent, the default of the family's class holds. Gemma's ties the weights.
                rest["tie_word_embeddings"] = self.tie_word_embeddings
            self.text_config = _text_config(text, **rest, dtype=self.dtype)
        elif isinstance(self.text_config, dict):
            self.text_config = _text_config(self.text_config.get("model_type", text), **self.text_config)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

        # Towers in config.json override a tower folder's settings. Tensor shapes override the defaults below.
        self.towers_given = self.vision_config is not None and self.vision_config_aux is not None
        if self.vision_config is None:
            self.vision_config = clip_config(**CLIP_VIT_L_14_336)
        elif isinstance(self.vision_config, dict):
            self.vision_config = clip_config(**self.vision_config)
        if self.vision_config_aux is None:
            self.vision_config_aux = dict(CONVNEXT_LARGE)
        self.check()
        super().__post_init__(**hub)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if "image_size_aux" in config_dict:
            # This is a published file. Where it is silent, the original's defaults hold, not the defaults of a
            # configuration that is made from nothing.
            config_dict = {**_ABSENT, **config_dict}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict:
            # This class serves every spelling of the model type. transformers would warn about all but its own.
            config_dict["published_model_type"] = config_dict.get("model_type")
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def check(self) -> None:
        """Refuses values that the published layout allows but no published checkpoint uses.

        Accepting them would compute something else than the original does.
        """
        for key in ("image_size_aux", "image_grid"):
            if (whole_number(getattr(self, key)) or 0) < 1:
                raise CheckpointError(f"{key}: expected a whole number above 0, got {quoted(getattr(self, key))}")
        if self.conversation_template not in (None, *TEMPLATES):
            raise CheckpointError(
                f"conversation_template {quoted(self.conversation_template)}: expected one of {', '.join(TEMPLATES)}"
            )
        if self.image_global and self.image_grid < 2:
            raise CheckpointError(f"image_global needs image_grid >= 2, got image_grid={self.image_grid}")
        if self.mm_vision_select_feature != "patch":
            raise CheckpointError(
                f"mm_vision_select_feature: expected 'patch', got {quoted(self.mm_vision_select_feature)}"
            )
        if self.mm_use_im_start_end:
            raise CheckpointError(
                "mm_use_im_start_end=true is not supported: no published checkpoint adds these tokens"
            )
        tower = (self.mm_vision_tower or "").lower()
        # The original looks for CLIP first, so "eva" and "lavis" may stand elsewhere in a CLIP path.
        if ("eva" in tower or "lavis" in tower) and "openai" not in tower and "sharegpt4v" not in tower:
            raise CheckpointError(
                f"mm_vision_tower {quoted(self.mm_vision_tower)}: the EVA tower is not supported, only CLIP is"
            )

    @property
    def views(self) -> int:
        """The number of low-resolution views per picture."""
        return self.image_grid**2 + int(self.image_global)

    @property
    def tokens_per_view(self) -> int:
        """The number of image tokens per view, which is the number of CLIP patches."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def tokens_per_picture(self) -> int:
        """The number of image tokens per picture: 576, or 2880 in HD, for the published towers."""
        return self.views * self.tokens_per_view

    def to_dict(self) -> dict[str, Any]:
        """The flat dictionary that config.json holds, in the published spelling (`rope_theta`, `torch_dtype`)."""
        text_type = self.text_config.model_type
        out = copy.deepcopy(self.flat)
        out.update(self._flat_text())
        own = _field_names(MiniGeminiConfig) - _field_names(PreTrainedConfig)
        for name in own - {"text_config", "vision_config", "vision_config_aux"}:
            out[name] = getattr(self, name)
        if out["conversation_template"] is None:
            del out["conversation_template"]
        out["vision_config"] = self.vision_config.to_diff_dict()
        out["vision_config_aux"] = dict(self.vision_config_aux)
        model_type, architectures = self.spelled
        bare = model_type is None or not model_type.startswith(("mgm", "mini_gemini"))
        out["model_type"] = PUBLISHED_MODEL_TYPES[text_type] if bare else model_type
        out["architectures"] = [PUBLISHED_ARCHITECTURES[text_type]] if bare or not architectures else architectures
        if self.dtype is not None:
            out["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        quantization = getattr(self, "quantization_config", None)
        if quantization is not None:
            out["quantization_config"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
        # Attributes may have been set to NumPy numbers since, which JSON does not know.
        return plain_numbers(out)

    def _flat_text(self) -> dict[str, Any]:
        text = self.text_config
        names = _field_names(type(text)) - _field_names(PreTrainedConfig) - {"rope_parameters"}
        out = {name: getattr(text, name) for name in names}
        rope = dict(text.rope_parameters or {})
        out["rope_theta"] = rope.pop("rope_theta", None)
        if rope.get("rope_type", "default") != "default":
            out["rope_scaling"] = rope
        # A null where the published file has no key would only add noise.
        return {key: value for key, value in out.items() if value is not None or key in self.flat}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _text_model_type(model_type: str | None, architectures: list[str] | None) -> str:
    """The language model's type, from `model_type` and, where that is absent or general, from `architectures`."""
    if model_type is not None and model_type not in TEXT_MODEL_TYPES:
        raise CheckpointError(
            f"model_type {quoted(model_type)} is not a Mini-Gemini one: expected one of {', '.join(TEXT_MODEL_TYPES)}"
        )
    named = next((t for t in PUBLISHED_MODEL_TYPES for a in architectures or [] if t in a.lower()), None)
    if model_type is None:
        if named is None and architectures:
            raise CheckpointError(
                "config.json has no model_type, and "
                f"architectures {quoted(architectures)} names no known language model"
            )
        return named or "llama"
    text = TEXT_MODEL_TYPES[model_type]
    # Early checkpoints of every family used the plain spelling, which now stands for Llama.
    return named if named is not None and text == "llama" else text


def _text_config(text: str, **settings) -> PreTrainedConfig:
    """Makes the language model's configuration, with the activation function that the settings name.

    For `gelu`, transformers from 5.18 on gives Gemma the tanh approximation; the original computes exact GELU.
    """
    exact = text == "gemma" and settings.get("hidden_act") == "gelu"
    if exact:
        del settings["hidden_act"]
    config = CONFIG_MAPPING[text](**settings)
    if exact:
        config.hidden_act = "gelu"
    return config


def clip_config(**kwargs) -> PreTrainedConfig:
    """Makes a CLIPVisionConfig.

    The class is looked up late: its module needs transformers' model tables, which may be loading this very module.
    """
    return CONFIG_MAPPING["clip_vision_model"](**kwargs)


def _field_names(config_class: type) -> set[str]:
    return {f.name for f in dataclasses.fields(config_class)}


# llama, gemma and the other plain types stay with transformers; such folders load only through the MiniGemini* classes.
register_configuration(MiniGeminiConfig, [name for name in TEXT_MODEL_TYPES if name.startswith(("mgm", "mini_gemini"))])
