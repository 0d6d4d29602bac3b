"""Broken files, files that hold code, and tensors that do not fit are refused, and in clear words."""

import json
import pickle
import re
import shutil

import pytest
import torch

from mg_fast import CheckpointError, MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.testing import random_checkpoints as random_checkpoint
from tests.checkpoints import (
    CLIP,
    CONVNEXT,
    copy_small,
    make_adapter,
    refused,
    remake,
    tensors_of,
    towers_of,
    without_towers,
    write_bin,
    write_safetensors,
)

# --- Broken folders and files


def test_no_config(standard, tmp_path):
    folder = write_safetensors(tmp_path, tensors_of(standard))
    refused(folder, "has no config.json: expected a Mini-Gemini checkpoint folder")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        MiniGeminiProcessor.from_pretrained(folder)


def test_no_weights(standard, tmp_path):
    refused(copy_small(standard, tmp_path), r"holds no weights: expected \*\.safetensors or pytorch_model\*\.bin")
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "holds no weights")


@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_index_names_an_absent_shard(standard, tmp_path, write):
    folder = write(copy_small(standard, tmp_path), tensors_of(standard), 3)
    gone = next(path for path in folder.iterdir() if "00002-of-00003" in path.name)
    gone.unlink()
    refused(folder, rf"index\.json names {re.escape(gone.name)}, which is not there")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 1}}'])
def test_broken_index(standard, tmp_path, text):
    folder = copy_small(standard, tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, r"model\.safetensors\.index\.json is not a weight index")


@pytest.mark.parametrize("left", [0, 4, 100, 0.3, 0.999])
def test_truncated_shard(standard, tmp_path, left):
    folder = write_safetensors(copy_small(standard, tmp_path), tensors_of(standard), 3)
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    refused(folder, rf"{shard.name} is corrupt or not a safetensors file")


def test_text_named_safetensors(standard, tmp_path):
    folder = copy_small(standard, tmp_path)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    refused(folder, r"model\.safetensors is corrupt or not a safetensors file")
    with pytest.raises(CheckpointError, match="corrupt"):
        MiniGeminiProcessor.from_pretrained(folder)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("left", [0, 1, 2, 20, 3000, 0.5, 0.999])
def test_truncated_bin(standard, tmp_path, left, legacy):
    folder = write_bin(copy_small(standard, tmp_path), tensors_of(standard), legacy=legacy)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    refused(folder, r"pytorch_model\.bin is (corrupt or not a PyTorch file|refused)")


@pytest.mark.parametrize(
    "content", [b"hello", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", bytes(64), b"PK\x03\x04"]
)
def test_something_else_named_bin(standard, tmp_path, content):
    folder = copy_small(standard, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(content)
    message = refused(folder, r"pytorch_model\.bin is (corrupt or not a PyTorch file|refused)")
    assert "\n" not in message


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, [torch.ones(1)], {1: torch.ones(1)}, torch.ones(1), {"step": 7}]
)
def test_bin_that_is_no_flat_dictionary(standard, tmp_path, content):
    folder = copy_small(standard, tmp_path)
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin: expected a flat dictionary of tensors, got ")


class Code:
    """What a hostile file would hold: an object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def write_code(path, target, form):
    content = {"lm_head.weight": torch.ones(2), "code": Code(target)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    # The code is live: a careless reader would run it and write the file.
    torch.load(path, weights_only=False) if form != "bare pickle" else pickle.loads(path.read_bytes())
    assert target.exists()
    target.unlink()


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "bare pickle"])
def test_bin_holding_code(standard, tmp_path, form):
    folder, target = copy_small(standard, tmp_path / "checkpoint"), tmp_path / "written"
    write_code(folder / "pytorch_model.bin", target, form)
    message = refused(folder, r"pytorch_model\.bin is refused: expected tensors and nothing else")
    assert "weights_only" not in message, "advice to load it unsafely"
    with pytest.raises(CheckpointError, match="refused"):
        MiniGeminiProcessor.from_pretrained(folder)
    assert not target.exists()


def test_shard_holding_code(standard, tmp_path):
    folder, target = (
        write_bin(copy_small(standard, tmp_path / "checkpoint"), tensors_of(standard), 3),
        tmp_path / "written",
    )
    write_code(folder / "pytorch_model-00003-of-00003.bin", target, "zip")
    refused(folder, "pytorch_model-00003-of-00003.bin is refused: .* it calls for io.open")
    assert not target.exists()


def test_adapter_holding_code(standard, tmp_path):
    adapter, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    target = tmp_path / "written"
    write_code(adapter / "mm_projector.bin", target, "zip")
    refused(adapter, r"mm_projector\.bin is refused", base_model=base)
    with pytest.raises(CheckpointError, match="refused"):
        MiniGeminiProcessor.from_pretrained(adapter, base_model=base)
    assert not target.exists()


@pytest.mark.parametrize("file", ["clip/pytorch_model.bin", "convnext/open_clip_pytorch_model.bin"])
def test_tower_holding_code(standard, tmp_path, file):
    folder = without_towers(standard, tmp_path / "checkpoint", mm_vision_tower="clip", mm_vision_tower_aux="convnext")
    towers_of(tensors_of(standard), folder / "clip", folder / "convnext")
    (folder / "convnext" / "open_clip_model.safetensors").unlink()
    write_code(folder / file, tmp_path / "written", "zip")
    refused(folder, f"{file} is refused" if "clip/" in file else "is refused|not found")
    assert not (tmp_path / "written").exists()


# --- Tensors that do not fit the configuration


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.mm_projector.2.bias",
        "model.vlm_uni_query_projector.0.weight",
        CLIP + "encoder.layers.2.mlp.fc1.bias",
        CLIP + "post_layernorm.weight",
        CONVNEXT + "vision_stages.2.blocks.1.gamma",
    ],
)
def test_missing_and_misshaped_tensors(standard, tmp_path, name):
    tensors = tensors_of(standard)
    tensor = tensors.pop(name)
    refused(
        remake(standard, tmp_path / "missing", tensors=tensors),
        rf"config\.json calls for\. 1 missing: {re.escape(name)}$",
    )
    longer = torch.cat([tensor, tensor[:1]])
    message = refused(remake(standard, tmp_path / "longer", tensors={**tensors, name: longer}), "1 mis-shaped")
    assert message.endswith(f"1 mis-shaped: {name} {list(longer.shape)}, expected {list(tensor.shape)}")


def test_misshaped_position_embedding(standard, tmp_path):
    """A wrong position embedding, from which the geometry is read, is refused: 30 positions do not form a square."""
    name = CLIP + "embeddings.position_embedding.weight"
    folder = remake(standard, tmp_path, tensors={**tensors_of(standard), name: torch.zeros(30, 64)})
    refused(folder, rf"mis-shaped: {re.escape(name)} \[30, 64\], expected \[26, 64\]")


def test_unexpected_tensors(standard, tmp_path):
    more = {"model.layers.2.mlp.up_proj.weight": torch.ones(1), "model.vlm_uni_extra.weight": torch.ones(1)}
    folder = remake(standard, tmp_path, tensors={**tensors_of(standard), **more})
    refused(folder, r"2 unexpected: model\.layers\.2\.mlp\.up_proj\.weight, model\.vlm_uni_extra\.weight$")


def test_long_lists_are_cut(standard, tmp_path):
    tensors = {name: tensor for name, tensor in tensors_of(standard).items() if "model.layers.1." not in name}
    tensors["x"] = torch.ones(1)
    message = refused(remake(standard, tmp_path, tensors=tensors), "and [0-9]+ more; 1 unexpected: x$")
    assert len(message) < 1000


def test_another_familys_tensors(built, tmp_path):
    mixtral = json.loads((built["mixtral"] / "config.json").read_text())
    message = refused(
        remake(built["llama"], tmp_path / "a", **mixtral),
        r"missing: model\.layers\.0\.block_sparse_moe\.experts\.0\.w1\.weight",
    )
    assert "unexpected: model.layers.0.mlp.down_proj.weight" in message
    gemma = json.loads((built["gemma"] / "config.json").read_text())
    refused(
        remake(built["mixtral"], tmp_path / "b", **gemma),
        r"missing: model\.layers\.0\.mlp.*unexpected: .*block_sparse_moe",
    )
    # Gemma's tensors have Llama's names, except for the head.
    refused(
        remake(built["gemma"], tmp_path / "c", model_type="mgm", tie_word_embeddings=False),
        r"1 missing: lm_head\.weight$",
    )


def test_vocabulary_of_another_size(standard, tmp_path):
    message = refused(remake(standard, tmp_path, vocab_size=32000), "2 mis-shaped")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert f"{name} [400, 64], expected [32000, 64]" in message


@pytest.mark.parametrize("name", [CLIP + "encoder.layers.2.", CONVNEXT + "vision_stages.2.blocks.1."])
def test_the_last_layers_of_a_tower_are_missed(standard, tmp_path, name):
    """A tower is as deep as its index, its folder or its published size says, not as deep as its tensors suggest."""
    kept = {key: tensor for key, tensor in tensors_of(standard).items() if not key.startswith(name)}
    folder = copy_small(standard, tmp_path / "sharded")
    write_safetensors(folder, kept, 3)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] |= {
        key: next(iter(document["weight_map"].values())) for key in tensors_of(standard) if key.startswith(name)
    }
    index.write_text(json.dumps(document))
    refused(folder, "tensors that no shard holds: " + re.escape(name))


def test_a_tower_folder_tells_how_deep_its_tower_is(golden, tmp_path):
    source = golden / "mgm-gemma"
    name = CLIP + "encoder.layers.2."
    folder = remake(
        source, tmp_path / "x", tensors={key: t for key, t in tensors_of(source).items() if not key.startswith(name)}
    )
    for tower in ("openai", "openclip-convnext-large-d-320-tiny"):
        shutil.copytree(source / tower, folder / tower, dirs_exist_ok=True)
    refused(folder, "16 missing: " + re.escape(name))


def test_published_widths_tell_the_depth():
    from mg_fast.models.mini_gemini.geometry import complete_config
    from mg_fast.models.tensor_files import TensorInfo

    config = random_checkpoint.make_config("7b")
    config.towers_given = False
    shapes = {
        key: s
        for key, s in MiniGeminiForConditionalGeneration.published_shapes(config).items()
        if "layers.23." not in key
    }
    shapes = {key: s for key, s in shapes.items() if "vision_stages.2.blocks.26." not in key}
    complete_config(
        config, {key: TensorInfo(None, key, shape) for key, shape in shapes.items()}, random_checkpoint.Path("nowhere")
    )
    assert config.vision_config.num_hidden_layers == 24 and config.vision_config_aux["depths"] == [3, 3, 27, 3]


def test_subfolders_are_refused(standard):
    refused(standard, "subfolder='x' is not supported", subfolder="x")
    with pytest.raises(TypeError, match="subfolder"):
        MiniGeminiProcessor.from_pretrained(standard, subfolder="x")
