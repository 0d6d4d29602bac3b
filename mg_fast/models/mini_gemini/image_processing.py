"""Turns pictures into the pixels that the model takes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from ... import ops
from ...errors import PictureError
from ...ops.reference import low_resolution_views
from ...ops.torch.dual_resize import normalise, place, square
from ...runtime.arguments import plain
from ..pictures import check_decoder, decode_on_device, open_picture
from .configuration import MiniGeminiConfig

_Made = TypeVar("_Made")


class MiniGeminiImageProcessor(ImageProcessingMixin):
    """Turns pictures into normalised high- and low-resolution tensors, exactly as the original does.

    Args:
        hr_size: side of the high-resolution picture in pixels.
        lr_size: side of one low-resolution view in pixels.
        grid: number of LR tiles per side.
        global_view: append a global LR view.
        pad: make pictures square by padding; False resizes the shortest side and crops the centre.
        tokens_per_picture: the number of image tokens that the model makes of a picture.
    """

    model_input_names = ["pixel_values", "pixel_values_hr"]

    def __init__(
        self,
        hr_size: int = 768,
        lr_size: int = 336,
        grid: int = 1,
        global_view: bool = False,
        pad: bool = True,
        tokens_per_picture: int = 576,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.hr_size, self.lr_size, self.grid, self.global_view = map(plain, (hr_size, lr_size, grid, global_view))
        self.pad, self.tokens_per_picture = plain(pad), plain(tokens_per_picture)

    @property
    def settings(self) -> tuple:
        """All settings that change the pixels of a picture."""
        return self.hr_size, self.lr_size, self.grid, self.global_view, self.pad

    @classmethod
    def from_config(cls, config: MiniGeminiConfig) -> "MiniGeminiImageProcessor":
        return cls(
            hr_size=config.image_size_aux,
            lr_size=config.vision_config.image_size,
            grid=config.image_grid,
            global_view=config.image_global,
            pad=config.image_aspect_ratio == "pad",
            tokens_per_picture=config.tokens_per_picture,
        )

    def __call__(
        self,
        images,
        return_tensors: str | None = "pt",
        allow_urls: bool = False,
        device: torch.device | str | None = None,
        decoder: str = "pillow",
    ) -> BatchFeature:
        """Turns pictures into tensors.

        Args:
            images: one picture or a list of them; see `open_picture`.
            return_tensors: `pt` or `np`.
            allow_urls: fetch pictures given as URLs.
            device: resize the decoded pictures on this device (`mg_fast.ops.dual_resize`). The high-resolution pixels
                have the same bits, and the views agree within 1e-6. None: resize with Pillow, on the CPU.
            decoder: `pillow`, or `nvjpeg`: torchvision decodes JPEG files and bytes on the CUDA `device`. Its
                pixels differ from Pillow's. Everything else is still decoded by Pillow.

        Returns:
            `pixel_values` [n, V, 3, lr_size, lr_size] (V = 1, or in HD the tiles row by row and the global view last)
            and `pixel_values_hr` [n, 3, hr_size, hr_size], both float32 and on `device` (NumPy arrays are in memory).

        Raises:
            PictureError: a picture cannot be used; the message has its number where several came.
            BackendError: `nvjpeg` was asked for without a CUDA device.
        """
        check_decoder(decoder, device)
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise PictureError("expected at least one picture, got none")
        pairs = [
            self._one(image, i, len(images), allow_urls, device, decoder, self._resized)
            for i, image in enumerate(images)
        ]
        pixels = torch.stack([hr for hr, _ in pairs])
        if device is None:
            views = low_resolution_views(pixels, self.lr_size, grid=self.grid, global_view=self.global_view)
        else:
            views = torch.stack([views for _, views in pairs])
        if return_tensors == "np":
            pixels, views = pixels.cpu(), views.cpu()
        return BatchFeature({"pixel_values": views, "pixel_values_hr": pixels}, tensor_type=return_tensors)

    def squared(self, images: Sequence) -> torch.Tensor:
        """Pictures squared at the high resolution, [n, hr_size, hr_size, 3] uint8: all that `pixels_of` needs of them.

        They are a fifth of the size of the pixels, for a process that hands them to another one.

        Args:
            images: as in a call, except for URLs.

        Raises:
            PictureError: as in a call.
        """

        def in_eight_bits(image: Image.Image, device: None) -> torch.Tensor:
            return torch.from_numpy(np.array(square(image, self.hr_size, self.pad)))

        return torch.stack(
            [self._one(image, i, len(images), False, None, "pillow", in_eight_bits) for i, image in enumerate(images)]
        )

    def pixels_of(self, squared: torch.Tensor) -> BatchFeature:
        """The pixels of squared pictures, on their device, as a call on that device makes them of the pictures.

        Args:
            squared: [n, hr_size, hr_size, 3] uint8.
        """
        if squared.dim() != 4 or squared.shape[1:] != (self.hr_size, self.hr_size, 3):
            raise ValueError(f"squared: expected [n, {self.hr_size}, {self.hr_size}, 3], got {list(squared.shape)}")
        # Resizing to the same size changes nothing, and on a CPU Pillow does that without any product.
        backend = "reference" if squared.device.type == "cpu" else None
        options = {"grid": self.grid, "global_view": self.global_view, "pad": self.pad, "backend": backend}
        pairs = [ops.dual_resize(picture, self.hr_size, self.lr_size, **options) for picture in squared]
        pixels, views = (torch.stack(tensors) for tensors in zip(*pairs))
        return BatchFeature({"pixel_values": views, "pixel_values_hr": pixels})

    def _one(
        self, source, index: int, count: int, allow_urls: bool, device, decoder: str, make: Callable[..., _Made]
    ) -> _Made:
        """What `make` makes of one opened picture and the device; errors are told with the picture's number."""
        try:
            image = decode_on_device(source, device) if decoder == "nvjpeg" else None
            if image is None:
                image = open_picture(source, allow_urls=allow_urls)
            try:
                return make(image, device)
            except PictureError as error:
                name = getattr(source, "filename", None) or getattr(image, "filename", None)
                raise PictureError(f"{name}: {error}" if name else str(error)) from None
        except PictureError as error:
            raise PictureError(
                f"picture {index + 1} of {count}: {error}" if count > 1 else str(error)
            ) from error.__cause__

    def _resized(self, image: Image.Image | torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The HR picture and, where it is resized on a device, its LR views."""
        if device is None:
            return normalise(square(image, self.hr_size, self.pad)), None
        # This check comes before a picture that is too large goes to the device.
        height, width = image.shape[:2] if isinstance(image, torch.Tensor) else (image.height, image.width)
        place(width, height, self.hr_size, self.pad)
        if not isinstance(image, torch.Tensor):
            # The picture is copied because torch has no read-only tensors.
            image = torch.from_numpy(np.array(image)).to(device)
        return ops.dual_resize(
            image, self.hr_size, self.lr_size, grid=self.grid, global_view=self.global_view, pad=self.pad
        )
