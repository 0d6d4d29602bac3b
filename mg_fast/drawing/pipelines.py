"""Loads a pipeline of diffusers, and adds to it what a painter was asked for."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import BackendError, CheckpointError, DrawingError, quoted
from ..models.tensor_files import first_line
from .settings import SCHEDULERS
from .sources import PipelineSource, check_room

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
        DrawingError: the pipeline takes no LoRA or no IP-Adapter.
    """
    if isinstance(source, PipelineSource):
        check_room(source, dtype, device, parts.offload)
        pipeline = _from_pretrained(source, dtype)
    else:
        pipeline = source
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
    if parts.compiled and unet is not None:
        unet.compile(fullgraph=True)
    return pipeline


def check_installed() -> None:
    """Raises BackendError where diffusers is not installed."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise BackendError(MISSING_DIFFUSERS) from None


def _from_pretrained(source: PipelineSource, dtype: torch.dtype):
    check_installed()
    from diffusers import AutoPipelineForText2Image

    variant = source.variant(dtype)
    options = {"dtype": dtype}
    # Parts that check a picture after it was drawn are not loaded.
    options |= {name: None for name in ("safety_checker",) if name in source.index}
    attempts = [{"variant": variant}, {}] if variant is not None else [{}]
    for attempt in attempts:
        try:
            return AutoPipelineForText2Image.from_pretrained(source.name, **options, **attempt)
        except Exception as error:  # A damaged folder raises whatever the loader of its part raises.
            if attempt is attempts[-1]:
                raise CheckpointError(
                    f"{source.name} ({source.class_name}) cannot be loaded as a text-to-image pipeline: "
                    f"{first_line(error)}"
                ) from error
            logger.debug("%s has no variant %s: %s", source.name, variant, first_line(error))
    raise AssertionError("the last attempt returns or raises")


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
                arguments = one if isinstance(one, dict) else {"pretrained_model_name_or_path_or_dict": one}
                pipeline.load_ip_adapter(**arguments)
    except Exception as error:  # diffusers raises errors of many kinds for files that do not fit.
        raise CheckpointError(f"{what} {quoted(added)} cannot be loaded: {first_line(error)}") from error
