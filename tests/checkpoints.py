"""Makes new checkpoint folders from existing ones: the same tensors in other files, or with something changed."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mg_fast import CheckpointError, MiniGeminiForConditionalGeneration

CLIP = "model.vision_tower.vision_tower.vision_model."
CONVNEXT = "model.vision_tower_aux."
# As a value for config.json, this means that the key is absent.
GONE = object()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's own weight files, read without mg_fast."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(path))
    for path in sorted(folder.glob("pytorch_model*.bin")):
        tensors.update(torch.load(path, weights_only=True))
    return tensors


def copy_small(source: Path, target: Path, **config) -> Path:
    """Copies everything except the weights and the recorded answers; keyword arguments change config.json."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if (
            path.is_file()
            and path.suffix in (".json", ".model", ".txt")
            and "index" not in path.name
            and path.name != "expected.json"
        ):
            shutil.copyfile(path, target / path.name)
    if config:
        edit_config(target, **config)
    return target


def edit_config(folder: Path, **changes) -> None:
    written = json.loads((folder / "config.json").read_text())
    written.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in written.items() if value is not GONE}))


def split(tensors: dict, shards: int) -> list[dict]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[i::shards]} for i in range(shards)]


def write_safetensors(folder: Path, tensors: dict, shards: int = 1) -> Path:
    return _write(
        folder,
        tensors,
        shards,
        "model",
        "safetensors",
        lambda part, path: save_file(part, path, metadata={"format": "pt"}),
    )


def write_bin(folder: Path, tensors: dict, shards: int = 1, *, legacy: bool = False) -> Path:
    def save(part, path):
        torch.save(part, path, _use_new_zipfile_serialization=not legacy)

    return _write(folder, tensors, shards, "pytorch_model", "bin", save)


def _write(folder, tensors, shards, stem, suffix, save):
    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    weight_map = {}
    for i, part in enumerate(split(tensors, shards), 1):
        file = f"{stem}-{i:05d}-of-{shards:05d}.{suffix}"
        save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def remake(source: Path, target: Path, *, tensors: dict | None = None, **config) -> Path:
    """Writes a copy as one safetensors file, with other tensors or another config.json."""
    copy_small(source, target, **config)
    return write_safetensors(target, tensors_of(source) if tensors is None else tensors)


def hub_cache(cache: Path, repositories: dict[str, Path]) -> Path:
    """Fills a cache folder as huggingface_hub keeps it, from `owner/name` (or `owner/name@revision`) -> folder."""
    for i, (key, folder) in enumerate(repositories.items()):
        name, _, revision = key.partition("@")
        repository, commit = cache / f"models--{name.replace('/', '--')}", f"{i:040x}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / (revision or "main")).write_text(commit)
        for path in folder.rglob("*"):
            if path.is_file():
                link = repository / "snapshots" / commit / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
    return cache


@torch.inference_mode()
def probe(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The image tokens and logits of a fixed random picture in a fixed prompt.

    Two models with the same weights give the same bits.
    """
    # So small a model is slower on two threads, and much slower where another program uses one of the cores.
    torch.set_num_threads(1)
    config, device, dtype = model.config, model.get_input_embeddings().weight.device, model.dtype
    generator = torch.Generator().manual_seed(0)
    lr, hr = config.vision_config.image_size, config.image_size_aux
    low = torch.randn(1, config.views, 3, lr, lr, generator=generator).to(device, dtype)
    high = torch.randn(1, 3, hr, hr, generator=generator).to(device, dtype)
    picture = config.tokens_per_picture
    ids = torch.tensor([[1, 17, 42] + [5] * picture + [99, 7, 31, 250]], device=device)
    marks = torch.tensor([[0] * 3 + [1] * picture + [0] * 4], device=device)
    tokens = model.get_image_features(low, high).pooler_output
    logits = model(input_ids=ids, image_tokens=tokens, mm_token_type_ids=marks).logits
    return tokens.cpu(), logits.cpu()


@functools.cache
def answers(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of `probe` for a checkpoint folder that no test changes."""
    return probe(MiniGeminiForConditionalGeneration.from_pretrained(folder))


def same_answers(model, other) -> bool:
    """Whether the answers agree bit for bit. `other` is a model, or a folder as in `answers`."""
    return all(
        torch.equal(a, b) for a, b in zip(probe(model), answers(other) if isinstance(other, Path) else probe(other))
    )


def refused(folder, match: str, **arguments) -> str:
    """Asserts that loading ends in a matching CheckpointError before any weight is read, and returns its message."""

    def load(*args, **kwargs):
        raise AssertionError("went on to load the weights")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=match) as caught:
        patch.setattr(PreTrainedModel, "from_pretrained", load)
        MiniGeminiForConditionalGeneration.from_pretrained(folder, **arguments)
    return str(caught.value)


def load(folder, **arguments):
    return MiniGeminiForConditionalGeneration.from_pretrained(folder, **arguments)


def towers_of(tensors, clip_folder, convnext_folder, *, extra=True):
    """Writes the towers among the tensors as their makers publish them, together with tensors that are not needed."""
    clip = {"vision_model." + name.removeprefix(CLIP): t for name, t in tensors.items() if name.startswith(CLIP)}
    convnext = {}
    for name, t in tensors.items():
        if name.startswith(CONVNEXT):
            convnext["visual.trunk." + name.removeprefix(CONVNEXT).removeprefix("vision_")] = t
    if extra:
        clip |= {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.rand(4)}
        clip |= {
            "vision_model.embeddings.position_ids": torch.arange(26)[None],
            "visual_projection.weight": torch.rand(4, 4),
        }
        convnext |= {
            "visual.trunk.head.norm.weight": torch.rand(32),
            "text.ln_final.weight": torch.rand(4),
            "logit_scale": torch.ones(()),
        }
    for folder in (clip_folder, convnext_folder):
        folder.mkdir(parents=True)
    torch.save(clip, clip_folder / "pytorch_model.bin")
    save_file(convnext, convnext_folder / "open_clip_model.safetensors")


def without_towers(source, target, *, prefixes=(CLIP, CONVNEXT), **config):
    kept = {name: tensor for name, tensor in tensors_of(source).items() if not name.startswith(prefixes)}
    return remake(source, target, tensors=kept, **config)


def is_adapters(name):
    return any(part in name for part in ("mm_projector", "vlm_uni", "vision_tower"))


def make_adapter(source, adapter, base):
    """Writes a stage-1 release, with all but the language model in one file, and the language model as published."""
    tensors = tensors_of(source)
    copy_small(source, adapter)
    for tokenizer in adapter.glob("tokenizer*"):
        tokenizer.unlink()
    (adapter / "generation_config.json").unlink()
    torch.save({name: tensor for name, tensor in tensors.items() if is_adapters(name)}, adapter / "mm_projector.bin")
    copy_small(source, base)
    multimodal = [
        key for key in json.loads((base / "config.json").read_text()) if key.startswith(("mm_", "image_", "tokenizer_"))
    ]
    kind = (
        json.loads((source / "config.json").read_text())["model_type"].removeprefix("mgm").removeprefix("_") or "llama"
    )
    edit_config(base, model_type=kind, architectures=[f"{kind.title()}ForCausalLM"], **dict.fromkeys(multimodal, GONE))
    return adapter, write_safetensors(
        base, {name: tensor for name, tensor in tensors.items() if not is_adapters(name)}, 2
    )
