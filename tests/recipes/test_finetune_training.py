"""Both stages, adapters and the cache of features on tiny checkpoints: what learns, what is written, what continues."""

import builtins
import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Trainer, TrainerCallback

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration
from mg_fast.errors import CheckpointError
from mg_fast.models.mini_gemini.naming import published_to_ours
from mg_fast.models.tensor_files import ADAPTER_FILE
from recipes.finetune.config import ConfigError
from recipes.finetune.features import feature_bytes
from recipes.finetune.prepare import check_samples, prepare, prepare_output
from recipes.finetune.run import fine_tune
from recipes.finetune.saving import load_picture_side
from recipes.finetune.trainer import FineTuneTrainer
from tests.checkpoints import is_adapters, make_adapter, remake, tensors_of, towers_of
from tests.families import family
from tests.recipes.finetuning import BATCH, CAPTIONS, PICTURES, SAMPLES, changed, losses, make_config, sample, skipped

OTHERS = ("hd", "mgm-gemma", "mgm-mixtral", "mgm-llama3", "mgm-yi-hd")
ONE = torch.ones(1)
LEARNS_FAST = {"learning_rate": 5e-3, "warmup": 0.0, "schedule": "constant", "max_steps": 4}


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread for every test, because all models here are tiny."""


def parts_of(name: str, folder: Path) -> tuple[Path, Path, Path, Path]:
    """A tiny checkpoint in parts: an adapter, a bare language model, and folders of both towers."""
    source = family(name).folder
    adapter, base = make_adapter(source, folder / "adapter", folder / "base")
    towers_of(tensors_of(source), folder / "openai-clip", folder / "openclip", extra=False)
    return adapter, base, folder / "openai-clip", folder / "openclip"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path, Path, Path]:
    """The tiny standard checkpoint in parts."""
    return parts_of("standard", tmp_path_factory.mktemp("parts"))


def in_picture_side(name: str) -> bool:
    return "mm_projector" in name or "vlm_uni" in name


def answer(pipeline: mg_fast.Pipeline) -> list[int]:
    return pipeline.chat("What is it?", [str(PICTURES[0])], max_new_tokens=4).token_ids


class Seen(TrainerCallback):
    """Keeps what Trainer gives to its callbacks when a training begins."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.args, self.model, self.optimizer = args, model, optimizer


# ---- stages


@pytest.mark.parametrize("name", ["standard", *OTHERS])
def test_stage_2(name, tmp_path):
    """The loss of one batch falls, everything but the towers learns, and the result loads and answers."""
    found = family(name)
    hd = found.processor.image_processor.global_view
    config = make_config(
        tmp_path, found.folder, BATCH, template=found.processor.template, hd=hd, max_length=2048, **LEARNS_FAST
    )
    out = fine_tune(config)
    first, *_, last = losses(config)
    assert len(losses(config)) == 4 and last < first and not skipped(config)
    before, after = tensors_of(found.folder), tensors_of(out)
    # A tied head is stored only once.
    before = {key: tensor for key, tensor in before.items() if key in after}
    learned = changed(before, after)
    towers = {key for key in before if "vision_tower" in key}
    assert not learned & towers
    # The biases of mining's keys have no influence, and no token may have gone to some expert: their gradient is zero.
    idle = {key for key in before.keys() - learned - towers if ".experts." not in key}
    assert all("vlm_uni_aux" in key and "bias" in key for key in idle)
    assert len(answer(mg_fast.load(out, template=found.processor.template))) > 0


@pytest.mark.parametrize("name, template", [("standard", "plain"), ("mgm-gemma", "gemma")])
def test_stage_1_from_a_bare_language_model(name, template, tmp_path):
    """Mining and projector learn from random weights; the adapter has the original's names and loads over its base."""
    published, base, clip, convnext = parts_of(name, tmp_path / "parts")
    towers = {"vision_tower": str(clip), "vision_tower_aux": str(convnext), "template": template}
    config = make_config(tmp_path, base, CAPTIONS[:2], 1, **LEARNS_FAST, **towers)
    out = fine_tune(config)
    assert losses(config)[-1] < losses(config)[0] and not skipped(config)
    before, after, original = (
        torch.load(folder / ADAPTER_FILE, weights_only=True) for folder in (tmp_path / "out/untrained", out, published)
    )
    learned = changed(before, after)
    assert learned and all(map(in_picture_side, learned))
    assert {key: tensor.shape for key, tensor in after.items()} == {key: t.shape for key, t in original.items()}
    assert all(torch.equal(after[key], original[key]) for key in original if "vision_tower" in key)
    written = json.loads((out / "config.json").read_text())
    assert written["image_aspect_ratio"] == "square" and written["model_type"].startswith("mgm")
    model = MiniGeminiForConditionalGeneration.from_pretrained(out, base_model=base)
    assert torch.equal(model.model.mm_projector[0].weight, after["model.mm_projector.0.weight"])
    state = model.state_dict()
    for key, tensor in tensors_of(family(name).folder).items():
        assert is_adapters(key) or torch.equal(state[published_to_ours(key)], tensor), key


def test_stage_2_from_the_adapter_of_stage_1(parts, tmp_path):
    adapter, base, *_ = parts
    config = make_config(tmp_path, base, BATCH, adapter=str(adapter), max_steps=1, warmup=0.0)
    out = fine_tune(config)
    before, after = tensors_of(family("standard").folder), tensors_of(out)
    assert {"model.mm_projector.0.weight", "lm_head.weight"} <= changed(before, after)
    assert len(answer(mg_fast.load(out))) > 0


def test_a_bare_language_model_needs_an_adapter(parts, tmp_path):
    with pytest.raises(ConfigError, match="is a bare language model; stage 2 needs its stage-1 adapter"):
        fine_tune(make_config(tmp_path, parts[1], BATCH))


def test_hd_starts_from_the_adapter_of_the_standard_model(parts, tmp_path):
    adapter, base, *_ = parts
    one = {"max_steps": 1, "global_batch": 1, "per_device_batch": 1}
    config = make_config(tmp_path, base, BATCH[:1], adapter=str(adapter), hd=True, **one)
    out = fine_tune(config)
    written = json.loads((out / "config.json").read_text())
    standard = json.loads((adapter / "config.json").read_text())
    assert written["image_size_aux"] == 2 * standard["image_size_aux"]
    assert (written["image_grid"], written["image_global"], written["tokenizer_model_max_length"]) == (2, True, 4096)
    assert mg_fast.load(out).see(str(PICTURES[0])).shape[0] == 5 * 25


def test_in_bfloat16(tmp_path):
    """Products are rounded, and what is written; weights learn in float32. Losses are those of float32, rounded."""
    folder, seen = family("standard").folder, Seen()
    whole, rounded = (
        make_config(tmp_path / dtype, folder, SAMPLES, dtype=dtype, **LEARNS_FAST | {"max_steps": 6})
        for dtype in ("float32", "bfloat16")
    )
    fine_tune(whole)
    written = tensors_of(fine_tune(rounded, [seen]))
    assert losses(rounded) != losses(whole) and losses(rounded) == pytest.approx(losses(whole), rel=5e-3)
    assert {p.dtype for p in seen.model.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


# ---- rates, checkpoints, the cache


def test_rates_of_parts(tmp_path):
    """As for the largest models of the original, mining and projector learn at twice the rate."""
    seen = Seen()
    rates = {"learning_rate": 1e-5, "learning_rate_times": {"mm_projector": 2, "vlm_uni": 2}, "weight_decay": 0.1}
    fine_tune(make_config(tmp_path, family("standard").folder, BATCH, max_steps=1, **rates), [seen])
    names = {id(p): name for name, p in seen.model.named_parameters()}
    rates = {names[id(p)]: group["initial_lr"] for group in seen.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name, p in seen.model.named_parameters() if p.requires_grad}
    assert all(rate == (2e-5 if in_picture_side(name) else 1e-5) for name, rate in rates.items())
    decayed = {names[id(p)] for g in seen.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert "lm_head.weight" in decayed and not any("norm" in name or "bias" in name for name in decayed)
    assert (seen.args.lr_scheduler_type, seen.args.warmup_steps) == ("cosine", 0.03)


def test_a_part_that_does_not_exist(tmp_path):
    config = make_config(tmp_path, family("standard").folder, BATCH, learning_rate_times={"mm_projecter": 2})
    with pytest.raises(ConfigError, match="no weight that learns has 'mm_projecter' in its name"):
        fine_tune(config)


def test_features_are_kept_between_epochs(tmp_path):
    """The second epoch reads them; losses do not change by a bit. Other weights of a tower have other features."""
    cache = tmp_path / "features"
    folder = family("standard").folder
    plain, cached = (
        make_config(tmp_path / name, folder, SAMPLES, max_steps=6, **more)
        for name, more in (("plain", {}), ("cached", {"feature_cache": str(cache)}))
    )
    for config in (plain, cached):
        fine_tune(config)
    assert losses(cached) == losses(plain)
    files = sorted(cache.glob("*/*/*.safetensors"))
    assert len(files) == len(PICTURES)
    size = feature_bytes(family("standard").model.config, torch.float32)
    assert all(0 <= file.stat().st_size - size < 1024 for file in files)
    written = [file.stat().st_mtime_ns for file in files]
    # Half a file is made anew, and so is one with other names; nothing else.
    for damaged in (lambda file: file.write_bytes(file.read_bytes()[:100]), lambda file: save_file({"a": ONE}, file)):
        damaged(files[0])
        fine_tune(make_config(tmp_path / "again", folder, SAMPLES, max_steps=3, feature_cache=str(cache)))
        assert losses(make_config(tmp_path / "again", folder, SAMPLES)) == losses(plain)[:3]
        assert load_file(files[0]).keys() > {"queries", "map3"}
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, written)] == [False, True]
    tensors = tensors_of(folder)
    tensors["model.vision_tower_aux.vision_stem.1.bias"] += 1.0
    other = remake(folder, tmp_path / "other", tensors=tensors)
    fine_tune(make_config(tmp_path / "third", other, SAMPLES[:1] * 2, max_steps=1, feature_cache=str(cache)))
    assert len(list(cache.glob("*/*/*.safetensors"))) == len(PICTURES) + 1 and len(list(cache.iterdir())) == 2


def test_the_room_for_features_is_that_of_different_pictures(tmp_path, monkeypatch, caplog):
    """Five samples show two pictures. Files of other towers are no room for them."""
    usage = namedtuple("usage", "total used free")
    config = make_config(
        tmp_path, family("standard").folder, SAMPLES, max_steps=1, feature_cache=str(tmp_path / "features")
    )
    size = feature_bytes(family("standard").model.config, torch.float32)
    (tmp_path / "features" / "ab" / "cd").mkdir(parents=True)
    (tmp_path / "features" / "ab" / "cd" / "e.safetensors").write_bytes(bytes(10 * size))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(0, 0, 2 * size - 1))
    with pytest.raises(ConfigError, match="feature_cache: 2 pictures of "):
        fine_tune(config)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(0, 0, 2 * size))
    fine_tune(config)


def test_broken_samples_end_nothing(tmp_path):
    """A sample that is broken by its form, one whose picture is, and a whole batch of the latter."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    bad = sample("<image>\nWhat?", "It.", image=str(broken))
    config = make_config(
        tmp_path, family("standard").folder, [*BATCH, bad, bad, sample("a", "")], max_steps=4, group_by_length=False
    )
    fine_tune(config)
    assert all(loss == loss for loss in losses(config))
    found = skipped(config)
    assert found[4] == "turn 2 is an empty answer" and found.keys() == {2, 3, 4}
    assert all(found[i].startswith(f"picture: {broken}: ") for i in (2, 3))


def test_samples_are_checked_without_a_training(tmp_path):
    config = make_config(tmp_path, family("standard").folder, [*BATCH, sample("a", "long " * 3000), 3])
    assert check_samples(config) == (2, 4)
    assert set(skipped(config, "checked.jsonl")) == {2, 3}
    assert [path.name for path in config.output.iterdir()] == ["checked.jsonl"]


def test_trainer_calls_what_is_replaced():
    """Five methods of Trainer are private. If transformers renamed one, ours would be passed over without an error."""
    replaced = {"_get_train_sampler", "_run_epoch", "_save", "_save_checkpoint", "_load_from_checkpoint"}
    own = {name for name in vars(FineTuneTrainer) if name.startswith("_") and not name.startswith("__")}
    assert own - {"_features"} == replaced and all(hasattr(Trainer, name) for name in replaced)


# ---- adapters


def test_low_rank_adapters(tmp_path):
    """Adapters, mining and projector learn; the merged model answers as the model with its adapters."""
    from peft import PeftModel

    folder = family("standard").folder
    config = make_config(
        tmp_path, folder, BATCH, method="lora", lora={"rank": 4}, gradient_checkpointing=True, **LEARNS_FAST
    )
    out = fine_tune(config)
    assert losses(config)[-1] < losses(config)[0]
    before, after = tensors_of(folder), tensors_of(out)
    learned = changed(before, after)
    assert all(in_picture_side(name) or "_proj.weight" in name and ".layers." in name for name in learned)
    assert any("self_attn.q_proj" in name for name in learned) and any("mlp.down_proj" in name for name in learned)
    assert any("vlm_uni_val" in name for name in learned)
    base = MiniGeminiForConditionalGeneration.from_pretrained(folder)
    published = torch.load(tmp_path / "out/adapters" / ADAPTER_FILE, weights_only=True)
    assert all(map(in_picture_side, published))
    load_picture_side(base, tmp_path / "out/adapters")
    tuned = PeftModel.from_pretrained(base, tmp_path / "out/adapters").eval()
    merged = MiniGeminiForConditionalGeneration.from_pretrained(out).eval()
    ids = torch.tensor([[1, 17, 42, 99, 7]])
    with torch.no_grad():
        torch.testing.assert_close(tuned(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_adapters_and_what_learned_beside_them_load_as_documented(tmp_path):
    folder = family("standard").folder
    config = make_config(tmp_path, folder, BATCH, method="lora", lora={"rank": 4}, **LEARNS_FAST)
    merged, adapters = mg_fast.load(fine_tune(config)), tmp_path / "out" / "adapters"
    with pytest.raises(CheckpointError, match=r"load_adapter\(folder\); mm_projector.bin holds mining and projector"):
        mg_fast.load(adapters, base_model=folder)
    pipeline = mg_fast.load(folder)
    before = pipeline.see(str(PICTURES[0]))
    pipeline.model.load_adapter(adapters)
    load_picture_side(pipeline.model, adapters)
    seen, expected = (p.see(str(PICTURES[0])) for p in (pipeline, merged))
    torch.testing.assert_close(seen, expected)
    assert not torch.equal(before, seen) and answer(pipeline) == answer(merged)
    torch.save({"model.mm_projector.9.weight": ONE}, adapters / ADAPTER_FILE)
    with pytest.raises(ConfigError, match="expected mining and projector, got also 'model.mm_projector.9.weight'"):
        load_picture_side(pipeline.model, adapters)


@pytest.mark.parametrize(
    "name, template",
    [
        *(("standard", "plain"), ("mgm-llama", "plain"), ("mgm-gemma", "gemma"), ("mgm-mixtral", "plain")),
        *(("mgm-llama3", "llama_3"), ("mgm-yi-hd", "plain")),
    ],
)
def test_the_template_of_stage_1_is_found(name, template, tmp_path):
    """Captions without roles where the original has them, from the bare language model alone."""
    _, base, clip, convnext = parts_of(name, tmp_path / "parts")
    if name == "mgm-yi-hd":
        # Its published tokenizer has these as tokens, the tiny one has not.
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.save_pretrained(base)
    towers = {"vision_tower": str(clip), "vision_tower_aux": str(convnext)}
    config = make_config(tmp_path, base, CAPTIONS, 1, template=None, **towers)
    prepare_output(config, fresh=True)
    prepared = prepare(config)
    assert (prepared.template, prepared.processor.template) == (template, family(name).processor.template)


def test_optional_packages_are_named(tmp_path, monkeypatch):
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("peft", "liger_kernel", "datasets", "bitsandbytes"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    folder = family("standard").folder
    with pytest.raises(ConfigError, match="method: lora needs the package peft: pip install peft"):
        fine_tune(make_config(tmp_path / "a", folder, BATCH, method="lora"))
    with pytest.raises(ConfigError, match="needs the package datasets: pip install datasets"):
        fine_tune(make_config(tmp_path / "b", folder, BATCH, data=[{"dataset": "owner/name"}]))
