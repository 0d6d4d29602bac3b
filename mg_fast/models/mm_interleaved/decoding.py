"""MM-Interleaved's answers to the questions that the decode loop asks a model (`mg_fast.models.protocol`)."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...errors import PromptError
from ...runtime.layer_dtypes import at_seam
from ..protocol import PassInputs, content_key
from .visible_pictures import check_pictures, count_pictures, repeated, splice

# The inputs of `generate` that bring pictures, and the arguments of passes that are made of them.
PICTURE_INPUTS = ("pixel_values", "image_tokens", "image_maps", "num_image_per_seq")
CONSTANT_INPUTS, INDEX_INPUT = ("picture_values", "picture_features"), "picture_index"
READING_INPUTS = (*CONSTANT_INPUTS, INDEX_INPUT)


class InterleavedDecoding:
    """A base class that makes MMInterleavedForConditionalGeneration a DecodableModel.

    It takes from the class that inherits it: `mm_decoder`, `text_decoder`, `soi_token`, `config` and
    `get_image_features`.
    """

    prompt_inputs = PICTURE_INPUTS

    @property
    def language_model(self) -> nn.Module:
        return self.mm_decoder

    @property
    def head(self) -> nn.Module:
        return self.text_decoder

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.config.text_config

    def embed(
        self,
        input_ids: torch.Tensor,
        *,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        image_maps: torch.Tensor | None = None,
        num_image_per_seq: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [B, L, D] of a prompt with its pictures' tokens in their places.

        Args:
            input_ids: [B, L].
            pixel_values: [n_images, 3, 224, 224] in 0..1, the pictures of all rows in reading order; not needed where
                their tokens are given.
            image_tokens: [n_images, T, D].
            image_maps: not needed here; every input of the prompt comes to this method.
            num_image_per_seq: int64 [V]. Where V is below B, B / V consecutive rows repeat the same pictures, as the
                beams of a prompt do.
        """
        if image_tokens is None and pixel_values is not None:
            image_tokens = self.get_image_features(pixel_values).pooler_output
        if image_tokens is not None and num_image_per_seq is not None and len(num_image_per_seq) < len(input_ids):
            image_tokens = repeated(image_tokens, num_image_per_seq, len(input_ids) // len(num_image_per_seq))
        embeddings = self.mm_decoder.embed_tokens(input_ids)
        return at_seam(
            splice(embeddings, input_ids, image_tokens, self.soi_token, self.config), self.language_model.layers
        )

    def embed_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed(input_ids)

    def with_pictures(self, input_ids: torch.Tensor, given: Mapping[str, object]) -> dict[str, torch.Tensor]:
        """The inputs of a prompt's passes with everything that pictures add to it, computed once.

        The host waits for the ids, to check the places of pictures.

        Args:
            input_ids: [B, L], the whole prompt.
            given: some of the inputs in `PICTURE_INPUTS` and `READING_INPUTS`, the latter as this method returned them.

        Returns:
            `num_image_per_seq`, `image_tokens` if there are pictures, and the arguments of the language model's passes.

        Raises:
            PromptError: the pictures do not fit their places, or a position sees too many.
        """
        tokens, maps, numbers = (given.get(name) for name in ("image_tokens", "image_maps", "num_image_per_seq"))
        read = {name: given[name] for name in READING_INPUTS if given.get(name) is not None}
        pixels = given.get("pixel_values")
        if numbers is None:
            numbers = count_pictures(input_ids, self.config)
        came = pixels if tokens is None else tokens
        # Pictures are encoded only for a prompt that they fit.
        check_pictures(input_ids, numbers, 0 if came is None else len(came), self.config)
        if pixels is not None and len(pixels) and (tokens is None or (maps is None and not read)):
            seen = self.get_image_features(pixels)
            tokens, maps = seen.pooler_output, seen.last_hidden_state
        if not read:
            if tokens is not None and len(tokens) and maps is None:
                raise PromptError("image_tokens came without image_maps: get_image_features returns both")
            if maps is None:
                maps = self.soi_token.new_zeros(0, self.config.pixels_of_llm, self.config.image_embed_dim)
            read = self.language_model.picture_arguments(input_ids, numbers, maps)
        return {"num_image_per_seq": numbers, **({} if tokens is None else {"image_tokens": tokens}), **read}

    def pass_inputs(self, model_inputs: Mapping[str, object]) -> PassInputs:
        if model_inputs.get(INDEX_INPUT) is None:
            if (ids := model_inputs.get("input_ids")) is None:
                raise PromptError(f"expected input_ids or {INDEX_INPUT}, which generate makes of a prompt, got neither")
            model_inputs = self.with_pictures(ids, model_inputs)
        constant = {name: model_inputs[name] for name in CONSTANT_INPUTS if model_inputs.get(name) is not None}
        return PassInputs(constant, {INDEX_INPUT: model_inputs[INDEX_INPUT]})

    def position_keys(
        self, ids: torch.Tensor, model_inputs: Mapping[str, object], digests: Sequence[bytes] | None
    ) -> list[int] | None:
        keys, index = ids[0].tolist(), model_inputs.get(INDEX_INPUT)
        pictures = 0 if index is None else index.shape[-1]
        if not pictures:
            return keys
        if not digests:
            return None
        if len(digests) != pictures:
            raise PromptError(f"expected one digest for each of {pictures} picture(s), got {len(digests)}")
        # A position depends on the pictures that it sees and on their order, which is that of the relative index.
        rows = [tuple(row) for row in (index[0] > 0).tolist()]
        rows += rows[-1:] * (len(keys) - len(rows))
        names: dict[tuple, bytes | None] = {}
        for position, row in enumerate(rows[: len(keys)]):
            if row not in names:
                seen = b"".join(digest[:16] for digest, sees in zip(digests, row) if sees)
                names[row] = hashlib.sha256(seen).digest() if seen else None
            if names[row] is not None:
                keys[position] = content_key(names[row], keys[position])
        return keys
