"""Draws varied scenes and pages: what ordinary scenes never show.

None to six shapes, some of them alike; numbers of one to five digits, 8 to 16 pixels high, in more fonts, and anywhere
in the picture, also across the border between the windows of two queries.
"""

import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .fonts import FONTS, MORE_FONTS
from .scenes import (
    BACKGROUNDS,
    CELL,
    CLUTTER,
    COLOURS,
    KINDS,
    SIDE,
    Print,
    Scene,
    Shape,
    apart,
    draw_background,
    draw_clutter,
    draw_number,
    draw_print,
    draw_shape,
    place,
)

TRAINED = (*FONTS, *MORE_FONTS)
HEIGHTS = (8.0, 16.0)
VARIED_DIGITS = (1, 2, 3, 3, 4, 4, 5, 5)
# How often a scene holds none, one, two shapes and so on. Long lists are the hardest.
SHAPES = (2, 2, 3, 4, 4, 3, 3)
# The share of scenes with shapes alike, and of further shapes there that are like one before.
ALIKE, ALIKE_SHAPES = 0.5, 0.4
# A number lies across a border if its centre is less than this far from it, in pixels of 192.
ACROSS = 4.0


def draw_varied(
    seed: int,
    index: int,
    *,
    split: str = "train",
    shapes: int | None = None,
    alike: bool | None = None,
    numbers: int | None = None,
    digits: Sequence[int] = VARIED_DIGITS,
    height: float | None = None,
    fonts: Sequence[str | None] = TRAINED,
    across: bool | None = None,
) -> Scene:
    """Draws the varied scene of a seed and an index, which is the same every time.

    Args:
        seed, index: together they name the scene.
        split: `train` or `unseen`, as in `draw_scene`.
        shapes: how many shapes to draw, as far as there is room, instead of none to six.
        alike: whether some shapes have both kind and colour in common: the first two do if True. None leaves it to
            chance.
        numbers: how many random numbers to print, as far as there is room, instead of one in nine scenes of ten.
        digits: the numbers of digits that a number may have.
        height: the height of the print in pixels of 192, instead of 8 to 16.
        fonts: the fonts to choose from.
        across: whether numbers lie across the border of two windows. None lets half of them lie anywhere.
    """
    rng = random.Random(f"varied/{split}/{seed}/{index}")
    background = rng.choice(list(BACKGROUNDS))
    base = BACKGROUNDS[background]
    boxes: list[tuple[float, float, float, float]] = []
    taken: set[tuple[int, int]] = set()
    prints = []
    for _ in range(int(rng.random() < 0.9) if numbers is None else numbers):
        text, tall = draw_number(rng, training=split == "train", digits=digits), height or _height(rng)
        fits = on_border if across else _anywhere if across is None and rng.random() < 0.5 else None
        spot = place(rng, half_width(text, tall), tall / 2 + 5, boxes, taken, fits=fits)
        if spot is not None:
            prints.append((text, *spot, tall))
    placed: list[Shape] = []
    same = rng.random() < ALIKE if alike is None else alike
    for _ in range(rng.choices(range(len(SHAPES)), SHAPES)[0] if shapes is None else shapes):
        size = rng.uniform(22, 40)
        spot = place(rng, size / 2, size / 2, boxes, taken)
        if spot is None:
            continue
        if same and placed and (rng.random() < ALIKE_SHAPES or (alike and len(placed) == 1)):
            before = rng.choice(placed)
            kind, colour = before.kind, before.colour
        else:
            kind, colour = _other(rng, placed, base)
        placed.append(Shape(kind, colour, *spot, size))

    image = draw_background(rng, base)
    canvas = ImageDraw.Draw(image)
    for kind in CLUTTER[split]:
        draw_clutter(rng, canvas, kind, base, boxes)
    for shape in placed:
        draw_shape(rng, canvas, shape)
    printed = [draw_print(rng, image, text, x, y, base, fonts=fonts, height=tall) for text, x, y, tall in prints]
    return Scene(background, placed, printed, image)


def draw_lines(seed: int, index: int, *, side: int = 2 * CELL) -> tuple[Image.Image, list[Print]]:
    """Draws a page of `side` pixels of 192 full of lines of print, from which the HR tower learns its digits."""
    rng = random.Random(f"lines/{seed}/{index}")
    base = rng.choice(list(BACKGROUNDS.values()))
    image = draw_background(rng, base, side)
    lines = []
    # Plates need more room. Otherwise they would hide what was printed before them.
    plates = rng.random() < 0.4
    y = rng.uniform(6, 16)
    while y < side - 5:
        tall = _height(rng)
        text = " ".join(draw_number(rng, training=True, digits=VARIED_DIGITS) for _ in range(3))
        at = side / 2 + rng.uniform(-12, 12)
        lines.append(draw_print(rng, image, text, at, y, base, plated=plates, fonts=TRAINED, height=tall))
        y += tall + rng.uniform(3, 6) + 9 * plates
    return image, lines


def draw_numbers(seed: int, index: int, *, side: int = 4 * CELL) -> tuple[Image.Image, list[Print]]:
    """Draws a page with as many numbers as there is room for, at most one per cell, and clutter.

    The high-resolution tower learns whole numbers from it.
    """
    rng = random.Random(f"numbers/{seed}/{index}")
    base = rng.choice(list(BACKGROUNDS.values()))
    image = draw_background(rng, base, side)
    boxes: list[tuple[float, float, float, float]] = []
    taken: set[tuple[int, int]] = set()
    prints = []
    for _ in range(10):
        text, tall = draw_number(rng, training=True, digits=VARIED_DIGITS), _height(rng)
        fits = _anywhere if rng.random() < 0.5 else None
        spot = place(rng, half_width(text, tall), tall / 2 + 2, boxes, taken, side, fits=fits)
        if spot is not None:
            prints.append((text, *spot, tall))
    for kind in CLUTTER["train"]:
        draw_clutter(rng, ImageDraw.Draw(image), kind, base, boxes, side)
    return image, [draw_print(rng, image, text, x, y, base, fonts=TRAINED, height=tall) for text, x, y, tall in prints]


def half_width(text: str, height: float) -> float:
    """Half the width of a number in the widest of the fonts, in pixels of 192."""
    return 0.48 * height * len(text)


def on_border(x: float, y: float) -> bool:
    """Whether a thing with this centre lies across the border between two cells."""
    return any(abs(at - edge) < ACROSS for at in (x, y) for edge in range(CELL, SIDE, CELL))


def _anywhere(x: float, y: float) -> bool:
    return True


def _height(rng: random.Random) -> float:
    """A height of print. Small print is harder, so about two thirds of it are at most 12 pixels high."""
    low, high = HEIGHTS
    return rng.uniform(low, high) if rng.random() < 0.7 else rng.uniform(low, 12)


def _other(rng: random.Random, placed: Sequence[Shape], base: tuple) -> tuple[str, str]:
    """A kind and a colour that can be seen on the ground and that no shape has yet."""
    there = {(shape.kind, shape.colour) for shape in placed}
    # Half of the time a kind that is there already comes again. Otherwise counts would rarely exceed one.
    kind = rng.choice(placed).kind if placed and rng.random() < 0.5 else rng.choice(KINDS)
    for other in (kind, *KINDS):
        free = [name for name, rgb in COLOURS.items() if apart(rgb, base) > 110 and (other, name) not in there]
        if free:
            return other, rng.choice(free)
    raise ValueError(f"no kind and colour are left for one more shape beside {len(placed)}")
