"""MiniGeminiForConditionalGeneration: towers, mining, projector and language model as one model of transformers."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from ...modules import ConvNeXtPyramid, PatchInfoMining
from ...ops import reference
from ...runtime.layer_dtypes import at_seam, call
from ...runtime.placement import execution_device
from ..logits_to_keep import kept_positions
from ..protocol import CACHE, CACHE_NAMES
from ..registration import register_model
from .configuration import MiniGeminiConfig
from .decoding import MiniGeminiDecoding
from .generation import GenerationWithPictures
from .loading import PublishedCheckpoints
from .places import PICTURE_INPUTS, check_no_places, check_places, of_new_positions
from .seeing import MiniGeminiSeeing
from .vision import PictureFeatures, build_projector, low_resolution_features


@dataclass
class MiniGeminiOutput(CausalLMOutputWithPast):
    """Language-model output with the image tokens [n_images, T, hidden], unscaled, that were spliced into the prompt.

    The image tokens are in `image_hidden_states`.
    """

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
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def device(self) -> torch.device:
        """The device that the model computes on. Offloaded weights are brought to this device."""
        return execution_device(self)


class MiniGeminiModel(MiniGeminiPreTrainedModel):
    """Everything except the language-model head."""

    def __init__(self, config: MiniGeminiConfig):
        super().__init__(config)
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.vision_tower_aux = ConvNeXtPyramid.from_dims(**config.vision_config_aux)
        self.patch_mining = PatchInfoMining(config.mm_hidden_size, config.vision_config_aux["dims"])
        self.mm_projector = build_projector(
            config.mm_projector_type, config.mm_hidden_size, config.text_config.hidden_size
        )
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
        """Computes the image tokens of pictures.

        Args:
            pixel_values: [n_images, V, 3, LR, LR] with V = 1, or in HD the tiles row by row and the global view last.
            pixel_values_hr: [n_images, 3, HR, HR].
            backend: overrides the choice in force.
            stage: called with the name of every stage; returns the context that the stage runs in (`Meter.stage`
                measures stages).

        Returns:
            `pooler_output`: image tokens [n_images, T, hidden], T = 576 or 2880, global view first, unscaled.
            `last_hidden_state`: the tokens before the projector, [n_images, T, D].
        """
        features = self.picture_features(pixel_values, pixel_values_hr, backend=backend, stage=stage)
        return BaseModelOutputWithPooling(last_hidden_state=features.tokens, pooler_output=features.image_tokens)

    def picture_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_hr: torch.Tensor,
        *,
        see_low: Callable[[torch.Tensor], torch.Tensor] | None = None,
        see_high: Callable[[torch.Tensor], list[torch.Tensor]] | None = None,
        mine: Callable[[torch.Tensor, list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]] | None = None,
        backend: str | None = None,
        stage: Callable = contextlib.nullcontext,
    ) -> PictureFeatures:
        """Runs all steps from pixels to image tokens: low-resolution tower, high-resolution tower, mining, projector.

        Packed or compiled parts may replace the model's own. Each is given as a function that is called once.

        Args:
            pixel_values, pixel_values_hr: as in `get_image_features`.
            see_low: from pixel_values to queries; default `low_resolution_queries`.
            see_high: from pixel_values_hr to stage maps, channels last; default the high-resolution tower.
            mine: from queries and stage maps to image tokens, and the tokens before the projector; default
                `mine_and_project`.
            backend: for those of the three that are the model's own; overrides the choice in force.
            stage: as in `get_image_features`. A part that replaces mining and projector is one stage.
        """
        self.check_pixels(pixel_values, pixel_values_hr)
        see_low = see_low or functools.partial(self.low_resolution_queries, backend=backend)
        see_high = see_high or functools.partial(self.vision_tower_aux, backend=backend)
        mine = mine or functools.partial(self.mine_and_project, backend=backend, stage=stage)
        with stage("LR tower"):
            queries = see_low(pixel_values)
        with stage("HR tower"):
            pyramid = [level.to(queries.device) for level in see_high(pixel_values_hr)]
        image_tokens, tokens = mine(queries, pyramid)
        return PictureFeatures(queries, pyramid, tokens, image_tokens)

    def mine_and_project(
        self,
        queries: torch.Tensor,
        pyramid: list[torch.Tensor],
        *,
        backend: str | None = None,
        stage: Callable = contextlib.nullcontext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns the towers' features into image tokens.

        Args:
            queries: [n_images, V, N, D], views in the order of pixel_values.
            pyramid: stage maps of the pictures, channels last.
            backend, stage: as in `get_image_features`.

        Returns:
            Image tokens [n_images, T, hidden], global view first, unscaled; and the tokens before the projector,
            [n_images, T, D].
        """
        with stage("patch info mining"):
            mined = self.patch_mining(queries, pyramid, grid=self.config.image_grid, backend=backend)
            # The sum has the wider dtype where those of CLIP and mining differ.
            tokens = reference.order_tokens(queries + mined.to(queries.device), grid=self.config.image_grid)
        with stage("projector"):
            return call(self.mm_projector, tokens), tokens

    def low_resolution_queries(
        self,
        pixel_values: torch.Tensor,
        *,
        backend: str | None = None,
        tower: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Turns low-resolution views [n_images, V, 3, LR, LR] into queries [n_images, V, N, D] in the same order.

        `tower` replaces CLIP.
        """
        n, cells = len(pixel_values), self.config.image_grid**2
        # The batch holds all tiles of all pictures and then the global views. This is the original's order, kept so
        # that numbers match to the last bit.
        tiles = pixel_values[:, :cells].flatten(0, 1)
        views = torch.cat([tiles, pixel_values[:, cells:].flatten(0, 1)])
        if tower is None:
            features = low_resolution_features(
                self.vision_tower, views, self.config.mm_vision_select_layer, backend=backend
            )
        else:
            features = tower(views)
        return torch.cat(
            [features[: len(tiles)].unflatten(0, (n, cells)), features[len(tiles) :].unflatten(0, (n, -1))], dim=1
        )

    def check_pixels(self, pixel_values: torch.Tensor, pixel_values_hr: torch.Tensor | None) -> None:
        """Raises ValueError for pixels of shapes that the model does not take."""
        if pixel_values_hr is None:
            raise ValueError("pixel_values came without pixel_values_hr: the processor returns both")
        config, n = self.config, len(pixel_values)
        low = (n, config.views, 3, config.vision_config.image_size, config.vision_config.image_size)
        high = (n, 3, config.image_size_aux, config.image_size_aux)
        for name, tensor, expected in (("pixel_values", pixel_values, low), ("pixel_values_hr", pixel_values_hr, high)):
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name}: expected {list(expected)} for {n} picture(s), got {list(tensor.shape)}")

    def splice(
        self,
        inputs_embeds: torch.Tensor,
        image_tokens: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None,
        *,
        checked: bool = True,
    ) -> torch.Tensor:
        """Replaces the picture positions of text embeddings by image tokens, in order.

        Args:
            inputs_embeds: [B, L, hidden].
            image_tokens: [n_images, T, hidden], unscaled.
            mm_token_type_ids: [B, L], 1 where a picture stands.
            checked: count the picture positions; fake tensors, which have no values, cannot be counted.

        Raises:
            PromptError: the number of picture positions differs from the number of image tokens.
        """
        if checked:
            check_places(mm_token_type_ids, image_tokens)
        mask = mm_token_type_ids == 1
        image_tokens = image_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
        if self.config.text_config.model_type == "gemma":
            # Gemma scales in its embedding module, which image tokens bypass. There, too, the factor is rounded to the
            # model's dtype.
            image_tokens = image_tokens * torch.tensor(
                self.config.text_config.hidden_size**0.5, dtype=inputs_embeds.dtype
            )
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), image_tokens)

    def embed(self, input_ids: torch.Tensor, **pictures: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, L, hidden] of a prompt [B, L], with its pictures (see `PICTURE_INPUTS`) in their places."""
        return self._with_pictures(self.embed_ids(input_ids), **pictures)[0]

    def embed_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, L, hidden] of ids alone, in the dtype of the layers.

        A tied head may have given the embedding weights another dtype.
        """
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
        inputs_embeds, image_tokens = self._with_pictures(
            inputs_embeds, pixel_values, pixel_values_hr, image_tokens, mm_token_type_ids
        )
        outputs = self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return outputs, image_tokens


class MiniGeminiForConditionalGeneration(
    PublishedCheckpoints,
    GenerationWithPictures,
    MiniGeminiDecoding,
    MiniGeminiSeeing,
    MiniGeminiPreTrainedModel,
    GenerationMixin,
):
    """Mini-Gemini with a language-model head.

    It loads published checkpoints by folder or hub id with `from_pretrained`, and `save_pretrained` writes them back.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MiniGeminiConfig):
        super().__init__(config)
        self.model = MiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_hr: torch.Tensor,
        *,
        backend: str | None = None,
        stage: Callable = contextlib.nullcontext,
    ) -> BaseModelOutputWithPooling:
        """Image tokens [n_images, T, hidden] as `pooler_output`; see `MiniGeminiModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_values_hr, backend=backend, stage=stage)

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
        cache=None,
        **kwargs,
    ) -> MiniGeminiOutput | tuple:
        """Runs one pass of the whole model.

        Args:
            input_ids: [B, L]; a picture is T copies of a filler id.
            pixel_values, pixel_values_hr: pictures in the order of their places in the batch.
            image_tokens: [n_images, T, hidden] from `get_image_features`, instead of pixels.
            mm_token_type_ids: [B, L], 1 at picture positions.
            past_key_values: keys and values of earlier positions. Pictures whose places are among these may be given
                again, with mm_token_type_ids for the whole prompt; they are not encoded again.
            labels: [B, L], -100 where no loss is wanted.
            logits_to_keep: only that many last positions get logits (0: all), or the positions in a list or tensor [n].
            allow_long: accept prompts beyond the trained length; None takes the model's `allow_long`.
            return_dict: False returns a tuple.
            cache: another name of `past_key_values`, by which transformers 5.24 and newer pass it.
            **kwargs: passed to the language model and `loss_function`, as in transformers' own models:
                `num_items_in_batch`, by which Trainer weighs the parts of an accumulated batch, `shift_labels`,
                `ignore_index`, ...

        Raises:
            PromptError: the prompt is longer than the model was trained for, or pictures do not match their places.
        """
        length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        pictures = dict(zip(PICTURE_INPUTS, (pixel_values, pixel_values_hr, image_tokens, mm_token_type_ids)))
        cache = past_key_values if cache is None else cache
        cached = 0 if cache is None else int(cache.get_seq_length())
        if not cached:
            # Only prompts are checked: an answer may grow past the trained length.
            self.check_length(length, 0, allow_long)
        elif any(tensor is not None for tensor in pictures.values()):
            pictures = of_new_positions(pictures, length, cached, self.config.tokens_per_picture)
        outputs, image_tokens = self.model(
            input_ids=input_ids,
            **pictures,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        logits = call(self.lm_head, outputs.last_hidden_state[:, kept_positions(logits_to_keep)])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        output = MiniGeminiOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_tokens,
            **{CACHE: getattr(outputs, CACHE)},
        )
        return output.to_tuple() if return_dict is False else output


register_model(MiniGeminiConfig, MiniGeminiForConditionalGeneration)
