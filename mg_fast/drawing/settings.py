"""The settings of a drawing, checked before anything is loaded or computed."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import DrawingError, PromptError, quoted
from ..runtime.arguments import real_number, whole_number

# The name of a scheduler, its class in diffusers, and the settings that differ from the pipeline's own.
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lightning": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
OFFLOADS = ("none", "model", "sequential")
# How much of a guiding picture is redrawn where the caller does not say.
DEFAULT_STRENGTH = 0.6
# The most pictures of one call.
MOST_PICTURES = 64


@dataclass(frozen=True)
class DrawingSettings:
    """How a picture is drawn; None leaves a setting to the painter, and then to the pipeline itself.

    Attributes:
        negative: what the picture should not show.
        size: side of a square picture, or (width, height), in pixels; multiples of eight.
        seed: of the first picture; the next ones have the seeds after it.
        steps: steps of the diffusion.
        guidance: weight of the prompt against the negative prompt.
        count: number of pictures.
        strength: with a guiding picture, which share of the diffusion is run over it: 0 would keep it, 1 redraws all.

    Raises:
        DrawingError: a value is out of its range; the message says which is expected.
    """

    negative: str | None = None
    size: int | tuple[int, int] | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    count: int = 1
    strength: float | None = None

    def __post_init__(self):
        if self.negative is not None and not isinstance(self.negative, str):
            raise DrawingError(f"negative: expected a text, got {quoted(self.negative)}")
        self._set("size", None if self.size is None else _size(self.size))
        self._set("steps", None if self.steps is None else _whole("steps", self.steps, 1))
        self._set("count", _whole("count", self.count, 1, MOST_PICTURES))
        # torch takes seeds of 64 bits, and the last picture's seed is the largest.
        self._set("seed", None if self.seed is None else _whole("seed", self.seed, 0, 2**63 - self.count))
        self._set("guidance", None if self.guidance is None else _real("guidance", self.guidance, 0.0, 1000.0))
        self._set("strength", None if self.strength is None else _real("strength", self.strength, 0.0, 1.0))

    def _set(self, name: str, value) -> None:
        object.__setattr__(self, name, value)


def check_prompt(prompt: object) -> str:
    """The prompt without white space around it.

    Raises:
        PromptError: it is no text, or an empty one.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"prompt: expected a text that says what to draw, got {quoted(prompt)}")
    if not prompt.strip():
        raise PromptError("prompt: expected a text that says what to draw, got an empty one")
    return prompt.strip()


def check_scheduler(scheduler: object) -> None:
    """Raises DrawingError unless this is None, a name in `SCHEDULERS`, or a scheduler of diffusers."""
    if scheduler is None or hasattr(scheduler, "set_timesteps"):
        return
    if scheduler not in SCHEDULERS:
        raise DrawingError(
            f"scheduler: expected {', '.join(SCHEDULERS)}, or a scheduler of diffusers, got {quoted(scheduler)}"
        )


def check_offload(offload: object) -> str:
    """The name of the offloading, "none" for None.

    Raises:
        DrawingError: there is no such offloading.
    """
    if offload is None:
        return "none"
    if offload not in OFFLOADS:
        raise DrawingError(f"offload: expected {', '.join(OFFLOADS)}, got {quoted(offload)}")
    return offload


def _size(size) -> tuple[int, int]:
    pair = (size, size) if whole_number(size) is not None else size
    sides = [whole_number(side) for side in pair] if isinstance(pair, (tuple, list)) and len(pair) == 2 else [None]
    if any(side is None or side < 8 or side % 8 for side in sides):
        raise DrawingError(
            f"size: expected a side or (width, height) in pixels, multiples of 8 and at least 8, got {quoted(size)}"
        )
    return sides[0], sides[1]


def _whole(name: str, value, least: int, most: int | None = None) -> int:
    number = whole_number(value)
    if number is None or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise DrawingError(f"{name}: expected a whole number {limits}, got {quoted(value)}")
    return number


def _real(name: str, value, least: float, most: float) -> float:
    number = real_number(value)
    if number is None or not least <= number <= most:
        raise DrawingError(f"{name}: expected a number from {least:g} to {most:g}, got {quoted(value)}")
    return number
