"""MMInterleavedConfig: the original's config.yaml together with the configurations of the models that it names."""

from pathlib import Path

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from ...errors import CheckpointError, quoted, shortened
from ...runtime.arguments import whole_number
from ..families import INTERLEAVED_TYPE, YAML_FILE, is_published_interleaved
from ..protocol import CACHE_NAMES
from ..registration import register_configuration
from ..tensor_files import HUB_ARGUMENTS, blaming
from .published import read_published

# The sides of the feature maps that the vision tower's adapter gives for a picture of 224 pixels.
MAP_SIDES = (64, 32, 16, 8)
# The side of a picture in pixels, and of a patch of the vision tower.
PICTURE_SIDE, PATCH_SIDE = 224, 14
# The side of a drawn picture for which the synchronizer of the original's U-Net is laid out.
DRAWN_SIDE = 512
# Rows of the tables of relative positions: one more than the pictures that a query may see.
LLM_MAX_IMAGES, UNET_MAX_IMAGES = 50, 10
# A unit of the offsets in the language model's synchronizers is this fraction of a picture's side.
LLM_BASE = 16
# Attributes that are positive whole numbers.
_SIZES = (
    "num_img_token",
    "cross_attention_frequency",
    "image_embed_dim",
    "seq_len",
    "image_size",
    "condition_length",
    "condition_width",
    "spm_inplane",
    "adapter_points",
    "llm_mmfs_heads",
    "llm_mmfs_points",
    "unet_mmfs_width",
    "unet_mmfs_heads",
    "unet_mmfs_points",
)


class MMInterleavedConfig(PreTrainedConfig):
    """Configuration of an MM-Interleaved model.

    The defaults are the published model's sizes. `save_pretrained` writes all of it into config.json, so that a saved
    model needs no other folder.

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

    model_type = INTERLEAVED_TYPE
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

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *, llm=None, clip=None, diffusion=None, return_unused_kwargs=False, **kwargs
    ):
        """Reads a folder in the published layout (config.yaml), or the config.json that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id of a model that was saved by this project.
            llm, clip, diffusion: for the published layout, the folders or hub ids of the language model, the vision
                tower and Stable Diffusion, for those that are not where config.yaml says.
            return_unused_kwargs, **kwargs: as in transformers.

        Raises:
            CheckpointError: the published folder lacks a file or a key, or its parts do not fit each other.
        """
        if not is_published_interleaved(pretrained_model_name_or_path):
            return super().from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=return_unused_kwargs, **kwargs
            )
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        hub = {name: value for name, value in hub.items() if value is not None}
        arguments = read_published(pretrained_model_name_or_path, llm=llm, clip=clip, diffusion=diffusion, **hub)
        where = Path(pretrained_model_name_or_path) / YAML_FILE
        with blaming(where):
            config = cls(**arguments)
            config.check(shortened(str(where), 120))
        unused = {}
        for name, value in kwargs.items():
            if hasattr(config, name):
                setattr(config, name, value)
            else:
                unused[name] = value
        return (config, unused) if return_unused_kwargs else config

    @property
    def pixels_of_llm(self) -> int:
        """Pixels of the maps that the language model's synchronizers read, all levels together."""
        return sum(side * side for side in self.spatial_shapes)

    @property
    def synchronized_layers(self) -> list[int]:
        """The indices of the language model's layers that have a synchronizer."""
        return list(range(0, self.text_config.num_hidden_layers, self.cross_attention_frequency))

    def check(self, where: str = "the configuration") -> None:
        """Refuses a configuration whose parts do not fit each other.

        Args:
            where: what the message names as the place of the numbers.

        Raises:
            CheckpointError: the message gives the number that was found and the one that was expected.
        """
        parts = ("text_config", "vision_config", "unet_config", "vae_config", "scheduler_config")
        absent = [name for name in (*parts, "visual_perceiver", "image_perceiver") if not getattr(self, name)]
        if absent:
            raise CheckpointError(f"{where} lacks {', '.join(absent)}: expected a complete MM-Interleaved model")
        for name in _SIZES:
            if (whole_number(getattr(self, name)) or 0) < 1:
                raise CheckpointError(
                    f"{where}: {name} must be a whole number of at least 1, got {quoted(getattr(self, name))}"
                )
        text, vision = self.text_config, self.vision_config
        equal = {
            "side of the vision tower's pictures": (vision.image_size, PICTURE_SIDE),
            "side of the vision tower's patches": (vision.patch_size, PATCH_SIDE),
            "width of the vision tower": (vision.hidden_size, self.image_embed_dim),
            "spatial_shapes": (tuple(self.spatial_shapes), MAP_SIDES[-len(self.spatial_shapes) :]),
            "queries of the visual perceiver": (self.visual_perceiver.get("num_queries"), self.num_img_token),
            "queries of the image perceiver": (self.image_perceiver.get("num_queries"), self.condition_length),
            "width of the image perceiver": (self.image_perceiver.get("hidden_size"), self.condition_width),
            "width that the image perceiver reads": (self.image_perceiver.get("encoder_hidden_size"), text.hidden_size),
            "width that the visual perceiver reads": (
                self.visual_perceiver.get("encoder_hidden_size"),
                self.image_embed_dim,
            ),
            "width of the U-Net's condition": (self.unet_config.get("cross_attention_dim"), self.condition_width),
        }
        for name, (found, expected) in equal.items():
            if found != expected:
                raise CheckpointError(f"{where}: the {name} must be {expected}, got {found}")
        divided = {
            "width of the feature maps": (self.image_embed_dim, self.llm_mmfs_heads),
            "width of the U-Net's synchronizers": (self.unet_mmfs_width, self.unet_mmfs_heads),
            f"largest picture side {DRAWN_SIDE}": (DRAWN_SIDE, self.image_size),
        }
        for name, (number, divisor) in divided.items():
            if number % divisor:
                raise CheckpointError(f"{where}: the {name} ({number}) must be a multiple of {divisor}")
        for name in ("bos_token_id", "pad_token_id", "soi_token_id", "image_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < text.vocab_size:
                raise CheckpointError(f"{where}: {name} must lie in the vocabulary of {text.vocab_size}, got {value}")


register_configuration(MMInterleavedConfig, (INTERLEAVED_TYPE,))
