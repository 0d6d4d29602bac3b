"""Pictures of every pixel type, and animations, show the colours of Pillow's own conversion, also through `see`."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import mg_fast
from mg_fast import PictureError
from mg_fast.models.pictures import open_picture
from tests.forked_python import python

SIZE = (48, 32)


def ramps():
    """An RGB picture with many colours that is smooth enough for every format."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    return Image.fromarray(np.stack([x * 5, y * 8, 255 - x * 3 - y], axis=2).astype(np.uint8))


def stored(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def greys(bits, dtype=np.uint16):
    """Greys of `bits` bits that use the whole range."""
    return np.linspace(0, 2**bits - 1, SIZE[0] * SIZE[1]).round().astype(dtype).reshape(SIZE[1], SIZE[0])


def palette(alpha=False):
    image = ramps().quantize(32)
    return Image.open(io.BytesIO(stored(image, "PNG", transparency=bytes(range(0, 256, 8)) if alpha else 3)))


def lab():
    return ImageCms.profileToProfile(
        ramps(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )


def alpha(mode):
    image = ramps().convert(mode)
    image.putalpha(Image.fromarray((greys(8, np.uint8) // 2 + 128).astype(np.uint8)))
    return image


# Pictures in memory that Pillow itself converts to what a viewer shows.
PILLOWS = {
    "1": lambda: ramps().convert("1"),
    "L": lambda: ramps().convert("L"),
    "LA": lambda: alpha("LA"),
    "P": lambda: ramps().quantize(32),
    "P with a transparent index": palette,
    "P with alpha": lambda: palette(alpha=True),
    "PA": lambda: ramps().quantize(32).convert("PA"),
    "RGBA": lambda: alpha("RGBA"),
    "RGBX": lambda: ramps().convert("RGBX"),
    "RGBa": lambda: alpha("RGBA").convert("RGBa"),
    "CMYK": lambda: ramps().convert("CMYK"),
    "YCbCr": lambda: ramps().convert("YCbCr"),
    "HSV": lambda: ramps().convert("HSV"),
    "LAB": lab,
}
# Files of unusual kinds, which Pillow also converts.
FILES = {
    "CMYK JPEG": lambda: stored(ramps().convert("CMYK"), "JPEG", quality=95),
    "CMYK TIFF": lambda: stored(ramps().convert("CMYK"), "TIFF"),
    "LAB TIFF": lambda: stored(lab(), "TIFF"),
    # Pillow 12 cannot read what it writes of these without compression.
    "YCbCr TIFF": lambda: stored(ramps().convert("YCbCr"), "TIFF", compression="tiff_lzw"),
    "YCbCr JPEG": lambda: stored(ramps(), "JPEG", subsampling=0, quality=95),
    "grey JPEG": lambda: stored(ramps().convert("L"), "JPEG", quality=95),
    "1-bit PNG": lambda: stored(ramps().convert("1"), "PNG"),
    "1-bit TIFF": lambda: stored(ramps().convert("1"), "TIFF", compression="group4"),
    "PBM": lambda: stored(ramps().convert("1"), "PPM"),
    "grey and alpha PNG": lambda: stored(alpha("LA"), "PNG"),
    "2-bit palette PNG": lambda: stored(ramps().quantize(4), "PNG", bits=2),
    "palette BMP": lambda: stored(ramps().quantize(32), "BMP"),
    "palette TIFF": lambda: stored(ramps().quantize(32), "TIFF"),
    "GIF": lambda: stored(ramps().quantize(32), "GIF"),
    "WEBP with alpha": lambda: stored(alpha("RGBA"), "WEBP", lossless=True, exact=True),
    "JPEG 2000": lambda: stored(ramps(), "JPEG2000"),
    "TGA": lambda: stored(alpha("RGBA"), "TGA"),
    "PCX": lambda: stored(ramps().quantize(32), "PCX"),
    "16-bit RGB PPM": lambda: b"P6 48 32 65535\n" + (np.asarray(ramps()).astype(">u2") * 257).tobytes(),
}


def expected_of(image):
    return np.asarray(image.convert("RGB"))


def shows(source, expected):
    found = open_picture(source)
    assert type(found.info) is dict and not found.info and found.mode == "RGB"
    return np.array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("kind", PILLOWS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pixel_types(pipeline, kind):
    image = PILLOWS[kind]()
    assert image.mode == kind.split()[0]
    expected = expected_of(image)
    # Only the rounding of the pixel type lies between the result and the picture that it was made from.
    if kind not in ("1",) and not kind.startswith(("P", "LAB")):
        grey = kind in ("L", "LA")
        near = np.asarray(ramps().convert("L").convert("RGB") if grey else ramps()).astype(int)
        assert np.abs(expected - near).max() <= 8
    before = image.mode, dict(image.info), image.tobytes()
    assert shows(image, expected)
    assert (image.mode, dict(image.info), image.tobytes()) == before
    assert torch.equal(pipeline.see(image), pipeline.see(Image.fromarray(expected)))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files(pipeline, kind, tmp_path):
    data = FILES[kind]()
    expected = expected_of(Image.open(io.BytesIO(data)))
    assert shows(data, expected)
    (tmp_path / "picture").write_bytes(data)
    assert shows(tmp_path / "picture", expected)
    assert torch.equal(pipeline.see(data), pipeline.see(Image.fromarray(expected)))
    assert np.asarray(expected).std() > 20


def tiff_of_greys(values, bits, photometric=1):
    """A TIFF file of one strip, with 12 bits packed as the standard says, or with 16 bits."""
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = np.stack(
            [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1
        ).astype(np.uint8)
        data = packed.tobytes()
    else:
        data = values.astype("<u2").tobytes()
    entries = [
        (256, SIZE[0]),
        (257, SIZE[1]),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, SIZE[1]),
        (279, len(data)),
    ]
    rows = b"".join(
        np.array([tag, 4, 1, 0, value, 0], "<u2").tobytes()[:8] + np.uint32(value).tobytes() for tag, value in entries
    )
    return b"II*\0" + np.uint32(8 + len(data)).tobytes() + data + np.uint16(len(entries)).tobytes() + rows + bytes(4)


WIDE = {
    "I;16": lambda: Image.fromarray(greys(16)),
    "I;16B": lambda: Image.frombytes("I;16B", SIZE, greys(16).astype(">u2").tobytes()),
    "I;16L": lambda: Image.frombytes("I;16L", SIZE, greys(16).astype("<u2").tobytes()),
    "PNG": lambda: stored(Image.fromarray(greys(16)), "PNG"),
    "TIFF": lambda: stored(Image.fromarray(greys(16)), "TIFF"),
    "compressed TIFF": lambda: stored(Image.fromarray(greys(16)), "TIFF", compression="tiff_lzw"),
    "big-endian TIFF": lambda: stored(Image.frombytes("I;16B", SIZE, greys(16).astype(">u2").tobytes()), "TIFF"),
    "JPEG 2000": lambda: stored(Image.fromarray(greys(16)), "JPEG2000"),
    "PGM": lambda: b"P5 48 32 65535\n" + greys(16).astype(">u2").tobytes(),
    "PGM of 10 bits": lambda: b"P5 48 32 1023\n" + greys(10).astype(">u2").tobytes(),
    "TIFF by hand": lambda: tiff_of_greys(greys(16), 16),
    "TIFF of 12 bits": lambda: tiff_of_greys(greys(12), 12),
    "TIFF with white at 0": lambda: tiff_of_greys(65535 - greys(16), 16, photometric=0),
}


@pytest.mark.parametrize("kind", WIDE)
def test_greys_of_more_than_8_bits(pipeline, kind):
    """Greys of more than 8 bits look like the same greys of 8 bits. Only the latter can be converted by Pillow."""
    source = WIDE[kind]()
    eight = Image.fromarray((greys(16) >> 8).astype(np.uint8))
    # Values of 10 and 12 bits lie between those of 16 bits, so they may differ by one.
    assert np.abs(np.asarray(open_picture(source)).astype(int) - expected_of(eight)).max() <= (
        1 if "of 1" in kind else 0
    )
    assert torch.equal(pipeline.see(source), pipeline.see(open_picture(source)))
    if "of 1" not in kind:
        assert torch.equal(pipeline.see(source), pipeline.see(eight))


def test_large_greys_are_converted_in_strips(monkeypatch):
    monkeypatch.setattr("mg_fast.models.pictures._STRIP", 100)
    eight = Image.fromarray((greys(16) >> 8).astype(np.uint8))
    assert shows(Image.fromarray(greys(16)), expected_of(eight))


def test_premultiplied_greys():
    """Pillow cannot convert premultiplied greys to RGB, only to greys with alpha."""
    image = alpha("LA").convert("La")
    assert shows(image, expected_of(image.convert("LA")))


@pytest.mark.parametrize("mode", ("I", "F"))
def test_pixels_of_no_known_range(mode):
    for image in (
        ramps().convert("L").convert(mode),
        Image.open(io.BytesIO(stored(ramps().convert("L").convert(mode), "TIFF"))),
    ):
        with pytest.raises(
            PictureError, match=f"32-bit {mode} pixels have no known range: convert to 8 or 16 bits per channel first"
        ):
            open_picture(image)


# ---- Transparency and animations are reported once.


def warnings_of(caplog, call):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        call()
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("mg_fast") and "has " in record.getMessage()
    ]


@pytest.mark.parametrize("kind", ("LA", "P with a transparent index", "P with alpha", "RGBA", "RGBa"))
def test_transparency_is_said_once(model, processor, caplog, kind):
    image = PILLOWS[kind]()
    for caches in ({}, {"image_cache_bytes": 0, "kv_cache_bytes": 0}):
        pipeline = mg_fast.Pipeline(model, processor, **caches)
        for call in (lambda: pipeline.see(image), lambda: pipeline.chat("What?", [image], max_new_tokens=1)):  # noqa: B023
            [said] = warnings_of(caplog, call)
            assert "has transparent pixels, their hidden colours are used" in said
        pipeline.reset()


def animation(kind, mode="RGB"):
    colours = ((200, 60, 20), (20, 60, 200), (60, 200, 20))
    frames = [Image.new("RGB", SIZE, colour).convert(mode) for colour in colours]
    if mode == "RGB":
        frames[0] = ramps()
    options = {"lossless": True} if kind == "WEBP" else {}
    return stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("GIF", "WEBP", "PNG", "TIFF", "MPO"))
def test_the_first_frame_is_used_and_said_once(model, processor, caplog, tmp_path, kind):
    data = animation(kind)
    expected = expected_of(Image.open(io.BytesIO(data)))
    # The first frame is the one with the ramps.
    assert np.abs(expected.astype(int) - np.asarray(ramps()).astype(int)).mean() < 12
    (tmp_path / "picture").write_bytes(data)
    for source in (data, tmp_path / "picture", Image.open(io.BytesIO(data))):
        assert shows(source, expected)
        for caches in ({}, {"image_cache_bytes": 0, "kv_cache_bytes": 0}):
            pipeline = mg_fast.Pipeline(model, processor, **caches)
            for call in (lambda: pipeline.see(source), lambda: pipeline.chat("What?", [source], max_new_tokens=1)):  # noqa: B023
                [said] = warnings_of(caplog, call)
                assert "has 3 frames, the first one is used" in said
            assert torch.equal(pipeline.see(source), pipeline.see(Image.fromarray(expected)))


def test_a_frame_that_a_caller_chose(caplog):
    image = Image.open(io.BytesIO(animation("GIF")))
    image.seek(2)
    [said] = warnings_of(caplog, lambda: open_picture(image))
    assert "has 3 frames, number 3 is used" in said and image.tell() == 2
    assert np.abs(np.asarray(open_picture(image)).astype(int) - [60, 200, 20]).max() <= 4


def test_a_gif_whose_first_frame_is_partly_transparent():
    first = Image.new("P", SIZE, 0)
    first.putpalette([255, 0, 0, 0, 0, 255])
    first.paste(1, (0, 0, 24, 32))
    file = stored(first, "GIF", save_all=True, append_images=[first], transparency=1, disposal=2)
    assert shows(file, expected_of(Image.open(io.BytesIO(file))))
    assert np.asarray(open_picture(file))[0, 0].tolist() == [0, 0, 255]


# ---- Memory

MEASURED = """
import re, sys
from pathlib import Path
from PIL import Image
from mg_fast.engine.image_cache import picture_digest
from mg_fast.models.pictures import open_picture
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor

def see(path):
    picture = open_picture(path)
    picture_digest(picture)
    MiniGeminiImageProcessor()(picture)
    # The peak of this program; getrusage would count the one that started it too.
    return 1024 * int(re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text()).group(1))

Image.MAX_IMAGE_PIXELS = None
print(see(sys.argv[1]), see(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a program's peak of memory")
@pytest.mark.parametrize("kind, mode", (("JPEG", "RGB"), ("PNG", "1"), ("TIFF", "I;16")))
def test_memory_of_large_pictures(kind, mode, tmp_path):
    """A large picture takes the memory of its pixels and of the padded square, 4 bytes a pixel, and of no copy."""
    small, large = (64, 48), (8000, 6000)
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
    for size in (small, large):
        Image.new(mode, size, 1).save(tmp_path / f"{size[0]}", kind, **options)
    done = python("-c", MEASURED, *(tmp_path / f"{size[0]}" for size in (small, large)))
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    picture, square = 4 * 8000 * 6000, 4 * 8000 * 8000
    assert square <= after - before <= picture + square + 60e6


def test_too_many_pixels_are_refused_with_the_limit(monkeypatch):
    """Pillow refuses more than twice its limit, about 179 million pixels. The message names the limit, to be raised."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        PictureError, match="refused as a decompression bomb: .* \\(PIL.Image.MAX_IMAGE_PIXELS sets the limit\\)"
    ):
        open_picture(stored(Image.new("1", (100, 100)), "PNG"))
