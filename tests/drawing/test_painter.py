"""The painter, with small random pipelines of two families."""

import builtins
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mg_fast.drawing import NEGATIVE_PROMPT, load_painter
from mg_fast.drawing.sources import find_pipeline
from mg_fast.errors import BackendError, CheckpointError, DrawingError, PictureError, PromptError
from mg_fast.testing.random_pipelines import random_sd, random_sdxl


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


def test_it_loads_on_first_use(folder):
    painter = load_painter(folder, device="cpu", steps=2)
    assert not painter.loaded
    (picture,) = painter.draw("a red cat", seed=3)
    assert painter.loaded and picture.size == (32, 32) and picture.info["seed"] == 3
    assert painter.pipeline.unet.dtype == torch.float32
    painter.unload()
    assert not painter.loaded


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


def test_an_interrupted_drawing_leaves_the_painter_usable(painter):
    (expected,) = painter.draw("a cat", seed=2)

    def stop(step, total):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        painter.draw("a cat", seed=2, on_step=stop)
    assert same(expected, painter.draw("a cat", seed=2)[0])


def test_long_prompts_are_read_to_their_end(painter, caplog):
    long = "a quiet street with (many) small+ houses, " * 4
    one, other = (painter.draw(long + end, seed=2)[0] for end in ("a cat", "a dog"))
    assert not same(one, other)
    assert not caplog.records


def test_without_compel_a_cut_is_said(painter, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "compel", None)
    painter.draw("a quiet street with many small houses, " * 4, seed=2)
    assert "the end of the prompt is cut" in caplog.text and "77 are read" in caplog.text


def test_another_family():
    painter = load_painter(random_sd(), steps=2)
    (picture,) = painter.draw("a cat", seed=1)
    assert same(picture, painter.draw("a cat", seed=1)[0])
    assert not same(picture, painter.draw("a cat", seed=1, like=picture)[0])
    assert not same(*(painter.draw("a cat" * 40 + end, seed=1)[0] for end in (" one", " two")))


@pytest.mark.parametrize("scheduler", ["lcm", "lightning", "turbo", "dpm", "unipc"])
def test_schedulers(folder, scheduler):
    painter = load_painter(folder, steps=2, guidance=1.0, scheduler=scheduler)
    assert same(*(painter.draw("a cat", seed=1)[0] for _ in range(2)))


def test_a_lora_changes_the_weights(folder, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    with_lora, without = (
        load_painter(folder, steps=2, lora=lora).draw("a cat", seed=1)[0] for lora in (tmp_path, None)
    )
    assert not same(with_lora, without)
    with pytest.raises(CheckpointError, match="lora"):
        load_painter(folder, lora=tmp_path / "nothing").draw("a cat")


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


def test_wrong_prompts_and_pictures_are_refused(painter, tmp_path):
    for prompt in ("", " \n", None, 3):
        with pytest.raises(PromptError, match="what to draw"):
            painter.draw(prompt)
    (tmp_path / "no.png").write_bytes(b"no picture")
    for like in (tmp_path / "no.png", tmp_path / "absent.png", 3):
        with pytest.raises(PictureError):
            painter.draw("a cat", like=like)


def test_what_is_no_pipeline_is_refused(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        load_painter(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        load_painter(tmp_path / "absent")
    (tmp_path / "model_index.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="_class_name"):
        load_painter(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_painter(tmp_path).draw("a cat")
    with pytest.raises(DrawingError, match="scheduler"):
        load_painter(folder, scheduler="fast")
    with pytest.raises(DrawingError, match="offload"):
        load_painter(folder, offload="all")
    with pytest.raises(BackendError, match="dtype"):
        load_painter(folder, dtype="int3")


def test_memory_that_runs_out_is_said(painter, monkeypatch):
    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(painter.pipeline.unet, "forward", short)
    with pytest.raises(DrawingError, match="memory is short while drawing"):
        painter.draw("a cat", size=32)


def test_without_diffusers_the_extra_is_named(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "diffusers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"mg_fast\[draw\]"):
        load_painter(folder)


def test_bytes_of_the_parts(folder):
    parts = find_pipeline(folder).part_bytes(torch.float16)
    loaded = random_sdxl()
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert parts[name] == sum(2 * p.numel() for p in getattr(loaded, name).parameters()), name
