"""The settings of a drawing, and the checks of them."""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...errors import quoted
from ...runtime.arguments import whole_number
from .stable_diffusion import import_diffusers

# What a scheduler of diffusers must have to be used here.
_SCHEDULER = ("set_timesteps", "step", "scale_model_input", "init_noise_sigma")


@dataclass(frozen=True)
class DrawingOptions:
    """How pictures are drawn.

    Attributes:
        guidance_scale: how far the prediction is moved away from that for the negative condition. Up to 1 there is no
            guidance, and the U-Net computes one row for a picture instead of two.
        num_inference_steps: steps of the scheduler.
        num_images: pictures for every target.
        generator: what the noise is drawn with, one for all rounds or a list with one for each. A round draws every
            target once. None: round k has a generator on the model's device with the seed sd_base_seed + k, as in the
            original. A batch draws its first latents, and then its noise of every step, the last one, too. A generator
            on the CPU gives the same noise for a model on any device; on a GPU every step then waits for the copy.
        latents: [num_images * targets, channels, h, w], the first latents with a standard deviation of one, in the
            place of drawn ones; the first round comes first.
        scheduler: a scheduler of diffusers, or the class of one, which then has the checkpoint's settings. A copy of it
            is used. None: DDPM with the checkpoint's settings, as in the original.
        batch_size: most pictures that the U-Net computes at once. A larger batch needs more memory, and draws in
            another order.
        on_step: is called after every step of a batch with the step's number from 0 on and the latents, which it must
            not write. What it raises ends the drawing and reaches the caller; nothing is kept of it.
    """

    guidance_scale: float = 7.5
    num_inference_steps: int = 30
    num_images: int = 1
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: torch.Tensor | None = None
    scheduler: object | None = None
    batch_size: int = 8
    on_step: Callable[[int, torch.Tensor], None] | None = None

    def __post_init__(self):
        for name in ("num_inference_steps", "num_images", "batch_size"):
            if (whole_number(getattr(self, name)) or 0) < 1:
                raise ValueError(f"{name} must be a positive whole number, got {quoted(getattr(self, name))}")
        scale = self.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a number, got {quoted(scale)}")
        if self.on_step is not None and not callable(self.on_step):
            raise ValueError(f"on_step must be a function of a step and latents, got {quoted(self.on_step)}")
        several = isinstance(self.generator, Sequence)
        given = list(self.generator) if several else [self.generator]
        if not all(one is None and not several or isinstance(one, torch.Generator) for one in given):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {quoted(self.generator)}")
        if several and len(given) != self.num_images:
            raise ValueError(f"expected a generator for each of {self.num_images} rounds, got {len(given)}")

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    def generators(self, seed: int, device: torch.device) -> list[torch.Generator]:
        """The generator of every round; `seed` is that of the first one, where none is given."""
        if isinstance(self.generator, Sequence):
            return list(self.generator)
        if self.generator is not None:
            return [self.generator] * self.num_images
        return [torch.Generator(device).manual_seed(seed + k) for k in range(self.num_images)]

    def check_latents(self, shape: Sequence[int]) -> None:
        """Raises ValueError unless given latents are floating point and of this shape."""
        if self.latents is None:
            return
        if not isinstance(self.latents, torch.Tensor) or not self.latents.is_floating_point():
            got = self.latents.dtype if isinstance(self.latents, torch.Tensor) else quoted(self.latents)
            raise ValueError(f"latents must be a floating-point tensor, got {got}")
        if list(self.latents.shape) != list(shape):
            raise ValueError(f"latents must be {list(shape)}, got {list(self.latents.shape)}")


class Steps:
    """A scheduler of its own for one batch: what it asks for, and its steps.

    Its tables and numbers lie on the CPU, so that a step makes no use of a GPU's results on the host.

    Args:
        options: of the drawing.
        settings: the checkpoint's configuration of its scheduler.

    Attributes:
        timesteps: on the CPU, as the scheduler made them.

    Raises:
        ValueError: the scheduler is none of diffusers', or it does not take so many steps.
    """

    def __init__(self, options: DrawingOptions, settings: dict | None):
        scheduler = options.scheduler
        if scheduler is None:
            scheduler = import_diffusers().DDPMScheduler
        if isinstance(scheduler, type) and hasattr(scheduler, "from_config"):
            scheduler = scheduler.from_config(settings or {})
        if missing := [name for name in _SCHEDULER if not hasattr(scheduler, name)]:
            raise ValueError(
                f"scheduler must be one of diffusers' with {', '.join(_SCHEDULER)}, or the class of one; "
                f"{quoted(options.scheduler)} lacks {', '.join(missing)}"
            )
        self._scheduler = copy.deepcopy(scheduler)
        count, most = options.num_inference_steps, getattr(self._scheduler.config, "num_train_timesteps", math.inf)
        if count > most:
            raise ValueError(f"num_inference_steps must be at most {most}, as the scheduler says, got {count}")
        self._scheduler.set_timesteps(count, device="cpu")
        self.timesteps = self._scheduler.timesteps
        self._takes_generator = "generator" in inspect.signature(self._scheduler.step).parameters

    @property
    def first_deviation(self):
        """What the first latents of a standard deviation of one are multiplied with."""
        return self._scheduler.init_noise_sigma

    def model_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self._scheduler.scale_model_input(latents, timestep)

    def next(
        self, predicted: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """The latents after a step."""
        options = {"generator": generator} if self._takes_generator else {}
        return self._scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0]
