"""What the decode loop and the engine may ask of a model."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

# The argument by which transformers' models take keys and values, and the field of their outputs that returns them.
# transformers 5.24 renamed `past_key_values` to `cache`.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


@dataclass(frozen=True, eq=False)
class PassInputs:
    """Tensors that every pass of a language model takes besides tokens, masks and the cache.

    Features to attend to are an example. The tensors do not change while an answer is generated. On a GPU they are
    copied to a fixed place, where captured passes read them.

    Attributes:
        constant: tensors by argument name that every pass takes whole.
        by_position: tensors [B, L, ...] by argument name, with one row for every position of the prompt. A pass takes
            the rows of its own positions. Positions after the prompt take the prompt's last row.
    """

    constant: Mapping[str, torch.Tensor] = field(default_factory=dict)
    by_position: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def at(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the arguments of a pass over these positions, int64 [Q]."""
        return {**self.constant, **{name: _rows(tensor, positions) for name, tensor in self.by_position.items()}}

    def extended(self, length: int) -> "PassInputs":
        """Returns these inputs for `length` positions: tensors by position are copied, and their last row repeated."""
        rows = {
            name: _rows(tensor, torch.arange(length, device=tensor.device)) for name, tensor in self.by_position.items()
        }
        return PassInputs(self.constant, rows)

    def copied(self) -> "PassInputs":
        """Returns the same numbers in memory of their own."""
        return PassInputs(
            *({name: tensor.clone() for name, tensor in part.items()} for part in (self.constant, self.by_position))
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors, in the order of their names."""
        return [part[name] for part in (self.constant, self.by_position) for name in sorted(part)]

    @property
    def layout(self) -> tuple:
        """Names, shapes, dtypes and devices of the tensors.

        Where two layouts are equal, the numbers of one object can be copied over those of the other.
        """
        names = tuple(tuple(sorted(part)) for part in (self.constant, self.by_position))
        return names, tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in self.tensors)


NO_PASS_INPUTS = PassInputs()


class DecodableModel(Protocol):
    """A model that `mg_fast.decoding.Decoder` can decode with.

    `MiniGeminiForConditionalGeneration` is one. `mg_fast.models.causal_lm.CausalLM` makes one of a plain language model
    of transformers. Members are looked up at every use, because adapters, quantization and loading replace modules.
    """

    @property
    def prompt_inputs(self) -> Sequence[str]:
        """Names of the inputs of `generate` that only the pass over the prompt needs, such as pixel values.

        `embed` takes them.
        """

    @property
    def language_model(self) -> nn.Module:
        """The transformer without its head.

        It is called with `inputs_embeds`, `attention_mask`, `position_ids`, `use_cache`, the keys and values under the
        name in `CACHE`, and the arguments that `pass_inputs` gives. It returns an output with `last_hidden_state`. Its
        decoder layers are in `layers`. For CUDA graphs, its pass must not ask the host for the value of a tensor.
        """

    @property
    def head(self) -> nn.Module:
        """The layer that turns hidden states into logits. Nothing may be applied to the logits afterwards."""

    @property
    def text_config(self) -> PreTrainedConfig:
        """The configuration of `language_model`."""

    @property
    def generation_config(self) -> GenerationConfig:
        """The settings that `generate` uses where a caller gives none."""

    def embed(self, input_ids: torch.Tensor, **prompt_inputs: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, L, hidden] of a prompt [B, L], including everything in it that is not text.

        The keyword arguments are the inputs named in `prompt_inputs`.
        """

    def embed_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, L, hidden] of ids [B, L] alone, in the dtype of the layers."""

    def pass_inputs(self, model_inputs: Mapping[str, object]) -> PassInputs:
        """The further inputs of every pass, taken from the inputs that `generate` was called with."""

    def position_keys(
        self, ids: torch.Tensor, model_inputs: Mapping[str, object], digests: Sequence[bytes] | None
    ) -> list[int] | None:
        """One number for every position of a sequence, by which the keys and values of that position are found again.

        Two sequences share the keys and values of their first positions as long as these numbers are equal. A number
        must therefore stand for everything that the keys and values of its position depend on, apart from the tokens
        before it: the token, the picture that stands in its place, and what `pass_inputs` says there. `content_key`
        makes numbers that differ from every token id.

        Args:
            ids: [1, L], a prompt, or a prompt and the tokens that were generated after it.
            model_inputs: what `generate` was called with for the prompt.
            digests: for every picture of the prompt, in order, at least 16 bytes that no other picture has. None where
                they are not known.

        Returns:
            The numbers, or None where they cannot be determined. Then nothing is reused or remembered.
        """


class AnsweringModel(DecodableModel, Protocol):
    """A model that the answer stage (`mg_fast.engine.answers`) can answer with."""

    def get_input_embeddings(self) -> nn.Module:
        """The layer that embeds ids. Prompts are moved to its device."""

    def check_length(self, prompt: int, new: int, allow_long: bool | None) -> None:
        """Raises PromptError where a prompt of `prompt` positions and `new` further ones do not fit the model."""

    def generate(self, **inputs) -> torch.Tensor:
        """Generates like transformers' GenerationMixin, `custom_generate` included, and returns ids [B, L + new].

        Besides `input_ids` and `attention_mask` [B, L], it takes `allow_long`, as `check_length` does, and for prompts
        with pictures `mm_token_type_ids` [B, L], 1 where a picture stands, and `image_tokens` [n_images, T, hidden] in
        the order of their places.
        """


class PackedPictureEncoder(Protocol):
    """The picture side of a model, packed for inference at one moment."""

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on work that is done only once."""

    def encode(self, **pixels: torch.Tensor) -> torch.Tensor:
        """Image tokens [n_images, T, hidden] of what the image processor returns.

        It also takes `stage`, as `SeeingModel.get_image_features` does.
        """


class SeeingModel(Protocol):
    """A model whose pictures the vision stage (`mg_fast.engine.vision`) can turn into image tokens."""

    dtype: torch.dtype

    @property
    def picture_parts(self) -> Mapping[str, nn.Module]:
        """The towers by name, for errors that say which tower is meant."""

    def get_input_embeddings(self) -> nn.Module:
        """The layer that embeds ids. Pixels are moved to its device."""

    def get_image_features(self, **pixels: torch.Tensor) -> BaseModelOutputWithPooling:
        """Image tokens [n_images, T, hidden] as `pooler_output`, computed by the model's own modules.

        Takes what the image processor returns, and `stage`, which is called with the name of every step and returns the
        context that the step runs in.
        """

    def picture_encoder(self, *, graphs: bool) -> PackedPictureEncoder:
        """The picture side as it is now, packed. ValueError where it computes something else than its weights say."""

    def picture_state(self) -> object:
        """What image tokens depend on apart from the pixels. It is compared with an earlier state by `==`."""


def take_cache(arguments: MutableMapping[str, object]) -> object | None:
    """Removes the keys and values from the arguments of a call, under either of their names, and returns them."""
    given = [arguments.pop(name, None) for name in CACHE_NAMES]
    return next((cache for cache in given if cache is not None), None)


def check_decodable(model: object) -> None:
    """Raises TypeError where a model lacks one of the members that `DecodableModel` names."""
    missing = [name for name in vars(DecodableModel) if not name.startswith("_") and not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"expected a model that can be decoded with, got {type(model).__name__} without {', '.join(missing)}: "
            "mg_fast.models.causal_lm.CausalLM(model) makes one of a plain language model of transformers"
        )


def content_key(digest: bytes, number: int) -> int:
    """A position's number for `DecodableModel.position_keys`. It is negative, so no token id equals it.

    Only equal arguments give equal numbers.

    Args:
        digest: at least 16 bytes, of which only the first 16 count.
        number: from 0 to 2**32 - 1, for instance the position within a picture.
    """
    return -1 - number - (int.from_bytes(digest[:16], "big") << 32)


def _rows(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The rows [B, Q, ...] of a tensor [B, L, ...] at these positions; the last row for positions past the end."""
    return tensor.index_select(1, positions.to(tensor.device).clamp(max=tensor.shape[1] - 1))
