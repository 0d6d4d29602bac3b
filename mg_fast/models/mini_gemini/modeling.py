"""MiniGeminiForConditionalGeneration: towers, mining, projector and language model as one model of transformers."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from ...runtime.layer_dtypes import at_seam, call
from ...runtime.placement import execution_device
from ..logits_to_keep import kept_positions
from ..protocol import CACHE, CACHE_NAMES
from ..registration import register_model
from .configuration import MiniGeminiConfig
from .decoding import MiniGeminiDecoding
from .generation import GenerationWithPictures
from .loading import PublishedCheckpoints
from .picture_side import PictureSteps, as_embeddings
from .places import PICTURE_INPUTS, check_no_places, check_places, of_new_positions
from .seeing import MiniGeminiSeeing


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


class MiniGeminiModel(PictureSteps, MiniGeminiPreTrainedModel):
    """Everything except the language-model head."""

    def __init__(self, config: MiniGeminiConfig):
        super().__init__(config)
        self.build_picture_side(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

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
        image_tokens = as_embeddings(
            image_tokens.to(inputs_embeds.device, inputs_embeds.dtype), self.config.text_config
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
        tower_features: tuple[torch.Tensor, list[torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        given = {"pixel_values": pixel_values, "image_tokens": image_tokens, "tower_features": tower_features}
        if len(names := [name for name, value in given.items() if value is not None]) > 1:
            raise ValueError(f"expected one of {', '.join(given)}, got {' and '.join(names)}")
        if tower_features is not None:
            image_tokens, _ = self.mine_and_project(*tower_features)
            if mm_token_type_ids is None:
                if bool(tower_features[0].any()):
                    raise ValueError("tower_features: expected mm_token_type_ids beside features of pictures, got none")
                # Adding a zero makes mining and projector a part of the pass, which has no place for their results.
                zero = 0.0 * image_tokens.float().sum()
                return inputs_embeds + zero.to(inputs_embeds.device, inputs_embeds.dtype), None
        elif pixel_values is not None:
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
        tower_features: tuple[torch.Tensor, list[torch.Tensor]] | None = None,
        **kwargs,
    ) -> tuple[BaseModelOutputWithPast, torch.Tensor | None]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_ids(input_ids)
        inputs_embeds, image_tokens = self._with_pictures(
            inputs_embeds, pixel_values, pixel_values_hr, image_tokens, mm_token_type_ids, tower_features
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
        tower_features: tuple[torch.Tensor, list[torch.Tensor]] | None = None,
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
            tower_features: queries and stage maps from `FrozenTowers`, instead of pixels: only mining and projector
                run. Without mm_token_type_ids they must be those of `FrozenTowers.nothing`, and run for nothing, so
                that a batch without pictures gives their weights a gradient of zero, for which data-parallel wrappers
                wait.
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
        if cached and tower_features is not None:
            raise ValueError("tower_features are for a pass over a whole prompt, got a cache of earlier positions")
        outputs, image_tokens = self.model(
            input_ids=input_ids,
            **pictures,
            tower_features=tower_features,
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
