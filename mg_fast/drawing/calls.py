"""The arguments with which a painter calls a pipeline of diffusers, and what its VAE needs meanwhile."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from PIL import Image, ImageOps

from ..errors import DrawingError
from .long_prompts import encoded_in_chunks, is_long
from .settings import DEFAULT_STRENGTH, DrawingSettings

# Mini-Gemini's negative prompt.
NEGATIVE_PROMPT = (
    "out of frame, lowres, text, error, cropped, worst quality, low quality, jpeg artifacts, ugly, duplicate, morbid, "
    "mutilated, out of frame, extra fingers, mutated hands, poorly drawn hands, poorly drawn face, mutation, deformed, "
    "blurry, dehydrated, bad anatomy, bad proportions, extra limbs, cloned face, disfigured, gross proportions, "
    "malformed limbs, missing arms, missing legs, extra arms, extra legs, fused fingers, too many fingers, long neck, "
    "username, watermark, signature"
)
# Above this many pixels of a picture, the VAE works in tiles, because its activations grow with the pixels. For SDXL
# 3.2 GB are predicted at 1024 x 1024 (bench/results/painters.json).
TILED_PIXELS = 1536 * 1536
# An IP-Adapter wants a picture in every call. Where there is none to follow, it gets this one, and does not count.
_NO_PICTURE = Image.new("RGB", (8, 8))


def call_arguments(
    pipeline,
    prompt: str,
    settings: DrawingSettings,
    picture: Image.Image | None,
    device: torch.device,
    *,
    redrawing=None,
    has_adapter: bool = False,
) -> dict[str, object]:
    """The arguments of a call, without its noise and its callback. The scale of an IP-Adapter is set here.

    Args:
        pipeline: draws from text.
        settings: with the painter's own steps and guidance where the caller gave none.
        picture: the one to start from or to follow; None: there is none.
        device: where the text encoders run.
        redrawing: the pipeline that starts from the picture and is called in the place of the other; None: there is
            no picture, or it is followed through an IP-Adapter.
        has_adapter: whether the pipeline has an IP-Adapter.

    Raises:
        DrawingError: the pipeline does not take a setting that was asked for, or no step would be left.
    """
    called = pipeline if redrawing is None else redrawing
    taken = inspect.signature(called.__call__).parameters
    found: dict[str, object] = {}

    def put(name: str, value, asked: str | None) -> None:
        if name in taken:
            found[name] = value
        elif asked is not None:
            raise DrawingError(f"{asked}: {type(called).__name__} takes no {name}")

    negative = NEGATIVE_PROMPT if settings.negative is None else settings.negative
    explicit = settings.negative or ""
    chunks = None
    if is_long(pipeline, prompt) or is_long(pipeline, explicit):
        chunks = encoded_in_chunks(pipeline, prompt, negative, device)
    if chunks is not None:
        found |= chunks
    else:
        found["prompt"] = prompt
        put("negative_prompt", negative, "negative" if explicit else None)
    if settings.steps is not None:
        put("num_inference_steps", settings.steps, "steps")
    if settings.guidance is not None:
        put("guidance_scale", settings.guidance, "guidance")
    strength = DEFAULT_STRENGTH if settings.strength is None else settings.strength
    if redrawing is not None:
        whole = taken["num_inference_steps"].default if settings.steps is None else settings.steps
        if int(whole * strength) < 1:
            raise DrawingError(
                f"strength {strength:g} of {whole} steps leaves no step to draw: expected at least {1 / whole:.3g}"
            )
        size = settings.size or own_size(pipeline) or tuple(max(8, side // 8 * 8) for side in picture.size)
        found |= {"image": ImageOps.fit(picture, size, Image.Resampling.LANCZOS), "strength": strength}
        # Some pipelines take the size from the picture, and others scale it to a size that is an argument.
        put("width", size[0], None)
        put("height", size[1], None)
    elif settings.size is not None:
        put("width", settings.size[0], "size")
        put("height", settings.size[1], "size")
    if has_adapter and redrawing is None:
        found["ip_adapter_image"] = _NO_PICTURE if picture is None else picture
        pipeline.set_ip_adapter_scale(0.0 if picture is None else strength)
    return found


def pixels(pipeline, arguments: dict[str, object]) -> int:
    """How many pixels the picture of a call has, by its arguments; 0 where nothing says it."""
    if "image" in arguments:
        width, height = arguments["image"].size
    elif "width" in arguments:
        width, height = arguments["width"], arguments["height"]
    else:
        width, height = own_size(pipeline) or (0, 0)
    return width * height


@contextlib.contextmanager
def vae_kept(pipeline, size: int) -> Iterator[None]:
    """Lets the VAE work in tiles meanwhile if a picture has many pixels, and leaves it as it was.

    SDXL's pipeline decodes in float32, and an error or an interruption there leaves the VAE in that dtype.
    """
    vae = getattr(pipeline, "vae", None)
    dtype = getattr(vae, "dtype", None)
    tiled = size > TILED_PIXELS and hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
    if tiled:
        vae.enable_tiling()
    try:
        yield
    finally:
        if tiled:
            vae.disable_tiling()
        if dtype is not None and vae.dtype != dtype:
            vae.to(dtype)


def own_size(pipeline) -> tuple[int, int] | None:
    """Width and height of the pictures that a pipeline draws if nothing else is asked for; None where it is unknown."""
    side = getattr(pipeline, "default_sample_size", None)
    if side is None:
        side = getattr(getattr(getattr(pipeline, "unet", None), "config", None), "sample_size", None)
    factor = getattr(pipeline, "vae_scale_factor", None)
    return (side * factor,) * 2 if isinstance(side, int) and isinstance(factor, int) else None
