"""Turns pictures into the pixels that the model takes, and drawn pixels into pictures."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from ...errors import PictureError
from ..pictures import open_picture
from .configuration import PICTURE_SIDE

# A picture may be this many times longer than it is wide. Only its central square is seen in any case, and scaling a
# longer strip would need gigabytes.
_LONGEST_STRIP = 200


class PicturePlaceholder:
    """Stands for a picture that is still to be drawn. `PLACEHOLDER` is the one object of this class."""

    def __repr__(self) -> str:
        return "PLACEHOLDER"

    def __copy__(self) -> "PicturePlaceholder":
        return self

    def __deepcopy__(self, memo) -> "PicturePlaceholder":
        return self


PLACEHOLDER = PicturePlaceholder()


class MMInterleavedImageProcessor(ImageProcessingMixin):
    """Turns pictures into the central square of 224x224 pixels, exactly as the original does."""

    model_input_names = ["pixel_values"]

    @property
    def settings(self) -> tuple:
        """What the pixels of a picture depend on besides the picture: nothing."""
        return ()

    def __call__(
        self,
        images,
        return_tensors: str | None = "pt",
        allow_urls: bool = False,
        device: torch.device | str | None = None,
    ) -> BatchFeature:
        """Turns pictures into pixels.

        Args:
            images: one picture or a list of them; see `open_picture`. `PLACEHOLDER` stands for a picture that is still
                to be drawn and becomes a constant grey of 0.5, as in the original.
            return_tensors: `pt` or `np`.
            allow_urls: fetch pictures given as URLs.
            device: where the tensor is put. Pictures are scaled by Pillow on the CPU in any case.

        Returns:
            `pixel_values` [n, 3, 224, 224], float32 in 0..1.

        Raises:
            PictureError: a picture cannot be used; the message has its number where several came.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise PictureError("expected at least one picture, got none")
        pixels = torch.stack([self._one(image, i, len(images), allow_urls) for i, image in enumerate(images)])
        if device is not None and return_tensors != "np":
            pixels = pixels.to(device)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _one(self, source, index: int, count: int, allow_urls: bool) -> torch.Tensor:
        if source is PLACEHOLDER:
            return torch.full((3, PICTURE_SIDE, PICTURE_SIDE), 0.5)
        try:
            image = open_picture(source, allow_urls=allow_urls)
            try:
                square = central_square(image)
            except PictureError as error:
                name = getattr(source, "filename", None) or getattr(image, "filename", None)
                raise PictureError(f"{name}: {error}" if name else str(error)) from None
        except PictureError as error:
            message = f"picture {index + 1} of {count}: {error}" if count > 1 else str(error)
            raise PictureError(message) from error.__cause__
        return torch.from_numpy(np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / np.float32(255))


def central_square(image: Image.Image) -> Image.Image:
    """The central square of a picture, scaled to 224x224 pixels.

    While the short side has 448 pixels or more, the picture is halved by averaging 2x2 pixels. Then it is scaled
    bicubically to a short side of 224 pixels.

    Raises:
        PictureError: the picture is more than 200 times longer than wide.
    """
    if max(image.size) > _LONGEST_STRIP * min(image.size):
        raise PictureError(
            f"{image.width}x{image.height} pixels: too thin, expected at most {_LONGEST_STRIP} times longer than wide"
        )
    while min(image.size) >= 2 * PICTURE_SIDE:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = PICTURE_SIDE / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - PICTURE_SIDE) // 2, (height - PICTURE_SIDE) // 2
    return image.crop((left, top, left + PICTURE_SIDE, top + PICTURE_SIDE))


def drawn_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """Drawn pixels [n, 3, H, W] in 0..1, of any float dtype, as pictures of 8 bits.

    A value x becomes the whole part of 255 x + 0.5, as in the original, which feeds pictures of these very bits back to
    the model. Values outside of 0..1 are clamped.

    Raises:
        PictureError: a value is not finite.
    """
    if not bool(torch.isfinite(pixels).all()):
        raise PictureError("the drawn picture holds values that are not finite: draw it in float32 or bfloat16")
    levels = pixels.detach().float().mul(255).add(0.5).clamp(0, 255).to(torch.uint8)
    arrays: Sequence[np.ndarray] = levels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
