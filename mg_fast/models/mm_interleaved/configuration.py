"""MMInterleavedConfig: the original's config.yaml together with the configurations of the models that it names."""

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from ..protocol import CACHE_NAMES

# The sides of the feature maps that the vision tower's adapter gives for a picture of 224 pixels.
MAP_SIDES = (64, 32, 16, 8)
# The side of a picture in pixels.
PICTURE_SIDE = 224
# The side of a drawn picture for which the synchronizer of the original's U-Net is laid out.
DRAWN_SIDE = 512
# Rows of the tables of relative positions: one more than the pictures that a query may see.
LLM_MAX_IMAGES, UNET_MAX_IMAGES = 50, 10
# A unit of the offsets in the language model's synchronizers is this fraction of a picture's side.
LLM_BASE = 16


class MMInterleavedConfig(PreTrainedConfig):
    """Configuration of an MM-Interleaved model.

    The defaults are the published model's sizes.

    Attributes:
        text_config: the language model's LlamaConfig. Its vocab_size includes the two special tokens of pictures.
        vision_config: the CLIPVisionConfig of the tower, without its adapter.
        unet_config, vae_config, scheduler_config: the configurations of Stable Diffusion's parts, as diffusers writes
            them.
        num_img_token: tokens of a picture in the language model.
        cross_attention_frequency: every so many layers of the language model, beginning with the first, has a
            synchronizer.
        image_embed_dim: width of the feature maps, which is the width of the vision tower.
        spatial_shapes: sides of the maps that the language model's synchronizers read, the largest first. They are the
            last ones of `MAP_SIDES`.
        seq_len: most positions of a context from which a picture is drawn.
        soi_token_id, image_token_id: ids of the token that begins a picture, and of the tokens that stand for it.
        visual_perceiver: settings of the Q-Former that makes tokens of a picture's features.
        image_perceiver: settings of the Q-Former that makes the U-Net's condition of a context.
        image_size: side of a drawn picture in pixels.
        condition_length, condition_width: rows and width of the U-Net's condition.
        sd_base_seed: seed of the first picture, where the caller gives none.
        spm_inplane: channels of the first convolutions of the spatial prior module.
        adapter_points, llm_mmfs_heads, llm_mmfs_points, unet_mmfs_width, unet_mmfs_heads, unet_mmfs_points: sizes of
            deformable attention in the vision tower's adapter and of the synchronizers.
    """

    model_type = "mm_interleaved"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = [*CACHE_NAMES, "image_hidden_states"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    unet_config: dict | None = None
    vae_config: dict | None = None
    scheduler_config: dict | None = None
    num_img_token: int = 64
    cross_attention_frequency: int = 4
    image_embed_dim: int = 1024
    spatial_shapes: list[int] | tuple[int, ...] = (32, 16, 8)
    seq_len: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 31999
    soi_token_id: int = 32000
    image_token_id: int = 32001
    visual_perceiver: dict | None = None
    image_perceiver: dict | None = None
    image_size: int = 512
    condition_length: int = 77
    condition_width: int = 1024
    sd_base_seed: int = 0
    spm_inplane: int = 64
    adapter_points: int = 4
    llm_mmfs_heads: int = 16
    llm_mmfs_points: int = 8
    unet_mmfs_width: int = 1024
    unet_mmfs_heads: int = 16
    unet_mmfs_points: int = 8

    def __post_init__(self, **kwargs):
        for name, default in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
            value = getattr(self, name)
            if isinstance(value, dict):
                value = CONFIG_MAPPING[value.get("model_type", default)](**value)
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    @property
    def pixels_of_llm(self) -> int:
        """Pixels of the maps that the language model's synchronizers read, all levels together."""
        return sum(side * side for side in self.spatial_shapes)

    @property
    def synchronized_layers(self) -> list[int]:
        """The indices of the language model's layers that have a synchronizer."""
        return list(range(0, self.text_config.num_hidden_layers, self.cross_attention_frequency))
