"""The second lesson: a UNet and two text encoders learn to make latents from words."""

import random

import torch
from torch import Tensor

from mg_fast.drawing import NEGATIVE_PROMPT

from .parts import DRAWING, assemble, embed
from .wishes import SIDE, Wish, phrased

# Errors count by the signal-to-noise ratio in the latents, and no more than by this one (Hang et al. 2023). Otherwise
# nearly clean pictures, in which little is left to decide, would count most.
MOST_SIGNAL = 5.0
# The times of training are those of an even spread to this power: more of them lie where noise is strong, because there
# it is decided what a picture of flat colours shows.
TIME_POWER = 0.7
# How many prompts are replaced by an empty one, or by the one against which mg_fast draws.
DROPPED = 0.1


def prompts(wishes: list[Wish], rng: random.Random) -> list[str]:
    """A prompt for every wish. A tenth of them say nothing, for guidance."""
    return [rng.choice(("", NEGATIVE_PROMPT)) if rng.random() < DROPPED else phrased(wished, rng) for wished in wishes]


def time_ids(count: int, like: Tensor) -> Tensor:
    """SDXL's numbers for uncropped pictures of the painter's size [n, 6]."""
    return like.new_tensor([SIDE, SIDE, 0, 0, SIDE, SIDE]).expand(count, 6)


def loss(parts: dict, latents: Tensor, texts: list[str], noise: torch.Generator) -> Tensor:
    """The weighted squared error of the predicted velocity.

    Args:
        latents: of pictures, normalised, [n, channels, side, side].
        texts: their prompts.
        noise: for the noise and the times, which are spread over the schedule.
    """
    scheduler, count = parts["scheduler"], len(latents)
    states, pooled = embed(parts, texts)
    steps = scheduler.config.num_train_timesteps
    spread = (torch.arange(count) + torch.rand((), generator=noise)) / count
    times = (spread[torch.randperm(count, generator=noise)] ** TIME_POWER * steps).long().to(latents.device)
    added = torch.randn(latents.shape, generator=noise).to(latents.device)
    noisy = scheduler.add_noise(latents, added, times)
    wanted = scheduler.get_velocity(latents, added, times)
    further = {"text_embeds": pooled, "time_ids": time_ids(count, latents)}
    found = parts["unet"](noisy, times, states, added_cond_kwargs=further).sample
    alphas = scheduler.alphas_cumprod.to(latents.device)[times]
    signal = alphas / (1 - alphas).clamp_min(1e-8)
    # The error of a velocity is the error of the picture times one plus the ratio.
    weight = (1 + signal).clamp_max(1 + MOST_SIGNAL) / (1 + signal)
    return (weight * (found.float() - wanted).square().mean((1, 2, 3))).mean()


@torch.inference_mode()
def sample(parts: dict, wishes: list[Wish], *, seed: int) -> list:
    """A picture for every wish, drawn together."""
    pipeline = assemble(parts)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        [wished.prompt for wished in wishes],
        negative_prompt=[NEGATIVE_PROMPT] * len(wishes),
        num_inference_steps=DRAWING["steps"],
        guidance_scale=DRAWING["guidance"],
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(wishes))],
    )
    return drawn.images
