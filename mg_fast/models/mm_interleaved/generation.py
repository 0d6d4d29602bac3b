"""What transformers' `generate` needs to know about prompts with pictures, and the original's rules where they differ.

The differences are listed at `InterleavedGeneration.generate`.
"""

import copy
import logging

import torch
from transformers import GenerationConfig, LogitsProcessorList

from ...errors import PromptError, quoted
from ...runtime.arguments import check_stop_strings, plain_options
from ..protocol import CACHE, take_cache
from .beam_search import BeamSearch
from .configuration import MMInterleavedConfig
from .decoding import CONSTANT_INPUTS, INDEX_INPUT, PICTURE_INPUTS, READING_INPUTS
from .text_settings import NewTokensRepetitionPenalty, new_tokens_of

logger = logging.getLogger(__name__)

# Settings with which beam search is left to transformers' own loop.
_OTHER_BEAMS = ("do_sample", "stop_strings", "stopping_criteria")
_OTHER_BEAMS += ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def default_generation_config(config: MMInterleavedConfig) -> GenerationConfig:
    """Greedy decoding that ends with the end token, or with the token that begins a picture."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[*dict.fromkeys([*ends, config.soi_token_id])],
        pad_token_id=config.pad_token_id,
        do_sample=False,
        num_beams=1,
    )


class InterleavedGeneration:
    """Generation of text after prompts that hold pictures.

    Its methods extend those of transformers' GenerationMixin, so it stands before that class among the model's bases.
    """

    def check_length(self, prompt: int, new: int = 0, allow_long: bool | None = None) -> None:
        """Raises PromptError where `prompt` positions and `new` further ones do not fit the model.

        Args:
            allow_long: has no effect, because the model was trained on as many positions as it has.
        """
        limit = self.config.text_config.max_position_embeddings
        if prompt > limit:
            raise PromptError(
                f"the prompt has {prompt} tokens, the model has {limit} positions (max_position_embeddings)"
            )
        if prompt + new > limit:
            raise PromptError(
                f"{prompt} prompt tokens and max_new_tokens={new} need {prompt + new} positions, the model has {limit} "
                f"(max_position_embeddings): at most {limit - prompt} new tokens fit"
            )

    def generate(self, inputs: torch.Tensor | None = None, *, allow_long: bool | None = None, **kwargs):
        """Generates as GenerationMixin's `generate` does; pictures are encoded once, before rows are repeated.

        Without settings it is greedy, and ends with the end token or with the token that begins a picture. It differs
        from transformers in three settings, in which it follows the original:

        - `min_length` counts one BOS and the new tokens, not the prompt: it is `min_new_tokens + 1`.
        - `repetition_penalty` sees one BOS and the new tokens, not the prompt.
        - beam search has the rules of transformers 4.31 (`BeamSearch` lists them), unless it samples, has stop
          strings or criteria, or is asked for more than ids and their scores. Then transformers' own loop runs, with a
          warning.

        Args:
            inputs: ids [B, L]; also as `input_ids`.
            allow_long: see `check_length`.
            **kwargs: settings, and the inputs of the prompt: `attention_mask` [B, L], `pixel_values`
                [n_images, 3, 224, 224] in 0..1 or what `get_image_features` returned for them (`image_tokens`
                [n_images, T, D] and `image_maps` [n_images, 5440, C]), and `num_image_per_seq` [B], which is counted in
                the ids where it is not given.

        Returns:
            Ids [B, L + new], or what transformers returns with `return_dict_in_generate`.

        Raises:
            PromptError: input_ids are no tensor [B, L] of whole numbers, the prompt is too long, its pictures do not
                fit their places, or a stop string is not text.
        """
        kwargs = plain_options(kwargs)
        if (cache := take_cache(kwargs)) is not None:
            kwargs[CACHE] = cache
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is None:
            raise PromptError("expected input_ids, in which the places of pictures are found, got none")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else quoted(ids)
            raise PromptError(f"input_ids: expected whole numbers [B, L], with at least one for each row, got {got}")
        if kwargs.get("inputs_embeds") is not None:
            raise PromptError("expected input_ids alone, in which the places of pictures are found, got inputs_embeds")
        given = kwargs.get("generation_config") or self.generation_config
        check_stop_strings(kwargs.get("stop_strings", given.stop_strings))
        self._check_lengths(ids, given, kwargs, allow_long)
        named = {name: kwargs.pop(name, None) for name in (*PICTURE_INPUTS, *READING_INPUTS)}
        with torch.no_grad():
            kwargs.update(self.with_pictures(ids, named))
        self._translate(ids, given, kwargs)
        return super().generate(inputs, **kwargs)

    def _check_lengths(self, ids, given: GenerationConfig, kwargs: dict, allow_long: bool | None) -> None:
        new = kwargs.get("max_new_tokens") or getattr(given, "max_new_tokens", None)
        if new is None:
            new = max(0, (kwargs.get("max_length") or given.max_length or 0) - ids.shape[1])
        self.check_length(ids.shape[1], new, allow_long)
        if kwargs.get("prefill_chunk_size") or given.prefill_chunk_size:
            raise PromptError("prefill_chunk_size cuts a prompt without regard to its pictures: it cannot be used here")

    def _translate(self, ids: torch.Tensor, given: GenerationConfig, kwargs: dict) -> None:
        """Replaces the settings whose meaning is the original's by settings and processors of transformers."""

        def setting(name: str):
            return kwargs[name] if kwargs.get(name) is not None else getattr(given, name, None)

        changes = {}
        if least := setting("min_length"):
            changes["min_new_tokens"] = max(setting("min_new_tokens") or 0, new_tokens_of(least))
            changes["min_length"] = None
        if (penalty := setting("repetition_penalty")) not in (None, 1.0):
            processor = NewTokensRepetitionPenalty(penalty, ids.shape[1], self.config.bos_token_id)
            kwargs["logits_processor"] = LogitsProcessorList([processor, *(kwargs.get("logits_processor") or ())])
            changes["repetition_penalty"] = 1.0
        if changes and kwargs.get("generation_config") is not None:
            # transformers is about to refuse settings beside a configuration.
            kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
            kwargs["generation_config"].update(**changes)
            for name in changes:
                kwargs.pop(name, None)
        else:
            kwargs.update(changes)
        if (setting("num_beams") or 1) > 1 and kwargs.get("custom_generate") is None:
            if asked := [name for name in _OTHER_BEAMS if setting(name)]:
                logger.warning(
                    "beam search with %s runs by transformers' own rules, which differ from the original's", asked[0]
                )
            else:
                kwargs["custom_generate"] = BeamSearch(self)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        image_tokens: torch.Tensor | None = None,
        num_image_per_seq: torch.Tensor | None = None,
        picture_values: torch.Tensor | None = None,
        picture_features: torch.Tensor | None = None,
        picture_index: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if picture_index is None:
            return model_inputs
        new, prompt = model_inputs["input_ids"].shape[1], picture_index.shape[1]
        if is_first_iteration or not kwargs.get("use_cache", True):
            # Prompt lookup appends guessed tokens to the prompt. Their ids stand for themselves.
            embeddings = [
                self.embed(input_ids[:, :prompt], image_tokens=image_tokens, num_image_per_seq=num_image_per_seq)
            ]
            if input_ids.shape[1] > prompt:
                embeddings.append(self.embed_ids(input_ids[:, prompt:]))
            model_inputs["inputs_embeds"] = torch.cat(embeddings, dim=1)[:, -new:]
            model_inputs["input_ids"] = None
        places = torch.arange(input_ids.shape[1] - new, input_ids.shape[1], device=input_ids.device)
        read = self.pass_inputs(
            {"picture_values": picture_values, "picture_features": picture_features, INDEX_INPUT: picture_index}
        )
        return {**model_inputs, **read.at(places)}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats the inputs for beams or samples; those of pictures are not repeated, because rows share them."""
        kept = {
            name: model_kwargs.pop(name)
            for name in ("image_tokens", "num_image_per_seq", *CONSTANT_INPUTS)
            if name in model_kwargs
        }
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **kept}
