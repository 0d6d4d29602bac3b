"""Checks a drawn picture against its wish by the colours and outlines of what is in it, without any model."""

from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from ..scenes import BACKGROUNDS, COLOURS
from .wishes import Wish

# Pixels that are farther than this from the background's colour belong to something that lies on it.
_DIFFERENT = 38.0
# A picture is enlarged before outlines are measured, so that they are smoother than its pixels.
_ENLARGED = 4
# Shapes are at least this high and wide, and print is not as high, in pixels of the picture.
_LEAST = 11.5
# Spots smaller than this area are taken as specks, which do not count.
_SPECK = 12.0
# Numbers stand below this share of the height. What is as small and stands above it is a shape that is none.
_PRINT_FROM = 0.75
# A colour farther than this from all named colours is none of them, and so is a background farther than that from all.
_FARTHEST = 75.0
_FARTHEST_GROUND = 40.0


@dataclass(frozen=True)
class Verdict:
    """What was found in a picture.

    Attributes:
        background: the name of its colour; None where it is none that has a name.
        shapes: each (kind, colour) from left to right; kind or colour is None where it is none that has a name.
        shapes_right, background_right, number_right: whether they are what was wished for. Shapes are right wherever
            they stand. A number is right where there is print if and only if it was asked for, whatever it says.
        order_right: whether the shapes are right and stand from left to right in the order of the wish.
    """

    background: str | None
    shapes: tuple[tuple[str | None, str | None], ...]
    shapes_right: bool
    order_right: bool
    background_right: bool
    number_right: bool


def check(picture: Image.Image, wished: Wish) -> Verdict:
    """Compares a picture with its wish. Holes in shapes are not looked for."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    named, away = _nearest(ground, BACKGROUNDS)
    background = named if away <= _FARTHEST_GROUND else None
    height, width = pixels.shape[:2]
    large = cv2.resize(pixels, (width * _ENLARGED, height * _ENLARGED), interpolation=cv2.INTER_CUBIC)
    distance = np.linalg.norm(large - ground, axis=-1)
    mask = (distance > _DIFFERENT).astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    found: list[tuple[float, str | None, str | None]] = []
    printed = False
    for outline in outlines:
        if cv2.contourArea(outline) < _SPECK * _ENLARGED**2:
            continue
        (x, y), (across, down), _ = cv2.minAreaRect(outline)
        if min(across, down) < _LEAST * _ENLARGED:
            if y > _PRINT_FROM * len(large):
                printed = True
            else:
                found.append((x, None, None))
            continue
        inside = np.zeros(mask.shape, np.uint8)
        cv2.drawContours(inside, [outline], -1, 1, cv2.FILLED)
        # The rim is a blend of two colours.
        core = cv2.erode(inside, np.ones((2 * _ENLARGED + 1,) * 2, np.uint8))
        if not core.any():
            found.append((x, None, None))
            continue
        colour = np.median(large[core > 0], axis=0)
        name, far = _nearest(colour, COLOURS)
        # The outline lies where the shape and the background have equal parts.
        half = (inside > 0) & (distance > np.linalg.norm(colour - ground) / 2)
        parts, _ = cv2.findContours(half.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        kind = _kind(max(parts, key=cv2.contourArea)) if parts else None
        found.append((x, kind, name if far <= _FARTHEST else None))
    shapes = tuple((kind, colour) for _, kind, colour in sorted(found, key=lambda one: one[0]))
    return Verdict(
        background,
        shapes,
        shapes_right=Counter(shapes) == Counter(wished.shapes),
        order_right=shapes == wished.shapes,
        background_right=background == wished.background,
        number_right=printed == wished.number,
    )


def _nearest(colour: np.ndarray, named: dict) -> tuple[str, float]:
    return min(((name, float(np.linalg.norm(colour - rgb))) for name, rgb in named.items()), key=lambda found: found[1])


def _kind(outline: np.ndarray) -> str | None:
    """The kind of a shape by how much of its hull, and how much of the smallest circle around it, it fills."""
    area = cv2.contourArea(outline)
    hull = area / cv2.contourArea(cv2.convexHull(outline))
    circle = area / (np.pi * cv2.minEnclosingCircle(outline)[1] ** 2)
    if hull < 0.75:
        # A star fills 0.52 of its hull and 0.39 of its circle.
        return "star" if 0.3 < circle < 0.55 else None
    if hull < 0.9:
        return None
    # A triangle fills 0.41 of its circle, a square 0.64, and a circle all of it.
    if circle > 0.85:
        return "circle"
    return "triangle" if 0.33 < circle < 0.53 else "square" if 0.55 < circle < 0.76 else None
