"""What this server takes as a picture: a file of limited size, of a few kinds, with a limited number of pixels."""

import io
import warnings

from PIL import Image

from ..errors import PictureError
from ..models.pictures import open_picture
from .limits import Limits, RequestRefused

# Pillow's names of the kinds that are taken. Pillow knows many more, whose readers are less used and less tested.
KINDS = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
# Scans of a JPEG file, of which a progressive one has about 10; and parts of other files that are read one by one.
MOST_SCANS, MOST_PARTS = 100, 100_000
EXTENSIONS = [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"]


def checked_picture(data: bytes, limits: Limits) -> tuple[Image.Image, str]:
    """A picture file as an upright RGB picture, and its kind, such as `image/png`.

    The number of pixels is read from the file's head before anything is decoded. The name of the file and the kind
    that its sender states are not looked at.

    Raises:
        RequestRefused: the file is too large, has too many pixels, is broken, or is none of the kinds that are taken.
    """
    if len(data) > limits.picture_bytes:
        raise RequestRefused(f"a picture may have {limits.megabytes} MiB, this one has more")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures at a limit of its own, which does not matter beside ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(_first_picture(data)), formats=list(KINDS))
            # A JPEG file with further pictures behind the first one has a name of its own in Pillow.
            kind, (width, height) = KINDS["JPEG" if opened.format == "MPO" else opened.format], opened.size
            if width * height > limits.picture_pixels:
                raise RequestRefused(
                    f"a picture may have {limits.megapixels} million pixels, this one has {width}x{height}"
                )
            return open_picture(opened, label="this picture"), kind
    except _Laborious:
        raise RequestRefused("this picture would take too long to decode: save it anew in another program") from None
    except PictureError as error:
        raise RequestRefused(str(error)) from None
    except RequestRefused:
        raise
    except Image.DecompressionBombError:
        raise RequestRefused(f"a picture may have {limits.megapixels} million pixels, this one has more") from None
    except Exception:  # Readers raise any kind of error on broken heads.
        raise RequestRefused(
            "this file is no picture: expected JPEG, PNG, WebP, GIF or BMP (SVG and HTML are not shown here)"
        ) from None


class _Laborious(Exception):
    """A file that is short, and takes long to decode."""


def _first_picture(data: bytes) -> bytes:
    """A file as it is given to Pillow: of a GIF file its first picture only.

    Raises:
        _Laborious: it has so many parts that decoding would take long.
    """
    if data.startswith(b"\xff\xd8"):
        # Each scan goes over the whole picture. The marks of scans occur nowhere else but in metadata.
        start = data.find(b"\xff\xda")
        if data.count(b"\xff\xda") > MOST_SCANS or data[:start].count(b"\xff") > MOST_PARTS:
            raise _Laborious
    elif data.startswith(b"GIF8"):
        return _first_of_gif(data)
    elif data.startswith(b"\x89PNG") and data.count(b"IDAT") > MOST_PARTS:
        raise _Laborious
    return data


def _first_of_gif(data: bytes) -> bytes:
    """The first picture of a GIF file, without what follows it, and without texts, which Pillow joins slowly."""

    def table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    parts, control = 0, b""
    at = head = 13 + table(data[10])

    def past_blocks(at: int) -> int:
        nonlocal parts
        while data[at]:
            at, parts = at + 1 + data[at], parts + 1
            if parts > MOST_PARTS:
                raise _Laborious
        return at + 1

    while data[at] == 0x21:
        end = past_blocks(at + 2)
        if data[at + 1] == 0xF9:
            control = data[at:end]
        at, parts = end, parts + 1
        if parts > MOST_PARTS:
            raise _Laborious
    if data[at] != 0x2C:
        raise ValueError("expected a picture in the file")
    end = past_blocks(at + 11 + table(data[at + 9]))
    return data[:head] + control + data[at:end] + b";"


def kept(picture: Image.Image, kind: str) -> tuple[bytes, str]:
    """A picture that was decoded from a file of some kind, as the file that is kept in its place, and that one's kind.

    Photographs stay JPEG with little loss, and other pictures become PNG without any.
    """
    file = io.BytesIO()
    if kind in ("image/jpeg", "image/webp"):
        picture.save(file, "JPEG", quality=95, subsampling=0)
        return file.getvalue(), "image/jpeg"
    picture.save(file, "PNG", compress_level=3)
    return file.getvalue(), "image/png"


def written(picture: Image.Image, *, photo: bool = False) -> tuple[bytes, str]:
    """A picture as a file in memory, and its kind: PNG, or for a photograph JPEG."""
    file = io.BytesIO()
    if photo:
        picture.convert("RGB").save(file, "JPEG", quality=90)
        return file.getvalue(), "image/jpeg"
    picture.save(file, "PNG")
    return file.getvalue(), "image/png"
