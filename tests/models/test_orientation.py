"""Pictures stand upright as their metadata says, and no metadata can spoil a picture that Pillow can decode."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from mg_fast.models.orientation import read_orientation
from mg_fast.models.pictures import open_picture

WIDTH, HEIGHT = 40, 24
# What a viewer does to the stored pixels, by the numbers of the EXIF standard.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
# Tags that describe a picture and do not affect how its pixels are stored. They include sub-directories and tags that
# people edit.
ODD_TAGS = (
    0x010E, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132,
    0x013B, 0x4746, 0x8298, 0x8769, 0x8825, 0x927C, 0x9286, 0xA005,
)  # fmt: skip
BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, SLONG, DOUBLE = TYPES = (1, 2, 3, 4, 5, 7, 9, 12)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "MPO")


def picture():
    """Smooth colours, which JPEG keeps, with different values in every corner."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([x * 6, y * 10, (x + y) * 4], axis=2).astype(np.uint8)


def directory(entries, order="<", at=8):
    """A TIFF directory of (tag, type, count, four bytes or a number) that begins at offset `at`."""
    rows = [
        struct.pack(order + "HHL", *entry[:3])
        + (entry[3] if isinstance(entry[3], bytes) else struct.pack(order + "L", entry[3]))
        for entry in sorted(entries, key=lambda entry: entry[0])
    ]
    return struct.pack(order + "H", len(rows)) + b"".join(rows) + struct.pack(order + "L", 0)


def short(value, order="<"):
    return struct.pack(order + "HH", value, 0)


def exif(*entries, order="<"):
    return (
        b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", 8) + directory(entries, order)
    )


def stated(orientation, order="<"):
    return (0x0112, SHORT, 1, short(orientation, order))


def tiff(*entries):
    """An uncompressed TIFF file of the picture with these additional entries."""
    pixels = picture().tobytes()
    bits = 8 + len(pixels)
    own = [
        (256, 4, 1, WIDTH),
        (257, 4, 1, HEIGHT),
        (258, 3, 3, bits),
        (259, 3, 1, short(1)),
        (262, 3, 1, short(2)),
        (273, 4, 1, 8),
    ]
    own += [(277, 3, 1, short(3)), (278, 4, 1, HEIGHT), (279, 4, 1, len(pixels)), (284, 3, 1, short(1))]
    return b"II*\0" + struct.pack("<L", bits + 6) + pixels + struct.pack("<HHH", 8, 8, 8) + directory([*own, *entries])


def stored(kind, *entries, **options):
    if kind == "TIFF":
        return tiff(*entries)
    out, image = io.BytesIO(), Image.fromarray(picture())
    options = {"exif": exif(*entries), **options}
    options |= {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind in ("JPEG", "MPO") else {}
    options |= {"save_all": True, "append_images": [Image.new("RGB", image.size)]} if kind == "MPO" else {}
    image.save(out, kind, **options)
    return out.getvalue()


def opened(data):
    with warnings.catch_warnings():
        # Pillow warns of metadata that it cannot read.
        warnings.simplefilter("ignore")
        return np.asarray(open_picture(data)).astype(int)


def stands(data, orientation):
    found, expected = opened(data), TURNS[orientation](picture()).astype(int)
    return found.shape == expected.shape and np.abs(found - expected).max() <= 16


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", TURNS)
def test_every_orientation_in_every_format(kind, orientation):
    data = stored(kind, stated(orientation))
    assert stands(data, orientation)
    # The result states no orientation, so nothing turns it a second time.
    assert np.array_equal(np.asarray(open_picture(open_picture(data))), np.asarray(open_picture(data)))
    image = Image.open(io.BytesIO(data))
    assert np.array_equal(opened(image), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int))
    # The caller's own picture keeps its metadata and its pixels.
    assert image.size == Image.open(io.BytesIO(data)).size


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tag", ODD_TAGS)
def test_no_other_tag_matters(kind, tag):
    for odd_type in TYPES:
        values = [(1, 6), (0, 0)]
        # Pillow cannot open a TIFF file where a tag whose value lies beyond the file precedes the tags of the pixels.
        values += [(1, 70000), (40, 2**31 - 1)] if kind != "TIFF" or tag > 0x0112 else []
        for count, value in values:
            data = stored(kind, stated(6), (tag, odd_type, count, value))
            assert stands(data, 6), (odd_type, count, value)


@pytest.mark.parametrize("order", "<>")
def test_both_byte_orders(order):
    assert stands(stored("JPEG", exif=exif(stated(8, order), order=order)), 8)


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "MPO"))
def test_orientations_that_are_none_turn_nothing(kind):
    """Values outside 1 to 8 turn nothing, as in Pillow and in viewers."""
    for value in (0, 9, 65535):
        assert stands(stored(kind, stated(value)), 1)
    for entry in ((ASCII, 2, b"6\0\0\0"), (UNDEFINED, 1, b"\6\0\0\0"), (DOUBLE, 1, 99999), (RATIONAL, 1, 4)):
        assert opened(stored(kind, (0x0112, *entry))).shape == (HEIGHT, WIDTH, 3), entry
    # A number stored in another integer type counts by its value.
    for entry in ((LONG, 1, 6), (SLONG, 1, 6), (SHORT, 2, short(6))):
        assert stands(stored(kind, (0x0112, *entry)), 6), entry


@pytest.mark.parametrize("order", "<>")
def test_every_integer_type_with_and_without_pillow(order, monkeypatch):
    """Without Pillow's help, the orientation is found in every integer type in which Pillow turns the picture."""
    values = {3: "HH", 4: "L", 6: "bbbb", 8: "hh", 9: "l", 13: "L"}
    image = Image.fromarray(picture())
    for kind, spelled in values.items():
        value = struct.pack(order + spelled, *([6] + [0] * (len(spelled) - 1)))
        raw = exif((0x0112, kind, 1, value), order=order)
        assert stands(stored("JPEG", exif=raw), 6), kind
        image.info["exif"] = raw
        with monkeypatch.context() as patched:
            patched.setattr(Image.Image, "getexif", lambda self: 1 / 0)
            assert read_orientation(image) == 6, kind


def test_truncated_exif():
    whole = exif(stated(6), (0x010E, ASCII, 30, 60), (0x0131, ASCII, 9, 90))
    for length in range(6, len(whole)):
        for kind in ("JPEG", "PNG", "WEBP"):
            found = opened(stored(kind, exif=whole[:length]))
            assert found.shape in ((HEIGHT, WIDTH, 3), (WIDTH, HEIGHT, 3)), (kind, length)


def test_changed_exif():
    """Wherever bytes of the metadata are changed, there is a picture, in one orientation or another."""
    rng = np.random.default_rng(0)
    whole = exif(
        stated(6), (0x8769, LONG, 1, 50), (0x8825, LONG, 1, 50), (0x011A, RATIONAL, 1, 50), (0x0128, SHORT, 1, short(2))
    )
    for _ in range(300):
        changed = bytearray(whole + b"\0" * 8)
        for at in rng.integers(6, len(changed), 3):
            changed[at] = rng.integers(256)
        found = opened(stored("JPEG", exif=bytes(changed)))
        assert found.shape in ((HEIGHT, WIDTH, 3), (WIDTH, HEIGHT, 3)), bytes(changed)


XMP = "<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description {}/></x:xmpmeta>"


@pytest.mark.parametrize(
    "written", ['tiff:Orientation="{}"', "tiff:Orientation='{}'", "><tiff:Orientation>{}</tiff:Orientation"]
)
@pytest.mark.parametrize("broken", (False, True))
def test_an_orientation_in_xmp_alone(written, broken):
    """The orientation in XMP is found where there is no EXIF, and where the EXIF cannot be read."""
    for orientation in TURNS:
        xmp = XMP.format(written.format(orientation)).encode()
        options = {"exif": b"Exif\0\0XX*\0\0\0\0\0"} if broken else {"exif": b""}
        assert stands(stored("JPEG", xmp=xmp, **options), orientation), orientation
        assert stands(stored("WEBP", xmp=xmp, **options), orientation), orientation


def test_exif_outranks_xmp():
    assert stands(stored("JPEG", stated(6), xmp=XMP.format('tiff:Orientation="3"').encode()), 6)
    assert stands(stored("JPEG", stated(1), xmp=XMP.format('tiff:Orientation="3"').encode()), 1)
    assert stands(stored("JPEG", xmp=XMP.format('tiff:Orientation="9"').encode()), 1)


def test_a_broken_raw_profile_of_png():
    """A PNG with EXIF as hexadecimal text, as ImageMagick writes it, opens even if that text is broken."""
    from PIL.PngImagePlugin import PngInfo

    for text, orientation in (
        ("\nexif\n      40\n" + exif(stated(6)).hex(), 6),
        ("\nexif\n      40\nno hexadecimal digits", 1),
        ("", 1),
    ):
        info, out = PngInfo(), io.BytesIO()
        info.add_text("Raw profile type exif", text)
        Image.fromarray(picture()).save(out, "PNG", pnginfo=info)
        assert stands(out.getvalue(), orientation), text
