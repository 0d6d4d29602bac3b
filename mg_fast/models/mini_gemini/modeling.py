"""MiniGeminiForConditionalGeneration: towers, mining, projector and language model as one transformers model."""

import contextlib
import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, CLIPVisionModel, GenerationMixin, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from ...errors import CheckpointError, PromptError, quoted
from ...modules import ConvNeXtPyramid, PatchInfoMining
from ...ops import reference
from ...quantization import check_config, check_savable, finish, named_config
from ...runtime.arguments import check_stop_strings, plain_options, whole_number
from ...runtime.device_maps import complete_device_map
from ...runtime.dtypes import wanted_dtype
from ...runtime.layer_dtypes import at_seam, call
from ...runtime.placement import execution_device, set_offloaded
from ..templates import get_template, stop_ids
from ..tensor_files import Table, read_tensors
from .checkpoint import Checkpoint, check_names, decide_template, load_tokenizer, open_checkpoint
from .configuration import MiniGeminiConfig
from .geometry import check_geometry
from .naming import published_to_ours
from .places import PICTURE_INPUTS, check_no_places, check_places, of_new_positions
from .vision import build_projector, low_resolution_features

logger = logging.getLogger(__name__)


@dataclass
class MiniGeminiOutput(CausalLMOutputWithPast):
    """Language-model output; `image_hidden_states` are the unscaled image tokens [n_images, T, hidden] that were spliced in."""

    image_hidden_states: torch.Tensor | None = None


class MiniGeminiPreTrainedModel(PreTrainedModel):
    config_class = MiniGeminiConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "LlamaDecoderLayer",
        "GemmaDecoderLayer",
        "MixtralDecoderLayer",
        "MistralDecoderLayer",
        "CLIPEncoderLayer",
        "CLIPVisionEmbeddings",
        "ConvNeXtPyramid",
        "PatchInfoMining",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def device(self) -> torch.device:
        """The device that the model computes on; where weights are offloaded, the one that they are brought to."""
        return execution_device(self)


class MiniGeminiModel(MiniGeminiPreTrainedModel):
    """Everything but the language-model head."""

    def __init__(self, config: MiniGeminiConfig):
        super().__init__(config)
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.vision_tower_aux = ConvNeXtPyramid.from_dims(**config.vision_config_aux)
        self.patch_mining = PatchInfoMining(config.mm_hidden_size, config.vision_config_aux["dims"])
        self.mm_projector = build_projector(config.mm_projector_type, config.mm_hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_hr: torch.Tensor,
        *,
        backend: str | None = None,
        stage: Callable = contextlib.nullcontext,
    ) -> BaseModelOutputWithPooling:
        """Image tokens of pictures.

        Args:
            pixel_values: [n_images, V, 3, LR, LR], V = 1, or in HD the tiles row by row and the global view last.
            pixel_values_hr: [n_images, 3, HR, HR].
            backend: overrides the choice in force.
            stage: called with the name of every stage, gives the context it runs in (`Meter.stage` measures them).

        Returns:
            `pooler_output`: image tokens [n_images, T, hidden], T = 576 or 2880, global view first, unscaled.
            `last_hidden_state`: the same before the projector, [n_images, T, D].
        """
        self.check_pixels(pixel_values, pixel_values_hr)
        with stage("LR tower"):
            queries = self.low_resolution_queries(pixel_values, backend=backend)
        with stage("HR tower"):
            pyramid = [level.to(queries.device) for level in self.vision_tower_aux(pixel_values_hr, backend=backend)]
        image_tokens, tokens = self.mine_and_project(queries, pyramid, backend=backend, stage=stage)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=image_tokens)

    def mine_and_project(
        self,
        queries: torch.Tensor,
        pyramid: list[torch.Tensor],
        *,
        backend: str | None = None,
        stage: Callable = contextlib.nullcontext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The towers' features to image tokens.

        Args:
            queries: [n_images, V, N, D], views in the order of pixel_values.
            pyramid: stage maps of the pictures, channels last.
            backend, stage: as of `get_image_features`.

        Returns:
            Image tokens [n_images, T, hidden], global view first, unscaled; the same before the projector, [n_images, T, D].
        """
        with stage("patch info mining"):
            mined = self.patch_mining(queries, pyramid, grid=self.config.image_grid, backend=backend)
            # in the wider of two dtypes, where CLIP and mining have different ones
            tokens = reference.order_tokens(queries + mined.to(queries.device), grid=self.config.image_grid)
        with stage("projector"):
            return call(self.mm_projector, tokens), tokens

    def low_resolution_queries(
        self, pixel_values: torch.Tensor, *, backend: str | None = None, tower: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Low-resolution views [n_images, V, 3, LR, LR] to queries [n_images, V, N, D], in the same order of views; `tower` for CLIP's."""
        n, cells = len(pixel_values), self.config.image_grid**2
        # all tiles of all pictures, then the global views: the original's batch, kept so that numbers match to the last bit
        tiles = pixel_values[:, :cells].flatten(0, 1)
        views = torch.cat([tiles, pixel_values[:, cells:].flatten(0, 1)])
        if tower is None:
            features = low_resolution_features(self.vision_tower, views, self.config.mm_vision_select_layer, backend=backend)
        else:
            features = tower(views)
        return torch.cat([features[: len(tiles)].unflatten(0, (n, cells)), features[len(tiles) :].unflatten(0, (n, -1))], dim=1)

    def check_pixels(self, pixel_values: torch.Tensor, pixel_values_hr: torch.Tensor | None) -> None:
        """Raises ValueError for pixels of other shapes than the model takes."""
        if pixel_values_hr is None:
            raise ValueError("pixel_values came without pixel_values_hr: the processor returns both")
        config, n = self.config, len(pixel_values)
        low = (n, config.views, 3, config.vision_config.image_size, config.vision_config.image_size)
        high = (n, 3, config.image_size_aux, config.image_size_aux)
        for name, tensor, expected in (("pixel_values", pixel_values, low), ("pixel_values_hr", pixel_values_hr, high)):
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name}: expected {list(expected)} for {n} picture(s), got {list(tensor.shape)}")

    def splice(self, inputs_embeds: torch.Tensor, image_tokens: torch.Tensor, mm_token_type_ids: torch.Tensor | None) -> torch.Tensor:
        """Text embeddings with the picture positions replaced by image tokens, in order.

        Args:
            inputs_embeds: [B, L, hidden].
            image_tokens: [n_images, T, hidden], unscaled.
            mm_token_type_ids: [B, L], 1 where a picture stands.

        Raises:
            PromptError: the number of picture positions is not the number of image tokens.
        """
        check_places(mm_token_type_ids, image_tokens)
        mask = mm_token_type_ids == 1
        image_tokens = image_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
        if self.config.text_config.model_type == "gemma":
            # Gemma scales in its embedding module, which image tokens do not pass; the factor is rounded to the model's dtype there too
            image_tokens = image_tokens * torch.tensor(self.config.text_config.hidden_size**0.5, dtype=inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), image_tokens)

    def embed(self, input_ids: torch.Tensor, **pictures: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, L, hidden] of a prompt [B, L], with its pictures, named as `PICTURE_INPUTS`, in their places."""
        return self._with_pictures(self.embed_ids(input_ids), **pictures)[0]

    def embed_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, L, hidden] of ids alone, in the dtype of the layers; a tied head may have given the embeddings another one."""
        return at_seam(self.get_input_embeddings()(input_ids), self.language_model.layers)

    def _with_pictures(
        self,
        inputs_embeds: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        pixel_values_hr: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if pixel_values is not None:
            if image_tokens is not None:
                raise ValueError("expected pixel_values or image_tokens, got both")
            image_tokens = self.get_image_features(pixel_values, pixel_values_hr).pooler_output
        if image_tokens is not None:
            inputs_embeds = self.splice(inputs_embeds, image_tokens, mm_token_type_ids)
        elif mm_token_type_ids is not None and inputs_embeds.shape[1] > 1:
            check_no_places(mm_token_type_ids)
        return inputs_embeds, image_tokens

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_hr: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[BaseModelOutputWithPast, torch.Tensor | None]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_ids(input_ids)
        inputs_embeds, image_tokens = self._with_pictures(inputs_embeds, pixel_values, pixel_values_hr, image_tokens, mm_token_type_ids)
        outputs = self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return outputs, image_tokens


class MiniGeminiForConditionalGeneration(MiniGeminiPreTrainedModel, GenerationMixin):
    """Mini-Gemini with its language-model head.

    Loads published checkpoints by folder or hub id with `from_pretrained`, and writes them back with `save_pretrained`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MiniGeminiConfig):
        super().__init__(config)
        self.model = MiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.allow_long = False
        self._long_said = False
        self.post_init()

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
        """Loads a checkpoint in the published layout, by folder or hub id; see transformers' method for the other arguments.

        Args:
            template: overrides the prompt template; saved by `save_pretrained`. It decides the stop ids in `generation_config`.
            base_model: the base language model of a stage-1 adapter folder (`mm_projector.bin`).
            allow_long: accept prompts longer than the model was trained on.
            quantization_config: `int8`, `int4` or `fp8` (torchao's weight-only ones), or a transformers quantization configuration, for the
                language model's layers; everything else keeps its dtype.

        Raises:
            BackendError: a quantisation that cannot run here, or a dtype that is none.
            CheckpointError: not a Mini-Gemini checkpoint, an unreadable file, or missing, unexpected or mis-shaped tensors, by name.
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
            config = copy.deepcopy(config) if isinstance(config, MiniGeminiConfig) else MiniGeminiConfig.from_pretrained(config)
        checkpoint = open_checkpoint(pretrained_model_name_or_path, base_model=base_model, config=config, **kwargs)
        config = checkpoint.config
        _override(config, kwargs)
        check_geometry(config, checkpoint.folder)
        quantized = getattr(config, "quantization_config", None)
        if quantized is None:
            # a quantised save stores other tensors under other names; there the report after loading must do
            check_names(cls.published_shapes(config), checkpoint.tensors, tied=config.tie_word_embeddings, where=checkpoint.weights_folder)
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, str):
            if quantized is not None:
                raise CheckpointError(
                    f"{checkpoint.folder} is quantised already (quantization_config in its config.json): not by {quantization!r} again"
                )
            dtype = _weights_dtype(kwargs, checkpoint)
            kwargs["quantization_config"] = named_config(quantization, config.text_config, kwargs.get("device_map"), dtype)
        elif quantization is not None:
            check_config(quantization)

        if isinstance(kwargs.get("device_map"), dict):
            tied = cls._tied_weights_keys if config.tie_word_embeddings else None
            kwargs["device_map"] = complete_device_map(kwargs["device_map"], cls._on_meta(config).state_dict(), tied)
        filled = {published_to_ours(name): name for name in checkpoint.extra}
        with _quiet_report(bool(filled)):
            model, info = super().from_pretrained(checkpoint.weights_folder, *model_args, config=config, output_loading_info=True, **kwargs)
        missing = sorted(set(info["missing_keys"]) - filled.keys())
        if missing or info["mismatched_keys"]:
            raise CheckpointError(f"{checkpoint.weights_folder}: {len(missing)} tensors did not load: {', '.join(missing[:4])}")
        model._fill(checkpoint.extra)
        if quantized is not None or quantization is not None:
            finish(model)
        info["missing_keys"] = set(missing)

        embedding = model.get_input_embeddings()
        if config.tie_word_embeddings and model.lm_head.weight is not embedding.weight and not embedding.weight.is_meta:
            # a stored head that differs would be kept by transformers; a tied model's head is its embedding, as the original has it
            logger.warning("%s stores an lm_head.weight beside tied embeddings; the embedding is used", checkpoint.weights_folder)
            model.lm_head.weight = embedding.weight
        model.config.name_or_path = str(pretrained_model_name_or_path)
        model.allow_long = allow_long
        if template is not None:
            model.config.conversation_template = template
        model._set_stop_ids(checkpoint.folder, checkpoint.weights_folder)
        return (model, info) if info_wanted else model

    @classmethod
    def published_shapes(cls, config: MiniGeminiConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a published checkpoint of this configuration. Allocates nothing."""
        model = cls._on_meta(config)
        state = dict(model.state_dict())
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}

    @classmethod
    def _on_meta(cls, config: MiniGeminiConfig) -> "MiniGeminiForConditionalGeneration":
        """A model without weights."""
        try:
            with torch.device("meta"):
                return cls(copy.deepcopy(config))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"config.json describes no model that can be built: {error!r}") from error

    def _fill(self, tensors: Table) -> None:
        """Copies tensors that lie outside the weights folder into the model."""
        if tensors:
            # transformers remembers only the renamings that it needed itself; without them a save takes all that are registered
            self._weight_conversions = None
        parameters = dict(self.named_parameters())
        for name, tensor in read_tensors(tensors):
            ours = published_to_ours(name)
            if ours not in parameters:
                continue
            if parameters[ours].is_meta:
                owner, _, parameter = ours.rpartition(".")
                if not set_offloaded(self.get_submodule(owner), parameter, tensor):
                    raise CheckpointError(f"{name}: its module is on the meta device, and no hook of accelerate loads weights into it")
                continue
            with torch.no_grad():
                parameters[ours].copy_(tensor)

    def _set_stop_ids(self, *folders) -> None:
        """Writes the template's stop ids into generation_config, beside those it has: published ones miss the turn's end."""
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

        Quantised weights are written as they are stored, and load again without a `quantization_config`; int4 packed for a CPU cannot be.
        """
        check_savable(self)
        kwargs["save_original_format"] = True
        super().save_pretrained(save_directory, **kwargs)

    def get_image_features(
        self, pixel_values: torch.Tensor, pixel_values_hr: torch.Tensor, *, backend: str | None = None
    ) -> BaseModelOutputWithPooling:
        """Image tokens [n_images, T, hidden] as `.pooler_output`; see `MiniGeminiModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_values_hr, backend=backend)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_hr: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        allow_long: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> MiniGeminiOutput | tuple:
        """One pass of the whole model.

        Args:
            input_ids: [B, L]; a picture stands as T copies of a filler id.
            pixel_values, pixel_values_hr: pictures in the order of their places in the batch.
            image_tokens: [n_images, T, hidden] from `get_image_features`, instead of the pixels.
            mm_token_type_ids: [B, L], 1 at picture positions.
            past_key_values: keys and values of the positions before. Pictures whose places are among these may come once more, with
                mm_token_type_ids for the whole prompt; they are not encoded again.
            labels: [B, L], -100 where no loss is wanted.
            logits_to_keep: only that many last positions (0: all) get logits, or those that a list or a tensor [n] names.
            allow_long: accept prompts beyond the trained length; None takes the model's `allow_long`.
            return_dict: False returns a tuple.
            **kwargs: reach the language model and `loss_function`, as in transformers' own models: `num_items_in_batch`, by which
                Trainer weighs the parts of an accumulated batch, `shift_labels`, `ignore_index`, ...

        Raises:
            PromptError: a prompt longer than the model was trained for, or pictures that do not match their places.
        """
        length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        pictures = dict(zip(PICTURE_INPUTS, (pixel_values, pixel_values_hr, image_tokens, mm_token_type_ids)))
        cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if not cached:
            # only prompts: an answer may grow past the trained length
            self.check_length(length, 0, allow_long)
        elif any(tensor is not None for tensor in pictures.values()):
            pictures = of_new_positions(pictures, length, cached, self.config.tokens_per_picture)
        outputs, image_tokens = self.model(
            input_ids=input_ids,
            **pictures,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = call(self.lm_head, outputs.last_hidden_state[:, kept_positions(logits_to_keep)])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        output = MiniGeminiOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_tokens,
        )
        return output.to_tuple() if return_dict is False else output

    def check_length(self, prompt: int, new: int = 0, allow_long: bool | None = None) -> None:
        """Holds a prompt of so many tokens, and so many new ones, against the context; `PromptError` has the numbers."""
        limit = self.config.text_config.max_position_embeddings
        trained = min(self.config.tokenizer_model_max_length or limit, limit)
        if prompt > limit:
            raise PromptError(f"the prompt has {prompt} tokens, the model has {limit} positions (max_position_embeddings)")
        if prompt > trained:
            message = f"the prompt has {prompt} tokens, the model was trained on at most {trained} (tokenizer_model_max_length)"
            if not (self.allow_long if allow_long is None else allow_long):
                raise PromptError(f"{message}; allow_long=True (--allow-long) runs it all the same, up to {limit}")
            if not self._long_said:
                self._long_said = True
                logger.warning("%s; running it because allow_long is set", message)
        if prompt + new > limit:
            raise PromptError(
                f"{prompt} prompt tokens and max_new_tokens={new} need {prompt + new} positions, the model has {limit} "
                f"(max_position_embeddings): at most {limit - prompt} new tokens fit"
            )

    def generate(self, inputs: torch.Tensor | None = None, *, allow_long: bool | None = None, **kwargs):
        """GenerationMixin's `generate`, after a check of the lengths.

        Args:
            allow_long: accept prompts between the trained length and max_position_embeddings, with one warning.

        Raises:
            PromptError: the prompt, or the prompt and `max_new_tokens` together, are too long (nothing is ever cut); or stop
                strings that are no texts.
        """
        kwargs = plain_options(kwargs)
        ids = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        given = kwargs.get("generation_config") or self.generation_config
        check_stop_strings(kwargs.get("stop_strings", given.stop_strings))
        if ids is not None:
            new = kwargs.get("max_new_tokens") or getattr(given, "max_new_tokens", None)
            if new is None:
                new = max(0, (kwargs.get("max_length") or given.max_length or 0) - ids.shape[1])
            self.check_length(ids.shape[1], new, allow_long)
            pictures = kwargs.get("pixel_values") is not None or kwargs.get("image_tokens") is not None
            if pictures and (kwargs.get("prefill_chunk_size") or given.prefill_chunk_size):
                raise PromptError("prefill_chunk_size cuts a prompt without regard to its pictures: not with pictures")
        if allow_long is not None:
            kwargs["allow_long"] = allow_long
        return super().generate(inputs, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        pictures = {name: kwargs.pop(name) for name in PICTURE_INPUTS if name in kwargs}
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            model_inputs.update(pictures)
            marks, ids = pictures.get("mm_token_type_ids"), model_inputs.get("input_ids")
            if marks is not None and ids is not None:
                # prompt lookup appends guesses to the prompt, which are text
                model_inputs["mm_token_type_ids"] = F.pad(marks, (0, input_ids.shape[1] - marks.shape[1]))
        return model_inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams: pictures are encoded once, and every row's image tokens are repeated as a block.

        The stock version repeats pictures one by one, which hands the two pictures of a prompt to the wrong beams.
        """
        if expand_size > 1:
            marks, pictures = model_kwargs.get("mm_token_type_ids"), {name: model_kwargs.pop(name, None) for name in PICTURE_INPUTS[:-1]}
            cache = model_kwargs.get("past_key_values")
            if marks is not None and (cached := 0 if cache is None else int(cache.get_seq_length())):
                pictures["mm_token_type_ids"] = marks
                pictures = of_new_positions(pictures, marks.shape[1] - cached, cached, self.config.tokens_per_picture)
                marks = pictures.pop("mm_token_type_ids")
            pixels, pixels_hr, image_tokens = (pictures[name] for name in PICTURE_INPUTS[:-1])
            if pixels is not None:
                image_tokens = self.get_image_features(pixels, pixels_hr).pooler_output
            if image_tokens is not None:
                check_places(marks, image_tokens)
                per_row = (marks.sum(dim=1) // image_tokens.shape[1]).tolist()
                blocks = image_tokens.split(per_row)
                expanded = torch.cat([block for block in blocks for _ in range(expand_size)])
                input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
                return input_ids, {**model_kwargs, "image_tokens": expanded}
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)


def kept_positions(logits_to_keep) -> "slice | torch.Tensor | list":
    """The index of the positions that get logits. Python's own numbers and tensors take no step that torch.compile cannot trace."""
    if isinstance(logits_to_keep, (int, torch.SymInt)):
        return slice(-logits_to_keep, None)
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim:
        return logits_to_keep
    number = whole_number(logits_to_keep)
    if number is not None:
        return slice(-number, None)
    if not (isinstance(logits_to_keep, (list, slice)) or getattr(logits_to_keep, "ndim", 0) == 1):
        raise ValueError(f"logits_to_keep: expected a whole number, or a list or tensor of positions, got {quoted(logits_to_keep)}")
    return logits_to_keep


def _override(config: MiniGeminiConfig, kwargs: dict) -> None:
    """Moves those keyword arguments that are configuration keys into the configuration, as transformers does."""
    for key in kwargs.keys() - {"dtype", "torch_dtype", "quantization_config", "name_or_path"}:
        for part in (config, config.text_config):
            if hasattr(part, key):
                setattr(part, key, kwargs.pop(key))
                break


def _weights_dtype(kwargs: dict, checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype that transformers will load the weights in: the one asked for, else that of the checkpoint."""
    dtype = wanted_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
    if isinstance(dtype, dict):
        # Under its empty key transformers looks for the dtype that it makes the weights in.
        dtype = wanted_dtype(dtype.get("", torch.get_default_dtype()))
    return checkpoint.stored_dtype() if dtype == "auto" else dtype


@contextlib.contextmanager
def _quiet_report(quiet: bool):
    """Keeps transformers from reporting as missing what is filled in right after."""
    level = transformers_logging.get_verbosity()
    if quiet:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


AutoModelForImageTextToText.register(MiniGeminiConfig, MiniGeminiForConditionalGeneration, exist_ok=True)
# Other parts of transformers look models up by these tables of class names, which `register` does not fill. By the first one Trainer shifts
# the labels of its label smoothing, which would be held against the wrong positions otherwise. By the second one `transformers serve` knows
# that the model takes pictures.
for _names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
    _names[MiniGeminiConfig.model_type] = MiniGeminiForConditionalGeneration.__name__
