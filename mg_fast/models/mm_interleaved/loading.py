"""Loads published checkpoints into the model, and writes the model into one self-contained folder."""

import copy

import torch
from transformers.core_model_loading import revert_weight_conversion

from ...errors import CheckpointError
from ...quantization import check_config, check_savable, finish, named_config
from ...runtime.device_maps import complete_device_map
from ...runtime.dtypes import wanted_dtype
from .checkpoint import COMPUTED, InterleavedCheckpoint, check_interleaved_names, open_interleaved
from .configuration import MMInterleavedConfig

# The submodule of a layer that reads pictures. It keeps its dtype.
SYNCHRONIZER = "llama_cross_attn"
# Full names of what quantization leaves in its dtype: everything except the self-attention and the MLPs of the language
# model. transformers reads them as regular expressions.
UNQUANTIZED_PARTS = (
    "visual_tokenizer",
    r"mm_decoder\.embed_tokens",
    rf"mm_decoder\.layers\.\d+\.{SYNCHRONIZER}",
    "text_decoder",
    "context_feat_proj",
    "picture_mark",
    "image_decoder",
)


class InterleavedCheckpoints:
    """Reads checkpoints in the published layout or in this project's own, and writes the latter.

    Its methods extend those of transformers' PreTrainedModel, so it stands before that class among the model's bases.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, llm=None, clip=None, diffusion=None, config=None, **kwargs
    ):
        """Loads a checkpoint by folder or hub id.

        The folder is in the published layout or was written by `save_pretrained`:

        - Published: config.yaml, and all state dictionaries (*.safetensors, or else *.bin) in `checkpoint/` or
          `mm_interleaved_pretrain/`, or else beside config.yaml. That file names the folders of the language model, of
          CLIP and of Stable Diffusion, of which only the configurations are read. All weights come from the checkpoint.
        - Written by `save_pretrained`: config.json and model*.safetensors, and no other folder.

        Weights are converted to the wanted dtype one by one, straight from the mapped files.

        Args:
            pretrained_model_name_or_path: the folder or hub id.
            llm, clip, diffusion: folders or hub ids of the language model, of CLIP and of Stable Diffusion, for those
                that are not where config.yaml says. Weights of a hub id are not fetched.
            config: a MMInterleavedConfig, or a folder with one, instead of the folder's own.
            dtype: the dtype of all floating-point weights. "auto", the default, is that of config.json, or else that in
                which the checkpoint stores the language model's embedding. A table of positions that is stored in
                another dtype is converted like all other tensors. Only the two constants by which pixels are normalised
                stay in float32.
            quantization_config: `int8`, `int4` or `fp8` (torchao's weight-only schemes), or a quantization
                configuration of transformers, for self-attention and MLPs of the language model. Everything else keeps
                its dtype, the synchronizers included.
            **kwargs: as in transformers (`device_map`, `attn_implementation`, `output_loading_info`, ...).

        Raises:
            BackendError: the quantization cannot run here, the dtype is unknown, or diffusers is not installed.
            CheckpointError: this is not an MM-Interleaved checkpoint, a file is unreadable, or tensors are missing,
                unexpected or mis-shaped; the message names them.
        """
        info_wanted = kwargs.pop("output_loading_info", False)
        kwargs["weights_only"] = True
        dtype = wanted_dtype(kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs.pop("dtype"))
        if isinstance(dtype, dict):
            raise CheckpointError("dtype: expected one dtype for the whole model, got a dict")
        kwargs.pop("dtype", None)
        if config is not None:
            config = (
                copy.deepcopy(config)
                if isinstance(config, MMInterleavedConfig)
                else MMInterleavedConfig.from_pretrained(config)
            )
        checkpoint = open_interleaved(
            pretrained_model_name_or_path, config=config, llm=llm, clip=clip, diffusion=diffusion, **kwargs
        )
        config = checkpoint.config
        for name in kwargs.keys() - {"quantization_config", "name_or_path"}:
            if hasattr(config, name):
                # As in transformers, a keyword argument can change the configuration.
                setattr(config, name, kwargs.pop(name))
        config.check("the configuration with the given changes")
        quantized = getattr(config, "quantization_config", None)
        shapes = cls.published_shapes(config)
        if quantized is None:
            # A quantized checkpoint stores other tensors under other names. transformers' report after loading covers
            # them.
            check_interleaved_names(shapes, checkpoint.tensors, where=checkpoint.weights_folder)
        dtype = checkpoint.stored_dtype() if dtype == "auto" else dtype
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, str):
            if quantized is not None:
                raise CheckpointError(
                    f"{checkpoint.folder} is quantized already (quantization_config in its config.json): "
                    f"it cannot be quantized by {quantization!r} again"
                )
            kwargs["quantization_config"] = named_config(
                quantization, config.text_config, kwargs.get("device_map"), dtype, unquantized=UNQUANTIZED_PARTS
            )
        elif quantization is not None:
            check_config(quantization, UNQUANTIZED_PARTS)
        if isinstance(kwargs.get("device_map"), dict):
            kwargs["device_map"] = complete_device_map(kwargs["device_map"], cls._on_meta(config).state_dict())

        model, info = super().from_pretrained(
            *cls._source(checkpoint, shapes, kwargs),
            *model_args,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            **kwargs,
        )
        # Tables that are computed may be absent.
        info["missing_keys"] = {name for name in info["missing_keys"] if not COMPUTED.search(name)}
        if info["missing_keys"] or info["mismatched_keys"]:
            names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            raise CheckpointError(
                f"{checkpoint.weights_folder}: {len(names)} tensors did not load: {', '.join(names[:4])}"
            )
        if quantized is not None or quantization is not None:
            finish(model, UNQUANTIZED_PARTS)
        model.config.name_or_path = str(pretrained_model_name_or_path)
        return (model, info) if info_wanted else model

    @classmethod
    def _source(cls, checkpoint: InterleavedCheckpoint, shapes: dict, kwargs: dict) -> tuple:
        """The first arguments of transformers' method: the folder, or None with the tensors among the others."""
        if not checkpoint.published:
            return (checkpoint.weights_folder,)
        kwargs["state_dict"] = checkpoint.state(shapes)
        return (None,)

    @classmethod
    def published_shapes(cls, config: MMInterleavedConfig) -> dict[str, tuple[int, ...]]:
        """The name and shape of every tensor of a published checkpoint of this configuration. Allocates nothing."""
        model = cls._on_meta(config)
        return {name: tuple(tensor.shape) for name, tensor in model.published_state().items()}

    def published_state(self) -> dict[str, torch.Tensor]:
        """The model's own tensors by their published names."""
        return revert_weight_conversion(self, dict(self.state_dict()))

    @classmethod
    def _on_meta(cls, config: MMInterleavedConfig) -> "InterleavedCheckpoints":
        """A model on the meta device, without weights."""
        try:
            with torch.device("meta"):
                return cls(copy.deepcopy(config))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the configuration describes no model that can be built: {error!r}") from error

    def save_pretrained(self, save_directory, **kwargs):
        """Writes the model into one folder that loads without any other: config.json and model*.safetensors.

        Names, shapes and values are those of the published state dictionary. Quantized weights are written as they are
        stored, and load again without a `quantization_config`. int4 weights that are packed for a CPU cannot be saved.
        The tokenizer is written by the processor's `save_pretrained`.
        """
        check_savable(self)
        kwargs["save_original_format"] = True
        super().save_pretrained(save_directory, **kwargs)
