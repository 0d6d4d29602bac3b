"""Opens anything that a caller may pass as a picture, as an upright RGB Pillow image, or says what came instead."""

import io
import logging
import os
import urllib.request
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..errors import BackendError, PictureError, quoted, shortened
from .base64_text import decode_data_uri, looks_like_base64, refusal
from .orientation import drop_broken_metadata, read_orientation, turn_upright, upright
from .urls import expanded, is_data_uri, is_url

logger = logging.getLogger(__name__)

# Grey pictures of more than 8 bits are converted in strips of this many pixels, because NumPy needs several times the
# memory that Pillow does.
_STRIP = 2**22
# TIFF tags for the bits per pixel and for the meaning of the lowest value: 0 is white where the second tag says 0.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262


def open_picture(source, *, allow_urls: bool = False, label: str | None = None) -> Image.Image:
    """Opens a picture in mode RGB, upright and without metadata.

    Args:
        source: a Pillow image, a path, bytes, a binary file, or a uint8 array or tensor [H, W], [H, W, C] or (tensor)
            [C, H, W], with C 1, 3 or 4. A str that begins with http://, https:// or data: needs `allow_urls`.
        allow_urls: fetch URLs.
        label: what error messages call the picture. Default: its path or type.

    Returns:
        The picture. The orientation that EXIF or XMP states is applied; no other metadata matters. Alpha is dropped, as
        in the original: transparent pixels show their hidden colour, and a warning says so. Greys of 16 bits keep their
        high byte, and greys of 12 bits their upper 8 bits. The first frame of an animation is taken, and a warning says
        so. An RGB image of one frame without metadata is returned as the very same object.

    Raises:
        PictureError: the source is not a picture, or it is truncated, empty, too large, or of a pixel type whose range
            is unknown.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, label or f"picture of mode {source.mode}", owned=False)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source, label or f"picture in a {type(source).__name__}")
    if is_url(source):
        shown = label or (source if len(source) <= 80 else source[:77] + "...")
        if not allow_urls:
            asked_for = "allow_urls=True, --allow-urls, or a message's `url` key"
            message = f"{shown}: URLs are fetched only when asked for ({asked_for})"
            raise PictureError(f"{message}; {refusal(len(source))}" if looks_like_base64(source) else message)
        return _decode(io.BytesIO(_fetch(source, shown)), shown)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(expanded(os.fspath(source)), label)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), label or f"picture of {len(source)} bytes")
    if hasattr(source, "read"):
        return _decode(source, label or getattr(source, "name", None) or "picture in a file object")
    expected = "a Pillow image, a path, bytes, a binary file, or a uint8 array or tensor"
    raise PictureError(f"{label or 'picture'}: expected {expected}, got {type(source).__name__}")


def check_decoder(decoder: str, device: torch.device | str | None) -> None:
    """Raises ValueError for an unknown decoder, and BackendError with the reason for one that cannot run."""
    if decoder not in ("pillow", "nvjpeg"):
        raise ValueError(f"unknown decoder {quoted(decoder)}: expected pillow or nvjpeg")
    if decoder == "nvjpeg" and (device is None or torch.device(device).type != "cuda"):
        raise BackendError(
            f"decoder 'nvjpeg' needs a CUDA device, got device={None if device is None else str(device)!r}"
        )
    if decoder == "nvjpeg" and not torch.cuda.is_available():
        raise BackendError("decoder 'nvjpeg' needs a CUDA device, torch finds none here")


def decode_on_device(source, device: torch.device | str) -> torch.Tensor | None:
    """Decodes a JPEG file or bytes with nvJPEG to an upright RGB tensor [H, W, 3] uint8 on a CUDA device.

    Returns None for anything else.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        if isinstance(source, (str, os.PathLike)):
            with open(expanded(os.fspath(source)), "rb") as file:
                source = file.read()
        if not isinstance(source, (bytes, bytearray, memoryview)) or bytes(source[:3]) != b"\xff\xd8\xff":
            return None
    except (OSError, ValueError):
        # The path through Pillow reports this error in words. A path that no file system can have is a ValueError.
        return None
    data = bytes(source)
    try:
        orientation = read_orientation(Image.open(io.BytesIO(data)))
        picture = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB, device)
    except Exception as error:  # Decoders raise any kind of error on broken data.
        raise PictureError(f"picture of {len(data)} bytes: nvJPEG cannot decode it: {_first_line(error)}") from None
    return upright(picture.permute(1, 2, 0), orientation)


def _fetch(url: str, label: str) -> bytes:
    try:
        if is_data_uri(url):
            return decode_data_uri(url)
        with urllib.request.urlopen(url, timeout=30) as reply:
            return reply.read()
    except Exception as error:  # Transports raise any kind of error.
        raise PictureError(f"{label}: cannot be fetched or decoded: {_first_line(error)}") from error


def _from_path(path: str | bytes, label: str | None) -> Image.Image:
    if not path or not os.path.exists(path):
        raise PictureError(
            refusal(len(path)) if looks_like_base64(path) else f"{path or 'an empty path'}: no such file"
        )
    if os.path.isdir(path):
        raise PictureError(f"{path}: a folder, expected a picture file")
    image = _decode(path, label or path)
    # Pillow sets this attribute on the files that it opens itself. Later messages about the picture use it.
    image.filename = path
    return image


def _decode(file, label: str) -> Image.Image:
    return _to_rgb(_opened(file, label), label, owned=True)


def _opened(file, label: str) -> Image.Image:
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:
        limit = "PIL.Image.MAX_IMAGE_PIXELS sets the limit"
        raise PictureError(f"{label}: refused as a decompression bomb: {_first_line(error)} ({limit})") from None
    except Exception as error:  # Decoders raise any kind of error on broken headers.
        if size := _base64_size(file):
            raise PictureError(f"{label}: {refusal(size)}") from None
        if isinstance(error, UnidentifiedImageError):
            raise PictureError(f"{label}: not a picture that Pillow can read") from None
        raise PictureError(f"{label}: cannot be opened as a picture: {_first_line(error)}") from None


def _base64_size(file) -> int:
    """The number of characters of a file that holds a picture as base64 text; 0 for any other file."""
    try:
        if isinstance(file, (str, bytes)):
            with open(file, "rb") as opened:
                return _base64_size(opened)
        file.seek(0)
        return file.seek(0, os.SEEK_END) if looks_like_base64(file.read(512)) else 0
    except Exception:  # A caller's file object may raise anything, and the error before this one is the one to report.
        return 0


def _to_rgb(image: Image.Image, label: str, *, owned: bool) -> Image.Image:
    """The picture as RGB. A picture that nothing else refers to (`owned`) is not copied, because it may be large."""
    label = shortened(str(label), 300)
    if 0 in image.size:
        raise PictureError(f"{label}: expected at least 1x1 pixels, got {image.width}x{image.height}")
    try:
        animated = getattr(image, "is_animated", False)
        if animated:
            # A file that was just opened stands at its first frame. A caller who moved on meant another frame.
            which = f"number {number}" if (number := image.tell() + 1) > 1 else "the first one"
            logger.warning("%s: has %d frames, %s is used", label, image.n_frames, which)
        drop_broken_metadata(image)
        image.load()
        known_bits, white_is_zero = _meaning_of_greys(image)
        image = turn_upright(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and known_bits):
            image = _to_eight_bits(image, known_bits or 16, white_is_zero)
        if image.mode in ("I", "F"):
            hint = "have no known range: convert to 8 or 16 bits per channel first"
            raise PictureError(f"{label}: 32-bit {image.mode} pixels {hint}")
        if _has_transparent_pixels(image):
            hint = "has transparent pixels, their hidden colours are used; flatten it to choose the background"
            logger.warning("%s: %s", label, hint)
        if image.mode == "RGB" and not animated and (owned or not image.info):
            rgb = image
        else:
            with warnings.catch_warnings():
                # The warning above already covers Pillow's own one about transparent palettes.
                warnings.simplefilter("ignore", UserWarning)
                # Pillow cannot convert premultiplied greys directly.
                rgb = (image.convert("LA") if image.mode == "La" else image).convert("RGB")
        # All metadata has been applied or reported. Nothing may apply it, or warn about it, again.
        rgb.info = {}
        return rgb
    except PictureError:
        raise
    except Exception as error:  # Decoders raise any kind of error on truncated or broken data.
        raise PictureError(f"{label}: broken or truncated: {_first_line(error)}") from None


def _meaning_of_greys(image: Image.Image) -> tuple[int | None, bool]:
    """The number of bits of a grey pixel, where the file tells it, and whether 0 is white."""
    if image.format == "PPM":
        # Pillow scales the greys of a file with more than 8 bits to 16 bits.
        return 16, False
    tags = getattr(image, "tag_v2", {})
    return (12 if tags.get(_BITS_PER_SAMPLE) == (12,) else None), tags.get(_PHOTOMETRIC) == 0


def _to_eight_bits(image: Image.Image, bits: int, white_is_zero: bool) -> Image.Image:
    """Keeps the upper 8 of the `bits` of a grey picture.

    Pillow's own conversion clips at 255, which turns nearly everything white.
    """
    grey, rows = Image.new("L", image.size), max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        strip = (strip >> (bits - 8)).astype(np.uint8)
        grey.paste(Image.fromarray(255 - strip if white_is_zero else strip), (0, top))
    grey.info = image.info
    return grey


def _has_transparent_pixels(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    if image.mode.lower().endswith("a"):
        return image.getchannel(len(image.getbands()) - 1).getextrema()[0] < 255
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def _from_array(array: np.ndarray | torch.Tensor, label: str) -> Image.Image:
    shape = tuple(array.shape)
    if isinstance(array, torch.Tensor):
        if (
            array.dtype == torch.uint8
            and array.dim() == 3
            and array.shape[0] in (1, 3, 4)
            and array.shape[2] not in (1, 3, 4)
        ):
            array = array.permute(1, 2, 0)
        array = array.detach().cpu().numpy() if array.dtype == torch.uint8 else array
    if str(array.dtype).removeprefix("torch.") != "uint8":
        raise PictureError(f"{label}: expected uint8 values 0 to 255, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise PictureError(
            f"{label}: expected [H, W], [H, W, 3] or [H, W, 4] (a tensor also [C, H, W]), got {list(shape)}"
        )
    if 0 in array.shape:
        raise PictureError(f"{label}: expected at least 1x1 pixels, got {list(shape)}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), label, owned=True)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
