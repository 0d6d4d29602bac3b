"""Mini-Gemini's answers to the questions that the decode loop asks a model (`mg_fast.models.protocol`)."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..protocol import NO_PASS_INPUTS, PassInputs, content_key
from .places import PICTURE_INPUTS


class MiniGeminiDecoding:
    """A base class that makes MiniGeminiForConditionalGeneration a DecodableModel."""

    prompt_inputs = PICTURE_INPUTS

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    @property
    def head(self) -> nn.Module:
        return self.lm_head

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.config.text_config

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replaces the language model.

        The method of transformers would set `language_model`, which is a property here.
        """
        self.model.set_decoder(decoder)

    def embed(self, input_ids: torch.Tensor, **prompt_inputs: torch.Tensor | None) -> torch.Tensor:
        return self.model.embed(input_ids, **prompt_inputs)

    def embed_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_ids(input_ids)

    def pass_inputs(self, model_inputs: Mapping[str, object]) -> PassInputs:
        # Pictures reach the language model only as embeddings.
        return NO_PASS_INPUTS

    def position_keys(
        self, ids: torch.Tensor, model_inputs: Mapping[str, object], digests: Sequence[bytes] | None
    ) -> list[int] | None:
        keys = ids[0].tolist()
        marks = model_inputs.get("mm_token_type_ids")
        places = [] if marks is None else (marks[0] == 1).nonzero().flatten().tolist()
        if places and not digests:
            return None
        firsts = [content_key(digest, 0) for digest in digests] if places else []
        for i, place in enumerate(places):
            picture, position = divmod(i, len(places) // len(firsts))
            # This equals `content_key(digest, position)`, without reading the digest for each of up to 2880 positions.
            keys[place] = firsts[picture] - position
        return keys
