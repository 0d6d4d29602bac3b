"""Image tokens are kept by the contents of pictures: what is found again, what is not, and how much is kept."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

import mg_fast
from mg_fast import Pipeline
from mg_fast.engine.image_cache import ImageCache, picture_digest
from mg_fast.models.mini_gemini import picture_side
from mg_fast.modules.clip import PackedClip
from mg_fast.modules.convnext import ConvNeXtPyramid, PackedPyramid

QUESTION = "What is written in the picture?"
# Bytes of the float32 image tokens of one picture of the tiny checkpoint.
BYTES = 25 * 64 * 4


@pytest.fixture
def runs(monkeypatch):
    """One entry for every run of a tower, packed or by its modules.

    Runs are counted by methods of the classes, because hooks would keep the towers from being packed.
    """
    runs = []

    def count(owner, method, entry):
        run = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda *args, **kwargs: runs.append(entry) or run(*args, **kwargs))

    count(PackedPyramid, "__call__", "packed HR")
    count(PackedClip, "forward", "packed LR")
    count(ConvNeXtPyramid, "forward", "HR")
    count(picture_side, "low_resolution_features", "LR")
    return runs


def test_a_hit_runs_no_tower_and_is_the_same(pipeline, model, processor, photo, runs):
    first = pipeline.see(photo)
    assert sorted(runs) == ["packed HR", "packed LR"]
    again = pipeline.see(photo)
    assert len(runs) == 2
    uncached = Pipeline(model, processor, image_cache_bytes=0).see(photo)
    assert len(runs) == 4
    assert torch.equal(first, again) and torch.equal(first, uncached)


def test_the_content_counts_not_the_file(pipeline, photo, tmp_path, runs):
    with Image.open(photo) as image:
        rgb = image.convert("RGB")
    expected = pipeline.see(photo)
    rgb.save(tmp_path / "copy.bmp")
    turned = rgb.rotate(-90, expand=True)
    exif = Image.Exif()
    # This EXIF orientation means that the picture lies on its side and must be turned by 270 degrees.
    exif[0x0112] = 8
    turned.save(tmp_path / "turned.png", exif=exif)
    kinds = [
        rgb,
        np.asarray(rgb),
        torch.from_numpy(np.array(rgb)),
        photo.read_bytes(),
        tmp_path / "copy.bmp",
        tmp_path / "turned.png",
    ]
    for kind in kinds:
        assert torch.equal(pipeline.see(kind), expected)
    assert len(runs) == 2


def test_one_pixel_is_another_picture(pipeline, photo, runs):
    with Image.open(photo) as image:
        rgb = image.convert("RGB")
    pipeline.see(rgb)
    rgb.putpixel((0, 0), tuple(255 - value for value in rgb.getpixel((0, 0))))
    pipeline.see(rgb)
    assert len(runs) == 4


def test_same_bytes_of_another_shape_are_another_picture():
    wide, high = (Image.new("RGB", size, "red") for size in ((6, 2), (2, 6)))
    assert wide.tobytes() == high.tobytes() and picture_digest(wide) != picture_digest(high)
    assert picture_digest(Image.new("L", (3, 2))) != picture_digest(Image.new("P", (3, 2)))


def test_chat_and_all_conversations_share_it(pipeline, photo, runs):
    alone = pipeline.chat(QUESTION, [photo], max_new_tokens=4)
    assert pipeline.conversation().chat(QUESTION, [photo], max_new_tokens=4) == alone
    pipeline.reset()
    assert pipeline.chat(QUESTION, [photo], max_new_tokens=4) == alone
    pipeline.see(photo)
    assert len(runs) == 2


@torch.inference_mode()
def test_whoever_writes_into_a_tensor_harms_nobody(pipeline, photo):
    first = pipeline.see(photo)
    expected = first.clone()
    first.zero_()
    second = pipeline.see(photo)
    assert torch.equal(second, expected)
    second.fill_(float("nan"))
    assert torch.equal(pipeline.see(photo), expected)


def test_backends_have_tokens_of_their_own(pipeline, photo, runs):
    pipeline.see(photo)
    with mg_fast.use_backend("torch"):
        # `auto` takes this backend here, too.
        pipeline.see(photo)
    assert len(runs) == 2
    with mg_fast.use_backend("reference"):
        pipeline.see(photo)
    assert sorted(runs) == ["HR", "LR", "packed HR", "packed LR"]


def test_towers_that_cannot_be_packed(pipeline, model, photo, runs):
    """The tokens of towers that cannot be packed are kept as well."""
    handle = model.model.vision_tower_aux.vision_stages[0].register_forward_hook(lambda *_: None)
    try:
        first = pipeline.see(photo)
        assert torch.equal(pipeline.see(photo), first) and sorted(runs) == ["HR", "LR"]
    finally:
        handle.remove()


@pytest.mark.parametrize("setting, value", [("pad", False), ("hr_size", None)])
def test_other_processing_has_tokens_of_its_own(pipeline, photo, monkeypatch, setting, value):
    before = pipeline.vision.circumstances()
    monkeypatch.setattr(pipeline.processor.image_processor, setting, value)
    assert pipeline.vision.circumstances() != before


def test_autocast_has_tokens_of_its_own(pipeline, photo):
    before = pipeline.vision.circumstances()
    with torch.autocast("cpu", torch.bfloat16):
        assert pipeline.vision.circumstances() != before
    assert pipeline.vision.circumstances() == before


def test_switched_off(model, processor, photo, runs):
    pipeline = Pipeline(model, processor, image_cache_bytes=0)
    assert torch.equal(pipeline.see(photo), pipeline.see(photo))
    assert len(runs) == 4 and len(pipeline.vision.cache) == 0


def test_load_takes_the_bound(standard, photo):
    assert mg_fast.load(standard, device="cpu", image_cache_bytes=BYTES).vision.cache.limit == BYTES
    with pytest.raises(ValueError, match="image_cache_bytes: expected 0 or more bytes, got -1"):
        mg_fast.load(standard, device="cpu", image_cache_bytes=-1)


def test_the_one_used_longest_ago_goes_first(model, processor, photo, drawing, runs):
    pipeline = Pipeline(model, processor, image_cache_bytes=2 * BYTES)
    third = Image.new("RGB", (40, 40), "green")
    for picture in (photo, drawing, photo, third):
        pipeline.see(picture)
    assert len(runs) == 6 and len(pipeline.vision.cache) == 2 and pipeline.vision.cache.held_bytes == 2 * BYTES
    pipeline.see(photo)
    assert len(runs) == 6
    pipeline.see(drawing)
    assert len(runs) == 8


def test_clear(model, processor, photo):
    """Clearing the cache makes a write through `.data`, which is not noticed, take effect."""
    pipeline = Pipeline(model, processor)
    before = pipeline.see(photo)
    bias = model.model.mm_projector[0].bias
    kept = bias.detach().clone()
    try:
        bias.data.add_(1)
        assert torch.equal(pipeline.see(photo), before)
        pipeline.clear_image_cache()
        assert len(pipeline.vision.cache) == pipeline.vision.cache.held_bytes == 0
        assert not torch.equal(pipeline.see(photo), before)
    finally:
        with torch.no_grad():
            bias.copy_(kept)


def test_a_hit_is_profiled_as_what_it_is(pipeline, photo):
    pipeline.see(photo)
    answer = pipeline.chat(QUESTION, [photo], max_new_tokens=2, profile=True)
    assert [stage.name for stage in answer.stages] == ["preprocess", "prefill to first token", "decode"]


def test_warnings_come_once(pipeline, tmp_path, caplog):
    Image.new("RGB", (40, 40), "green").save(tmp_path / "clear.png", transparency=(0, 128, 0))
    with caplog.at_level("WARNING"):
        pipeline.see(tmp_path / "clear.png")
    assert caplog.text.count("transparent pixels") == 1


def test_bytes_are_counted_exactly():
    cache = ImageCache(100)
    cache.put("a", torch.zeros(1000)[:10])
    cache.put("b", torch.zeros(2, 1).expand(2, 5))
    assert cache.held_bytes == 80 and len(cache) == 2
    cache.put("a", torch.ones(5))
    assert cache.held_bytes == 60 and torch.equal(cache.get("a"), torch.ones(5))
    cache.put("too large", torch.zeros(26))
    assert cache.get("too large") is None and len(cache) == 2
    cache.put("c", torch.zeros(25))
    assert cache.get("a") is None and cache.get("b") is None and cache.held_bytes == 100


def test_threads():
    """With many threads and more tensors than fit, each key gets its own tensor and the count of bytes stays right."""
    cache, failures = ImageCache(8 * 400), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for number in torch.randint(0, 12, (400,), generator=generator).tolist():
            found = cache.get(number)
            if found is None:
                cache.put(number, torch.full((100,), float(number)))
            elif not torch.equal(found, torch.full((100,), float(number))):
                failures.append(number)
            else:
                found.fill_(-1)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and cache.held_bytes == 400 * len(cache) <= 8 * 400
