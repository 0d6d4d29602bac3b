"""Resizing in PyTorch has Pillow's bits at high resolution and the reference's views at low; bad input is refused.

The processor's `device=` is tested here, too.
"""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mg_fast import BackendError, PictureError, ops, use_backend
from mg_fast.models import pictures
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor
from mg_fast.models.orientation import ORIENTATION, upright
from mg_fast.ops.reference import low_resolution_views
from mg_fast.ops.torch import dual_resize as resizing
from mg_fast.testing.tolerances import LR_PIXELS
from tests.paths import OWN_GOLDEN, original_golden


def noise(width, height, seed=0):
    """Pixels of all values, half of them black or white, so that both passes make overshoots, which are clipped."""
    generator = np.random.default_rng(seed)
    picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(
        np.where(generator.random((height, width, 1)) < 0.5, picture, np.where(picture < 128, 0, 255)).astype(np.uint8)
    )


def by_pillow(picture, hr_size, lr_size, grid, pad):
    """Resizes as the processor did before it had another way, written out.

    Where it pads, it calls Pillow's resize once.
    """
    image = Image.fromarray(picture.numpy())
    w, h = image.size
    if pad:
        side = max(w, h)
        canvas = Image.new("RGB", (side, side), (122, 116, 104))
        canvas.paste(image, ((side - w) // 2, (side - h) // 2))
        image = canvas.resize((hr_size, hr_size), Image.Resampling.BICUBIC)
    else:
        scaled = hr_size if w == h else int(hr_size * max(w, h) / min(w, h))
        wide, high = (scaled, hr_size) if w > h else (hr_size, scaled)
        image = image.resize((wide, h), Image.Resampling.BICUBIC).resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - hr_size) // 2, (high - hr_size) // 2
        image = image.crop((left, top, left + hr_size, top + hr_size))
    hr = resizing.normalise(image)
    return hr, low_resolution_views(hr[None], lr_size, grid=grid, global_view=grid > 1)[0]


def assert_same(ours, expected):
    assert torch.equal(ours[0], expected[0])
    assert ours[1].shape == expected[1].shape and ours[1].dtype == torch.float32
    assert (ours[1] - expected[1]).abs().max() <= LR_PIXELS


def assert_as_pillow(picture, hr_size, lr_size, grid=1, pad=True, backend="torch"):
    ours = ops.dual_resize(picture, hr_size, lr_size, grid=grid, global_view=grid > 1, pad=pad, backend=backend)
    assert_same(ours, by_pillow(picture, hr_size, lr_size, grid, pad))


@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "crop"])
def test_pillows_bits_at_random_sizes(pad, grid):
    """The cases of this test are 320 sizes in all, up and down, most of them to sizes that nothing divides."""
    # A second thread would only have to be woken up.
    torch.set_num_threads(1)
    generator = np.random.default_rng(7 + 2 * grid + pad)
    for i in range(80):
        width, height = (int(n) for n in np.exp(generator.uniform(0, np.log(400), 2)))
        hr_size = int(generator.integers(1, 160))
        # Thinner pictures than these are refused, which is tested below.
        width, height = max(width, -(-height // hr_size)), max(height, -(-width // hr_size))
        assert_as_pillow(noise(width, height, i), hr_size, int(generator.integers(1, 80)), grid, pad)


EXTREME = {
    "one pixel": (1, 1, 33, True),
    "one row": (90, 1, 96, True),
    "one column": (1, 90, 96, True),
    "as thin as may be": (3, 96, 32, True),
    "one row, cropped": (70, 1, 20, False),
    "one column, cropped": (1, 70, 20, False),
    "tall, cropped": (13, 300, 10, False),
    "its own size": (40, 40, 40, True),
    "its own width": (40, 30, 40, True),
    "its own height, cropped": (90, 40, 40, False),
    "a hundred times smaller": (1500, 1100, 11, True),
    "to one pixel": (50, 50, 1, True),
}


@pytest.mark.parametrize("case", EXTREME)
def test_pillows_bits_at_the_extremes(case):
    width, height, hr_size, pad = EXTREME[case]
    assert_as_pillow(noise(width, height), hr_size, 7, 2, pad)


PHOTOGRAPHS = sorted([*OWN_GOLDEN.glob("*.png"), *(original_golden().glob("*/*.png") if original_golden() else [])])


@pytest.mark.slow
@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_pillows_bits_of_photographs(path):
    picture = torch.from_numpy(np.array(pictures.open_picture(path)))
    assert_as_pillow(picture, 768, 336)
    assert_as_pillow(picture, 1536, 336, grid=2)


@pytest.fixture(scope="module")
def camera_files(tmp_path_factory):
    """Photographs as cameras write them: 12 megapixels in landscape and 24 in portrait.

    The first is tiled, so that every pixel is one of the small photograph. The second is enlarged, and its rows are
    stored as columns.
    """
    cbook = pytest.importorskip("matplotlib.cbook")
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        small = np.array(image.convert("RGB"))
    folder = tmp_path_factory.mktemp("camera")
    Image.fromarray(np.tile(small, (6, 8, 1))[:3024, :4032]).save(folder / "landscape.jpg", quality=95)
    portrait = Image.fromarray(small[:, 56:456]).resize((3000, 4000), Image.Resampling.LANCZOS)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    portrait.transpose(Image.Transpose.ROTATE_90).save(folder / "portrait.jpg", quality=95, exif=exif)
    return {"landscape": (folder / "landscape.jpg", (4032, 3024)), "portrait": (folder / "portrait.jpg", (3000, 4000))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, grid, pad",
    [("landscape", 1, True), ("landscape", 2, False), ("portrait", 1, False), ("portrait", 2, True)],
    ids=["landscape-768-pad", "landscape-1536-crop", "portrait-768-crop", "portrait-1536-pad"],
)
def test_pillows_bits_of_camera_files(camera_files, name, grid, pad):
    """From the file on, both ways of the processor give Pillow's bits."""
    # With so many small products a second thread would only spin.
    torch.set_num_threads(1)
    path, size = camera_files[name]
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image)
    assert turned.size == size
    expected = by_pillow(torch.from_numpy(np.array(turned)), 768 * grid, 336, grid, pad)
    processor = MiniGeminiImageProcessor(768 * grid, 336, grid, grid > 1, pad)
    for device in (None, "cpu"):
        ours = processor(path, device=device)
        assert_same((ours["pixel_values_hr"][0], ours["pixel_values"][0]), expected)


@pytest.mark.parametrize("layout", ["CHW", "turned", "within", "flipped"])
def test_strides(layout):
    picture = noise(31, 22)
    same = {
        "CHW": lambda p: p.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "turned": lambda p: p.transpose(0, 1).contiguous().transpose(0, 1),
        "within": lambda p: torch.cat([p, 255 - p, p], 1).repeat(1, 1, 2)[:, 31:62, 3:].bitwise_not(),
        "flipped": lambda p: p.flip(0).contiguous().flip(0)[::1],
    }[layout](picture)
    assert torch.equal(same, picture)
    assert_as_pillow(same, 40, 9)
    if layout == "within":
        assert_as_pillow(torch.cat([picture, picture], 1)[1::2, 5:40:3], 40, 9)


@pytest.mark.parametrize(
    "hr_size, lr_size, grid", [(48, 21, 1), (96, 21, 2), (90, 13, 3), (20, 50, 1), (37, 37, 1), (1, 5, 2)]
)
def test_views_from_tables(hr_size, lr_size, grid):
    """The tables by which other devices make the views give the reference's views."""
    hr = torch.randn(3, hr_size, hr_size, generator=torch.Generator().manual_seed(0))
    expected = low_resolution_views(hr[None], lr_size, grid=grid, global_view=grid > 1)[0]
    views = resizing.views_by_taps(hr, lr_size, grid=grid, global_view=grid > 1)
    assert views.shape == expected.shape and (views - expected).abs().max() <= LR_PIXELS


def test_published_sizes_from_tables():
    hr = torch.randn(3, 1536, 1536, generator=torch.Generator().manual_seed(0)).clamp(-2.2, 2.7)
    expected = low_resolution_views(hr[None], 336, grid=2, global_view=True)[0]
    assert (resizing.views_by_taps(hr, 336, grid=2, global_view=True) - expected).abs().max() <= LR_PIXELS


def test_every_backend_gives_the_same():
    picture = noise(50, 33)
    results = [ops.dual_resize(picture, 64, 28, backend=backend) for backend in ("reference", "torch", "auto")]
    for result in results[1:]:
        assert_same(result, results[0])


REFUSED = {
    "float": (torch.rand(4, 4, 3), {}, "must be uint8, got torch.float32"),
    "with a gradient": (torch.rand(4, 4, 3, requires_grad=True), {}, "integers have no gradient"),
    "CHW": (torch.zeros(3, 4, 4, dtype=torch.uint8), {}, r"must be \[H, W, 3\] and have pixels, got \[3, 4, 4\]"),
    "grey": (torch.zeros(4, 4, dtype=torch.uint8), {}, r"got \[4, 4\]"),
    "empty": (torch.zeros(0, 4, 3, dtype=torch.uint8), {}, r"got \[0, 4, 3\]"),
    "no size": (torch.zeros(4, 4, 3, dtype=torch.uint8), {"hr_size": 0}, "must be at least 1, got hr_size=0"),
    "no cell": (torch.zeros(4, 4, 3, dtype=torch.uint8), {"grid": 0}, "grid=0"),
    "too thin": (torch.zeros(1, 99, 3, dtype=torch.uint8), {}, "99x1 pixels: too thin"),
    "too large": (
        torch.zeros(1, 1, 1, dtype=torch.uint8).expand(18919, 18919, 3),
        {},
        "too large to square by padding",
    ),
    "too thin to crop": (
        torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, 900_000, 3),
        {"pad": False},
        "resized to 32 makes the other",
    ),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_was_expected_and_what_came(case, backend):
    picture, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ops.dual_resize(**{"picture": picture, "hr_size": 32, "lr_size": 14, "backend": backend} | changes)


def test_triton_on_a_cpu_is_refused():
    with (
        pytest.raises(BackendError, match="cannot run dual_resize: triton runs on CUDA tensors, these are on cpu"),
        use_backend("triton"),
    ):
        ops.dual_resize(noise(4, 4), 8, 4)


def test_operator():
    sample = (noise(9, 7), 16, 7, 2, True, True, "torch")
    torch.library.opcheck(ops.resize_picture, sample)
    compiled = torch.compile(
        lambda p: ops.dual_resize(p, 16, 7, grid=2, global_view=True, backend="torch"),
        backend="aot_eager",
        fullgraph=True,
    )
    for size in ((9, 7), (12, 8), (10, 30)):
        assert_same(compiled(noise(*size)), by_pillow(noise(*size), 16, 7, 2, True))


# ---- The processor.


@pytest.mark.parametrize("pad", [True, False], ids=["pad", "crop"])
@pytest.mark.parametrize("grid", [1, 2])
def test_processor_on_a_device(photo, drawing, grid, pad):
    processor = MiniGeminiImageProcessor(64 * grid, 28, grid, grid > 1, pad)
    images = [photo, drawing, noise(40, 70)]
    expected, ours = processor(images), processor(images, device="cpu")
    assert torch.equal(ours["pixel_values_hr"], expected["pixel_values_hr"])
    assert ours["pixel_values"].shape == expected["pixel_values"].shape
    assert (ours["pixel_values"] - expected["pixel_values"]).abs().max() <= LR_PIXELS
    assert isinstance(processor(photo, "np", device="cpu")["pixel_values"], np.ndarray)


def test_device_reaches_the_pictures_of_prompts_and_messages(processor, photo, monkeypatch):
    devices = []
    resize = ops.dual_resize
    monkeypatch.setattr(
        ops,
        "dual_resize",
        lambda picture, *args, **kw: devices.append(picture.device.type) or resize(picture, *args, **kw),
    )
    expected = processor(photo, "<image> What?", return_tensors="pt")
    assert devices == []
    ours = processor(photo, "<image> What?", return_tensors="pt", device="cpu")
    messages = [{"role": "user", "content": [{"type": "image", "path": str(photo)}, {"type": "text", "text": "What?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"device": "cpu"}}
    asked = processor.apply_chat_template(messages, **options)
    assert devices == ["cpu", "cpu"]
    for result in (ours, asked):
        assert torch.equal(result["pixel_values_hr"], expected["pixel_values_hr"])


@pytest.mark.parametrize(
    "pad, size, message", [(True, (1, 99), "too thin, squared"), (False, (1, 900_000), "its shortest side resized")]
)
def test_the_same_errors_on_both_paths(pad, size, message, drawing):
    processor = MiniGeminiImageProcessor(32, 14, pad=pad)
    said = []
    for device in (None, "cpu"):
        with pytest.raises(PictureError, match=f"picture 2 of 2: .*{message}") as caught:
            processor([drawing, Image.new("RGB", size)], device=device)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_nvjpeg_needs_a_cuda_device(device, photo):
    with pytest.raises(BackendError, match=f"decoder 'nvjpeg' needs a CUDA device, got device={device!r}"):
        MiniGeminiImageProcessor()(photo, device=device, decoder="nvjpeg")


def test_nvjpeg_needs_cuda(photo, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="decoder 'nvjpeg' needs a CUDA device, torch finds none here"):
        MiniGeminiImageProcessor()(photo, device="cuda", decoder="nvjpeg")


def test_unknown_decoder(photo):
    with pytest.raises(ValueError, match="unknown decoder 'turbo': expected pillow or nvjpeg"):
        MiniGeminiImageProcessor()(photo, decoder="turbo")


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_of_what_nvjpeg_decodes(orientation, tmp_path):
    """A decoded picture is turned upright; it is decoded on the CPU here, where torchvision's decoder works as well."""
    image, exif = Image.fromarray(noise(40, 24).numpy()), Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.jpg"
    image.save(path, exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(path)))
    assert torch.equal(upright(torch.from_numpy(np.array(Image.open(path))), orientation), torch.from_numpy(expected))
    for source in (path, path.read_bytes()):
        assert pictures.decode_on_device(source, "cpu").shape == expected.shape


def test_nvjpeg_leaves_what_is_no_jpeg_to_pillow(photo):
    other = io.BytesIO()
    for source in (photo, photo.read_bytes(), "no such file.jpg", Image.new("RGB", (4, 4)), other, noise(4, 4)):
        assert pictures.decode_on_device(source, "cpu") is None


def test_nvjpeg_says_what_is_broken(photo):
    stream = io.BytesIO()
    Image.open(photo).convert("RGB").save(stream, "JPEG")
    for data in (b"\xff\xd8\xff" + bytes(50), stream.getvalue()[:40]):
        with pytest.raises(PictureError, match=f"picture of {len(data)} bytes: nvJPEG cannot decode it: "):
            pictures.decode_on_device(data, "cpu")


def test_taps_add_up():
    """The fixed-point weights of a pixel add up to one, except for their rounding, wherever the canvas ends."""
    for canvas, resized in itertools.product((1, 7, 100), (1, 9, 60)):
        first, weights = resizing.bicubic_taps(resizing.Side(canvas, 0, canvas, resized, 0, resized))
        assert (np.abs(weights.sum(1) - 2**22) <= weights.shape[1]).all()
        assert (first >= 0).all() and (first < canvas).all()


def test_tables_of_many_sizes_are_forgotten(monkeypatch):
    """The bytes held on the device are bounded, whatever pictures come, and the tables of the last size are reused."""
    store = resizing._blocks.store
    made = []
    monkeypatch.setattr(store, "_make", lambda *arguments, make=store._make: made.append(arguments) or make(*arguments))
    monkeypatch.setattr(store._tables, "limit", 2**20)
    picture = torch.zeros(1, 1, 3, dtype=torch.uint8)
    for height in range(300, 420):
        ops.dual_resize(picture.expand(height, 300, 3), 96, 14, backend="torch")
        assert store.held_bytes <= 2**20
    assert len(store) < len(made)
    before = len(made)
    expected = ops.dual_resize(picture.expand(419, 300, 3), 96, 14, backend="torch")
    assert len(made) == before
    monkeypatch.setattr(store._tables, "limit", 0)
    store.clear()
    for ours, other in zip(ops.dual_resize(picture.expand(419, 300, 3), 96, 14, backend="torch"), expected):
        assert torch.equal(ours, other)


def test_tables_are_of_float32_whatever_the_default_is():
    expected = resizing.bilinear_taps(48, 21)
    resizing.bilinear_taps.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(
            np.array_equal(ours, other) and ours.dtype == other.dtype
            for ours, other in zip(resizing.bilinear_taps(48, 21), expected)
        )
    finally:
        torch.set_default_dtype(torch.float32)
        resizing.bilinear_taps.cache_clear()
