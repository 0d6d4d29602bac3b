"""Configurations are completed from headers alone, and checkpoints that no server can load are refused by name."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mg_fast import CheckpointError, MiniGeminiConfig, MiniGeminiForConditionalGeneration
from mg_fast.models.mini_gemini import headers
from mg_fast.models.mini_gemini.headers import complete_from_headers
from mg_fast.models.tensor_files import read_table
from tests.checkpoints import copy_small, is_adapters, make_adapter, remake, tensors_of, without_towers


def geometry(config: MiniGeminiConfig) -> tuple:
    return config.vision_config.hidden_size, config.vision_config.image_size, config.vision_config_aux["dims"]


def test_a_folder_tells_the_geometry(standard, model):
    config = MiniGeminiConfig.from_pretrained(standard)
    assert geometry(config) != geometry(model.config)
    assert complete_from_headers(config, standard) == standard
    assert geometry(config) == geometry(model.config)
    assert config.tokens_per_picture == model.config.tokens_per_picture


def test_a_hub_id_tells_it_by_headers(standard, model, tmp_path, monkeypatch):
    """Nothing but small files and headers is fetched for a hub id."""
    small = copy_small(standard, tmp_path / "small")
    fetched = {name: SimpleNamespace(shape=list(info.shape)) for name, info in read_table(standard).items()}
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=fetched)})
    asked = []

    def resolve(name, **options):
        assert options == {"weights": False, "revision": "v1"}
        return small

    monkeypatch.setattr(headers, "resolve_folder", resolve)
    monkeypatch.setattr(
        headers.huggingface_hub, "get_safetensors_metadata", lambda *a, **k: asked.append((a, k)) or metadata
    )
    config = MiniGeminiConfig.from_pretrained(small)
    complete_from_headers(config, "owner/name", revision="v1")
    assert geometry(config) == geometry(model.config) and asked == [(("owner/name",), {"revision": "v1"})]


def test_without_headers_the_towers_are_the_published_ones(standard, tmp_path, monkeypatch):
    wide = {"mm_hidden_size": 1024, "mm_hidden_size_aux": 2880, "image_size_aux": 768}
    small = copy_small(standard, tmp_path / "small", **wide)

    def offline(*arguments, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(headers, "resolve_folder", lambda name, **options: small)
    monkeypatch.setattr(headers.huggingface_hub, "get_safetensors_metadata", offline)
    config = MiniGeminiConfig.from_pretrained(small)
    complete_from_headers(config, "owner/name")
    assert geometry(config) == (1024, 336, [192, 384, 768, 1536])


def test_a_stage_1_adapter_is_refused(standard, tmp_path):
    adapter, _ = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    assert any(map(is_adapters, tensors_of(standard)))
    with pytest.raises(CheckpointError, match=r"stage-1 adapter \(mm_projector.bin\) without its language model"):
        complete_from_headers(MiniGeminiConfig.from_pretrained(adapter), adapter)


def test_quantized_weights_are_refused(standard, tmp_path):
    pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    folder = tmp_path / "int8"
    MiniGeminiForConditionalGeneration.from_pretrained(standard, quantization_config="int8").save_pretrained(folder)
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"is quantized \(torchao, by quantization_config"):
        complete_from_headers(MiniGeminiConfig.from_pretrained(folder), folder)


def test_other_tensors_than_the_configuration_calls_for_are_refused(standard, tmp_path):
    tensors = tensors_of(standard)
    del tensors["model.norm.weight"]
    folder = remake(standard, tmp_path / "partial", tensors=tensors)
    with pytest.raises(CheckpointError, match="1 missing: model.norm.weight"):
        complete_from_headers(MiniGeminiConfig.from_pretrained(folder), folder)


def test_towers_may_lie_in_their_own_folders(standard, tmp_path):
    bare = without_towers(standard, tmp_path / "bare", mm_vision_tower="clip", mm_vision_tower_aux="openclip-convnext")
    with pytest.raises(CheckpointError, match="the tower's own weights were not found"):
        complete_from_headers(MiniGeminiConfig.from_pretrained(bare), bare)
