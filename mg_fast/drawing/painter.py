"""A text-to-image pipeline of diffusers, which is loaded when the first picture is drawn."""

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps

from ..errors import BackendError, DrawingError, PictureError, quoted
from ..models.pictures import open_picture
from ..models.tensor_files import first_line
from ..runtime.dtypes import wanted_dtype
from .long_prompts import encoded_in_chunks, is_long
from .pipelines import PipelineParts, check_installed, load_pipeline
from .settings import DEFAULT_STRENGTH, DrawingSettings, check_offload, check_prompt, check_scheduler
from .sources import PipelineSource, find_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Mini-Gemini's negative prompt.
NEGATIVE_PROMPT = (
    "out of frame, lowres, text, error, cropped, worst quality, low quality, jpeg artifacts, ugly, duplicate, morbid, "
    "mutilated, out of frame, extra fingers, mutated hands, poorly drawn hands, poorly drawn face, mutation, deformed, "
    "blurry, dehydrated, bad anatomy, bad proportions, extra limbs, cloned face, disfigured, gross proportions, "
    "malformed limbs, missing arms, missing legs, extra arms, extra legs, fused fingers, too many fingers, long neck, "
    "username, watermark, signature"
)
# Above this many pixels of a picture, the VAE decodes in tiles, so that its activations do not exceed the UNet's.
TILED_PIXELS = 1536 * 1536


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
        self.defaults = DrawingSettings(steps=steps, guidance=guidance)
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
            prompt: what to draw. If the text encoders are CLIP's, a prompt of more than 77 tokens is encoded in chunks;
                where that is not possible, a warning says how much of it is cut.
            negative: what not to draw; None means Mini-Gemini's `NEGATIVE_PROMPT`, and "" nothing. Of the default, the
                first 77 tokens count, as in the original. Pipelines that take no negative prompt ignore the default.
            size: side of a square picture or (width, height) in pixels, multiples of eight; None: the pipeline's own.
            seed: of the first picture; the others have the seeds after it. None: a random one.
            steps, guidance: None: the painter's, and then the pipeline's own.
            count: number of pictures.
            like: a picture to start from, or to follow if the painter has an IP-Adapter: anything that
                `mg_fast.Pipeline.chat` takes as a picture.
            strength: with `like` and no IP-Adapter, how much is redrawn, from 0 to 1; 0.6 by default. With an
                IP-Adapter, how much the picture counts.
            on_step: called after each step with the number of steps done and their total. Its exceptions end the
                drawing.

        Raises:
            PromptError: there is no prompt.
            PictureError: `like` is no picture.
            DrawingError: a setting is out of range, the pipeline does not take it, or memory is short.
            BackendError, CheckpointError: the pipeline cannot be loaded.
        """
        prompt = check_prompt(prompt)
        settings = DrawingSettings(negative, size, seed, steps, guidance, count, strength)
        picture = None if like is None else _opened(like)
        if strength is not None and picture is None:
            raise DrawingError("strength: it says how far to depart from a picture, but no picture came as like=")
        if seed is None:
            settings = DrawingSettings(negative, size, int(torch.randint(2**31, ())), steps, guidance, count, strength)
        with self._lock:
            pipeline = self.pipeline
            arguments = self._arguments(pipeline, prompt, settings, picture)
            if picture is not None and self._parts.ip_adapter is None:
                pipeline = self._image_to_image(pipeline)
            return [
                self._drawn(pipeline, arguments, settings.seed + i, _progress(on_step, i, settings.count))
                for i in range(settings.count)
            ]

    def _arguments(
        self, pipeline, prompt: str, settings: DrawingSettings, picture: Image.Image | None
    ) -> dict[str, object]:
        """The arguments of the pipeline that all pictures of a call share."""
        redrawn = picture is not None and self._parts.ip_adapter is None
        taken = inspect.signature((self._image_to_image(pipeline) if redrawn else pipeline).__call__).parameters
        found: dict[str, object] = {}

        def put(name: str, value, asked: str | None) -> None:
            if name in taken:
                found[name] = value
            elif asked is not None:
                raise DrawingError(f"{asked}: {type(pipeline).__name__} takes no {name}")

        negative = NEGATIVE_PROMPT if settings.negative is None else settings.negative
        explicit = settings.negative or ""
        chunks = None
        if is_long(pipeline, prompt) or is_long(pipeline, explicit):
            chunks = encoded_in_chunks(pipeline, prompt, negative, self.device)
        if chunks is not None:
            found |= chunks
        else:
            found["prompt"] = prompt
            put("negative_prompt", negative, "negative" if explicit else None)
        steps = self.defaults.steps if settings.steps is None else settings.steps
        guidance = self.defaults.guidance if settings.guidance is None else settings.guidance
        if steps is not None:
            put("num_inference_steps", steps, "steps")
        if guidance is not None:
            put("guidance_scale", guidance, "guidance")
        if redrawn:
            strength = DEFAULT_STRENGTH if settings.strength is None else settings.strength
            whole = steps if steps is not None else taken["num_inference_steps"].default
            if int(whole * strength) < 1:
                raise DrawingError(
                    f"strength {strength:g} of {whole} steps leaves no step to draw: expected at least {1 / whole:.3g}"
                )
            size = settings.size or _own_size(pipeline) or _multiples_of_eight(picture.size)
            found |= {"image": ImageOps.fit(picture, size, Image.Resampling.LANCZOS), "strength": strength}
        else:
            if settings.size is not None:
                put("width", settings.size[0], "size")
                put("height", settings.size[1], "size")
            if picture is not None:
                put("ip_adapter_image", picture, "like")
                pipeline.set_ip_adapter_scale(DEFAULT_STRENGTH if settings.strength is None else settings.strength)
            elif self._parts.ip_adapter is not None:
                raise DrawingError("like: expected a picture, because this painter has an IP-Adapter, got None")
        return found

    def _drawn(self, pipeline, arguments: dict, seed: int, on_step: Callable[[int, int], None] | None) -> Image.Image:
        further: dict[str, object] = {"generator": torch.Generator("cpu").manual_seed(seed)}
        if on_step is not None:

            def stepped(running, step: int, _, tensors: dict) -> dict:
                on_step(step + 1, running.num_timesteps)
                return tensors

            further["callback_on_step_end"] = stepped
        pixels = arguments.get("width", 0) * arguments.get("height", 0)
        vae = getattr(pipeline, "vae", None)
        if pixels > TILED_PIXELS and hasattr(vae, "enable_tiling"):
            vae.enable_tiling()
        pipeline.set_progress_bar_config(disable=True)
        try:
            with torch.inference_mode():
                drawn = pipeline(**arguments, **further).images[0]
        except torch.OutOfMemoryError as error:
            raise DrawingError(
                f"memory is short while drawing: {first_line(error)}; a smaller size, offload='model' or "
                "offload='sequential' need less"
            ) from error
        finally:
            # After an error or an interruption, parts that are offloaded go back to where they came from.
            with contextlib.suppress(Exception):
                pipeline.maybe_free_model_hooks()
            if pixels > TILED_PIXELS and hasattr(vae, "disable_tiling"):
                vae.disable_tiling()
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
            `stabilityai/stable-diffusion-xl-base-1.0`, which Mini-Gemini uses; or a loaded pipeline.
        dtype: `auto` or None is float16 on a GPU and float32 on a CPU.
        device: default: a GPU if there is one.
        steps, guidance: what `draw` uses where the caller gives none; None: the pipeline's own.
        scheduler: a scheduler of diffusers, or a name in `mg_fast.drawing.settings.SCHEDULERS`: `lcm`, `lightning` and
            `turbo` for few steps. None: the pipeline's own.
        lora: a LoRA's file, folder or hub id, or several of them; they are merged into the weights.
        ip_adapter: an IP-Adapter's folder or hub id, or a dict of arguments of diffusers' `load_ip_adapter`. Then
            `draw(like=...)` follows a picture, instead of starting from it.
        offload: `none` (None means it) keeps the whole pipeline on the device, `model` only the part that runs, and
            `sequential` only the layer that runs.
        compiled: run the UNet through torch.compile, which takes a minute at the first drawing of each size.

    Raises:
        CheckpointError: there is no such pipeline.
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
    if dtype == "auto":
        dtype = torch.float16 if known.type == "cuda" else torch.float32
    if not isinstance(dtype, torch.dtype):
        raise BackendError(f"dtype: expected one dtype for all parts of the pipeline, got {quoted(dtype)}")
    check_scheduler(scheduler)
    offload = check_offload(offload)
    if offload != "none" and known.type == "cpu":
        raise DrawingError(f"offload={quoted(offload)}: expected none on a CPU, where there is nothing to offload from")
    check_installed()
    source = find_pipeline(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else name_or_path
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


def _opened(like) -> Image.Image:
    try:
        return open_picture(like, label="like")
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(f"like: expected a picture, got {quoted(like)}: {first_line(error)}") from error


def _progress(on_step, done: int, count: int) -> Callable[[int, int], None] | None:
    """A callback that counts the steps of all pictures of a call."""
    if on_step is None:
        return None
    return lambda step, total: on_step(done * total + step, count * total)


def _own_size(pipeline) -> tuple[int, int] | None:
    side = getattr(pipeline, "default_sample_size", None)
    if side is None:
        side = getattr(getattr(getattr(pipeline, "unet", None), "config", None), "sample_size", None)
    factor = getattr(pipeline, "vae_scale_factor", None)
    return (side * factor,) * 2 if isinstance(side, int) and isinstance(factor, int) else None


def _multiples_of_eight(size: tuple[int, int]) -> tuple[int, int]:
    return tuple(max(8, side // 8 * 8) for side in size)
