"""What transformers' `generate` needs to know about prompts with pictures, and the check of prompt lengths."""

import logging

import torch
import torch.nn.functional as F

from ...errors import PromptError
from ...runtime.arguments import check_stop_strings, plain_options
from ..protocol import CACHE, take_cache
from .places import PICTURE_INPUTS, check_places, of_new_positions

logger = logging.getLogger(__name__)


class GenerationWithPictures:
    """Generation with prompts that hold pictures.

    Its methods extend those of transformers' GenerationMixin, so it stands before that class among the model's bases.
    """

    # Whether prompts longer than the trained length are accepted, and whether the warning about one was given.
    allow_long = False
    _warned_of_length = False

    def check_length(self, prompt: int, new: int = 0, allow_long: bool | None = None) -> None:
        """Checks `prompt` tokens and `new` further ones against the context; `PromptError` gives the numbers."""
        limit = self.config.text_config.max_position_embeddings
        trained = min(self.config.tokenizer_model_max_length or limit, limit)
        if prompt > limit:
            raise PromptError(
                f"the prompt has {prompt} tokens, the model has {limit} positions (max_position_embeddings)"
            )
        if prompt > trained:
            message = (
                f"the prompt has {prompt} tokens, "
                f"the model was trained on at most {trained} (tokenizer_model_max_length)"
            )
            if not (self.allow_long if allow_long is None else allow_long):
                raise PromptError(f"{message}; allow_long=True (--allow-long) runs it all the same, up to {limit}")
            if not self._warned_of_length:
                self._warned_of_length = True
                logger.warning("%s; running it because allow_long is set", message)
        if prompt + new > limit:
            raise PromptError(
                f"{prompt} prompt tokens and max_new_tokens={new} need {prompt + new} positions, the model has {limit} "
                f"(max_position_embeddings): at most {limit - prompt} new tokens fit"
            )

    def generate(self, inputs: torch.Tensor | None = None, *, allow_long: bool | None = None, **kwargs):
        """Generates as GenerationMixin's `generate` does, after a check of the lengths.

        Args:
            allow_long: accept prompts between the trained length and max_position_embeddings, with one warning.

        Raises:
            PromptError: the prompt alone, or the prompt and `max_new_tokens` together, are too long (nothing is ever
                cut), or a stop string is not text.
        """
        kwargs = plain_options(kwargs)
        if (cache := take_cache(kwargs)) is not None:
            kwargs[CACHE] = cache
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
                raise PromptError(
                    "prefill_chunk_size cuts a prompt without regard to its pictures: it cannot be used with pictures"
                )
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
                # Prompt lookup appends guessed tokens to the prompt, and those are text.
                model_inputs["mm_token_type_ids"] = F.pad(marks, (0, input_ids.shape[1] - marks.shape[1]))
        return model_inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats the inputs for beams: pictures are encoded once, and a row's image tokens are repeated as a block.

        The method of transformers repeats pictures one by one, which gives the two pictures of a prompt to wrong beams.
        """
        if expand_size > 1:
            marks, pictures = (
                model_kwargs.get("mm_token_type_ids"),
                {name: model_kwargs.pop(name, None) for name in PICTURE_INPUTS[:-1]},
            )
            cache = model_kwargs.get(CACHE)
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
                input_ids, model_kwargs = super()._expand_inputs_for_generation(
                    expand_size, is_encoder_decoder, input_ids, **model_kwargs
                )
                return input_ids, {**model_kwargs, "image_tokens": expanded}
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
