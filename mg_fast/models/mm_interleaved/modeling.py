"""MMInterleavedForConditionalGeneration: visual tokenizer, language model and image decoder as one model."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...errors import PromptError
from ...runtime.layer_dtypes import call
from ...runtime.placement import execution_device
from ..logits_to_keep import kept_positions
from ..protocol import CACHE, CACHE_NAMES
from ..registration import register_model
from .configuration import MMInterleavedConfig
from .decoding import CONSTANT_INPUTS, InterleavedDecoding
from .drawing import PictureGeneration
from .generation import InterleavedGeneration, default_generation_config
from .image_decoder import ImageDecoder
from .language_model import SynchronizedLlamaModel, TextDecoder
from .loading import InterleavedCheckpoints
from .naming import register_names
from .seeing import InterleavedSeeing
from .visual_tokenizer import VisualTokenizer


@dataclass
class MMInterleavedOutput(CausalLMOutputWithPast):
    """Language-model output with the image tokens [n_images, T, D] that were spliced into the prompt.

    The image tokens are in `image_hidden_states`.
    """

    image_hidden_states: torch.Tensor | None = None


class MMInterleavedPreTrainedModel(PreTrainedModel):
    config_class = MMInterleavedConfig
    base_model_prefix = "mm_decoder"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The picture side and what draws each have parameters of their own beside those of their parts.
    _no_split_modules = ["SynchronizedDecoderLayer", "VisualTokenizer", "ImageDecoder"]
    # What the synchronizers read of pictures is large. A layer on another device fetches its own part of it.
    _skip_keys_device_placement = [*CACHE_NAMES, *CONSTANT_INPUTS]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def device(self) -> torch.device:
        """The device that the model computes on. Offloaded weights are brought to this device."""
        return execution_device(self)


class PictureMark(nn.Module):
    """Holds what is added to the embedding of the token that begins a picture.

    It is a module, because accelerate and torchao pass over parameters that lie outside of any module.

    Args:
        width: of the language model.
    """

    def __init__(self, width: int):
        super().__init__()
        self.soi_token = nn.Parameter(torch.zeros(1, width))

    def forward(self) -> torch.Tensor:
        """The parameter, [1, D]; where it is offloaded, it is brought to the device for this call."""
        return self.soi_token


class MMInterleavedForConditionalGeneration(
    InterleavedCheckpoints,
    InterleavedGeneration,
    PictureGeneration,
    InterleavedDecoding,
    InterleavedSeeing,
    MMInterleavedPreTrainedModel,
    GenerationMixin,
):
    """MM-Interleaved (arXiv 2401.10208): reads pictures and texts in any order, answers, and draws pictures.

    It loads published checkpoints by folder or hub id with `from_pretrained`. The parameters have the published
    names, except for `picture_mark.soi_token`.

    Args:
        config: a complete configuration.

    Raises:
        CheckpointError: parts of the configuration are absent or do not fit each other.
    """

    def __init__(self, config: MMInterleavedConfig):
        config.check()
        super().__init__(config)
        width = config.text_config.hidden_size
        self.visual_tokenizer = VisualTokenizer(config)
        self.mm_decoder = SynchronizedLlamaModel(config)
        self.text_decoder = TextDecoder(config)
        self.context_feat_proj = nn.Linear(width, width)
        self.picture_mark = PictureMark(width)
        self.image_decoder = ImageDecoder(config)
        self.generation_config = default_generation_config(config)
        self.post_init()

    @property
    def soi_token(self) -> torch.Tensor:
        """What is added to the embedding of the token that begins a picture, [1, D]."""
        return self.picture_mark()

    def get_input_embeddings(self) -> nn.Module:
        return self.mm_decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.mm_decoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.text_decoder.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.text_decoder.head = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """Returns the embedding, whose size cannot be changed.

        Raises:
            ValueError: another size is asked for. The two tokens of pictures must stay the last ones, because a head of
                their own is added to the last two logits.
        """
        size = self.config.text_config.vocab_size
        if new_num_tokens is not None and new_num_tokens != size:
            raise ValueError(
                f"the vocabulary must keep its {size} tokens, of which the last two begin and mark pictures"
            )
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_image_per_seq: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        image_maps: torch.Tensor | None = None,
        picture_values: torch.Tensor | None = None,
        picture_features: torch.Tensor | None = None,
        picture_index: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        cache=None,
        **kwargs,
    ) -> MMInterleavedOutput | tuple:
        """Runs one pass of the language model over a prompt with its pictures, or over what follows a prompt.

        Args:
            input_ids: int64 [B, L]. A picture is the token that begins it and T image tokens.
            attention_mask: [B, L], 0 at padding.
            pixel_values: [n_images, 3, 224, 224] in 0..1, the pictures of all rows in reading order.
            num_image_per_seq: int64 [B], the number of pictures of each row; None counts them in the ids.
            image_tokens, image_maps: [n_images, T, D] and [n_images, 5440, C], from `get_image_features`, instead of
                pixels.
            picture_values, picture_features, picture_index: what the synchronizers read, from `with_pictures`; see
                `SynchronizedLlamaModel.forward`. They are needed with `inputs_embeds`, and after a prompt.
            position_ids: [B, L]; None counts all positions, padding included, as the original does where it draws.
                `generate` leaves padding out.
            past_key_values: keys and values of earlier positions.
            inputs_embeds: [B, L, D], instead of ids, with image tokens in their places.
            labels: [B, L], -100 where no loss is wanted.
            logits_to_keep: only that many last positions get logits (0: all), or the positions in a list or tensor [n].
            return_dict: False returns a tuple.
            cache: another name of `past_key_values`, by which transformers 5.24 and newer pass it.
            **kwargs: passed to the language model and `loss_function`, as in transformers' own models.

        Returns:
            Logits [B, L, vocabulary], the loss if there are labels, keys and values, and where they are asked for, the
            hidden states of all layers, the last one after the final norm.

        Raises:
            PromptError: the prompt is too long, pictures do not fit their places, or what is read of them is missing.
            ValueError: both or neither of ids and embeddings came.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        cache = past_key_values if cache is None else cache
        read = {
            "picture_values": picture_values,
            "picture_features": picture_features,
            "picture_index": picture_index,
        }
        after_prompt = cache is not None and int(cache.get_seq_length()) > 0
        if picture_index is None and (after_prompt or input_ids is None):
            raise PromptError(
                "inputs_embeds, and ids after a prompt, need what model.with_pictures(input_ids, inputs) gave for the "
                "whole prompt: picture_values or picture_features, and the rows of picture_index for their positions"
            )
        if inputs_embeds is None and after_prompt:
            inputs_embeds = self.embed_ids(input_ids)
        elif inputs_embeds is None:
            self.check_length(input_ids.shape[1])
            pictures = {
                "pixel_values": pixel_values,
                "num_image_per_seq": num_image_per_seq,
                "image_tokens": image_tokens,
                "image_maps": image_maps,
            }
            found = self.with_pictures(input_ids, {**pictures, **read})
            image_tokens = found.get("image_tokens")
            inputs_embeds = self.embed(input_ids, image_tokens=image_tokens)
            read = {name: found.get(name) for name in read}
        outputs = self.mm_decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **read,
            **{CACHE: cache},
            **kwargs,
        )
        logits = call(self.text_decoder, outputs.last_hidden_state[:, kept_positions(logits_to_keep)])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        output = MMInterleavedOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_tokens,
            **{CACHE: getattr(outputs, CACHE)},
        )
        return output.to_tuple() if return_dict is False else output


register_names(MMInterleavedForConditionalGeneration)
register_model(MMInterleavedConfig, MMInterleavedForConditionalGeneration)
