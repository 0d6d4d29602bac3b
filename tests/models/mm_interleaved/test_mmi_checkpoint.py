"""Loading MM-Interleaved checkpoints and saving them: every tensor by name and value, in both layouts."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from mg_fast import MMInterleavedConfig, MMInterleavedForConditionalGeneration
from mg_fast.testing.random_interleaved import build_interleaved
from tests.checkpoints import hub_cache
from tests.models.mm_interleaved.recorded import NAMES, folder_of, read_config


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread for every test, because all models here are tiny."""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A random checkpoint in the published layout, in float16 and two shards. No test changes it."""
    return build_interleaved(tmp_path_factory.mktemp("built"), dtype=torch.float16, shards=2)


def load(folder, **arguments):
    return MMInterleavedForConditionalGeneration.from_pretrained(folder, **arguments)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a published folder, read without mg_fast."""
    found = {}
    for file in sorted((folder / "checkpoint").glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def same(model, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a model's tensors have these names and, widened or rounded to the model's dtypes, these bits."""
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(
        torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_recorded_checkpoints(name, tmp_path):
    folder = folder_of(name)
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()) and not model.training
    assert same(model, stored(folder))
    read, expected = (each.to_dict() for each in (MMInterleavedConfig.from_pretrained(folder), read_config(name)))
    for each in (read, expected):
        for part in ("text_config", "vision_config"):
            # These describe files, not the model.
            each[part] = {key: value for key, value in each[part].items() if key not in ("dtype", "architectures")}
    assert read == expected
    model.save_pretrained(tmp_path / "saved", max_shard_size="2MB")
    again = load(tmp_path / "saved")
    assert same(again, model.state_dict()) and {p.dtype for p in again.parameters()} == {torch.float32}
    # Every number that makes a difference survives the round trip.
    ours, theirs = ({**m.config.to_dict(), "_name_or_path": None} for m in (again, model))
    assert ours == theirs
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    saved = [load_file(file) for file in (tmp_path / "saved").glob("*.safetensors")]
    assert len(saved) > 1 and {name for part in saved for name in part} == stored(folder).keys()


def test_dtypes(built):
    """`auto` takes the dtype of the stored weights, for tables too; another dtype is given tensor by tensor."""
    auto, half = load(built), load(built, dtype="bf16")
    assert {p.dtype for p in auto.parameters()} == {torch.float16} == {auto.config.dtype}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert same(auto, stored(built)) and same(half, stored(built))


def test_auto_is_the_language_models_dtype(built, tmp_path):
    folder = copied(built, tmp_path)
    tensors = stored(built)
    tensors["visual_tokenizer.pos_embed"] = tensors["visual_tokenizer.pos_embed"].float()
    write(folder, {"pytorch_model.bin": tensors})
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


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
    assert all(tensor.untyped_storage().filename for tensor in seen.values())


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
    assert same(load(folder), tensors)


def test_leftovers_of_old_libraries_are_ignored(built, tmp_path):
    tensors = stored(built)
    del tensors["visual_tokenizer.encoder.vision_model.embeddings.position_ids"]
    extra = {f"mm_decoder.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    model = load(write(copied(built, tmp_path), {"pytorch_model.bin": tensors | extra}))
    assert same(model, stored(built)), "the positions of CLIP's patches are counted"


def test_side_folders_by_argument(built, tmp_path):
    """Folders and hub ids replace what config.yaml names; of a hub id, the small files are enough."""
    folder = copied(built, tmp_path / "checkpoint of mine")
    shutil.copytree(built / "checkpoint", folder / "checkpoint", dirs_exist_ok=True)
    for side in ("vicuna-random", "clip-random", "sd-random"):
        shutil.move(folder / side, tmp_path / side)
    cache = hub_cache(tmp_path / "cache", {"someone/sd": tmp_path / "sd-random"})
    sides = {"llm": tmp_path / "vicuna-random", "clip": tmp_path / "clip-random", "diffusion": "someone/sd"}
    model = load(folder, **sides, cache_dir=cache)
    assert same(model, stored(built))
    # The saved folder holds all that is needed.
    model.save_pretrained(tmp_path / "saved")
    assert same(load(tmp_path / "saved"), stored(built))


def test_whole_clip_instead_of_its_tower(built, tmp_path):
    folder = copied(built, tmp_path)
    path = folder / "clip-random" / "config.json"
    tower = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "clip", "vision_config": tower, "text_config": {"hidden_size": 8}}))
    read = MMInterleavedConfig.from_pretrained(folder)
    assert read.vision_config.to_dict() == MMInterleavedConfig.from_pretrained(built).vision_config.to_dict()


def test_hub_id(built, tmp_path):
    cache = hub_cache(tmp_path / "cache", {"someone/interleaved": built})
    assert same(load("someone/interleaved", cache_dir=cache), stored(built))


def test_absent_keys_are_the_published_models(built, tmp_path):
    """A key that config.yaml lacks means the published number, and what that contradicts is refused."""
    folder = copied(built, tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"  special_token_dict:\n(    .*\n)+", "", text))
    with pytest.raises(ValueError, match="pad_token_id must lie in the vocabulary of 386, got 31999"):
        MMInterleavedConfig.from_pretrained(folder)


def test_auto_classes(built, tmp_path):
    load(built).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MMInterleavedConfig
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is MMInterleavedForConditionalGeneration


def test_device_map(built, tmp_path):
    """With parts on disk, the model answers as with all of them in memory."""
    torch.manual_seed(0)
    model = load(built, dtype=torch.float32)
    config = model.config
    picture = [config.soi_token_id] + [config.image_token_id] * config.num_img_token
    inputs = {"input_ids": torch.tensor([[1, 30, *picture, 40, 50]]), "pixel_values": torch.rand(1, 3, 224, 224)}
    places = {"": "cpu", **dict.fromkeys(("visual_tokenizer", "mm_decoder.layers.0", "text_decoder"), "disk")}
    parted = load(built, dtype=torch.float32, device_map=places, offload_folder=tmp_path)
    assert parted.text_decoder.head.weight.is_meta
    with torch.inference_mode():
        assert torch.equal(parted(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("scheme", ["int8"])
def test_quantization(built, tmp_path, scheme):
    """Only self-attention and MLPs of the language model are quantized, and a saved model loads again."""
    pytest.importorskip("torchao")
    model = load(built, dtype=torch.bfloat16, quantization_config=scheme)
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
