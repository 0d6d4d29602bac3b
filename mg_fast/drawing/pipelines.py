"""Loads a pipeline of diffusers, and adds to it what a painter was asked for."""

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import BackendError, CheckpointError, DrawingError, quoted
from ..models.tensor_files import first_line
from .long_prompts import expect_long_texts
from .settings import SCHEDULERS
from .sources import PipelineSource, check_room, find_pipeline, free_bytes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

MISSING_DIFFUSERS = "drawing needs diffusers, which is not installed here: pip install 'mg_fast[draw]'"


@dataclass(frozen=True)
class PipelineParts:
    """What is added to a pipeline once it is loaded; see `load_painter` for each."""

    scheduler: object = None
    lora: object = None
    ip_adapter: object = None
    offload: str = "none"
    compiled: bool = False


def load_pipeline(
    source: "PipelineSource | DiffusionPipeline", dtype: torch.dtype, device: torch.device, parts: PipelineParts
) -> "DiffusionPipeline":
    """A text-to-image pipeline on its device.

    Raises:
        BackendError: diffusers is not installed, or the weights do not fit the device.
        CheckpointError: the pipeline, its LoRA or its IP-Adapter cannot be loaded.
        DrawingError: the pipeline takes no LoRA or no IP-Adapter, or has nothing to compile.
    """
    if isinstance(source, PipelineSource):
        check_installed()
        source = _fetched(source, dtype)
        check_room(source, dtype, free_bytes(device), parts.offload)
        pipeline = _from_pretrained(source, dtype)
    else:
        pipeline = source
        if pipeline.dtype != dtype:
            pipeline.to(dtype=dtype)
    expect_long_texts(pipeline)
    if parts.scheduler is not None:
        pipeline.scheduler = _scheduler(parts.scheduler, pipeline)
    for what, added in (("lora", parts.lora), ("ip_adapter", parts.ip_adapter)):
        if added is not None:
            _extend(pipeline, what, added)
    if parts.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif parts.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    unet = getattr(pipeline, "unet", None)
    if device.type == "cuda" and unet is not None:
        unet.to(memory_format=torch.channels_last)
    if parts.compiled:
        network = unet if unet is not None else getattr(pipeline, "transformer", None)
        if network is None:
            raise DrawingError(f"compiled: {type(pipeline).__name__} has neither a UNet nor a transformer to compile")
        network.compile(fullgraph=True)
    return pipeline


def is_pipeline(value) -> bool:
    """Whether this is a loaded pipeline of diffusers."""
    from diffusers import DiffusionPipeline

    return isinstance(value, DiffusionPipeline)


def check_installed() -> None:
    """Raises BackendError where diffusers is not installed."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise BackendError(MISSING_DIFFUSERS) from None


def _fetched(source: PipelineSource, dtype: torch.dtype) -> PipelineSource:
    """The same pipeline in a local folder. What a hub id names is downloaded, unless it has been before."""
    if source.folder is not None:
        return source
    from diffusers import DiffusionPipeline

    def fetch(variant: str | None) -> str:
        return DiffusionPipeline.download(source.name, variant=variant)

    folder = _first_that_works(fetch, source.variant(dtype), f"{source.name} cannot be fetched")
    return dataclasses.replace(find_pipeline(folder), name=source.name)


def _from_pretrained(source: PipelineSource, dtype: torch.dtype):
    from diffusers import AutoPipelineForText2Image

    def load(variant: str | None):
        return AutoPipelineForText2Image.from_pretrained(str(source.folder), dtype=dtype, variant=variant)

    failed = f"{source.name} ({source.class_name}) cannot be loaded as a text-to-image pipeline"
    return _first_that_works(load, source.variant(dtype), failed)


def _first_that_works(call, variant: str | None, failed: str):
    """What a call gives for a variant of the weights; where that fails, what it gives for the weights themselves.

    Raises:
        CheckpointError: both fail; the message begins with `failed`.
    """
    if variant is not None:
        try:
            return call(variant)
        except Exception as error:
            logger.debug("there is no variant %s: %s", variant, first_line(error))
    try:
        return call(None)
    except Exception as error:  # A damaged folder raises whatever the loader of its part raises.
        raise CheckpointError(f"{failed}: {first_line(error)}") from error


def _scheduler(wanted, pipeline):
    if not isinstance(wanted, str):
        return wanted
    import diffusers

    name, changes = SCHEDULERS[wanted]
    return getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes)


def _extend(pipeline, what: str, added) -> None:
    """Adds LoRAs or an IP-Adapter to a pipeline."""
    method = {"lora": "load_lora_weights", "ip_adapter": "load_ip_adapter"}[what]
    if not hasattr(pipeline, method):
        raise DrawingError(f"{what}: {type(pipeline).__name__} takes none")
    several = added if what == "lora" and isinstance(added, (list, tuple)) else [added]
    try:
        for one in several:
            if what == "lora":
                pipeline.load_lora_weights(one)
                pipeline.fuse_lora()
                pipeline.unload_lora_weights()
            else:
                pipeline.load_ip_adapter(**(one if isinstance(one, dict) else _adapter_beside(one)))
    except Exception as error:  # diffusers raises errors of many kinds for files that do not fit.
        raise CheckpointError(f"{what} {quoted(added)} cannot be loaded: {first_line(error)}") from error


def check_added(lora, ip_adapter) -> None:
    """Raises CheckpointError where a LoRA or an IP-Adapter is given by a file that does not exist."""
    for one in lora if isinstance(lora, (list, tuple)) else [lora]:
        # Anything of the form owner/name may be a hub id.
        if isinstance(one, (str, os.PathLike)) and not Path(one).expanduser().exists() and str(one).count("/") != 1:
            raise CheckpointError(f"lora {quoted(str(one))}: expected a file, a folder or a hub id (owner/name)")
    if isinstance(ip_adapter, (str, os.PathLike)) and not Path(ip_adapter).expanduser().is_file():
        raise CheckpointError(
            f"ip_adapter {quoted(str(ip_adapter))}: there is no such file; expected one, or a dict of arguments of "
            "diffusers' load_ip_adapter"
        )


def _adapter_beside(file: str | os.PathLike) -> dict[str, str]:
    """The arguments of `load_ip_adapter` for a file of weights with the folder of its image encoder beside it."""
    path = Path(file).expanduser()
    return {"pretrained_model_name_or_path_or_dict": str(path.parent), "subfolder": "", "weight_name": path.name}
