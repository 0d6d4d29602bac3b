"""The files in which a checkpoint's tensors may lie, and saving, which loses nothing."""

import json
import logging
import re
import shutil
import zipfile

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoTokenizer, TorchAoConfig

import mg_fast
from mg_fast import CheckpointError, MiniGeminiProcessor, PromptError
from mg_fast.models.mini_gemini.checkpoint import load_tokenizer, read_config
from mg_fast.testing.tolerances import relative_error
from tests.checkpoints import (
    CLIP,
    CONVNEXT,
    answers,
    copy_small,
    hub_cache,
    load,
    make_adapter,
    probe,
    refused,
    remake,
    same_answers,
    tensors_of,
    towers_of,
    without_towers,
    write_bin,
    write_safetensors,
)

GOLDEN = ["mgm-gemma", "mgm-llama", "mgm-llama-hd", "mgm-llama3", "mgm-mixtral", "mgm-yi-hd"]
# --- The same weights in other files


FILES = {
    "sharded safetensors": lambda folder, tensors: write_safetensors(folder, tensors, 5),
    "one .bin": write_bin,
    "sharded .bin": lambda folder, tensors: write_bin(folder, tensors, 3),
    "one .bin from before torch 1.6": lambda folder, tensors: write_bin(folder, tensors, legacy=True),
    "sharded .bin from before torch 1.6": lambda folder, tensors: write_bin(folder, tensors, 2, legacy=True),
}


@pytest.mark.parametrize("files", FILES)
def test_same_weights_in_every_kind_of_file(standard, tmp_path, files):
    folder = FILES[files](copy_small(standard, tmp_path), tensors_of(standard))
    assert not (folder / "model.safetensors").exists()
    old = [path for path in folder.glob("*.bin") if not zipfile.is_zipfile(path)]
    assert bool(old) == ("1.6" in files)
    assert same_answers(load(folder), standard)
    assert MiniGeminiProcessor.from_pretrained(folder).image_processor.lr_size == 70


def test_mixtral_and_gemma_as_bin(built, tmp_path):
    """Mixtral's experts are fused while loading; Gemma's .bin may hold the tied head in the embedding's storage."""
    for kind in ("mixtral", "gemma"):
        tensors = tensors_of(built[kind])
        if kind == "gemma":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        folder = write_bin(copy_small(built[kind], tmp_path / kind), tensors)
        assert same_answers(load(folder), built[kind])


def test_safetensors_come_before_bin(standard, tmp_path):
    folder = remake(standard, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert same_answers(load(folder), standard)


def test_leftovers_of_older_files_are_passed_over(standard, tmp_path):
    old = {CLIP + "embeddings.position_ids": torch.arange(26)[None]}
    old.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(2)})
    assert same_answers(load(remake(standard, tmp_path, tensors={**tensors_of(standard), **old})), standard)


def test_tied_head_stored_a_second_time(built, tmp_path):
    tensors = tensors_of(built["gemma"])
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone()
    model = load(remake(built["gemma"], tmp_path / "same", tensors={**tensors, "lm_head.weight": head}))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert same_answers(model, built["gemma"])
    other = {**tensors, "lm_head.weight": torch.zeros_like(head)}
    model = load(remake(built["gemma"], tmp_path / "other", tensors=other))
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.weight.any()
    cut = remake(built["gemma"], tmp_path / "cut", tensors={**tensors, "lm_head.weight": head[:-1].clone()})
    refused(cut, r"lm_head\.weight")


# --- By hub id, without a network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Fills the default cache of huggingface_hub, which is a new folder in these tests."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return lambda repositories: hub_cache(cache, repositories)


def test_by_hub_id(standard, photo, tmp_path):
    cache = hub_cache(tmp_path, {"YanweiLi/MGM-tiny": standard})
    where = dict(cache_dir=cache, local_files_only=True)
    loaded = load("YanweiLi/MGM-tiny", **where)
    assert same_answers(loaded, standard)
    assert loaded.config.name_or_path == "YanweiLi/MGM-tiny"
    processor = MiniGeminiProcessor.from_pretrained("YanweiLi/MGM-tiny", **where)
    assert (processor.image_processor.lr_size, processor.image_processor.hr_size) == (70, 160)
    inputs = processor(text="<image>\nWhat?", images=[photo], return_tensors="pt")
    expected = MiniGeminiProcessor.from_pretrained(standard)(text="<image>\nWhat?", images=[photo], return_tensors="pt")
    assert inputs.keys() == expected.keys() and all(torch.equal(inputs[key], expected[key]) for key in inputs)


@pytest.mark.parametrize("files", ["sharded safetensors", "one .bin", "sharded .bin"])
def test_other_files_by_hub_id(standard, tmp_path, hub, files):
    folder = FILES[files](copy_small(standard, tmp_path / "source"), tensors_of(standard))
    hub({"somebody/mgm": folder})
    assert same_answers(load("somebody/mgm"), standard)


def test_load_by_hub_id(standard, photo, hub):
    hub({"somebody/mgm": standard})
    expected = mg_fast.load(standard).chat("What?", [photo], max_new_tokens=4)
    assert mg_fast.load("somebody/mgm").chat("What?", [photo], max_new_tokens=4).token_ids == expected.token_ids


def test_revision(standard, hd, hub):
    hub({"somebody/mgm": standard, "somebody/mgm@hd": hd})
    assert load("somebody/mgm").config.image_grid == 1
    assert load("somebody/mgm", revision="hd").config.image_grid == 2
    assert MiniGeminiProcessor.from_pretrained("somebody/mgm", revision="hd").image_processor.grid == 2


def test_id_that_is_not_in_the_cache(standard, hub):
    hub({"somebody/mgm": standard})
    for call in (load, MiniGeminiProcessor.from_pretrained, mg_fast.load):
        with pytest.raises(
            CheckpointError, match="^somebody/else is neither a folder nor a hub id that can be loaded: "
        ) as caught:
            call("somebody/else")
        assert "\n" not in str(caught.value)


def test_hub_repository_without_weights(standard, tmp_path, hub):
    hub({"somebody/mgm": copy_small(standard, tmp_path / "source")})
    refused("somebody/mgm", "neither a folder nor a hub id that can be loaded: .*cannot find the requested files")


def test_shard_that_is_not_in_the_cache(standard, tmp_path, hub):
    folder = write_safetensors(copy_small(standard, tmp_path / "source"), tensors_of(standard), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    hub({"somebody/mgm": folder})
    refused("somebody/mgm", "^somebody/mgm is neither a folder nor a hub id that can be loaded")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c", "~/nowhere-at-all"])
def test_folder_that_is_not_there(name):
    refused(name, f"^{re.escape(name)} is not a folder: expected a checkpoint folder or a hub id")


def test_a_file_is_no_folder(standard):
    refused(standard / "model.safetensors", "is not a folder")


# --- Towers that the checkpoint lacks


def test_towers_from_the_shared_folders(golden, tmp_path):
    source = golden / "mgm-llama"
    folder = without_towers(source, tmp_path / "checkpoint")
    for tower in ("openai", "openclip-convnext-large-d-320-tiny"):
        shutil.copytree(source / tower, folder / tower)
    model, full = load(folder), load(source)
    for name, parameter in full.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert same_answers(model, full)
    assert MiniGeminiProcessor.from_pretrained(folder).image_processor.lr_size == 84


@pytest.mark.parametrize("lacking", [(CLIP,), (CONVNEXT,), (CLIP, CONVNEXT)], ids=["CLIP", "ConvNeXt", "both"])
def test_towers_from_folders(standard, tmp_path, lacking, caplog):
    paths = dict(mm_vision_tower="zoo/clip", mm_vision_tower_aux="zoo/convnext")
    folder = without_towers(standard, tmp_path / "checkpoint", prefixes=lacking, **paths)
    towers_of(tensors_of(standard), folder / "zoo" / "clip", tmp_path / "convnext")
    with caplog.at_level(logging.WARNING):
        loaded = load(folder, device_map="cpu")
    assert same_answers(loaded, standard)
    for prefix in (CLIP, CONVNEXT):
        assert (f"{prefix}* is not in the checkpoint" in caplog.text) == (prefix in lacking)
    assert {p.dtype for p in load(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert MiniGeminiProcessor.from_pretrained(folder).image_processor.lr_size == 70
    # The saved checkpoint includes the towers.
    loaded.save_pretrained(tmp_path / "saved")
    assert tensors_of(tmp_path / "saved").keys() == tensors_of(standard).keys()


def test_towers_of_a_checkpoint_that_has_them_are_not_opened(standard, tmp_path):
    folder = remake(standard, tmp_path, mm_vision_tower="clip", mm_vision_tower_aux="convnext")
    for file in ("clip/pytorch_model.bin", "convnext/open_clip_pytorch_model.bin"):
        (folder / file).parent.mkdir()
        (folder / file).write_bytes(b"never opened")
    assert same_answers(load(folder), standard)


def test_towers_from_the_hub(standard, tmp_path, hub):
    """Towers come from the hub ids of the published towers, whatever revision of the checkpoint was asked for."""
    folder = without_towers(standard, tmp_path / "checkpoint")
    towers_of(tensors_of(standard), tmp_path / "clip", tmp_path / "convnext")
    clip, convnext = "openai/clip-vit-large-patch14-336", "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
    hub({clip: tmp_path / "clip", convnext: tmp_path / "convnext", "somebody/mgm@old": folder})
    assert same_answers(load(folder), standard)
    assert same_answers(load("somebody/mgm", revision="old"), standard)


def test_towers_that_are_nowhere(standard, tmp_path, hub):
    folder = without_towers(
        standard, tmp_path / "checkpoint", mm_vision_tower="zoo/clip", mm_vision_tower_aux="zoo/convnext"
    )
    message = refused(folder, re.escape(CLIP))
    for part in (
        "model.safetensors or pytorch_model.bin",
        "'zoo/clip'",
        str(folder),
        "openai/clip-vit-large-patch14-336",
    ):
        assert part in message
    towers_of(tensors_of(standard), folder / "zoo" / "clip", tmp_path / "elsewhere")
    message = refused(folder, re.escape(CONVNEXT))
    for part in (
        "open_clip_model.safetensors or open_clip_pytorch_model.bin",
        "'zoo/convnext'",
        "laion/CLIP-convnext_large_d_320",
    ):
        assert part in message


def test_tower_of_another_size(standard, tmp_path):
    """Where a folder holds half a tower, the missing tensors are named and not left as they were initialised."""
    folder = without_towers(standard, tmp_path / "checkpoint", mm_vision_tower="clip", mm_vision_tower_aux="convnext")
    tensors = tensors_of(standard)
    del tensors[CLIP + "encoder.layers.1.mlp.fc2.bias"]
    towers_of(tensors, folder / "clip", folder / "convnext")
    refused(folder, re.escape("1 missing: " + CLIP + "encoder.layers.1.mlp.fc2.bias"))


# --- Stage-1 adapters


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma", "mixtral", "hd"])
def test_adapter_over_its_base(built, tmp_path, kind):
    source = built[kind]
    adapter, base = make_adapter(source, tmp_path / "adapter", tmp_path / "base")
    model, whole = load(adapter, base_model=base), load(source)
    assert same_answers(model, source)
    assert model.generation_config.eos_token_id == whole.generation_config.eos_token_id
    processor, expected = (
        MiniGeminiProcessor.from_pretrained(adapter, base_model=base),
        MiniGeminiProcessor.from_pretrained(source),
    )
    assert processor.template == expected.template
    assert processor.image_processor.to_dict() == expected.image_processor.to_dict()
    # A saved model with an adapter is a checkpoint like any other.
    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(tensors_of(tmp_path / "saved"), tensors_of(source))


def test_adapter_through_load(standard, photo, tmp_path):
    adapter, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    answer = mg_fast.load(adapter, base_model=base).chat("What?", [photo], max_new_tokens=6)
    assert answer.token_ids == mg_fast.load(standard).chat("What?", [photo], max_new_tokens=6).token_ids


def test_adapter_and_base_by_hub_id(standard, tmp_path, hub):
    adapter, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    hub({"YanweiLi/MGM-Pretrain": adapter, "lmsys/vicuna": base})
    assert same_answers(load("YanweiLi/MGM-Pretrain", base_model="lmsys/vicuna"), standard)
    assert (
        MiniGeminiProcessor.from_pretrained("YanweiLi/MGM-Pretrain", base_model="lmsys/vicuna").image_processor.lr_size
        == 70
    )


def test_adapter_in_another_dtype(standard, tmp_path):
    adapter, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    model = load(adapter, base_model=base, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weight = tensors_of(standard)["model.mm_projector.0.weight"]
    assert torch.equal(model.model.mm_projector[0].weight, weight.bfloat16())


def test_adapter_that_is_one_file(standard, tmp_path):
    """mm_projector.bin alone, as in the published stage-1 repositories, is loaded as a standard model of its shapes."""
    adapter, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    for file in adapter.iterdir():
        if file.name != "mm_projector.bin":
            file.unlink()
    loaded = load(adapter, base_model=base)
    assert same_answers(loaded, standard)
    assert (loaded.config.image_size_aux, loaded.config.mm_hidden_size, loaded.config.mm_hidden_size_aux) == (
        160,
        64,
        80,
    )
    processor = MiniGeminiProcessor.from_pretrained(adapter, base_model=base)
    assert (
        processor.image_processor.to_dict() == MiniGeminiProcessor.from_pretrained(standard).image_processor.to_dict()
    )


def test_a_config_given_for_an_adapter_is_kept(standard, tmp_path):
    adapter, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    given = read_config(standard)
    given.image_size_aux, given.image_grid, given.image_global = 320, 2, True
    (adapter / "config.json").unlink()
    config = load(adapter, base_model=base, config=given).config
    assert (config.image_size_aux, config.image_grid, config.tokens_per_picture) == (320, 2, 125)


def test_adapter_without_its_base(standard, tmp_path):
    adapter, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    refused(adapter, r"stage-1 adapter \(mm_projector\.bin\): name its base language model with base_model=")
    refused(adapter, "not a folder", base_model=tmp_path / "nowhere")
    refused(adapter, "holds no weights", base_model=copy_small(base, tmp_path / "empty"))


def test_base_for_a_whole_checkpoint(standard, tmp_path):
    _, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    refused(standard, "base_model= is for stage-1 adapters", base_model=base)


def test_adapter_over_the_wrong_base(built, tmp_path):
    adapter, _ = make_adapter(built["llama"], tmp_path / "adapter", tmp_path / "base")
    _, base = make_adapter(built["mixtral"], tmp_path / "other", tmp_path / "wrong")
    refused(adapter, r"missing: model\.layers\.0\.mlp\.down_proj\.weight", base_model=base)


def test_adapter_that_lacks_a_tensor(standard, tmp_path):
    adapter, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    tensors = torch.load(adapter / "mm_projector.bin")
    del tensors["model.vlm_uni_val_projector.1.bias"]
    torch.save(tensors, adapter / "mm_projector.bin")
    refused(adapter, r"1 missing: model\.vlm_uni_val_projector\.1\.bias", base_model=base)


# --- Round trips


def same_tensors(one, other):
    differing = [name for name in one.keys() | other.keys() if not same_tensor(one.get(name), other.get(name))]
    assert differing == []
    return True


def same_tensor(a, b):
    return a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def check_round_trip(source, target):
    model = load(source)
    model.save_pretrained(target)
    assert same_tensors(tensors_of(target), tensors_of(source))
    published = json.loads((source / "config.json").read_text())
    written = json.loads((target / "config.json").read_text())
    published.pop("transformers_version", None)
    assert {key: written.get(key, "missing") for key in published} == published
    assert {"rope_theta", "torch_dtype"} <= written.keys()
    assert "dtype" not in written and "rope_parameters" not in written and "text_config" not in written
    assert same_answers(load(target), source)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma", "mixtral", "hd", "bfloat16"])
def test_round_trip(built, tmp_path, kind):
    check_round_trip(built[kind], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_round_trip_of_the_original_layout(golden, tmp_path, name):
    check_round_trip(golden / name, tmp_path)


# The names that section 5.1 of the specification allows in a published file.
PUBLISHED = re.compile(
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|input_layernorm|post_attention_layernorm)\.weight"
    r"|model\.layers\.\d+\.block_sparse_moe\.(gate|experts\.\d+\.w[123])\.weight"
    r"|model\.mm_projector\.[02]\.(weight|bias)|model\.vlm_uni_(query|aux|val)_projector\.[01]\.(weight|bias)"
    r"|model\.vision_tower\.vision_tower\.vision_model\.(embeddings\.(class_embedding|(patch|position)_embedding\.weight)"
    r"|(pre_layrnorm|post_layernorm)\.(weight|bias)"
    r"|encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.(weight|bias))"
    r"|model\.vision_tower_aux\.(vision_stem\.[01]\.(weight|bias)|vision_stages\.[1-3]\.downsample\.[01]\.(weight|bias)"
    r"|vision_stages\.[0-3]\.blocks\.\d+\.(gamma|(conv_dw|norm|mlp\.fc[12])\.(weight|bias)))"
)


@pytest.mark.parametrize("kind", ["llama", "gemma", "mixtral"])
def test_saved_names_are_the_published_ones(built, kind):
    names = tensors_of(built[kind])
    assert [name for name in names if not PUBLISHED.fullmatch(name)] == []
    assert any("block_sparse_moe.experts.3.w2" in name for name in names) == (kind == "mixtral")
    assert ("lm_head.weight" in names) == (kind != "gemma")


def test_sharded_save(built, tmp_path):
    for kind in ("llama", "mixtral"):
        model, folder = load(built[kind]), tmp_path / kind
        model.save_pretrained(folder, max_shard_size="200KB")
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(index.values())) == len(list(folder.glob("*.safetensors"))) > 3
        assert index.keys() == tensors_of(built[kind]).keys()
        assert same_tensors(tensors_of(folder), tensors_of(built[kind]))
        assert same_answers(load(folder), built[kind])


def test_template_is_saved(standard, tmp_path):
    load(standard, template="llama_3").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["conversation_template"] == "llama_3"
    assert load(tmp_path).config.conversation_template == "llama_3"
    MiniGeminiProcessor.from_pretrained(standard).tokenizer.save_pretrained(tmp_path)
    assert MiniGeminiProcessor.from_pretrained(tmp_path).template == "llama_3"
    assert mg_fast.load(tmp_path).template == "llama_3"
    # Another override takes precedence over the saved template.
    assert mg_fast.load(tmp_path, template="gemma").template == "gemma"
    load(standard).save_pretrained(tmp_path / "without")
    assert "conversation_template" not in json.loads((tmp_path / "without" / "config.json").read_text())


def test_unknown_template_is_refused_before_loading(standard, monkeypatch):
    monkeypatch.setattr("mg_fast.models.mini_gemini.loading.open_checkpoint", None)
    with pytest.raises(PromptError, match="unknown template 'nope': expected one of vicuna_v1"):
        load(standard, template="nope")


# --- dtype, device_map, quantization


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
def test_dtype(standard, dtype):
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    model = load(standard, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert model.config.dtype == wanted
    assert torch.equal(model.lm_head.weight, tensors_of(standard)["lm_head.weight"].to(wanted))


def test_stored_dtype_is_kept(built, standard):
    assert {p.dtype for p in load(built["bfloat16"]).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(built["bfloat16"], dtype="auto").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(standard, dtype="auto").parameters()} == {torch.float32}


def test_device_map(standard):
    assert same_answers(load(standard, device_map="cpu"), standard)
    spread = load(standard, device_map="auto")
    tolerance = 0 if spread.device.type == "cpu" else 5e-3
    assert all(relative_error(a, b) <= tolerance for a, b in zip(probe(spread), answers(standard)))


def int8():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    try:
        layer = torch.nn.Sequential(torch.nn.Linear(64, 64))
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        layer(torch.ones(1, 64))
    except Exception as error:
        pytest.skip(f"torchao cannot run here: {error}")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("kind", ["llama", "gemma", "hd"])
def test_quantized_language_model(built, photo, kind):
    model, plain = load(built[kind], quantization_config=int8()), load(built[kind])
    for name, parameter in model.named_parameters():
        linear = name.startswith("model.language_model.layers.") and parameter.dim() == 2
        if linear:
            assert type(parameter.data) is not torch.Tensor, f"{name} was not quantized"
        else:
            assert type(parameter.data) is torch.Tensor and torch.equal(parameter, plain.get_parameter(name)), (
                f"{name} was touched"
            )
    (tokens, logits), (plain_tokens, plain_logits) = probe(model), probe(plain)
    assert torch.equal(tokens, plain_tokens)
    assert 0 < relative_error(logits, plain_logits) < 0.1
    inputs = MiniGeminiProcessor.from_pretrained(built[kind])(
        text="<image>\nWhat?", images=[photo], return_tensors="pt"
    )
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 4


def test_quantized_adapter_through_load(standard, photo, tmp_path):
    adapter, base = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    pipeline = mg_fast.load(adapter, base_model=base, quantize=int8(), device="cpu")
    assert type(pipeline.model.model.language_model.layers[0].mlp.up_proj.weight.data) is not torch.Tensor
    assert torch.equal(pipeline.model.model.mm_projector[0].weight, tensors_of(standard)["model.mm_projector.0.weight"])
    assert len(pipeline.chat("What?", [photo], max_new_tokens=3).token_ids) == 3


# --- Stop ids


STOPS = {
    "mgm-gemma": ["<eos>", "<end_of_turn>"],
    "mgm-llama": ["</s>"],
    "mgm-llama-hd": ["</s>"],
    "mgm-llama3": ["<|eot_id|>", "<|end_of_text|>"],
    "mgm-mixtral": ["</s>"],
    "mgm-yi-hd": ["</s>"],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_stop_ids_of_the_original_families(golden, name):
    ids = AutoTokenizer.from_pretrained(golden / name).convert_tokens_to_ids(STOPS[name])
    assert None not in ids and sorted(load(golden / name).generation_config.eos_token_id) == sorted(ids)


def test_template_decides_the_stop_ids(golden):
    tokenizer = load_tokenizer(golden / "mgm-gemma")
    assert load(golden / "mgm-gemma", template="vicuna_v1").generation_config.eos_token_id == [tokenizer.eos_token_id]
    tokenizer = load_tokenizer(golden / "mgm-llama3")
    assert load(golden / "mgm-llama3", template="vicuna_v1").generation_config.eos_token_id == [tokenizer.eos_token_id]
    # A template whose marks this tokenizer does not have adds nothing.
    assert load(golden / "mgm-llama", template="gemma").generation_config.eos_token_id == [2]


def test_override_where_the_tokenizer_knows_the_strings(standard, built, tmp_path):
    """A Llama with Gemma's tokenizer stops at <end_of_turn> only under Gemma's template."""
    folder = remake(standard, tmp_path)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(built["gemma"] / file, folder / file)
    tokenizer = load_tokenizer(folder)
    turn, eos = tokenizer.convert_tokens_to_ids("<end_of_turn>"), tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in (turn, eos)
    assert set(load(folder).generation_config.eos_token_id) == {2, eos}
    assert set(load(folder, template="gemma").generation_config.eos_token_id) == {2, eos, turn}


def test_stop_ids_beside_what_generation_config_says(standard, tmp_path):
    for i, (given, expected) in enumerate(
        [({"eos_token_id": [7, 2]}, [7, 2]), ({"eos_token_id": 7}, [7, 2]), ({}, [2])]
    ):
        folder = remake(standard, tmp_path / str(i))
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, **given}))
        assert load(folder).generation_config.eos_token_id == expected
    (folder / "generation_config.json").unlink()
    assert load(folder).generation_config.eos_token_id == [2]


def test_without_a_tokenizer_the_model_still_loads(standard, tmp_path, caplog):
    folder = remake(standard, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert same_answers(load(folder), standard)
    assert "no tokenizer in" in caplog.text and caplog.text.count(str(folder)) == 1
    with pytest.raises(CheckpointError, match="no tokenizer in .*: expected tokenizer.model or tokenizer.json"):
        MiniGeminiProcessor.from_pretrained(folder)


def test_config_by_path_and_overrides_that_do_not_fit(standard, model):
    assert same_answers(load(standard, config=str(standard)), model)
    assert load(standard, use_cache=False).config.text_config.use_cache is False
    refused(standard, "image_size_aux=110", image_size_aux=110)
    refused(standard, "whole window", image_grid=3)
