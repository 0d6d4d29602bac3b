"""What a painter draws, with small random pipelines of two families."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mg_fast.drawing import NEGATIVE_PROMPT, calls, load_painter
from mg_fast.drawing.long_prompts import encoded_in_chunks
from mg_fast.errors import DrawingError, PictureError, PromptError
from mg_fast.testing.random_pipelines import random_flux, random_sd, random_sdxl

# The models are so small that they are slower on two threads.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved SDXL pipeline."""
    path = tmp_path_factory.mktemp("sdxl")
    random_sdxl().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def painter(folder):
    return load_painter(folder, steps=3)


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and np.array_equal(np.asarray(first), np.asarray(second))


def test_the_same_seed_gives_the_same_picture(painter):
    (alone,) = painter.draw("a red cat", seed=7)
    several = painter.draw("a red cat", seed=5, count=3)
    painter.draw("something else", seed=1, size=(48, 32), guidance=1.0)
    assert same(alone, several[2]) and [picture.info["seed"] for picture in several] == [5, 6, 7]
    assert same(alone, painter.draw(" a red cat\n", seed=7)[0])
    assert not same(alone, several[0])
    (unseeded,) = painter.draw("a red cat")
    assert same(unseeded, painter.draw("a red cat", seed=unseeded.info["seed"])[0])


def test_it_draws_what_diffusers_draws(painter, folder):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(
        "a red cat",
        negative_prompt=NEGATIVE_PROMPT,
        num_inference_steps=3,
        guidance_scale=4.0,
        height=48,
        width=32,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    assert same(plain, painter.draw("a red cat", seed=7, guidance=4.0, size=(32, 48))[0])


def test_every_setting_changes_the_picture(painter):
    (plain,) = painter.draw("a red cat", seed=7)
    like = Image.new("RGB", (40, 30), (200, 30, 30))
    changes = [{"steps": 2}, {"guidance": 1.0}, {"negative": ""}, {"seed": 8}, {"like": like}]
    drawn = [painter.draw("a red cat", **{"seed": 7, **change})[0] for change in changes]
    assert not any(same(plain, picture) for picture in drawn)
    assert all(picture.size == (32, 32) for picture in drawn)


def test_it_starts_from_a_picture(painter, tmp_path):
    like = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8))
    like.save(tmp_path / "like.png")
    from_file, little = (
        painter.draw("a cat", seed=1, like=tmp_path / "like.png", strength=strength, size=32)[0]
        for strength in (1.0, 0.4)
    )
    assert same(from_file, painter.draw("a cat", seed=1, like=like, strength=1.0, size=32)[0])
    assert not same(from_file, little)


def test_progress_counts_all_steps(painter):
    seen = []
    painter.draw("a cat", count=2, on_step=lambda step, total: seen.append((step, total)))
    assert seen == [(step, 6) for step in range(1, 7)]


def test_an_interrupted_drawing_leaves_the_painter_usable(painter, monkeypatch):
    (expected,) = painter.draw("a cat", seed=2)
    freed = []
    monkeypatch.setattr(painter.pipeline, "maybe_free_model_hooks", lambda: freed.append(True))

    def stop(step, total):
        if step == 2:
            raise KeyboardInterrupt

    for like in (None, expected):
        with pytest.raises(KeyboardInterrupt):
            painter.draw("a cat", seed=2, like=like, strength=None if like is None else 1.0, on_step=stop)
    # What is offloaded has gone back.
    assert len(freed) == 2
    assert same(expected, painter.draw("a cat", seed=2)[0])


def test_long_prompts_are_read_to_their_end(painter, caplog):
    pytest.importorskip("compel")
    long = "a quiet street with (many) small+ houses, " * 4
    one, other = (painter.draw(long + end, seed=2)[0] for end in ("a cat", "a dog"))
    assert not same(one, other)
    assert not caplog.records and painter.pipeline.tokenizer_2.deprecation_warnings


@pytest.mark.parametrize("made", [random_sdxl, random_sd])
def test_chunks_are_what_the_pipeline_encodes(made, monkeypatch):
    pytest.importorskip("compel")
    pipeline, texts, cpu = made(), ("a (red)+ cat", "[blurry]--, ugly"), torch.device("cpu")
    found = encoded_in_chunks(pipeline, *texts, cpu)
    options = {"device": cpu, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        plain = pipeline.encode_prompt(prompt=texts[0], negative_prompt=texts[1], **options)
    for mine, its in zip(found.values(), plain, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)
    long = encoded_in_chunks(pipeline, "a quiet street, " * 20, texts[1], cpu)
    assert long["prompt_embeds"].shape == long["negative_prompt_embeds"].shape
    torch.testing.assert_close(long["negative_prompt_embeds"][:, :77], plain[1], rtol=0, atol=1e-5)
    # Between its calls, the weights of an encoder that is offloaded layer by layer are nowhere.
    monkeypatch.setattr(type(pipeline.text_encoder), "device", torch.device("meta"))
    for mine, its in zip(encoded_in_chunks(pipeline, *texts, cpu).values(), found.values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_without_compel_a_cut_is_said(painter, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "compel", None)
    long = "a quiet street with many small houses, " * 4
    painter.draw(long, negative="", seed=2)
    painter.draw("a cat", negative=long, seed=2)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("mg_fast")]
    assert [message.split(" is cut")[0] for message in said] == [
        "the end of the prompt",
        "the end of the negative prompt",
    ]
    assert all("of which 77 are read), because compel is not installed" in message for message in said)


@pytest.mark.parametrize("made", [random_sd, random_flux])
def test_other_families(made, caplog):
    painter = load_painter(made(), steps=2, device="cpu")
    options = {"seed": 1, "size": (40, 32)}
    (picture,) = painter.draw("a cat", **options)
    assert picture.size == (40, 32) and same(picture, painter.draw("a cat", **options, count=2)[0])
    (redrawn,) = painter.draw("a cat", **options, like=picture)
    assert redrawn.size == (40, 32) and not same(picture, redrawn)
    pytest.importorskip("compel")
    # Chunks, or another text encoder, read long prompts to their end.
    assert not same(*(painter.draw("a cat, " * 40 + end, **options)[0] for end in ("one", "two")))
    # diffusers says by itself that one of Flux's two encoders reads less.
    assert not [record for record in caplog.records if record.name.startswith("mg_fast")]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": 30}, "multiples of 8"),
        ({"size": (32, 0)}, "multiples of 8"),
        ({"size": "large"}, "multiples of 8"),
        ({"steps": 0}, "at least 1, got 0"),
        ({"steps": 2.5}, "whole number"),
        ({"count": 0}, "from 1 to"),
        ({"seed": -1}, "from 0"),
        ({"guidance": float("nan")}, "from 0 to"),
        ({"negative": 3}, "expected a text"),
        ({"strength": 0.5}, "no picture came"),
        ({"strength": 1.5, "like": Image.new("RGB", (8, 8))}, "from 0 to 1"),
        ({"strength": 0.0, "like": Image.new("RGB", (8, 8))}, "leaves no step"),
    ],
)
def test_wrong_settings_are_refused(painter, settings, message):
    with pytest.raises(DrawingError, match=message):
        painter.draw("a cat", **settings)


def test_large_pictures_are_decoded_in_tiles(painter, monkeypatch):
    tiled, vae = [], painter.pipeline.vae
    real = vae.decode
    monkeypatch.setattr(vae, "decode", lambda *args, **options: tiled.append(vae.use_tiling) or real(*args, **options))
    monkeypatch.setattr(calls, "TILED_PIXELS", 32 * 32)
    like = Image.new("RGB", (8, 8))
    for options in ({}, {"size": (40, 32)}, {"size": (40, 32), "like": like}):
        painter.draw("a cat", **options)
    assert tiled == [False, True, True] and not vae.use_tiling
    monkeypatch.setattr(vae, "use_tiling", True)
    painter.draw("a cat", size=(40, 32))
    assert vae.use_tiling


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_a_vae_that_was_interrupted_is_what_it_was(monkeypatch):
    painter = load_painter(random_sdxl().to(torch.float16), steps=1, device="cpu")
    (expected,) = painter.draw("a cat", seed=1)
    vae = painter.pipeline.vae

    def short(latents, **options):
        assert vae.dtype == latents.dtype == torch.float32
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(vae, "decode", short)
        with pytest.raises(DrawingError, match="memory is short"):
            painter.draw("a cat", seed=1)
    assert vae.dtype == torch.float16 and same(expected, painter.draw("a cat", seed=1)[0])


def test_what_a_safety_checker_withholds_is_said(painter, monkeypatch):
    from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

    withheld = StableDiffusionPipelineOutput(images=[Image.new("RGB", (8, 8))], nsfw_content_detected=[True])

    def draw(self, prompt=None, num_inference_steps=50, **options):
        return withheld

    monkeypatch.setattr(type(painter.pipeline), "__call__", draw)
    with pytest.raises(DrawingError, match="safety checker"):
        painter.draw("a cat")


def test_wrong_prompts_and_pictures_are_refused(painter, tmp_path):
    for prompt in ("", " \n", None, 3):
        with pytest.raises(PromptError, match="what to draw"):
            painter.draw(prompt)
    (tmp_path / "no.png").write_bytes(b"no picture")
    for like in (tmp_path / "no.png", tmp_path / "absent.png", 3):
        with pytest.raises(PictureError):
            painter.draw("a cat", like=like)


def test_memory_that_runs_out_is_said(painter, monkeypatch):
    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(painter.pipeline.unet, "forward", short)
    with pytest.raises(DrawingError, match="memory is short while drawing"):
        painter.draw("a cat", size=32)
