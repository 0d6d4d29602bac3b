"""What is no MM-Interleaved checkpoint, or a broken one, is refused in clear words before any weight is read."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from mg_fast import (
    CheckpointError,
    MiniGeminiForConditionalGeneration,
    MiniGeminiProcessor,
    MMInterleavedConfig,
    MMInterleavedForConditionalGeneration,
)
from mg_fast.models.families import checkpoint_family
from mg_fast.models.mm_interleaved.published import read_published
from mg_fast.testing.random_interleaved import build_interleaved


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A random checkpoint in the published layout, in two shards. No test changes it."""
    torch.set_num_threads(1)
    return build_interleaved(tmp_path_factory.mktemp("built"), shards=2)


@pytest.fixture
def folder(built, tmp_path) -> Path:
    """A copy whose files may be changed. The weights are links, which must be replaced rather than written to."""
    target = tmp_path / "copy"
    shutil.copytree(built, target, ignore=shutil.ignore_patterns("*.bin"))
    for file in (built / "checkpoint").iterdir():
        (target / "checkpoint" / file.name).symlink_to(file)
    return target


def refused(folder, match: str, **arguments) -> str:
    """Asserts that loading ends in a matching CheckpointError before any weight is read, and returns its message."""

    def load(*args, **kwargs):
        raise AssertionError("went on to load the weights")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=match) as caught:
        patch.setattr(PreTrainedModel, "from_pretrained", load)
        MMInterleavedForConditionalGeneration.from_pretrained(folder, **arguments)
    return str(caught.value)


def shard(folder: Path, number: int = 1) -> Path:
    return folder / "checkpoint" / f"pytorch_model-{number:05d}-of-00002.bin"


def replace(path: Path, content) -> None:
    path.unlink()
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


def edit_yaml(folder: Path, change) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    change(content)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


# ---- Other folders


def test_the_other_family(folder, standard):
    assert checkpoint_family(folder) == "MM-Interleaved" and checkpoint_family(standard) == "Mini-Gemini"
    told = "this is a checkpoint of Mini-Gemini, which mg_fast.MiniGeminiForConditionalGeneration loads"
    refused(standard, rf"has no config\.yaml, .*; {told}")
    told = "this is a checkpoint of MM-Interleaved, which mg_fast.MMInterleavedForConditionalGeneration loads"
    for kind in (MiniGeminiForConditionalGeneration, MiniGeminiProcessor):
        with pytest.raises(CheckpointError, match=told):
            kind.from_pretrained(folder)
    # So is a folder that save_pretrained wrote.
    MMInterleavedConfig.from_pretrained(folder).save_pretrained(folder.parent / "saved")
    for kind in (MiniGeminiForConditionalGeneration, MiniGeminiProcessor):
        with pytest.raises(CheckpointError, match=told):
            kind.from_pretrained(folder.parent / "saved")
    refused(folder.parent / "saved", r"holds no weights: expected model\.safetensors")


def test_nothing_there(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no config\.yaml, and no config\.json with model_type mm_interleaved")
    refused(tmp_path / "absent", "is not a folder")
    refused(folder, "subfolder='checkpoint' is not supported", subfolder="checkpoint")
    shutil.rmtree(folder / "checkpoint")
    refused(folder, r"holds no weights: expected \*\.bin or \*\.safetensors in checkpoint, in mm_interleaved_pretrain")


# ---- Weight files


def test_weights_in_two_places(folder):
    shutil.copytree(folder / "checkpoint", folder / "mm_interleaved_pretrain", symlinks=True)
    refused(folder, "expected weights in one place, but checkpoint and mm_interleaved_pretrain both hold some")


@pytest.mark.parametrize("left", [0, 100, 0.5, 0.999])
def test_truncated_shard(folder, left):
    whole = shard(folder).read_bytes()
    replace(shard(folder), whole[: left if isinstance(left, int) else int(left * len(whole))])
    refused(folder, rf"{shard(folder).name} is (corrupt or not a PyTorch file|refused)")


def test_a_tensor_twice(folder):
    torch.save({"soi_token": torch.zeros(1, 64)}, folder / "checkpoint" / "more.bin")
    refused(folder, r"soi_token: stored in more\.bin and again in .*pytorch_model-0000[12]-of-00002\.bin")


def test_index_names_an_absent_shard(folder):
    weight_map = {"soi_token": "pytorch_model-00003-of-00003.bin"}
    index = folder / "checkpoint" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, r"index\.json names pytorch_model-00003-of-00003\.bin, which is not there")


class Code:
    """What a hostile file would hold: an object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["zip", "bare pickle"])
def test_file_holding_code(folder, tmp_path, form):
    target = tmp_path / "written"
    content = {"soi_token": torch.ones(1, 64), "code": Code(target)}
    replace(shard(folder), pickle.dumps(content, protocol=2) if form == "bare pickle" else content)
    message = refused(folder, r"\.bin is refused: expected tensors and nothing else")
    assert "weights_only" not in message and not target.exists()


def test_file_that_is_no_state_dictionary(folder):
    """One of a known name is passed over, as training_args.bin; another is refused rather than ignored."""
    torch.save({"step": 7}, folder / "checkpoint" / "trainer_state.bin")
    refused(folder, r"trainer_state\.bin: expected a flat dictionary of tensors, got dict")
    (folder / "checkpoint" / "trainer_state.bin").rename(folder / "checkpoint" / "training_args.bin")
    (folder / "config.yaml").unlink()
    refused(folder, r"has no config\.yaml")


def test_tensors_that_do_not_fit(folder):
    tensors = torch.load(shard(folder), weights_only=True)
    gone, wrong = sorted(name for name in tensors if name.startswith("mm_decoder") and ".mlp." in name)[:2]
    del tensors[gone]
    tensors[wrong] = tensors[wrong].flatten()
    tensors["more.weight"] = torch.ones(2)
    replace(shard(folder), tensors)
    message = refused(folder, "does not hold the tensors its configuration calls for")
    assert f"1 missing: {gone}" in message and "1 unexpected: more.weight" in message
    assert f"1 mis-shaped: {wrong} [6144], expected [" in message


# ---- Configuration


@pytest.mark.parametrize(
    "text, match",
    [
        ("model: [", r"config\.yaml is not valid YAML"),
        ("- 1", r"config\.yaml: expected sections by name, got list"),
        ("other: {}", r"config\.yaml: expected a section model, got None"),
        ("model: !!python/object/apply:os.getcwd []", r"config\.yaml is not valid YAML"),
    ],
)
def test_broken_yaml(folder, text, match):
    (folder / "config.yaml").write_text(text)
    refused(folder, match)


def test_unknown_keys_are_named(folder, caplog):
    read_published(folder)
    assert "without effect" not in caplog.text
    edit_yaml(folder, lambda content: content["model"].update(spatial_shape=[1]))
    edit_yaml(folder, lambda content: content["model"]["image_decoder_config"].update(image_sise=1, uncond_prob=0.1))
    read_published(folder)
    assert "without effect: model.spatial_shape, model.image_decoder_config.image_sise\n" in caplog.text


def test_side_folders_that_are_not_there(folder):
    shutil.rmtree(folder / "clip-random")
    refused(
        folder,
        r"names 'clip-random' as model\.visual_tokenizer_config\.encoder_model_path, and there is no such folder "
        r"beside it: pass clip= a folder or hub id \(the original uses openai/clip-vit-large-patch14\)",
    )
    edit_yaml(folder, lambda content: content["model"].pop("llm_model_path"))
    refused(folder, r"has no model\.llm_model_path: pass llm= a folder or hub id")


def test_side_folders_of_another_kind(folder):
    refused(folder, "expected model_type llama, got 'clip_vision_model'", llm=folder / "clip-random")
    refused(folder, r"unet.config\.json is not there", diffusion=folder / "clip-random")
    (folder / "sd-random" / "vae" / "config.json").write_text("{")
    refused(folder, r"vae.config\.json is not valid JSON")


@pytest.mark.parametrize(
    "place, value, match",
    [
        (("model", "num_img_token"), 9, "queries of the visual perceiver must be 9, got 8"),
        (("model", "num_img_token"), "nine", "num_img_token must be a whole number of at least 1, got 'nine'"),
        (("model", "image_embed_dim"), 48, "width of the vision tower must be 48, got 32"),
        (("model", "spatial_shapes"), [64, 32], r"spatial_shapes must be \(16, 8\), got \(64, 32\)"),
        (("model", "txt_vocab_size"), 300, "pad_token_id must lie in the vocabulary of 300, got 383"),
        (
            ("model", "cross_attention_frequency"),
            0,
            "cross_attention_frequency must be a whole number of at least 1, got 0",
        ),
        (("model", "image_decoder_config", "embed_dim"), 64, "width of the image perceiver must be 64, got 32"),
        (("model", "image_decoder_config", "perceiver_config"), None, "expected a section perceiver_config, got None"),
        (("constants", "heads"), 4, "constants may hold spm_inplane, .*; it has heads"),
        (("constants", "llm_mmfs_heads"), 5, r"width of the feature maps \(32\) must be a multiple of 5"),
    ],
)
def test_parts_that_do_not_fit(folder, place, value, match):
    def change(content):
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    edit_yaml(folder, change)
    refused(folder, match)


def test_side_folders_for_a_saved_model(folder):
    MMInterleavedConfig.from_pretrained(folder).save_pretrained(folder.parent / "saved")
    refused(folder.parent / "saved", r"llm= is for folders with a config\.yaml", llm=folder / "vicuna-random")
