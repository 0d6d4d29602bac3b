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
            opened = Image.open(io.BytesIO(data), formats=list(KINDS))
            # A JPEG file with further pictures behind the first one has a name of its own in Pillow.
            kind, (width, height) = KINDS["JPEG" if opened.format == "MPO" else opened.format], opened.size
            if width * height > limits.picture_pixels:
                raise RequestRefused(
                    f"a picture may have {limits.megapixels} million pixels, this one has {width}x{height}"
                )
            return open_picture(opened, label="this picture"), kind
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


def written(picture: Image.Image, *, photo: bool = False) -> tuple[bytes, str]:
    """A picture as a file in memory, and its kind: PNG, or for a photograph JPEG."""
    file = io.BytesIO()
    if photo:
        picture.convert("RGB").save(file, "JPEG", quality=90)
        return file.getvalue(), "image/jpeg"
    picture.save(file, "PNG")
    return file.getvalue(), "image/png"
