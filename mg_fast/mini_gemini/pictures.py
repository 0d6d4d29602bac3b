"""Anything a caller may call a picture, as an upright RGB Pillow image; or an error that says what came."""

import base64
import io
import logging
import os
import urllib.request
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import BackendError, PictureError

logger = logging.getLogger(__name__)

# of EXIF's tags
ORIENTATION = 0x0112


def open_picture(source, *, allow_urls: bool = False, label: str | None = None) -> Image.Image:
    """A picture in mode RGB, its EXIF orientation applied.

    Args:
        source: a Pillow image, a path, bytes, a binary file, or a uint8 array or tensor [H, W], [H, W, C] or (tensor) [C, H, W], C 1, 3
            or 4. A str that begins with http://, https:// or data: only where `allow_urls` is set.
        allow_urls: fetch URLs.
        label: what error messages call the picture; default: its path or type.

    Returns:
        Alpha is dropped, as the original does: transparent pixels show their hidden colour (a warning says so). 16-bit greys keep
        their high byte. Of an animation the first frame is taken (a warning says so).

    Raises:
        PictureError: not a picture, truncated, empty, too large, or of a pixel type whose range is unknown.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, label or f"picture of mode {source.mode}")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source, label or f"picture in a {type(source).__name__}")
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        shown = label or (source if len(source) <= 80 else source[:77] + "...")
        if not allow_urls:
            raise PictureError(f"{shown}: URLs are fetched only when asked for (allow_urls=True, --allow-urls, or a message's `url` key)")
        return _decode(io.BytesIO(_fetch(source, shown)), shown)
    if isinstance(source, (str, os.PathLike)):
        path = os.path.expanduser(os.fspath(source))
        if not path or os.path.isdir(path) or not os.path.exists(path):
            raise PictureError(
                f"{path or 'an empty path'}: {'a folder, expected a picture file' if os.path.isdir(path) else 'no such file'}"
            )
        image = _decode(path, label or path)
        # as Pillow's own files carry it, for what is said of the picture later
        image.filename = path
        return image
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), label or f"picture of {len(source)} bytes")
    if hasattr(source, "read"):
        return _decode(source, label or getattr(source, "name", None) or "picture in a file object")
    expected = "a Pillow image, a path, bytes, a binary file, or a uint8 array or tensor"
    raise PictureError(f"{label or 'picture'}: expected {expected}, got {type(source).__name__}")


def check_decoder(decoder: str, device: torch.device | str | None) -> None:
    """Raises ValueError for a decoder that is not known, BackendError with the reason for one that cannot run."""
    if decoder not in ("pillow", "nvjpeg"):
        raise ValueError(f"unknown decoder {decoder!r}: expected pillow or nvjpeg")
    if decoder == "nvjpeg" and (device is None or torch.device(device).type != "cuda"):
        raise BackendError(f"decoder 'nvjpeg' needs a CUDA device, got device={None if device is None else str(device)!r}")
    if decoder == "nvjpeg" and not torch.cuda.is_available():
        raise BackendError("decoder 'nvjpeg' needs a CUDA device, torch finds none here")


def decode_on_device(source, device: torch.device | str) -> torch.Tensor | None:
    """A JPEG file or bytes as an upright RGB tensor [H, W, 3] uint8 on a CUDA device, by nvJPEG; None for anything else."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        if isinstance(source, (str, os.PathLike)):
            with open(os.path.expanduser(os.fspath(source)), "rb") as file:
                source = file.read()
        if not isinstance(source, (bytes, bytearray, memoryview)) or bytes(source[:3]) != b"\xff\xd8\xff":
            return None
    except OSError:
        # Pillow's way has the words for it
        return None
    data = bytes(source)
    try:
        orientation = Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1)
        picture = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB, device)
    except Exception as error:  # decoders raise anything on broken data
        raise PictureError(f"picture of {len(data)} bytes: nvJPEG cannot decode it: {_first_line(error)}") from None
    return upright(picture.permute(1, 2, 0), orientation)


def upright(picture: torch.Tensor, orientation: int) -> torch.Tensor:
    """[H, W, C] turned as EXIF says, without a copy for turns that strides can tell; values but 1 to 8 turn nothing, as in Pillow."""
    turned = picture.transpose(0, 1) if orientation in (5, 6, 7, 8) else picture
    flipped = {2: [1], 3: [0, 1], 4: [0], 6: [1], 7: [0, 1], 8: [0]}.get(orientation, [])
    return turned.flip(flipped) if flipped else turned


def _fetch(url: str, label: str) -> bytes:
    try:
        if url.startswith("data:"):
            return base64.b64decode(url.partition(",")[2])
        with urllib.request.urlopen(url, timeout=30) as reply:
            return reply.read()
    except Exception as error:  # whatever the transport raises
        raise PictureError(f"{label}: cannot be fetched or decoded: {_first_line(error)}") from error


def _decode(file, label: str) -> Image.Image:
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{label}: refused as a decompression bomb: {_first_line(error)}") from None
    except UnidentifiedImageError:
        raise PictureError(f"{label}: not a picture that Pillow can read") from None
    except Exception as error:  # decoders raise anything on broken headers
        raise PictureError(f"{label}: cannot be opened as a picture: {_first_line(error)}") from None
    return _to_rgb(image, label)


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if 0 in image.size:
        raise PictureError(f"{label}: expected at least 1x1 pixels, got {image.width}x{image.height}")
    try:
        if getattr(image, "is_animated", False):
            # a file just opened stands at its first frame; where a caller has moved on, that was meant
            logger.warning(
                "%s: has %d frames, %s is used", label, image.n_frames, f"number {n}" if (n := image.tell() + 1) > 1 else "the first one"
            )
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            # Pillow's own conversion clips at 255, which turns nearly everything white
            return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise PictureError(f"{label}: 32-bit {image.mode} pixels have no known range: convert to 8 or 16 bits per channel first")
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            logger.warning("%s: has transparent pixels, their hidden colours are used; flatten it to choose the background", label)
        with warnings.catch_warnings():
            # about palettes with alpha, said above in our own words
            warnings.simplefilter("ignore", UserWarning)
            return image.convert("RGB")
    except PictureError:
        raise
    except Exception as error:  # decoders raise anything on truncated or broken data
        raise PictureError(f"{label}: broken or truncated: {_first_line(error)}") from None


def _from_array(array: np.ndarray | torch.Tensor, label: str) -> Image.Image:
    shape = tuple(array.shape)
    if isinstance(array, torch.Tensor):
        if array.dtype == torch.uint8 and array.dim() == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
            array = array.permute(1, 2, 0)
        array = array.detach().cpu().numpy() if array.dtype == torch.uint8 else array
    if str(array.dtype).removeprefix("torch.") != "uint8":
        raise PictureError(f"{label}: expected uint8 values 0 to 255, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise PictureError(f"{label}: expected [H, W], [H, W, 3] or [H, W, 4] (a tensor also [C, H, W]), got {list(shape)}")
    if 0 in array.shape:
        raise PictureError(f"{label}: expected at least 1x1 pixels, got {list(shape)}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), label)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
