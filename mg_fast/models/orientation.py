"""Tells how a stored picture has to be turned to stand upright.

Metadata is read and never written, so broken metadata cannot spoil a picture.
"""

import re
import struct

import torch
from PIL import Image

# The EXIF tag, and the property with the same meaning that Adobe's XMP metadata may hold instead.
ORIENTATION = 0x0112
_XMP_PROPERTY = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])""")
_XMP_KEYS = ("XML:com.adobe.xmp", "xmp")
# The EXIF types that Pillow reads as whole numbers, by their number, with their letters in `struct`: SHORT and LONG,
# the signed SHORT and LONG, the signed BYTE, and IFD.
_INTEGERS = {3: "H", 4: "L", 8: "h", 9: "l", 6: "b", 13: "L"}
# The sub-directories of EXIF that Pillow follows while it loads a TIFF file: Exif, GPS, and interoperability.
_POINTER_TAGS = (0x8769, 0x8825, 0xA005)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_orientation(image: Image.Image) -> int:
    """The orientation, 1 to 8, that the picture's EXIF states, or its XMP where EXIF states none.

    The result is 1, which turns nothing, where neither states an orientation, where the value is none of the eight
    numbers, and where the metadata cannot be read. `PIL.ImageOps.exif_transpose` gives the same answers but also
    rewrites the EXIF, which fails on any tag of an unexpected type.
    """
    stated = _stated_in_exif(image)
    if stated is None:
        stated = _stated_in_xmp(image)
    return stated if stated in _TURNS else 1


def _stated_in_exif(image: Image.Image) -> int | None:
    try:
        stated = image.getexif().get(ORIENTATION)
        if stated is not None:
            return int(stated) if stated in _TURNS else 1
    except Exception:  # Pillow raises many kinds of errors on broken metadata.
        pass
    # Pillow stops reading at the first broken tag, and the orientation may come after it.
    raw = image.info.get("exif")
    return _scanned(raw) if isinstance(raw, bytes) else None


def _scanned(raw: bytes) -> int | None:
    """The orientation in the first directory of raw EXIF bytes. No other tag is read."""
    while raw.startswith(b"Exif\0\0"):
        raw = raw[6:]
    order = {b"II": "<", b"MM": ">"}.get(raw[:2])
    if order is None or len(raw) < 8:
        return None
    [start] = struct.unpack_from(order + "L", raw, 4)
    for at in range(start + 2, len(raw) - 11, 12):
        tag, kind, count = struct.unpack_from(order + "HHL", raw, at)
        if at >= start + 2 + 12 * struct.unpack_from(order + "H", raw, start)[0]:
            return None
        if tag == ORIENTATION:
            if kind not in _INTEGERS or count != 1:
                return None
            return struct.unpack_from(order + _INTEGERS[kind], raw, at + 8)[0]
    return None


def _stated_in_xmp(image: Image.Image) -> int | None:
    for key in _XMP_KEYS:
        xmp = image.info.get(key, b"")
        xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
        if isinstance(xmp, bytes) and (found := _XMP_PROPERTY.search(xmp)):
            return int(found.group(1))
    return None


def turn_upright(image: Image.Image) -> Image.Image:
    """The loaded picture, turned as its orientation says, or the very same object where it is upright already."""
    turn = _TURNS.get(read_orientation(image))
    return image if turn is None else image.transpose(turn)


def upright(picture: torch.Tensor, orientation: int) -> torch.Tensor:
    """A picture [H, W, C], turned as orientation 1 to 8 says. Turns that strides can express make no copy."""
    turned = picture.transpose(0, 1) if orientation in (5, 6, 7, 8) else picture
    flipped = {2: [1], 3: [0, 1], 4: [0], 6: [1], 7: [0, 1], 8: [0]}.get(orientation, [])
    return turned.flip(flipped) if flipped else turned


def drop_broken_metadata(image: Image.Image) -> None:
    """Removes from a TIFF file's metadata, in memory, what Pillow cannot read.

    Pillow reads the metadata of a TIFF file together with its pixels. An unreadable tag would lose the pixels too.
    """
    if image.format != "TIFF":
        return
    try:
        exif = image.getexif()
    except Exception:  # Pillow keeps what it has read so far and does not try again.
        return
    for tag in _POINTER_TAGS:
        try:
            if tag in exif:
                exif.get_ifd(tag)
        except Exception:  # The directory may be broken in any way.
            del exif[tag]
