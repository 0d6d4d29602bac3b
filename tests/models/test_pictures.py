"""Pictures of every kind open as upright RGB, preprocessing is bit exact, and errors name what is not a picture."""

import base64
import http.server
import io
import logging
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from mg_fast import PictureError
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor
from mg_fast.models.pictures import open_picture

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def noise(width, height, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(width, height, seed=0):
    return Image.fromarray(noise(width, height, seed=seed))


def stored(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reopened(image, kind="PNG", **options):
    return Image.open(io.BytesIO(stored(image, kind, **options)))


def pixels(source, **options):
    image = open_picture(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- Every kind of source


def sources(folder):
    """Yields (name, source) for one picture of 7x5 pixels in every form that a caller may hold."""
    array = noise(7, 5)
    image, path = Image.fromarray(array), folder / "picture.png"
    path.write_bytes(stored(image))
    chw = torch.from_numpy(array.transpose(2, 0, 1).copy())
    alpha = np.full((5, 7, 1), 255, np.uint8)
    return array, {
        "Pillow image": image,
        "lazily opened Pillow image": Image.open(path),
        "str": str(path),
        "Path": path,
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "memoryview": memoryview(path.read_bytes()),
        "BytesIO": io.BytesIO(path.read_bytes()),
        "array HxWx3": array,
        "array HxWx4": np.concatenate([array, alpha], axis=2),
        "array not contiguous": np.ascontiguousarray(array[:, ::-1])[:, ::-1],
        "tensor CHW": chw,
        "tensor CHW with alpha": torch.cat([chw, torch.full((1, 5, 7), 255, dtype=torch.uint8)]),
        "tensor HWC": torch.from_numpy(array.copy()),
        "tensor HWC not contiguous": chw.permute(1, 2, 0),
    }


def test_every_source_gives_the_same_pixels(tmp_path, caplog):
    expected, found = sources(tmp_path)
    for name, source in found.items():
        assert np.array_equal(pixels(source), expected), name
    with open(tmp_path / "picture.png", "rb") as file:
        assert np.array_equal(pixels(file), expected)
    assert caplog.records == []


def test_path_under_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "picture.png").write_bytes(stored(picture(3, 2)))
    assert np.array_equal(pixels("~/picture.png"), noise(3, 2))
    with pytest.raises(PictureError, match=f"{tmp_path}/other.png: no such file"):
        open_picture(Path("~/other.png"))


def test_grey_arrays():
    grey = noise(7, 5, 1)
    expected = np.repeat(grey, 3, axis=2)
    for source in (
        grey,
        grey[..., 0],
        torch.from_numpy(grey),
        torch.from_numpy(grey[..., 0]),
        torch.from_numpy(grey).permute(2, 0, 1),
    ):
        assert np.array_equal(pixels(source), expected), source.shape


def test_tensor_with_three_columns_is_taken_as_rows_columns_channels():
    """[3, W, 3] could be in either order. It is read as channels last, as for arrays."""
    array = noise(3, 3)
    assert np.array_equal(pixels(torch.from_numpy(array.copy())), array)


def test_callers_array_is_left_alone():
    array = noise(4, 3)
    before = array.copy()
    image = open_picture(array)
    image.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(array, before)


# ---- Every mode, against pixels worked out by hand

HIDDEN = (10, 20, 30)


def one(mode, *values):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def palette(mode="P"):
    image = Image.new("P", (3, 1))
    image.putpalette([*HIDDEN, 200, 100, 50, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image if mode == "P" else image.convert(mode)


MODES = {
    "1": (one("1", 0, 1), [(0, 0, 0), (255, 255, 255)]),
    "L": (one("L", 0, 7, 255), [(0, 0, 0), (7, 7, 7), (255, 255, 255)]),
    "LA": (one("LA", (7, 255)), [(7, 7, 7)]),
    "P": (palette(), [HIDDEN, (200, 100, 50), (0, 0, 255)]),
    "PA": (palette("PA"), [HIDDEN, (200, 100, 50), (0, 0, 255)]),
    "RGB": (one("RGB", (1, 2, 3)), [(1, 2, 3)]),
    "RGBX": (one("RGBX", (1, 2, 3, 0)), [(1, 2, 3)]),
    "RGBA": (one("RGBA", (1, 2, 3, 255)), [(1, 2, 3)]),
    "CMYK": (
        one("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (9, 9, 9, 255)),
        [(255, 255, 255), (0, 255, 255), (255, 0, 255), (0, 0, 0)],
    ),
    "YCbCr": (one("YCbCr", (0, 128, 128), (77, 128, 128), (255, 128, 128)), [(0, 0, 0), (77, 77, 77), (255, 255, 255)]),
    "HSV": (one("HSV", (0, 255, 255), (170, 255, 255), (0, 0, 9)), [(255, 0, 0), (0, 0, 255), (9, 9, 9)]),
    "I;16": (one("I;16", 0, 0x00FF, 0x0100, 0x7FFF, 0xFFFF), [(0,) * 3, (0,) * 3, (1,) * 3, (127,) * 3, (255,) * 3]),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, caplog):
    image, expected = MODES[mode]
    assert image.mode == mode
    assert [tuple(p) for p in pixels(image)[0].tolist()] == expected
    assert caplog.records == []


def test_sixteen_bit_files_keep_their_high_byte():
    """16-bit greys keep their high byte; Pillow's own conversion clips at 255 and makes nearly everything white."""
    values = np.array([[0, 255, 256, 32767, 32768, 65535]], np.uint16)
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    png = stored(Image.fromarray(values))
    assert Image.open(io.BytesIO(png)).mode == "I;16"
    assert np.array_equal(pixels(png), expected)
    big_endian = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert np.array_equal(pixels(big_endian), expected)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    assert np.array_equal(pixels(url, allow_urls=True), expected)


def test_cmyk_jpeg():
    """CMYK JPEGs of Photoshop and Pillow hold inverted values, and still open in the right colours."""
    file = stored(Image.new("RGB", (32, 32), (200, 60, 20)).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(file)).mode == "CMYK"
    assert np.abs(pixels(file).astype(int) - [200, 60, 20]).max() <= 3


@pytest.mark.parametrize("kind, tolerance", [("BMP", 0), ("TIFF", 0), ("GIF", 0), ("PPM", 0), ("WEBP", 4), ("JPEG", 4)])
def test_file_kinds(kind, tolerance):
    image = Image.new("RGB", (24, 16), (180, 90, 30))
    found = pixels(stored(image, kind)).astype(int)
    assert found.shape == (16, 24, 3) and np.abs(found - [180, 90, 30]).max() <= tolerance


def transparent_pictures():
    rgba = one("RGBA", (*HIDDEN, 0), (1, 2, 3, 255))
    rgb, la = one("RGB", HIDDEN, (1, 2, 3)), one("LA", (10, 0), (1, 255))
    return {
        "RGBA": (rgba, [HIDDEN, (1, 2, 3)]),
        "half transparent": (one("RGBA", (*HIDDEN, 254), (1, 2, 3, 255)), [HIDDEN, (1, 2, 3)]),
        "array": (np.array([[[*HIDDEN, 0], [1, 2, 3, 255]]], np.uint8), [HIDDEN, (1, 2, 3)]),
        "LA": (la, [(10, 10, 10), (1, 1, 1)]),
        "RGB with a transparent colour": (reopened(rgb, transparency=HIDDEN), [HIDDEN, (1, 2, 3)]),
        "palette with a transparent index": (
            reopened(palette(), transparency=0),
            [HIDDEN, (200, 100, 50), (0, 0, 255)],
        ),
        "palette with alpha": (
            reopened(palette(), transparency=b"\x80\xff\xff"),
            [HIDDEN, (200, 100, 50), (0, 0, 255)],
        ),
    }


@pytest.mark.parametrize("name", transparent_pictures())
def test_transparent_pixels_show_their_hidden_colour_and_are_said(name, caplog):
    source, expected = transparent_pictures()[name]
    assert [tuple(p) for p in pixels(source)[0].tolist()] == expected
    [record] = caplog.records
    assert (
        record.levelno == logging.WARNING
        and "has transparent pixels, their hidden colours are used" in record.getMessage()
    )


def test_opaque_alpha_is_not_worth_a_word(caplog):
    for image in (one("RGBA", (1, 2, 3, 255)), reopened(palette(), transparency=b"\xff\xff\xff")):
        open_picture(image)
    assert caplog.records == []


# What a viewer does to the stored pixels, by the numbers of the EXIF standard.
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("number", ORIENTATIONS)
def test_exif_orientation(number):
    array = noise(7, 5)
    exif = Image.Exif()
    exif[0x0112] = number
    expected = ORIENTATIONS[number](array)
    png = stored(Image.fromarray(array), exif=exif)
    assert np.array_equal(pixels(png), expected)
    assert np.array_equal(pixels(Image.open(io.BytesIO(png))), expected)
    jpeg = stored(Image.new("RGB", (48, 32), (180, 90, 30)), "JPEG", exif=exif)
    assert pixels(jpeg).shape[:2] == ((48, 32) if number >= 5 else (32, 48))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame_and_a_warning(kind, caplog):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels(file) == [255, 0, 0]).all()
    [record] = caplog.records
    assert "has 3 frames, the first one is used" in record.getMessage()


# ---- Preprocessing, computed again from the specification


def squared(image):
    array, (w, h) = np.asarray(image), image.size
    side = max(w, h)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = [int(255 * m) for m in MEAN]
    top, left = (side - h) // 2, (side - w) // 2
    canvas[top : top + h, left : left + w] = array
    return Image.fromarray(canvas)


def cropped(image, size):
    w, h = image.size
    long = int(size * max(w, h) / min(w, h))
    new = (long, size) if w > h else (size, long)
    array = np.asarray(image.resize(new, Image.Resampling.BICUBIC))
    top, left = (new[1] - size) // 2, (new[0] - size) // 2
    return array[top : top + size, left : left + size]


def normalised(array):
    unit = (array.astype(np.float64) / 255).astype(np.float32)
    return ((unit - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(2, 0, 1)


def bilinear(array, size):
    """Resizes with half-pixel centres and no antialiasing, in float64, from the four nearest inputs of every output."""
    count = array.shape[-1]
    at = ((np.arange(size) + 0.5) * count / size - 0.5).clip(0)
    low = np.floor(at).astype(int)
    high, part = (low + 1).clip(max=count - 1), at - low
    rows = array[:, low] * (1 - part)[:, None] + array[:, high] * part[:, None]
    return rows[:, :, low] * (1 - part) + rows[:, :, high] * part


def views(hr, side, grid, global_view):
    canvas = bilinear(hr.astype(np.float64), side * grid)
    out = [canvas[:, r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(grid) for c in range(grid)]
    return np.stack([*out, bilinear(canvas, side)] if global_view else out)


def check(processor, image, expected):
    found = processor(image)
    assert found["pixel_values"].dtype == found["pixel_values_hr"].dtype == torch.float32
    assert np.array_equal(found["pixel_values_hr"][0].numpy(), expected)
    low = views(expected, processor.lr_size, processor.grid, processor.global_view)
    assert found["pixel_values"].shape == (1, *low.shape)
    # The code rounds positions to float32. On noise, the resulting error grows with the side; one wrong neighbour would
    # change values by tenths.
    assert np.abs(found["pixel_values"][0].numpy() - low).max() < 1e-6 * processor.hr_size


SIZES = [
    (160, 160),
    (200, 100),
    (100, 200),
    (171, 200),
    (101, 100),
    (100, 101),
    (161, 160),
    (160, 161),
    (499, 37),
    (64, 63),
    (3, 2),
    (1, 1),
]


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing(processor, size):
    image = picture(*size)
    check(
        processor.image_processor,
        image,
        normalised(np.asarray(squared(image).resize((160, 160), Image.Resampling.BICUBIC))),
    )


@pytest.mark.parametrize("size", [(320, 320), (400, 300), (300, 401), (5, 9)])
def test_preprocessing_hd(hd_processor, size):
    assert (hd_processor.image_processor.grid, hd_processor.image_processor.global_view) == (2, True)
    image = picture(*size)
    check(
        hd_processor.image_processor,
        image,
        normalised(np.asarray(squared(image).resize((320, 320), Image.Resampling.BICUBIC))),
    )


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_by_a_centre_crop(size):
    """An `image_aspect_ratio` other than `pad` crops the centre."""
    image = picture(*size)
    processor = MiniGeminiImageProcessor(hr_size=160, lr_size=70, pad=False)
    check(processor, image, normalised(cropped(image, 160)))


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(171, 200), (101, 100), (64, 333), (5, 3)])
def test_preprocessing_as_transformers_does_it(pad, size):
    image = picture(*size)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    expected = clip(squared(image) if pad else image, return_tensors="np")["pixel_values"]
    found = MiniGeminiImageProcessor(hr_size=96, lr_size=42, pad=pad)(image, return_tensors="np")["pixel_values_hr"]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("hd", [False, True])
def test_published_sizes(hd):
    """768 becomes 336, and 1536 becomes four tiles and a whole view that is the 2x2 mean of the canvas."""
    image = picture(60, 40)
    hr = 1536 if hd else 768
    processor = MiniGeminiImageProcessor(hr_size=hr, grid=2, global_view=True) if hd else MiniGeminiImageProcessor()
    check(processor, image, normalised(np.asarray(squared(image).resize((hr, hr), Image.Resampling.BICUBIC))))
    if hd:
        tiles = processor(image)["pixel_values"][0]
        canvas = torch.cat([torch.cat([tiles[0], tiles[1]], dim=2), torch.cat([tiles[2], tiles[3]], dim=2)], dim=1)
        assert torch.allclose(tiles[4], torch.nn.functional.avg_pool2d(canvas, 2), atol=1e-5)


def test_padding_is_split_evenly_and_the_odd_pixel_goes_after():
    black = MiniGeminiImageProcessor(hr_size=32, lr_size=32)
    grey = normalised(np.array([[[122, 116, 104]]], np.uint8))[:, 0, 0]
    for size, rows in (((32, 30), (1, 31)), ((32, 29), (1, 30)), ((32, 31), (0, 31))):
        hr = black(Image.new("RGB", size))["pixel_values_hr"][0].numpy()
        is_padding = (hr == grey[:, None, None]).all(axis=(0, 2))
        assert is_padding.tolist() == [not rows[0] <= y < rows[1] for y in range(32)]


def test_several_pictures_are_stacked_in_order(processor, hd_processor, photo, drawing):
    for images in (processor.image_processor, hd_processor.image_processor):
        both = images([photo, Image.open(drawing)])
        for i, file in enumerate((photo, drawing)):
            for key in ("pixel_values", "pixel_values_hr"):
                assert torch.equal(both[key][i : i + 1], images(file)[key])
    assert both["pixel_values"].shape == (2, 5, 3, 70, 70) and both["pixel_values_hr"].shape == (2, 3, 320, 320)


def test_return_tensors(processor, photo):
    torches, arrays = (processor.image_processor(photo, return_tensors=kind) for kind in ("pt", "np"))
    for key in ("pixel_values", "pixel_values_hr"):
        assert isinstance(torches[key], torch.Tensor) and isinstance(arrays[key], np.ndarray)
        assert np.array_equal(torches[key].numpy(), arrays[key])


# ---- What is not a picture


def png_header(width, height):
    """The few bytes of a PNG whose header states this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


FILES = {
    "truncated.png": (lambda: stored(picture(64, 64))[:6000], "broken or truncated"),
    "truncated.jpg": (lambda: stored(picture(64, 64), "JPEG")[:2000], "broken or truncated"),
    "truncated.gif": (
        lambda: stored(picture(64, 64), "GIF", save_all=True, append_images=[picture(64, 64, 1)])[:6000],
        "broken or truncated",
    ),
    "truncated.tif": (
        lambda: stored(picture(64, 64), "TIFF", save_all=True, append_images=[picture(64, 64, 1)])[:6000],
        "broken or truncated",
    ),
    "header.png": (lambda: stored(picture(64, 64))[:20], "cannot be opened as a picture"),
    "text.png": (lambda: b"This is no picture.\n" * 9, "not a picture that Pillow can read"),
    "empty.png": (lambda: b"", "not a picture that Pillow can read"),
    "bomb.png": (lambda: png_header(100_000, 100_000), r"refused as a decompression bomb: .*10000000000 pixels"),
    "i.tif": (lambda: stored(one("I", 1, 70000), "TIFF"), "32-bit I pixels have no known range"),
    "f.tif": (lambda: stored(one("F", 0.5, 0.7), "TIFF"), "32-bit F pixels have no known range"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_bad_files(tmp_path, name):
    make, message = FILES[name]
    (tmp_path / name).write_bytes(make())
    for source in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(PictureError, match=f"^{tmp_path / name}: {message}"):
            open_picture(source)
    with pytest.raises(PictureError, match=f"^picture of {len(make())} bytes: {message}"):
        open_picture(make())
    with open(tmp_path / name, "rb") as file, pytest.raises(PictureError, match=f"^{tmp_path / name}: {message}"):
        open_picture(file)
    with pytest.raises(PictureError, match=f"^picture in a file object: {message}"):
        open_picture(io.BytesIO(make()))
    with pytest.raises(PictureError, match=f"^the left one: {message}"):
        open_picture(make(), label="the left one")


@pytest.mark.parametrize(
    "kind",
    [
        "PNG",
        "JPEG",
        "GIF",
        "WEBP",
        "TIFF",
        "BMP",
        "PPM",
        "PNG animated",
        "GIF animated",
        "WEBP animated",
        "TIFF animated",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_broken_files_raise_nothing_else(kind, monkeypatch):
    """Files cut or changed anywhere give a picture or a PictureError of one line; Pillow raises a dozen kinds."""
    # A changed byte can ask for gigabytes.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    kind, _, animated = kind.partition(" ")
    file = stored(
        picture(24, 24),
        kind,
        **({"save_all": True, "append_images": [picture(24, 24, i) for i in (1, 2)]} if animated else {}),
    )
    rng = np.random.default_rng(1)
    broken = [file[:cut] for cut in [*range(0, min(64, len(file)), 3), *rng.integers(0, len(file), 40)]]
    for _ in range(60):
        changed = bytearray(file)
        for at in rng.integers(0, min(len(file), 200), 3):
            changed[at] = rng.integers(256)
        broken.append(bytes(changed))
    refused = 0
    for data in broken:
        try:
            open_picture(data)
        except PictureError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).startswith(f"picture of {len(data)} bytes: ")
    assert refused >= 20


def test_decompression_bomb_by_pillows_limit(monkeypatch, photo):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PictureError, match=f"{photo}: refused as a decompression bomb: .*34200 pixels"):
        open_picture(photo)


BAD_SOURCES = [
    (lambda folder: folder / "missing.png", r"missing\.png: no such file"),
    (lambda folder: folder, "a folder, expected a picture file"),
    (lambda folder: str(folder), "a folder, expected a picture file"),
    (lambda _: Image.new("RGB", (0, 0)), "^picture of mode RGB: expected at least 1x1 pixels, got 0x0"),
    (lambda _: Image.new("L", (5, 0)), "^picture of mode L: expected at least 1x1 pixels, got 5x0"),
    (lambda _: np.zeros((0, 0, 3), np.uint8), r"^picture in a ndarray: expected at least 1x1 pixels, got \[0, 0, 3\]"),
    (lambda _: torch.zeros(3, 0, 5, dtype=torch.uint8), r"expected at least 1x1 pixels, got \[3, 0, 5\]"),
    (lambda _: one("I", 1, 70000), "32-bit I pixels have no known range: convert to 8 or 16 bits"),
    (lambda _: one("F", 0.5), "32-bit F pixels have no known range: convert to 8 or 16 bits"),
    (lambda _: np.zeros((5, 7, 3), np.float32), "expected uint8 values 0 to 255, got float32"),
    (lambda _: np.zeros((5, 7, 3), np.uint16), "expected uint8 values 0 to 255, got uint16"),
    (lambda _: np.zeros((5, 7), bool), "expected uint8 values 0 to 255, got bool"),
    (lambda _: torch.zeros(3, 5, 7), "expected uint8 values 0 to 255, got torch.float32"),
    (lambda _: torch.zeros(3, 5, 7, dtype=torch.bfloat16), "expected uint8 values 0 to 255, got torch.bfloat16"),
    (
        lambda _: np.zeros((3, 5, 7), np.uint8),
        r"\[H, W, 3\] or \[H, W, 4\] \(a tensor also \[C, H, W\]\), got \[3, 5, 7\]",
    ),
    (lambda _: np.zeros((5, 7, 2), np.uint8), r"got \[5, 7, 2\]"),
    (lambda _: np.zeros(7, np.uint8), r"got \[7\]"),
    (lambda _: np.array(3, np.uint8), r"got \[\]"),
    (lambda _: torch.zeros(1, 3, 5, 7, dtype=torch.uint8), r"got \[1, 3, 5, 7\]"),
    (lambda _: torch.zeros(2, 5, 7, dtype=torch.uint8), r"got \[2, 5, 7\]"),
    (lambda _: 7, "^picture: expected a Pillow image, a path, bytes, .*, got int"),
    (lambda _: None, "got NoneType"),
    (lambda _: {"path": "x.png"}, "got dict"),
    (lambda _: io.StringIO("text"), "cannot be opened as a picture: .*StringIO"),
    (
        lambda _: "http://example.invalid/a.png",
        r"^http://example.invalid/a.png: URLs are fetched only when asked for \(allow_urls=True",
    ),
    (lambda _: "https://example.invalid/a.png", "URLs are fetched only when asked for"),
    (lambda _: "data:image/png;base64,AAAA", "^data:image/png;base64,AAAA: URLs are fetched only when asked for"),
]


@pytest.mark.parametrize("number", range(len(BAD_SOURCES)))
def test_bad_sources(tmp_path, number):
    make, message = BAD_SOURCES[number]
    with pytest.raises(PictureError, match=message):
        open_picture(make(tmp_path))


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (161, 1), (1, 161)])
def test_too_thin(processor, size):
    image = Image.new("RGB", size)
    assert open_picture(image).size == size
    with pytest.raises(PictureError, match=f"{size[0]}x{size[1]} pixels: too thin, squared and resized to 160x160"):
        processor.image_processor(image)


def test_thinnest_that_still_shows(processor):
    for size in ((160, 1), (1, 160)):
        assert torch.isfinite(processor.image_processor(Image.new("RGB", size))["pixel_values_hr"]).all()


def test_too_thin_or_too_large_for_memory(processor):
    with pytest.raises(
        PictureError, match="20000x150 pixels: too large to square by padding, the longest side may be 18918"
    ):
        processor.image_processor(Image.new("RGB", (20000, 150)))
    crop = MiniGeminiImageProcessor(hr_size=160, lr_size=70, pad=False)
    with pytest.raises(
        PictureError, match="1x20000 pixels: too thin, its shortest side resized to 160 makes the other one 3200000"
    ):
        crop(Image.new("RGB", (1, 20000)))


def test_the_number_of_the_bad_picture_is_said(processor, photo, tmp_path):
    for bad, message in (
        (tmp_path / "missing.png", f"{tmp_path}/missing.png: no such file"),
        (Image.new("RGB", (1, 999)), "1x999 pixels: too thin"),
        (7, "picture: expected a Pillow image"),
    ):
        with pytest.raises(PictureError, match=f"^picture 2 of 3: {message}"):
            processor.image_processor([photo, bad, photo])
        with pytest.raises(PictureError, match=f"^{message}"):
            processor.image_processor([bad])
    with pytest.raises(PictureError, match="expected at least one picture, got none"):
        processor.image_processor([])


# ---- URLs


def test_data_urls(processor):
    png = stored(picture(7, 5))
    for encode in (base64.b64encode, base64.encodebytes):
        url = "data:image/png;base64," + encode(png).decode()
        assert np.array_equal(pixels(url, allow_urls=True), noise(7, 5))
        expected = processor.image_processor(picture(7, 5))["pixel_values_hr"]
        assert torch.equal(processor.image_processor(url, allow_urls=True)["pixel_values_hr"], expected)


@pytest.mark.parametrize(
    "data, message",
    [("A" * 100_001, "cannot be fetched or decoded"), ("A" * 100_000, "not a picture that Pillow can read")],
)
def test_errors_do_not_repeat_a_whole_data_url(data, message):
    with pytest.raises(PictureError, match=message) as caught:
        open_picture("data:image/png;base64," + data, allow_urls=True)
    assert len(str(caught.value)) < 300


@pytest.fixture
def web():
    """A web server on this machine."""
    answers = {"/a.png": stored(picture(7, 5)), "/page.html": b"<html></html>"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = answers.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_web_addresses(web):
    at = web
    assert np.array_equal(pixels(f"{at}/a.png", allow_urls=True), noise(7, 5))
    for name, message in (
        ("page.html", "not a picture"),
        ("none.png", "cannot be fetched or decoded: .*404"),
    ):
        with pytest.raises(PictureError, match=f"^{at}/{name}: .*{message}"):
            open_picture(f"{at}/{name}", allow_urls=True)
    with pytest.raises(PictureError, match="^http://127.0.0.1:9/a.png: cannot be fetched or decoded: .*refused"):
        open_picture("http://127.0.0.1:9/a.png", allow_urls=True)
