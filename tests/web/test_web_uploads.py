"""What is taken as a picture, by its contents alone: kinds, bytes, pixels, and files that only claim to be one."""

import io
import struct
import zlib

import pytest
from PIL import Image

from mg_fast.web.limits import Limits, RequestRefused
from mg_fast.web.uploads import KINDS, MOST_PARTS, checked_picture, kept, written

SVG = b"""<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>"""
HTML = b"<!doctype html><html><script>alert(1)</script></html>"


def file_of(kind, size=(20, 10), **options):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(file, kind, **options)
    return file.getvalue()


def png_of(width, height):
    """A PNG file whose head names this size and whose pixels are all of one value, packed."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + width // 8)
    pixels = b"".join(packer.compress(row) for _ in range(min(height, 200))) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_are_taken(kind):
    picture, media_type = checked_picture(file_of(kind), Limits())
    assert picture.mode == "RGB" and picture.size == (20, 10) and media_type == KINDS[kind]


def test_the_first_of_several_pictures_in_a_file():
    file = io.BytesIO()
    red, blue = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    red.save(file, "MPO", save_all=True, append_images=[blue])
    picture, media_type = checked_picture(file.getvalue(), Limits())
    assert media_type == "image/jpeg" and picture.getpixel((3, 3))[0] > 200


def test_an_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6
    assert checked_picture(file_of("JPEG", exif=exif), Limits())[0].size == (10, 20)


@pytest.mark.parametrize(
    "data, message",
    [
        (SVG, "is no picture"),
        (HTML, "is no picture"),
        (b"GIF89a" + HTML, "is no picture|broken|million pixels"),
        (b"", "is no picture"),
        (b"\x89PNG\r\n\x1a\n", "is no picture"),
        (file_of("PNG")[:-30], "broken or truncated"),
        (file_of("TIFF"), "is no picture"),
        (file_of("PPM"), "is no picture"),
        (file_of("EPS"), "is no picture"),
    ],
)
def test_files_that_are_not_taken(data, message):
    with pytest.raises(RequestRefused, match=message):
        checked_picture(data, Limits())


@pytest.mark.parametrize("side", [6_000, 12_000, 60_000])
def test_a_bomb_is_refused_by_its_head(side, monkeypatch):
    """The limit is looked at before any pixel is decoded, and whatever Pillow's own limit is."""
    data = png_of(side, side)
    assert len(data) < 2**20
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestRefused, match="may have 25 million pixels, this one has"):
        checked_picture(data, Limits())


def test_limits():
    data = file_of("PNG", (100, 100))
    with pytest.raises(RequestRefused, match="may have 1 million pixels, this one has 1200x1000"):
        checked_picture(file_of("PNG", (1200, 1000)), Limits(megapixels=1))
    with pytest.raises(RequestRefused, match="may have 1 MiB"):
        checked_picture(data + b"\0" * 2**20, Limits(megabytes=1))
    assert checked_picture(data, Limits(megapixels=1, megabytes=1))[0].size == (100, 100)


def test_written_pictures_hold_nothing_but_pixels():
    exif = Image.Exif()
    exif[270] = "a secret"
    data = file_of("JPEG", exif=exif)
    assert b"secret" in data
    picture = checked_picture(data, Limits())[0]
    for photo, kind in ((False, "image/png"), (True, "image/jpeg")):
        data, media_type = written(picture, photo=photo)
        assert media_type == kind and b"secret" not in data and checked_picture(data, Limits())[0].size == picture.size


def scans_of(times):
    """A progressive JPEG file whose last scan comes again so often."""
    data = file_of("JPEG", (64, 64), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + data[-2:]


def test_files_that_take_long_to_decode_are_refused(monkeypatch):
    assert checked_picture(scans_of(20), Limits())[0].size == (64, 64)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    start = file_of("GIF").index(b"\x2c")
    gif, png = file_of("GIF"), file_of("PNG")
    for data in (
        scans_of(200),
        b"\xff\xd8" + b"\xff\xfe\x00\x02" * (MOST_PARTS + 1) + file_of("JPEG")[2:],
        gif[:start] + b"\x21\xfe\x00" * (MOST_PARTS + 1) + gif[start:],
        gif[:start] + b"\x21\xfe" + b"\x01a" * (MOST_PARTS + 1) + b"\0" + gif[start:],
        png[:33] + b"\0\0\0\0IDAT5\xaf\x06\x1e" * (MOST_PARTS + 1) + png[33:],
    ):
        with pytest.raises(RequestRefused, match="would take too long to decode"):
            checked_picture(data, Limits())


def test_of_an_animation_only_the_first_frame_is_decoded():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], comment="a text " * 90)
        data = file.getvalue()
        picture = checked_picture(data, Limits())[0]
        red, green, blue = picture.getpixel((3, 3))
        assert red > 200 and max(green, blue) < 60
        if kind == "GIF":
            # What stands behind the first frame is not even looked at.
            assert checked_picture(data[:-1] + b"\x21\xfe" + b"\x01a" * 10**6, Limits())[0] == picture


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_written_anew(kind):
    data = file_of(kind, (64, 48)) + b"<script>"
    file, media_type = kept(*checked_picture(data, Limits()))
    assert b"<script>" not in file and media_type in ("image/png", "image/jpeg")
    picture = Image.open(io.BytesIO(file))
    assert picture.size == (64, 48) and all(abs(a - b) < 8 for a, b in zip(picture.getpixel((9, 9)), (200, 30, 40)))
