"""Pictures of vLLM's requests: how they are opened, squared for the way to the workers, and placed in prompts."""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.config import ModelConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.image import open_image
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from ...errors import PictureError, quoted
from ...models.mini_gemini.configuration import MiniGeminiConfig
from ...models.mini_gemini.processing import MiniGeminiProcessor
from ...models.pictures import open_picture
from ...models.templates import IMAGE_TAG
from ...models.tensor_files import resolve_folder
from .configuration import hub_arguments

# The name by which squared pictures travel from the process with the requests to the workers.
SQUARED = "squared"
# What vLLM notes of a picture that it converted to RGB itself, if nobody chose another way: over white.
_OVER_WHITE = {"image_mode": "RGB", "rgba_background_color": (255, 255, 255)}


def make_processor(model_config: ModelConfig, tokenizer) -> MiniGeminiProcessor:
    """Our processor with vLLM's tokenizer, and the configuration that `MiniGeminiServingConfig` completed."""
    folder = resolve_folder(model_config.model, weights=False, **hub_arguments(model_config))
    return MiniGeminiProcessor.of_checkpoint(model_config.hf_config, tokenizer, folder)


class PictureInfo(BaseProcessingInfo):
    """What vLLM asks of a model about its pictures."""

    @functools.cached_property
    def processor(self) -> MiniGeminiProcessor:
        """The processor of the checkpoint, with the tokenizer that vLLM loaded."""
        return make_processor(self.ctx.model_config, self.get_tokenizer())

    def get_hf_config(self) -> MiniGeminiConfig:
        return self.ctx.get_hf_config(MiniGeminiConfig)

    def get_hf_processor(self, **kwargs: object) -> MiniGeminiProcessor:
        return self.processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().tokens_per_picture}

    def parse_mm_data(self, mm_data: MultiModalDataDict, *, validate: bool = True) -> MultiModalDataItems:
        """The pictures of a request as vLLM handles them; see `open_pictures`."""
        if mm_data.get("image") is not None:
            mm_data = {**mm_data, "image": open_pictures(mm_data["image"])}
        return super().parse_mm_data(mm_data, validate=validate)


def as_list(pictures) -> list:
    """The pictures of a request, which may be one picture, a list, or one array or tensor [n, H, W, C] of several."""
    several = isinstance(pictures, (list, tuple)) or getattr(pictures, "ndim", 0) == 4
    return list(pictures) if several else [pictures]


def open_pictures(pictures) -> list:
    """Opens a request's pictures as mg_fast does everywhere.

    vLLM itself puts transparent pixels over white and clips greys of 16 bits.

    Args:
        pictures: as in `as_list`. Each is a Pillow image, a uint8 array or tensor as in `open_picture`, or what vLLM's
            server makes of a file: an image with the file's bytes, by which vLLM knows it again. None stands for a
            picture that vLLM has already.

    Returns:
        Upright RGB images, with the file's bytes where they came. A background that the server or the request chose for
        transparent pixels is kept.

    Raises:
        VLLMValidationError: a picture cannot be used. The message says why.
    """
    pictures = as_list(pictures)
    return [_opened(picture, i, len(pictures)) for i, picture in enumerate(pictures)]


def _opened(picture, index: int, count: int):
    if picture is None:
        return None
    try:
        if isinstance(picture, MediaWithBytes):
            media = picture.media
            if picture.io_config == _OVER_WHITE:
                # vLLM has converted the picture. The original's conversion needs the file's own pixels.
                media = open_image(io.BytesIO(picture.original_bytes))
            return dataclasses.replace(picture, media=open_picture(media))
        if not isinstance(picture, (Image.Image, np.ndarray, torch.Tensor)):
            expected = "a Pillow image or a uint8 array or tensor"
            raise PictureError(f"picture: expected {expected}, got {type(picture).__name__}")
        return open_picture(picture)
    except PictureError as error:
        number = f"picture {index + 1} of {count}: " if count > 1 else ""
        raise VLLMValidationError(f"{number}{error}", parameter="image") from error


class DummyPictures(BaseDummyInputsBuilder[PictureInfo]):
    """Pictures of the largest size, by which vLLM measures its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TAG * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        side = self.info.get_hf_config().image_size_aux
        return {"image": [Image.new("RGB", (side, side))] * mm_counts.get("image", 0)}


class PictureProcessor(BaseMultiModalProcessor[PictureInfo]):
    """Turns the pictures of a request into 8-bit squares, and the filler that marks each picture into its places."""

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> ProcessorInputs:
        # The tokenizer does not know the tag, so the prompt is made of ids.
        pictures = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        prompt = [self.info.processor.filler_id] * mm_counts.get("image", 0)
        return ProcessorInputs(prompt=prompt, mm_data_items=self.info.parse_mm_data(pictures, validate=False))

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Processes a request. The prompt holds one filler id per picture.

        Raises:
            VLLMValidationError: the numbers of fillers and pictures differ, or the request has options for the
                processor, which takes none.
        """
        if inputs.hf_processor_mm_kwargs:
            raise VLLMValidationError(
                f"mm_processor_kwargs: Mini-Gemini's processor takes none, got "
                f"{quoted(sorted(inputs.hf_processor_mm_kwargs))}",
                parameter="mm_processor_kwargs",
            )
        filler, pictures = self.info.processor.filler_id, inputs.mm_data_items.get_count("image", strict=False)
        if (places := inputs.prompt.count(filler)) != pictures:
            raise VLLMValidationError(
                f"prompt_token_ids: expected the id {filler} once for each of the {pictures} picture(s), "
                f"got it {places} time(s)",
                parameter="image",
            )
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        try:
            squared = self.info.processor.image_processor.squared(hf_data["images"])
        except PictureError as error:
            raise VLLMValidationError(str(error), parameter="image") from error
        return BatchFeature({SQUARED: squared})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {SQUARED: MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        filler, tokens = self.info.processor.filler_id, self.info.get_hf_config().tokens_per_picture
        return [PromptReplacement(modality="image", target=[filler], replacement=[filler] * tokens)]
