"""Pipelines, which are facades over the stages of the engine, and their loading."""

import dataclasses
import functools
import os
import time
from typing import TYPE_CHECKING

import torch

from ..engine.options import CacheOptions
from ..errors import BackendError, CheckpointError, quoted
from ..models import builtin
from ..models.families import MM_INTERLEAVED, checkpoint_family
from ..models.mini_gemini import loading_dtype
from ..models.mini_gemini.modeling import MiniGeminiForConditionalGeneration
from ..models.mini_gemini.processing import MiniGeminiProcessor
from ..models.tensor_files import resolve_folder
from ..ops.backend import check_everywhere
from ..runtime import attention
from ..runtime.dtypes import wanted_dtype
from .mini_gemini import Pipeline, as_painter

if TYPE_CHECKING:
    from .mm_interleaved import InterleavedPipeline


def _known_device(device: str | torch.device) -> torch.device:
    """The device if torch knows it and it exists here, else raises `BackendError`, before any weight is read."""
    try:
        known = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise BackendError(f"unknown device {quoted(device)}: {str(error).splitlines()[0]}") from None
    if known.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"device {quoted(str(device))}: torch finds no CUDA device here (`mg-fast doctor` shows more)"
        )
    return known


def load(
    path: str | os.PathLike,
    *,
    dtype: str | torch.dtype | dict | None = "auto",
    device: str | torch.device | None = None,
    backend: str | None = None,
    quantize=None,
    template: str | None = None,
    base_model: str | os.PathLike | None = None,
    attn_implementation: str | None = None,
    allow_long: bool = False,
    image_cache_bytes: int = CacheOptions.image_cache_bytes,
    kv_cache_bytes: int | None = CacheOptions.kv_cache_bytes,
    compiled: bool = False,
    cuda_graphs: bool = True,
    llm: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    diffusion: str | os.PathLike | None = None,
    painter=None,
) -> "Pipeline | InterleavedPipeline":
    """Loads a checkpoint with its processor, as a pipeline.

    The folder's files say which family it belongs to: Mini-Gemini gives a `Pipeline`, and MM-Interleaved an
    `InterleavedPipeline`.

    Args:
        path: folder or hub id of a checkpoint in its published layout or as `save_pretrained` wrote it, or the name of
            one in the package (`nano`).
        dtype: the dtype of the weights, by any usual name. `auto` or None takes the one that config.json names, else
            the stored one. On a CPU, for a checkpoint of 16-bit weights, it takes the dtype that the CPU multiplies
            fastest in, but float32 only if that fits in memory (`loading_dtype`). A dict is passed on to transformers,
            which loads the weights in the dtype under the empty key.
        device: `cuda`, `cpu`, ..., or `auto` to spread the model over all devices; default: a GPU if there is one.
        backend: `auto`, `reference`, `torch` or `triton`, for every call of this pipeline.
        quantize: `int8`, `int4` or `fp8` (weight-only, by torchao), or a quantization configuration of transformers. It
            applies to the layers of the language model; towers, mining, projector and head keep their dtype, and so do
            MM-Interleaved's synchronizers and what draws.
        template: name of a prompt template, in the place of the checkpoint's own; Mini-Gemini only.
        base_model: folder or hub id of the base language model, for a stage-1 adapter; Mini-Gemini only.
        attn_implementation: `sdpa` (the default, which lets torch choose its kernels, and the only one that is captured
            in CUDA graphs), `eager`, or `flash_attention_2`, which takes the package flash-attn, a GPU, and weights in
            float16 or bfloat16.
        allow_long: accept prompts longer than the model was trained on; Mini-Gemini only.
        image_cache_bytes, kv_cache_bytes: see `CacheOptions`.
        compiled: on a GPU, decode through torch.compile, which takes seconds to a minute at the first answer.
        cuda_graphs: on a GPU, capture the work in CUDA graphs; without graphs less memory is needed.
        llm, clip, diffusion: folders or hub ids of the models that MM-Interleaved's config.yaml names, for those that
            are not where it says.
        painter: draws what answers ask for: a `mg_fast.drawing.Painter`, or the folder or hub id of a text-to-image
            pipeline of diffusers (`nano` is the one in the package), whose weights are loaded when the first picture is
            drawn; Mini-Gemini only, because MM-Interleaved draws by itself.

    Raises:
        CheckpointError: the checkpoint or the painter cannot be loaded, or an argument is for another family.
        BackendError: the backend, the device or the attention cannot be used here, or the dtype is unknown.
        PromptError: the template is unknown.
        ValueError: a limit of a cache is below 0.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known_device = _known_device(device)
    dtype = wanted_dtype(dtype)
    caches = CacheOptions(image_cache_bytes, kv_cache_bytes)
    check_everywhere(backend, known_device)
    attention.check(attn_implementation, known_device)
    began = time.perf_counter()
    path = builtin.resolve(path)
    # Only small files are read or fetched to tell the family.
    family = checkpoint_family(folder := resolve_folder(path, weights=False))
    if family is None and base_model is None and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: expected a Mini-Gemini checkpoint folder, or one of MM-Interleaved, which "
            "has a config.yaml"
        )
    of_mini_gemini = {
        "template": template,
        "base_model": base_model,
        "allow_long": allow_long or None,
        # What is wrong with the painter's folder is found before the gigabytes of the model are read.
        "painter": as_painter(painter, known_device),
    }
    of_interleaved = {"llm": llm, "clip": clip, "diffusion": diffusion}
    sides = _given(of_interleaved if family == MM_INTERLEAVED else of_mini_gemini)
    if others := _given(of_mini_gemini if family == MM_INTERLEAVED else of_interleaved):
        raise CheckpointError(
            f"{', '.join(f'{name}=' for name in others)}: not for this checkpoint, which belongs to "
            f"{family or 'Mini-Gemini'}"
        )
    optional = _given({"quantization_config": quantize, "attn_implementation": attn_implementation})
    further = {name: sides.pop(name) for name in ("painter",) if name in sides}
    load_parts = _load_interleaved if family == MM_INTERLEAVED else _load_mini_gemini
    kind, model, processor = load_parts(path, dtype, device, known_device, quantize, sides, optional)
    pipeline = kind(
        model,
        processor,
        backend=backend,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
        **dataclasses.asdict(caches),
        **further,
    )
    pipeline.load_seconds = time.perf_counter() - began
    return pipeline


def _load_mini_gemini(path, dtype, device, known_device: torch.device, quantize, sides: dict, optional: dict) -> tuple:
    allow_long, adapter = (
        sides.pop("allow_long", False),
        {name: sides[name] for name in ("base_model",) if name in sides},
    )
    # A hub id is fetched whole before anything is built, because the size of the views is read from a tensor's shape.
    resolve_folder(path)
    template = sides.get("template")
    # The processor comes first: it loads quickly, and it finds most faults of a folder.
    processor = MiniGeminiProcessor.from_pretrained(path, template=template, **adapter)
    if known_device.type == "cpu":
        dtype = loading_dtype.resolve(dtype, path, quantize=quantize, **adapter)
    if optional.get("attn_implementation") == attention.FLASH:
        attention.check(attention.FLASH, known_device, loading_dtype.of_weights(dtype, path, **adapter))
    model = MiniGeminiForConditionalGeneration.from_pretrained(
        path, dtype=dtype, device_map=device, template=template, allow_long=allow_long, **optional, **adapter
    )
    return Pipeline, model, processor


def _load_interleaved(path, dtype, device, known_device: torch.device, quantize, sides: dict, optional: dict) -> tuple:
    # Only this family needs these modules, whose import takes a while.
    from ..models.mm_interleaved.checkpoint import open_interleaved
    from ..models.mm_interleaved.modeling import MMInterleavedForConditionalGeneration
    from ..models.mm_interleaved.processing import MMInterleavedProcessor
    from .mm_interleaved import InterleavedPipeline

    find = functools.partial(open_interleaved, **sides)
    processor = MMInterleavedProcessor.from_pretrained(path, **sides)
    if known_device.type == "cpu":
        dtype = loading_dtype.resolve(dtype, path, quantize=quantize, find=find)
    if optional.get("attn_implementation") == attention.FLASH:
        attention.check(attention.FLASH, known_device, loading_dtype.of_weights(dtype, path, find=find))
    model = MMInterleavedForConditionalGeneration.from_pretrained(
        path, dtype=dtype, device_map=device, **optional, **sides
    )
    return InterleavedPipeline, model, processor


def _given(options: dict) -> dict:
    return {name: value for name, value in options.items() if value is not None}
