"""Loads published checkpoints into the model and writes them back."""

import contextlib
import copy
import logging
import os

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from ...errors import CheckpointError
from ...quantization import check_config, check_savable, finish, named_config
from ...runtime.device_maps import complete_device_map
from ...runtime.dtypes import wanted_dtype
from ...runtime.placement import set_offloaded
from ..templates import get_template, stop_ids
from ..tensor_files import Table, read_tensors
from .checkpoint import Checkpoint, check_names, decide_template, load_tokenizer, open_checkpoint
from .configuration import MiniGeminiConfig
from .geometry import check_geometry
from .naming import published_to_ours

logger = logging.getLogger(__name__)


class PublishedCheckpoints:
    """Reads and writes checkpoints in the published layout.

    Its methods extend those of transformers' PreTrainedModel, so it stands before that class among the model's bases.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        template: str | None = None,
        base_model: str | os.PathLike | None = None,
        allow_long: bool = False,
        **kwargs,
    ):
        """Loads a checkpoint in the published layout, by folder or hub id.

        The other arguments are those of transformers' method.

        Args:
            template: overrides the prompt template, and is saved by `save_pretrained`. It decides the stop ids in
                `generation_config`.
            base_model: the base language model of a stage-1 adapter folder (`mm_projector.bin`).
            allow_long: accept prompts longer than the model was trained on.
            quantization_config: `int8`, `int4` or `fp8` (torchao's weight-only schemes), or a quantization
                configuration of transformers, for the language model's layers. Everything else keeps its dtype.

        Raises:
            BackendError: the quantization cannot run here, or the dtype is unknown.
            CheckpointError: this is not a Mini-Gemini checkpoint, a file is unreadable, or tensors are missing,
                unexpected or mis-shaped; the message names them.
        """
        if template is not None:
            get_template(template)
        info_wanted = kwargs.pop("output_loading_info", False)
        kwargs["weights_only"] = True
        for name in ("dtype", "torch_dtype"):
            if kwargs.get(name) is not None:
                kwargs[name] = wanted_dtype(kwargs[name])
        config = kwargs.pop("config", None)
        if config is not None:
            config = (
                copy.deepcopy(config)
                if isinstance(config, MiniGeminiConfig)
                else MiniGeminiConfig.from_pretrained(config)
            )
        checkpoint = open_checkpoint(pretrained_model_name_or_path, base_model=base_model, config=config, **kwargs)
        config = checkpoint.config
        _override(config, kwargs)
        check_geometry(config, checkpoint.folder)
        quantized = getattr(config, "quantization_config", None)
        if quantized is None:
            # A quantized checkpoint stores other tensors under other names. transformers' report after loading covers
            # them.
            check_names(
                cls.published_shapes(config),
                checkpoint.tensors,
                tied=config.tie_word_embeddings,
                where=checkpoint.weights_folder,
            )
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, str):
            if quantized is not None:
                raise CheckpointError(
                    f"{checkpoint.folder} is quantized already (quantization_config in its config.json): "
                    f"it cannot be quantized by {quantization!r} again"
                )
            dtype = _weights_dtype(kwargs, checkpoint)
            kwargs["quantization_config"] = named_config(
                quantization, config.text_config, kwargs.get("device_map"), dtype
            )
        elif quantization is not None:
            check_config(quantization)

        if isinstance(kwargs.get("device_map"), dict):
            tied = cls._tied_weights_keys if config.tie_word_embeddings else None
            kwargs["device_map"] = complete_device_map(kwargs["device_map"], cls._on_meta(config).state_dict(), tied)
        filled = {published_to_ours(name): name for name in checkpoint.extra}
        with _quiet_report(bool(filled)):
            model, info = super().from_pretrained(
                checkpoint.weights_folder, *model_args, config=config, output_loading_info=True, **kwargs
            )
        missing = sorted(set(info["missing_keys"]) - filled.keys())
        if missing or info["mismatched_keys"]:
            raise CheckpointError(
                f"{checkpoint.weights_folder}: {len(missing)} tensors did not load: {', '.join(missing[:4])}"
            )
        model._fill(checkpoint.extra)
        if quantized is not None or quantization is not None:
            finish(model)
        info["missing_keys"] = set(missing)

        embedding = model.get_input_embeddings()
        if config.tie_word_embeddings and model.lm_head.weight is not embedding.weight and not embedding.weight.is_meta:
            # transformers keeps a stored head that differs. In a tied model the head is the embedding, as in the
            # original.
            logger.warning(
                "%s stores an lm_head.weight beside tied embeddings; the embedding is used", checkpoint.weights_folder
            )
            model.lm_head.weight = embedding.weight
        model.config.name_or_path = str(pretrained_model_name_or_path)
        model.allow_long = allow_long
        if template is not None:
            model.config.conversation_template = template
        model._set_stop_ids(checkpoint.folder, checkpoint.weights_folder)
        return (model, info) if info_wanted else model

    @classmethod
    def published_shapes(cls, config: MiniGeminiConfig) -> dict[str, tuple[int, ...]]:
        """The name and shape of every tensor of a published checkpoint of this configuration. Allocates nothing."""
        model = cls._on_meta(config)
        state = dict(model.state_dict())
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}

    @classmethod
    def _on_meta(cls, config: MiniGeminiConfig) -> "PublishedCheckpoints":
        """A model on the meta device, without weights."""
        try:
            with torch.device("meta"):
                return cls(copy.deepcopy(config))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"config.json describes no model that can be built: {error!r}") from error

    def _fill(self, tensors: Table) -> None:
        """Copies tensors that are stored outside the weights folder into the model."""
        if tensors:
            # transformers remembers only the renamings that it needed for its own files. Without this record, a save
            # applies all registered renamings.
            self._weight_conversions = None
        parameters = dict(self.named_parameters())
        for name, tensor in read_tensors(tensors):
            ours = published_to_ours(name)
            if ours not in parameters:
                continue
            if parameters[ours].is_meta:
                owner, _, parameter = ours.rpartition(".")
                if not set_offloaded(self.get_submodule(owner), parameter, tensor):
                    raise CheckpointError(
                        f"{name}: its module is on the meta device, and no hook of accelerate loads weights into it"
                    )
                continue
            with torch.no_grad():
                parameters[ours].copy_(tensor)

    def _set_stop_ids(self, *folders) -> None:
        """Writes the template's stop ids into generation_config, after those that it has already.

        Published files lack the id that ends a turn.
        """
        try:
            tokenizer = load_tokenizer(*folders)
        except CheckpointError as error:
            logger.warning("%s; stop ids stay as generation_config has them", error)
            return
        ids = stop_ids(decide_template(self.config, tokenizer), tokenizer)
        given = self.generation_config.eos_token_id
        given = given if isinstance(given, list) else [] if given is None else [given]
        self.generation_config.eos_token_id = given + [i for i in ids if i not in given]

    def save_pretrained(self, save_directory, **kwargs):
        """Writes the checkpoint back in the published layout: names, shapes, values and flat config keys.

        Quantized weights are written as they are stored, and load again without a `quantization_config`. int4 weights
        that are packed for a CPU cannot be saved.
        """
        check_savable(self)
        kwargs["save_original_format"] = True
        super().save_pretrained(save_directory, **kwargs)


def _override(config: MiniGeminiConfig, kwargs: dict) -> None:
    """Moves the keyword arguments that are configuration keys into the configuration, as transformers does."""
    for key in kwargs.keys() - {"dtype", "torch_dtype", "quantization_config", "name_or_path"}:
        for part in (config, config.text_config):
            if hasattr(part, key):
                setattr(part, key, kwargs.pop(key))
                break


def _weights_dtype(kwargs: dict, checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype in which transformers will load the weights: the requested one, or else that of the checkpoint."""
    dtype = wanted_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
    if isinstance(dtype, dict):
        # Under its empty key, transformers looks up the dtype in which it creates the weights.
        dtype = wanted_dtype(dtype.get("", torch.get_default_dtype()))
    return checkpoint.stored_dtype() if dtype == "auto" else dtype


@contextlib.contextmanager
def _quiet_report(quiet: bool):
    """Keeps transformers from reporting tensors as missing that are filled in right afterwards."""
    level = transformers_logging.get_verbosity()
    if quiet:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
