"""Loading MM-Interleaved checkpoints and saving them: every tensor by name and value, in both layouts."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from mg_fast import (
    BackendError,
    MMInterleavedConfig,
    MMInterleavedForConditionalGeneration,
    MMInterleavedProcessor,
)
from mg_fast.models.mm_interleaved.checkpoint import open_interleaved
from mg_fast.testing.random_interleaved import build_interleaved
from mg_fast.testing.tolerances import relative_error
from tests.checkpoints import hub_cache
from tests.models.mm_interleaved import loaded
from tests.models.mm_interleaved.recorded import NAMES, folder_of, read_config


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread for every test, because all models here are tiny."""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A random checkpoint in the published layout, in float16 and two shards. No test changes it."""
    return build_interleaved(tmp_path_factory.mktemp("built"), dtype=torch.float16, shards=2)


@functools.cache
def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a published folder that no test changes, read without mg_fast."""
    found = {}
    for file in sorted((folder / "checkpoint").glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def load(folder, **arguments):
    return MMInterleavedForConditionalGeneration.from_pretrained(folder, **arguments)


def same(model, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a model's tensors have these names and, widened or rounded to the model's dtypes, these bits."""
    state = model.published_state()
    return state.keys() == tensors.keys() and all(
        torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_recorded_checkpoints(name):
    model, folder = loaded.load(name), folder_of(name)
    assert same(model, stored(folder)) and not model.training
    read, expected = (each.to_dict() for each in (MMInterleavedConfig.from_pretrained(folder), read_config(name)))
    for each in (read, expected):
        for part in ("text_config", "vision_config"):
            # These describe files, not the model.
            each[part] = {key: value for key, value in each[part].items() if key not in ("dtype", "architectures")}
    assert read == expected


def test_saved_and_loaded(tmp_path):
    """A saved folder needs no other, has the published names and the same bits, and the Auto classes know it."""
    model = loaded.load("mmi-tiny")
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    saved = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    assert len(saved) > 1 and {name for part in saved for name in part} == stored(folder_of("mmi-tiny")).keys()
    assert type(AutoConfig.from_pretrained(tmp_path)) is MMInterleavedConfig
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is MMInterleavedForConditionalGeneration and not any(info.values())
    assert same(again, model.published_state()) and {p.dtype for p in again.parameters()} == {torch.float32}
    # Every number that makes a difference survives the round trip.
    ours, theirs = ({**each.config.to_dict(), "_name_or_path": None} for each in (again, model))
    assert ours == theirs and again.generation_config.to_dict() == model.generation_config.to_dict()


def test_dtypes(built, tmp_path):
    """`auto` takes the dtype of the stored embedding of words, for tables that are stored in another dtype too."""
    tensors = dict(stored(built))
    tensors["visual_tokenizer.pos_embed"] = tensors["visual_tokenizer.pos_embed"].float()
    auto = load(write(copied(built, tmp_path), {"pytorch_model.bin": tensors}))
    assert {p.dtype for p in auto.parameters()} == {torch.float16} == {auto.config.dtype}
    half = load(built, dtype="bf16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and same(half, stored(built))
    with pytest.raises(BackendError, match="expected auto, float32"):
        load(built, dtype="int9")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows mapped files on Linux only")
def test_weights_are_views_of_their_files(built, monkeypatch):
    """What goes to transformers' loader takes no memory, and no weight is read before all names are checked."""
    seen = {}

    def take(cls, *args, state_dict, **kwargs):
        seen.update(state_dict)
        raise RuntimeError("enough")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(take))
    with pytest.raises(RuntimeError, match="enough"):
        load(built)
    assert seen.keys() == stored(built).keys()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(built) in line]
    spans = [tuple(int(end, 16) for end in span.split("-")) for span, *_ in maps]
    assert all(any(first <= tensor.data_ptr() < last for first, last in spans) for tensor in seen.values())


def copied(source: Path, target: Path) -> Path:
    """A copy of a published folder without its weights."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.bin", "*.safetensors"), dirs_exist_ok=True)
    return target


def write(folder: Path, files: dict[str, dict[str, torch.Tensor]], place: str = "checkpoint") -> Path:
    (folder / place).mkdir(exist_ok=True)
    for name, tensors in files.items():
        save = save_file if name.endswith(".safetensors") else torch.save
        save(tensors, folder / place / name)
    return folder


@pytest.mark.parametrize("place", ["checkpoint", "mm_interleaved_pretrain", "."])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_where_weights_may_lie(built, tmp_path, place, kind):
    folder, tensors = copied(built, tmp_path), stored(built)
    names = sorted(tensors)
    parts = {f"part{i}.{kind}": {name: tensors[name].contiguous() for name in names[i::3]} for i in range(3)}
    write(folder, parts, place)
    if kind == "bin":
        torch.save({"learning_rate": 1e-4}, folder / place / "training_args.bin")
    found = open_interleaved(folder).state(tensors)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in names)


def test_leftovers_of_old_libraries_are_ignored(built, tmp_path):
    tensors = dict(stored(built))
    del tensors["visual_tokenizer.encoder.vision_model.embeddings.position_ids"]
    tensors |= {f"mm_decoder.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    # The positions of CLIP's patches are counted where they are not stored.
    assert same(load(write(copied(built, tmp_path), {"pytorch_model.bin": tensors})), stored(built))


def test_side_folders_by_argument(built, tmp_path):
    """Folders and hub ids replace what config.yaml names; of a hub id, the small files are enough."""
    folder = tmp_path / "checkpoint of mine"
    shutil.copytree(built, folder)
    for side in ("vicuna-random", "clip-random", "sd-random"):
        shutil.move(folder / side, tmp_path / side)
    cache = hub_cache(tmp_path / "cache", {"someone/sd": tmp_path / "sd-random"})
    sides = {"llm": tmp_path / "vicuna-random", "clip": tmp_path / "clip-random", "diffusion": "someone/sd"}
    found = open_interleaved(folder, **sides, cache_dir=cache)
    assert found.config.to_dict() == MMInterleavedConfig.from_pretrained(built).to_dict()


def test_whole_clip_instead_of_its_tower(built, tmp_path):
    folder = copied(built, tmp_path)
    path = folder / "clip-random" / "config.json"
    tower = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "clip", "vision_config": tower, "text_config": {"hidden_size": 8}}))
    read = MMInterleavedConfig.from_pretrained(folder)
    assert read.vision_config.to_dict() == MMInterleavedConfig.from_pretrained(built).vision_config.to_dict()


def test_hub_id(built, tmp_path):
    cache = hub_cache(tmp_path / "cache", {"someone/interleaved": built})
    found = open_interleaved("someone/interleaved", cache_dir=cache)
    assert found.published and found.tensors.keys() == stored(built).keys()


def test_absent_keys_are_the_published_models(built, tmp_path):
    """A key that config.yaml lacks means the published number, and what that contradicts is refused."""
    folder = copied(built, tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"  special_token_dict:\n(    .*\n)+", "", text))
    with pytest.raises(ValueError, match="pad_token_id must lie in the vocabulary of 386, got 31999"):
        MMInterleavedConfig.from_pretrained(folder)


def test_device_map(built, tmp_path):
    """With parts on disk, the model answers as with all of them in memory."""
    model = load(built, dtype=torch.float32)
    inputs = MMInterleavedProcessor.from_pretrained(built)(
        text="<image> is the work", images=[Image.effect_noise((300, 260), 90)], return_tensors="pt"
    )
    places = {"": "cpu", **dict.fromkeys(("visual_tokenizer", "mm_decoder.layers.0", "text_decoder"), "disk")}
    parted = load(built, dtype=torch.float32, device_map=places, offload_folder=tmp_path)
    assert parted.text_decoder.head.weight.is_meta
    with torch.inference_mode():
        # Values that are not computed by one product over folded weights are rounded elsewhere.
        assert relative_error(parted(**inputs).logits, model(**inputs).logits) <= 1e-5


def test_quantization(built, tmp_path, caplog):
    """Only self-attention and MLPs of the language model are quantized, and a saved model loads again."""
    pytest.importorskip("torchao")
    model = load(built, dtype=torch.bfloat16, quantization_config="int8")
    # Synchronizers, which are most of this small model's layers, keep their dtype without a warning.
    assert "are not quantized" not in caplog.text
    kinds = {name: type(parameter.data) for name, parameter in model.named_parameters()}
    expected = {
        name for name in kinds if re.fullmatch(r"mm_decoder\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.weight", name)
    }
    assert {name for name, kind in kinds.items() if kind is not torch.Tensor} == expected
    inputs = {"input_ids": torch.tensor([[1, 30, 40, 50]])}
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
