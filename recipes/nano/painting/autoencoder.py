"""The first lesson: an autoencoder whose latents keep the edges of shapes and the strokes of print."""

import itertools

import numpy as np
import torch
from torch import Tensor

from ..arithmetic import autocast
from ..scenes import SIDE as SCENE_SIDE
from .parts import FACTOR
from .wishes import SIDE, draw_wish, picture

# How much the means and spreads of the latents' channels count that are not 0 and 1, beside the error in pixels.
SPREAD_WEIGHT = 0.02
# The spread of the noise on latents before they are decoded. What a UNet draws is never quite right either.
NOISE = 0.05
# How much squared errors count beside absolute ones. Alone, absolute errors leave small shapes out for long.
SQUARES_WEIGHT = 2.0
# How much more the pixels of print count than others, and how far a print reaches from its centre, in pixels of 192.
PRINT_WEIGHT = 8.0
_REACH = (22, 9)


def batch(seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
    """Pictures [n, 3, side, side] from -1 to 1, and the weights of their pixels [n, 1, side, side]."""
    pictures, weights = [], []
    for index in range(step * size, (step + 1) * size):
        _, scene = draw_wish(seed, index, split="autoencoder", scattered=True)
        pictures.append(np.asarray(picture(scene)))
        weight = np.ones((SIDE, SIDE), np.float32)
        for printed in scene.prints:
            (left, right), (top, bottom) = (
                (int((at - reach) * SIDE / SCENE_SIDE), int((at + reach) * SIDE / SCENE_SIDE))
                for at, reach in zip((printed.x, printed.y), _REACH)
            )
            weight[max(0, top) : bottom, max(0, left) : right] = PRINT_WEIGHT
        weights.append(weight)
    return to_tensor(np.stack(pictures)), torch.from_numpy(np.stack(weights))[:, None]


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Pictures of bytes [n, side, side, 3] as [n, 3, side, side] from -1 to 1."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss(vae, pixels: Tensor, weights: Tensor, noise: torch.Generator) -> Tensor:
    """The error of what comes back, of its differences between neighbours (its edges), and of the latents' spread."""
    latents = vae.encode(pixels).latents
    added = NOISE * torch.randn(latents.shape, generator=noise).to(latents.device)
    back = vae.decode(latents + added).sample.float()
    error = (back - pixels).abs()
    total = (weights * (error + SQUARES_WEIGHT * error.square())).mean()
    for axis in (-1, -2):
        total = total + (weights.narrow(axis, 1, SIDE - 1) * (back.diff(dim=axis) - pixels.diff(dim=axis)).abs()).mean()
    channels = latents.float().transpose(0, 1).flatten(1)
    spread = channels.mean(1).square() + channels.std(1).clamp_min(1e-3).log().square()
    return total + SPREAD_WEIGHT * spread.mean()


@torch.inference_mode()
def encode(vae, pixels: Tensor) -> Tensor:
    """The latents [n, channels, side / 2, side / 2]."""
    with autocast(pixels.device.type):
        return vae.encode(pixels).latents.float()


@torch.inference_mode()
def round_trip(vae, seed: int, count: int) -> list[tuple]:
    """Unseen scenes with a number, and their pictures before and after encoding and decoding."""
    from diffusers.image_processor import VaeImageProcessor

    found = []
    processor = VaeImageProcessor(vae_scale_factor=FACTOR)
    unseen = (draw_wish(seed, index, split="unseen", scattered=True) for index in itertools.count())
    for wished, scene in itertools.islice((one for one in unseen if one[1].print is not None), count):
        image = picture(scene)
        pixels = to_tensor(np.asarray(image)[None]).to(vae.device)
        back = vae.decode(vae.encode(pixels).latents).sample
        found.append((wished, scene, image, processor.postprocess(back)[0]))
    return found
