"""A picture of a prompt: SDXL with Mini-Gemini's settings, and the painter of mg_fast over the same weights.

Latency is by the host's clock, since that is what a user waits for. The stages of a call are both text encoders, the
steps of the UNet, and the VAE. SDXL's weights are random: their values do not change the work.
"""

import copy
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mg_fast.drawing import NEGATIVE_PROMPT, Painter
from mg_fast.drawing.pipelines import PipelineParts
from mg_fast.testing.random_pipelines import SDXL, TINY_SDXL, random_sdxl

from ..painters import floor_flop
from ..registry import Call, Case, Cost, Provider

# The tokenizers here read a byte as a token, so it has at most 75 bytes.
PROMPT = "a small harbour at dawn, fishing boats, soft light on wet stones"
SEED = 7
# Mini-Gemini draws with the defaults of SDXL's pipeline.
STEPS = 50
# Variants of the painter's UNet that are measured beside it.
FUSED, COMPILED = "fused projections", "compiled"


@dataclass(frozen=True)
class Drawing:
    """A pipeline on its device as the original has it, a painter's with a UNet of its own, and the side of pictures."""

    plain: object
    painted: object
    side: int
    dtype: torch.dtype
    device: str


def cases() -> list[Case]:
    found = [_case("tiny-32-b1-float32", TINY_SDXL, 32, torch.float32, ("cpu",), {"painter": 4}, base=4)]
    steps = {"painter": STEPS, "painter, 30 steps": 30}
    found.append(_case("sdxl-1024-b1-float16", SDXL, 1024, torch.float16, ("cuda",), steps))
    few = {"painter": 4}
    found.append(_case("sdxl-lightning-1024-b1-float16", SDXL, 1024, torch.float16, ("cuda",), few, base=4, few=True))
    return found


def _case(
    name: str,
    settings: Mapping,
    side: int,
    dtype: torch.dtype,
    devices: tuple[str, ...],
    steps: Mapping[str, int],
    *,
    base: int = STEPS,
    few: bool = False,
) -> Case:
    """A case whose baseline is diffusers' own pipeline.

    Args:
        steps: of each provider of mg_fast.
        base: steps of the baseline.
        few: with the scheduler of SDXL-Lightning and without guidance, as its LoRA needs it.
    """
    guidance = 0.0 if few else None
    providers = {"reference": _provider(functools.partial(_plain, base, guidance))}
    for label, count in steps.items():
        providers[label] = _provider(functools.partial(_painted, count, guidance, ""))
    variants = (FUSED, COMPILED) if devices == ("cuda",) else (FUSED,)
    for variant in variants:
        providers[f"painter, {variant}"] = _provider(functools.partial(_painted, base, guidance, variant))
    return Case(
        f"drawing/{name}",
        functools.partial(_make, settings, side, dtype, few),
        providers,
        None,
        least=Cost(flop=floor_flop(base)) if settings is SDXL and not few else Cost(),
        devices=devices,
        clocked=True,
        release=_held.cache_clear,
    )


def _make(settings: Mapping, side: int, dtype: torch.dtype, few: bool, device: str) -> Drawing:
    return Drawing(*_held(settings is SDXL, dtype, few, device), side, dtype, device)


@functools.lru_cache(maxsize=1)
def _held(published: bool, dtype: torch.dtype, few: bool, device: str) -> tuple:
    from mg_fast.drawing.pipelines import load_pipeline

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            pipeline = random_sdxl(SDXL if published else TINY_SDXL)
    finally:
        torch.set_default_dtype(before)
    parts = PipelineParts("lightning" if few else None)
    painted = load_pipeline(_with_own_unet(pipeline), dtype, torch.device(device), parts)
    pipeline.scheduler = type(painted.scheduler).from_config(painted.scheduler.config)
    return pipeline, painted


def _with_own_unet(pipeline):
    """The same pipeline over a copy of the UNet, because a painter and its variants change it in place."""
    return type(pipeline)(**{**pipeline.components, "unet": copy.deepcopy(pipeline.unet)})


def _provider(build: Callable[[Drawing], Call]) -> Provider:
    return Provider(lambda drawing: build(drawing)[0], stages=lambda drawing: build(drawing)[1]())


def _plain(steps: int, guidance: float | None, drawing: Drawing) -> tuple[Call, Callable[[], list[dict]]]:
    """diffusers' pipeline as Mini-Gemini calls it."""
    pipeline, options = drawing.plain, {} if guidance is None else {"guidance_scale": guidance}
    pipeline.set_progress_bar_config(disable=True)

    def draw(on_step: Callable[[int, int], None] | None = None):
        def stepped(running, step: int, _, tensors: dict) -> dict:
            if on_step is not None:
                on_step(step + 1, running.num_timesteps)
            return tensors

        generator = torch.Generator("cpu").manual_seed(SEED)
        size = {"width": drawing.side, "height": drawing.side}
        return pipeline(
            PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
            num_inference_steps=steps,
            generator=generator,
            callback_on_step_end=stepped,
            **size,
            **options,
        ).images[0]

    return _clocked(draw, drawing.device)


def _painted(
    steps: int, guidance: float | None, variant: str, drawing: Drawing
) -> tuple[Call, Callable[[], list[dict]]]:
    pipeline = _with_own_unet(drawing.painted) if variant else drawing.painted
    if variant == FUSED:
        pipeline.unet.fuse_qkv_projections()
    device, compiled = torch.device(drawing.device), variant == COMPILED
    painter = Painter(pipeline, dtype=drawing.dtype, device=device, steps=steps, compiled=compiled)

    def draw(on_step: Callable[[int, int], None] | None = None):
        (picture,) = painter.draw(PROMPT, seed=SEED, size=drawing.side, guidance=guidance, on_step=on_step)
        return picture

    return _clocked(draw, drawing.device)


def _clocked(draw: Callable, device: str) -> tuple[Call, Callable[[], list[dict]]]:
    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    def call():
        began = now()
        picture = draw()
        return torch.tensor(list(picture.resize((8, 8)).tobytes())), [now() - began]

    def stages() -> list[dict]:
        moments = [now()]
        draw(lambda step, total: moments.append(now()))
        moments.append(now())
        # The first moment after a step also holds the text encoders, which take as long as it takes more than the
        # other steps.
        steps = [after - before for before, after in zip(moments[1:-2], moments[2:-1])]
        step = sum(steps) / len(steps) if steps else 0.0
        return [
            {"name": "encode", "ms": max(0.0, moments[1] - moments[0] - step), "peak_mib": None},
            {"name": "per step", "ms": step, "peak_mib": None},
            {"name": "decode", "ms": moments[-1] - moments[-2], "peak_mib": None},
        ]

    return call, stages
