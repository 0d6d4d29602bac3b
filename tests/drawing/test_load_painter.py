"""Where painters come from: folders and hub ids, what is added to them, and what is wrong with them."""

import builtins
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mg_fast.drawing import load_painter, pipelines
from mg_fast.drawing.sources import check_room, find_pipeline
from mg_fast.errors import BackendError, CheckpointError, DrawingError
from mg_fast.testing.random_pipelines import random_sdxl

# The models are so small that they are slower on two threads.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved SDXL pipeline."""
    path = tmp_path_factory.mktemp("sdxl")
    random_sdxl().save_pretrained(path)
    return path


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


def test_a_folder_recommends_steps_and_guidance(folder, tmp_path):
    advised = tmp_path / "advised"
    shutil.copytree(folder, advised)
    (advised / "drawing_config.json").write_text('{"steps": 3, "guidance": 1.5}')
    (wanted,) = load_painter(folder, steps=3, guidance=1.5, device="cpu").draw("a cat", seed=1)
    assert same(load_painter(advised, device="cpu").draw("a cat", seed=1)[0], wanted)
    # What the caller says comes first, in `load_painter` and in `draw`.
    (other,) = load_painter(folder, steps=2, guidance=4.0, device="cpu").draw("a cat", seed=1)
    assert not same(other, wanted)
    assert same(load_painter(advised, steps=2, device="cpu").draw("a cat", seed=1, guidance=4.0)[0], other)
    for text, message in (
        ("{", "is not JSON"),
        ('{"scale": 1}', "expected an object with the keys steps and guidance, got {'scale': 1}"),
        ('{"steps": 0}', "drawing_config.json: steps: expected"),
    ):
        (advised / "drawing_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_painter(advised)


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
        load_painter(folder, lora=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="lora 'owner/name' cannot be loaded"):
        load_painter(folder, lora="owner/name").draw("a cat")


def test_an_ip_adapter_follows_a_picture(folder, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    save_ip_adapter(find_pipeline(folder), tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "image_encoder")
    painter = load_painter(folder, steps=2, ip_adapter=tmp_path / "ip.safetensors")
    red, blue = (Image.new("RGB", (40, 30), color) for color in ("red", "blue"))
    (plain,) = load_painter(folder, steps=2).draw("a cat", seed=1)
    (followed,) = painter.draw("a cat", seed=1, like=red)
    assert not same(plain, followed) and not same(followed, painter.draw("a cat", seed=1, like=blue)[0])
    assert not same(followed, painter.draw("a cat", seed=1, like=red, strength=0.1)[0])
    # Without a picture, such as in the first turn of a story, the adapter does not count.
    assert same(plain, painter.draw("a cat", seed=1)[0])
    with pytest.raises(CheckpointError, match="ip_adapter .* no such file"):
        load_painter(folder, ip_adapter=tmp_path)


def save_ip_adapter(source, path) -> None:
    """Saves random weights of an IP-Adapter for the UNet of a pipeline, as diffusers reads them."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    unet, made = UNet2DConditionModel.from_pretrained(source.folder / "unet"), torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    weights = {
        "image_proj.proj.weight": torch.randn(4 * width, 8, generator=made),
        "image_proj.proj.bias": torch.randn(4 * width, generator=made),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(layers):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for side in ("k", "v"):
            weights[f"ip_adapter.{2 * i + 1}.to_{side}_ip.weight"] = torch.randn(inner, width, generator=made)
    save_file(weights, path / "ip.safetensors")


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_a_loaded_pipeline_is_used_as_it_is():
    pipeline = random_sdxl().to(torch.float16)
    painter = load_painter(pipeline, device="cpu", steps=1)
    painter.draw("a cat")
    assert painter.pipeline is pipeline and painter.dtype == pipeline.unet.dtype == torch.float16
    # The VAE was upcast to decode and cast back, and can still be trained.
    assert not any(parameter.is_inference() for parameter in pipeline.vae.parameters())
    assert load_painter(pipeline, dtype="float32", device="cpu").pipeline.unet.dtype == torch.float32


def test_a_hub_id_is_found_in_the_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="owner/name cannot be fetched"):
        load_painter("owner/name")
    repository, commit = tmp_path / "models--owner--name", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    painter = load_painter("owner/name", device="cpu", steps=1)
    assert painter.name == "owner/name" and len(painter.draw("a cat")) == 1
    monkeypatch.setattr(pipelines, "free_bytes", lambda device: 1000)
    with pytest.raises(BackendError, match="owner/name needs"):
        load_painter("owner/name", device="cpu").draw("a cat")


def test_weights_that_do_not_fit_are_refused(folder):
    source = find_pipeline(folder)
    sizes = source.part_bytes(torch.float16).values()
    check_room(source, torch.float16, sum(sizes), "none")
    check_room(source, torch.float16, None, "none")
    with pytest.raises(BackendError, match=r'GiB are free on the device: offload="model"'):
        check_room(source, torch.float16, sum(sizes) - 1, "none")
    check_room(source, torch.float16, max(sizes), "model")
    with pytest.raises(BackendError, match='try offload="sequential"'):
        check_room(source, torch.float16, max(sizes) - 1, "model")
    check_room(source, torch.float16, 0, "sequential")


def test_offload_changes_nothing_on_a_cpu(folder, caplog):
    for offload in ("model", "sequential"):
        assert len(load_painter(folder, device="cpu", steps=1, offload=offload).draw("a cat")) == 1
    assert caplog.text.count("changes nothing on a CPU") == 2


def test_compiling(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    painter = load_painter(folder, steps=1, compiled=True)
    painter.draw("a cat")
    assert compiled == [painter.pipeline.unet]


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
    for value in (3, None, object()):
        with pytest.raises(CheckpointError, match="expected a folder or hub id"):
            load_painter(value)
    with pytest.raises(DrawingError, match="scheduler"):
        load_painter(folder, scheduler="fast")
    with pytest.raises(DrawingError, match="offload"):
        load_painter(folder, offload="all")
    with pytest.raises(BackendError, match="dtype"):
        load_painter(folder, dtype="int3")


def broken_json(folder):
    (folder / "unet" / "config.json").write_text("{")


def another_kind(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableVideoDiffusionPipeline"}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "'unet' has no file"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "the part 'tokenizer', but there is no such folder"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no"), "safetensors"),
        (broken_json, "JSON"),
        (another_kind, "cannot be loaded as a text-to-image pipeline"),
    ],
)
def test_damaged_folders(folder, tmp_path, damage, message):
    shutil.copytree(folder, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(CheckpointError, match=message):
        load_painter(tmp_path / "damaged").draw("a cat")


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
