"""Writes what was trained: a stage-1 adapter in the original's format, a whole checkpoint, or low-rank adapters."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from mg_fast import MiniGeminiConfig, MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.errors import quoted
from mg_fast.models.mini_gemini.frozen_towers import FrozenTowers
from mg_fast.models.mini_gemini.naming import ours_to_published, published_to_ours
from mg_fast.models.tensor_files import ADAPTER_FILE, read_file, read_tensors

from .config import ConfigError, FineTuneConfig, OutputError
from .start import PICTURE_SIDE, load_model

State = Mapping[str, torch.Tensor]


@contextlib.contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Within the block, an error of the disk is one sentence about the folder.

    Raises:
        OutputError: a file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save raises RuntimeError, as almost everything in torch does; its own begin with a file or a class.
        if isinstance(error, RuntimeError) and not any(
            part in str(error) for part in ("PytorchStreamWriter", "inline_c")
        ):
            raise
        raise OutputError(f"{folder} cannot be written: {' '.join(str(error).split())}") from error


def write_adapter(
    state: State, towers: FrozenTowers | None, config: MiniGeminiConfig | None, folder: Path, dtype: torch.dtype
) -> Path:
    """Writes a stage-1 adapter as the original does: `mm_projector.bin` with published names, and config.json.

    `mg_fast.load(folder, base_model=...)` loads it.

    Args:
        state: the model's tensors by our names; those of mining and projector are written.
        towers: they are written, too, as in the original. None leaves them out.
        config: None writes no config.json.
        folder: it is made if it is missing.
        dtype: of the weights in the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor for name, tensor in state.items() if name.split(".")[1] in PICTURE_SIDE}
    tensors = {**kept, **({} if towers is None else towers.state_dict())}
    torch.save(
        {ours_to_published(name): tensor.detach().to("cpu", dtype, copy=True) for name, tensor in tensors.items()},
        folder / ADAPTER_FILE,
    )
    if config is not None:
        config.dtype = dtype
        config.save_pretrained(folder)
    return folder


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a stage-1 adapter by our names."""
    return {published_to_ours(name): tensor for name, tensor in read_tensors(read_file(folder / ADAPTER_FILE))}


def load_picture_side(model: MiniGeminiForConditionalGeneration, folder: Path | str) -> None:
    """Puts mining and projector that learned beside low-rank adapters into the model that they were trained on.

    Args:
        model: the model; `model.load_adapter(folder)` gives it the adapters themselves.
        folder: `adapters` in the output of a training.

    Raises:
        CheckpointError: the file is missing or broken.
        ConfigError: the file is of another kind of model.
    """
    tensors = read_adapter(Path(folder))
    if other := model.load_state_dict(tensors, strict=False).unexpected_keys:
        raise ConfigError(f"{folder}: expected mining and projector, got also {quoted(other[0])}")


def write_checkpoint(
    config: MiniGeminiConfig,
    generation_config: GenerationConfig,
    state: State,
    towers: FrozenTowers | None,
    processor: MiniGeminiProcessor,
    folder: Path,
    dtype: torch.dtype,
) -> Path:
    """Writes a whole model in the published layout, which `mg_fast.load(folder)` loads.

    Args:
        config, generation_config: of the model.
        state: its tensors by our names.
        towers: those that were taken out of it; None if `state` has them.
        processor: it is written beside the model.
        folder: it is made if it is missing.
        dtype: of the weights in the files.
    """
    tensors = {**state, **({} if towers is None else towers.state_dict())}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    tensors = {
        name: tensor.detach().to("cpu", dtype, copy=True) if tensor.is_floating_point() else tensor.detach().cpu()
        for name, tensor in tensors.items()
    }
    # The trained model may be wrapped or divided. One without values has the same names, and their conversions.
    with torch.device("meta"):
        empty = MiniGeminiForConditionalGeneration(copy.deepcopy(config)).to(dtype)
    empty.generation_config = generation_config
    empty.save_pretrained(folder, state_dict=tensors)
    processor.save_pretrained(folder)
    return folder


def write_low_rank(tuned, state: State, config: FineTuneConfig, folder: Path, dtype: torch.dtype) -> Path:
    """Writes low-rank adapters in peft's format, and mining and projector beside them as in `write_adapter`.

    Args:
        tuned: the PeftModel.
        state: its tensors by its names.
        config: says whether mining and projector learned.
        folder: it is made if it is missing.
        dtype: of mining and projector in their file; adapters are written as they are.
    """
    tuned.save_pretrained(folder, state_dict=dict(state), save_embedding_layers=False)
    if config.lora.picture_side:
        write_adapter(without_wrapper(state), None, None, folder, dtype)
    return folder


def without_wrapper(state: State) -> dict[str, torch.Tensor]:
    """The tensors of a PeftModel that are not of its adapters, by the names that they have in the model itself."""
    found = {}
    for name, tensor in state.items():
        if "lora_" not in name:
            found[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    return found


def merge(config: FineTuneConfig, source: dict, adapters: Path, processor: MiniGeminiProcessor, folder: Path) -> Path:
    """Loads the model that a training started from once more, whole and on the CPU, and merges adapters into it.

    Args:
        config, source: as `load_model` takes them.
        adapters: the folder that `write_low_rank` wrote.
        processor: it is written beside the model.
        folder: where the merged checkpoint goes.
    """
    from peft import PeftModel

    dtype = getattr(torch, config.dtype)
    model = load_model(config, source, template=processor.template, whole=True)
    if (adapters / ADAPTER_FILE).is_file():
        model.load_state_dict(read_adapter(adapters), strict=False)
    merged = PeftModel.from_pretrained(model, adapters).merge_and_unload()
    parts = merged.config, merged.generation_config, merged.state_dict()
    return write_checkpoint(*parts, None, processor, folder, dtype)
