"""A text-to-image pipeline of diffusers, which is loaded when the first picture is drawn."""

import contextlib
import dataclasses
import inspect
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..errors import BackendError, CheckpointError, DrawingError, quoted
from ..models.pictures import open_picture
from ..models.tensor_files import first_line
from ..runtime.dtypes import wanted_dtype
from .calls import call_arguments, pixels, vae_kept
from .pipelines import PipelineParts, check_added, check_installed, is_pipeline, load_pipeline
from .settings import DrawingSettings, check_offload, check_prompt, check_scheduler
from .sources import PipelineSource, find_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


class Painter:
    """Draws pictures from text. `load_painter` makes one.

    The pipeline is loaded when the first picture is drawn. Several threads may share a painter: it draws one picture
    at a time.

    Args:
        source: where the pipeline comes from, or a loaded text-to-image pipeline of diffusers.
        dtype, device, steps, guidance, scheduler, lora, ip_adapter, offload, compiled: see `load_painter`.
    """

    def __init__(
        self,
        source: "PipelineSource | DiffusionPipeline",
        *,
        dtype: torch.dtype,
        device: torch.device,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler=None,
        lora=None,
        ip_adapter=None,
        offload: str = "none",
        compiled: bool = False,
    ):
        self.source, self.dtype, self.device = source, dtype, device
        recommended = source.recommended if isinstance(source, PipelineSource) else {}
        given = {name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None}
        self.defaults = DrawingSettings(**{**recommended, **given})
        self._parts = PipelineParts(scheduler, lora, ip_adapter, offload, compiled)
        self._lock = threading.RLock()
        self._pipeline: DiffusionPipeline | None = None
        self._guided: DiffusionPipeline | None = None

    @property
    def name(self) -> str:
        """The folder or hub id of the pipeline, or the name of the class of one that was given."""
        return self.source.name if isinstance(self.source, PipelineSource) else type(self.source).__name__

    @property
    def loaded(self) -> bool:
        """Whether the pipeline has been loaded."""
        return self._pipeline is not None

    @property
    def pipeline(self) -> "DiffusionPipeline":
        """The text-to-image pipeline of diffusers. It is loaded now if it has not been before.

        Raises:
            BackendError: diffusers is not installed, or the weights do not fit the device.
            CheckpointError: the pipeline, its LoRA or its IP-Adapter cannot be loaded.
        """
        with self._lock:
            if self._pipeline is None:
                self._pipeline = load_pipeline(self.source, self.dtype, self.device, self._parts)
            return self._pipeline

    def unload(self) -> None:
        """Frees the memory of a pipeline that was loaded here; the next drawing loads it again."""
        with self._lock:
            if isinstance(self.source, PipelineSource):
                self._pipeline = self._guided = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def draw(
        self,
        prompt: str,
        *,
        negative: str | None = None,
        size: int | tuple[int, int] | None = None,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        count: int = 1,
        like=None,
        strength: float | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Draws pictures of a prompt.

        The noise of a picture depends on its seed alone, and pictures are drawn one after the other, so the same seed
        gives the same picture in whatever company. A picture's `info["seed"]` holds its seed.

        Args:
            prompt: what to draw. If all text encoders are CLIP's, a prompt of more tokens than they read (77; 48 for
                `nano`) is encoded in chunks; where that is not possible, a warning says how much of it is cut.
            negative: what not to draw; None means Mini-Gemini's `NEGATIVE_PROMPT`, and "" nothing. Beside a prompt that
                is not long, only the first tokens of this default count, as in the original. Pipelines that take no
                negative prompt ignore it.
            size: side of a square picture or (width, height) in pixels, multiples of eight; None: the pipeline's own.
            seed: of the first picture; the others have the seeds after it. None: a random one.
            steps, guidance: None: the painter's (see `load_painter`).
            count: number of pictures.
            like: a picture to start from, or to follow if the painter has an IP-Adapter: anything that
                `mg_fast.Pipeline.chat` takes as a picture.
            strength: with `like`, from 0 to 1: how much is redrawn, or with an IP-Adapter, how much the picture counts;
                0.6 by default.
            on_step: called after each step with the number of steps done and their total, if the pipeline tells them.
                Its exceptions end the drawing.

        Raises:
            PromptError: there is no prompt.
            PictureError: `like` is no picture.
            DrawingError: a setting is out of range, the pipeline does not take it, memory is short, or the pipeline's
                safety checker withholds the picture.
            BackendError, CheckpointError: the pipeline cannot be loaded.
        """
        prompt = check_prompt(prompt)
        settings = DrawingSettings(negative, size, seed, steps, guidance, count, strength)
        own = {name: getattr(self.defaults, name) for name in ("steps", "guidance") if getattr(settings, name) is None}
        settings = dataclasses.replace(settings, **own)
        picture = None if like is None else open_picture(like, label="like")
        if strength is not None and picture is None:
            raise DrawingError("strength: it says how far to depart from a picture, but no picture came as like=")
        if seed is None:
            settings = dataclasses.replace(settings, seed=int(torch.randint(2**31, ())))
        with self._lock:
            pipeline = self.pipeline
            has_adapter = self._parts.ip_adapter is not None
            redrawing = None if picture is None or has_adapter else self._image_to_image(pipeline)
            options = {"redrawing": redrawing, "has_adapter": has_adapter}
            arguments = call_arguments(pipeline, prompt, settings, picture, self.device, **options)
            called = pipeline if redrawing is None else redrawing
            try:
                with vae_kept(pipeline, pixels(pipeline, arguments)):
                    return [
                        self._drawn(called, arguments, settings.seed + i, _progress(on_step, i, settings.count))
                        for i in range(settings.count)
                    ]
            finally:
                # Only a pipeline that ends well, and that was offloaded itself, puts its parts back where they lay.
                with contextlib.suppress(Exception):
                    pipeline.maybe_free_model_hooks()

    def _drawn(self, pipeline, arguments: dict, seed: int, on_step: Callable[[int, int], None] | None) -> Image.Image:
        further: dict[str, object] = {"generator": torch.Generator("cpu").manual_seed(seed)}
        # Not every pipeline tells how far it is.
        if on_step is not None and "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:

            def stepped(running, step: int, _, tensors: dict) -> dict:
                on_step(step + 1, running.num_timesteps)
                return tensors

            further["callback_on_step_end"] = stepped
        pipeline.set_progress_bar_config(disable=True)
        try:
            # Pipelines draw without gradients. In inference mode, weights that are moved or upcast meanwhile would
            # become tensors that nobody can train or trace afterwards.
            found = pipeline(**arguments, **further)
        except torch.OutOfMemoryError as error:
            raise DrawingError(
                f"memory is short while drawing: {first_line(error)}; a smaller size, offload='model' or "
                "offload='sequential' need less"
            ) from error
        if any(getattr(found, "nsfw_content_detected", None) or ()):
            raise DrawingError("the pipeline's safety checker has withheld the picture")
        drawn = found.images[0]
        drawn.info["seed"] = seed
        return drawn

    def _image_to_image(self, pipeline):
        """The pipeline that redraws a picture. It shares all parts with the one that draws from text alone."""
        if self._guided is None:
            from diffusers import AutoPipelineForImage2Image

            try:
                self._guided = AutoPipelineForImage2Image.from_pipe(pipeline)
            except ValueError as error:
                raise DrawingError(
                    f"like: {type(pipeline).__name__} has no form that starts from a picture: {first_line(error)}"
                ) from error
        return self._guided


def load_painter(
    name_or_path: "str | os.PathLike | DiffusionPipeline",
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | torch.device | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler=None,
    lora: str | os.PathLike | Sequence | None = None,
    ip_adapter: str | os.PathLike | dict | None = None,
    offload: str | None = None,
    compiled: bool = False,
) -> Painter:
    """Finds a text-to-image pipeline of diffusers. Its weights are loaded when the first picture is drawn.

    Args:
        name_or_path: folder or hub id of any pipeline that diffusers draws from text with, such as
            `stabilityai/stable-diffusion-xl-base-1.0`, which Mini-Gemini uses; the name of the one in the package
            (`nano`, which knows simple shapes alone); or a loaded pipeline, to which what is asked for here is applied.
        dtype: `auto` or None is float16 on a GPU and float32 on a CPU; a loaded pipeline keeps its own.
        device: default: a GPU if there is one.
        steps, guidance: what `draw` uses where the caller gives none. None: what a local folder recommends in a file
            `drawing_config.json`, such as `{"steps": 30, "guidance": 3.5}`, and then the pipeline's own.
        scheduler: a scheduler of diffusers, or a name in `mg_fast.drawing.settings.SCHEDULERS`: `lcm`, `lightning` and
            `turbo` for few steps. None: the pipeline's own.
        lora: a LoRA's file, folder or hub id, or several of them; they are merged into the weights.
        ip_adapter: an IP-Adapter's file of weights with the folder `image_encoder` beside it, or a dict of arguments
            of diffusers' `load_ip_adapter`. Then `draw(like=...)` follows a picture, instead of starting from it.
        offload: `none` (None means it) keeps the whole pipeline on the device, `model` only the part that runs, and
            `sequential` only the layer that runs. On a CPU there is nothing to offload from, and a warning says so.
        compiled: run the UNet or transformer through torch.compile, which takes a minute for each new size.

    Raises:
        CheckpointError: there is no such pipeline, LoRA or IP-Adapter, or a file of the folder cannot be read.
        BackendError: diffusers is not installed, or the dtype or the device is unknown.
        DrawingError: another argument is out of range.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"unknown device {quoted(device)}: {first_line(error)}") from None
    if known.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {quoted(str(device))}: torch finds no CUDA device here")
    dtype = wanted_dtype(dtype)
    check_scheduler(scheduler)
    offload = check_offload(offload)
    check_added(lora, ip_adapter)
    check_installed()
    source = find_pipeline(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else name_or_path
    if not (isinstance(source, PipelineSource) or is_pipeline(source)):
        raise CheckpointError(
            f"expected a folder or hub id of a pipeline of diffusers, or a loaded one, got {quoted(source)}"
        )
    if dtype == "auto" and not isinstance(source, PipelineSource):
        dtype = source.dtype
    elif dtype == "auto":
        dtype = torch.float16 if known.type == "cuda" else torch.float32
    if not isinstance(dtype, torch.dtype):
        raise BackendError(f"dtype: expected one dtype for all parts of the pipeline, got {quoted(dtype)}")
    if offload != "none" and known.type == "cpu":
        logger.warning("offload=%s changes nothing on a CPU, where there is nothing to offload from", quoted(offload))
        offload = "none"
    return Painter(
        source,
        dtype=dtype,
        device=known,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        lora=lora,
        ip_adapter=ip_adapter,
        offload=offload,
        compiled=compiled,
    )


def _progress(on_step, done: int, count: int) -> Callable[[int, int], None] | None:
    """A callback that counts the steps of all pictures of a call."""
    if on_step is None:
        return None
    return lambda step, total: on_step(done * total + step, count * total)
