"""Draws scenes from a seed: coloured shapes, clutter and one small printed number.

The print is 10 to 12 pixels high where the picture is seen at 192 pixels, and 4 to 5 pixels where it is seen at 84.
Only the high-resolution branch can read it.

`python -m recipes.nano.write_scenes FOLDER` writes a few scenes as PNG files, with the questions about them.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageChops, ImageDraw

from .fonts import FONTS, advance_of, font_of

# A scene is drawn at twice the size at which the high-resolution branch sees it. All measures below are in the pixels
# of that branch.
SIDE = 192
CELL = 32
DRAWN = 2
PRINT_HEIGHT = (10.0, 12.0)
# The width of four digits in the widest font, with most of their plate.
PRINT_WIDTH = 46
# The largest number of digits in ordinary scenes is four, and in varied scenes five.
DIGITS = (2, 3, 3, 4, 4)
MAX_DIGITS = 5

COLOURS = {
    "red": (205, 30, 40),
    "orange": (245, 130, 20),
    "yellow": (245, 220, 40),
    "green": (35, 150, 60),
    "blue": (35, 75, 215),
    "purple": (130, 50, 165),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
BACKGROUNDS = {
    "white": (240, 240, 238),
    "gray": (130, 130, 132),
    "black": (28, 28, 30),
    "beige": (224, 202, 160),
    "pink": (240, 165, 190),
    "teal": (60, 160, 165),
}
KINDS = ("circle", "square", "star", "triangle")
# Words for the place of something in the picture, down and across. No word is in both lists.
THIRDS = (("top", "middle", "bottom"), ("left", "centre", "right"))
WORDS = ("no", "one", "two", "three", "four", "five", "six")
TYPES = ("number", "where", "colour", "count", "background", "describe", "draw")
CLUTTER = {"train": ("lines", "dots", "blobs"), "unseen": ("arcs", "crosses", "dashes")}


@dataclass(frozen=True)
class Shape:
    """A shape of one of `KINDS` and `COLOURS`, with its centre and diameter in pixels of 192."""

    kind: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Print:
    """A printed number or a line of numbers, with its centre, its height and its digits' centres in pixels of 192."""

    text: str
    x: float
    y: float
    height: float
    digits: tuple[tuple[float, float], ...] = ()


@dataclass
class Scene:
    """A drawn scene. `image` is an RGB picture of 384x384 pixels."""

    background: str
    shapes: list[Shape]
    prints: list[Print]
    image: Image.Image = field(repr=False)

    @property
    def print(self) -> Print | None:
        """The number, if there is one. A crowded scene has several, and no question is asked about them."""
        return self.prints[0] if self.prints else None

    def of(self, kind: str) -> list[Shape]:
        return [shape for shape in self.shapes if shape.kind == kind]


def held_out(number: str) -> bool:
    """Whether a number is kept from training, as one in seven is, so that evaluation can tell reading from memory."""
    return int(number) % 7 == 3


def draw_number(rng: random.Random, *, training: bool, digits: Sequence[int] = DIGITS) -> str:
    """A number without a leading zero, whose length is one of `digits`.

    In training it is never one that is held out.
    """
    while True:
        length = rng.choice(digits)
        number = str(rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length))
        if not (training and held_out(number)):
            return number


def draw_scene(
    seed: int,
    index: int,
    *,
    split: str = "train",
    number: str | None = None,
    shapes: int | None = None,
    numbers: int | None = None,
) -> Scene:
    """Draws the scene of a seed and an index, which is the same every time.

    Args:
        seed, index: together they name the scene.
        split: `train` or `unseen`. Their scenes differ for the same seed: unseen ones have other clutter, and any
            number.
        number: the number to print instead of a random one.
        shapes: how many shapes to draw, as far as there are room and colours, instead of one to four.
        numbers: how many random numbers to print, as far as there is room, instead of one in nine scenes of ten. It
            cannot be combined with `number`.
    """
    if number is not None and numbers is not None:
        raise ValueError(
            f"draw_scene: expected a number to print or how many random ones, got both: {number!r} and {numbers}"
        )
    rng = random.Random(f"{split}/{seed}/{index}")
    background = rng.choice(list(BACKGROUNDS))
    base = BACKGROUNDS[background]
    if numbers is None:
        numbers = int(number is not None or rng.random() < 0.9)
    boxes: list[tuple[float, float, float, float]] = []
    taken: set[tuple[int, int]] = set()
    # Prints are placed first, and shapes around them.
    texts = [number or draw_number(rng, training=split == "train") for _ in range(numbers)]
    places = [place(rng, PRINT_WIDTH / 2, 10, boxes, taken) for _ in texts]
    placed: list[Shape] = []
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4)) if shapes is None else shapes):
        size = rng.uniform(22, 40)
        spot = place(rng, size / 2, size / 2, boxes, taken)
        if spot is not None:
            # Half of the time a kind that is there already comes again. Otherwise counts would rarely exceed one.
            kind = rng.choice(placed).kind if placed and rng.random() < 0.5 else rng.choice(KINDS)
            # No two shapes are alike, so that each can be named.
            there = {shape.colour for shape in placed if shape.kind == kind}
            colours = [name for name, rgb in COLOURS.items() if apart(rgb, base) > 110 and name not in there]
            if colours:
                placed.append(Shape(kind, rng.choice(colours), *spot, size))

    image = draw_background(rng, base)
    canvas = ImageDraw.Draw(image)
    for kind in CLUTTER[split]:
        draw_clutter(rng, canvas, kind, base, boxes)
    for shape in placed:
        draw_shape(rng, canvas, shape)
    prints = [draw_print(rng, image, text, *spot, base) for text, spot in zip(texts, places) if spot is not None]
    return Scene(background, placed, prints, image)


def draw_print(
    rng: random.Random,
    image: Image.Image,
    text: str,
    x: float,
    y: float,
    base: tuple[int, int, int],
    *,
    plated: bool | None = None,
    fonts: Sequence[str | None] = FONTS,
    height: float | None = None,
) -> Print:
    """Prints a number on the picture, on a plate or directly on the ground (None: either).

    Args:
        fonts: one of these is taken.
        height: the height of the digits in pixels of 192; None takes one of ordinary scenes.

    Returns:
        The print, with its place and the places of its digits.
    """
    height = rng.uniform(*PRINT_HEIGHT) if height is None else height
    font = font_of(rng.choice(fonts), round(height * DRAWN * 2) / 2)
    angle = rng.gauss(0, 4)
    plated = rng.random() < 0.6 if plated is None else plated
    plate = rng.choice([rgb for rgb in COLOURS.values() if apart(rgb, base) > 60]) if plated else None
    ground = _jitter(rng, plate or base)
    inks = [rgb for rgb in COLOURS.values() if abs(_luma(rgb) - _luma(ground)) > 105]
    ink = _jitter(rng, rng.choice(inks or [COLOURS["white"], COLOURS["black"]]))

    left, top, right, bottom = font.getbbox(text)
    width, tall = right - left, bottom - top
    mask = Image.new("L", (round(width) + 16, round(tall) + 16))
    middle = (mask.width / 2, mask.height / 2)
    start = (middle[0] - (left + right) / 2, middle[1] - (top + bottom) / 2)
    ImageDraw.Draw(mask).text(start, text, 255, font)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    cx, cy = x * DRAWN, y * DRAWN

    def turned(dx: float, dy: float) -> tuple[float, float]:
        # The angle is counter-clockwise, and y points downwards.
        return cx + dx * cos + dy * sin, cy - dx * sin + dy * cos

    if plate is not None:
        w, h = width / 2 + rng.uniform(5, 10), tall / 2 + rng.uniform(5, 10)
        outline = ink if rng.random() < 0.5 else None
        ImageDraw.Draw(image).polygon([turned(*p) for p in ((-w, -h), (w, -h), (w, h), (-w, h))], ground, outline)
    mask = mask.rotate(angle, Image.Resampling.BILINEAR)
    corner = (round(cx - middle[0]), round(cy - middle[1]))
    image.paste(ink, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    centres, across = [], start[0] - middle[0]
    for character in text:
        advance = advance_of(font, character)
        if character != " ":
            centres.append(tuple(v / DRAWN for v in turned(across + advance / 2, 0)))
        across += advance
    return Print(text, x, y, height, tuple(centres))


def place(
    rng: random.Random,
    half_width: float,
    half_height: float,
    boxes: list,
    taken: set,
    side: int = SIDE,
    *,
    fits: Callable[[float, float], bool] | None = None,
) -> tuple[float, float] | None:
    """Finds a free spot and marks its box and its cell as taken; None where none was found.

    Args:
        fits: says whether a centre may lie there, instead of `clear_of_edges` across and down.
    """
    for _ in range(40):
        x = rng.uniform(half_width + 2, side - half_width - 2)
        y = rng.uniform(half_height + 2, side - half_height - 2)
        if not (fits(x, y) if fits else clear_of_edges(x, side) and clear_of_edges(y, side)):
            continue
        box = (x - half_width - 3, y - half_height - 3, x + half_width + 3, y + half_height + 3)
        cell = (int(x // CELL), int(y // CELL))
        if cell not in taken and not any(_overlap(box, other) for other in boxes):
            boxes.append(box)
            taken.add(cell)
            return x, y
    return None


def clear_of_edges(at: float, side: int = SIDE) -> bool:
    """Whether a place across or down is far enough from edges that it is clear which query and third it belongs to."""
    thirds = (SIDE // 3, 2 * SIDE // 3) if side == SIDE else ()
    return all(abs(at - edge) >= (7 if edge in thirds else 4) for edge in range(CELL, side, CELL))


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def apart(a: tuple, b: tuple) -> float:
    return math.dist(a, b)


def _luma(rgb: tuple) -> float:
    return 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]


def _jitter(rng: random.Random, rgb: tuple, by: int = 12) -> tuple[int, int, int]:
    return tuple(min(255, max(0, v + rng.randint(-by, by))) for v in rgb)


def draw_background(rng: random.Random, base: tuple, side: int = SIDE) -> Image.Image:
    """A background of one colour that becomes a little lighter or darker in some direction."""
    size = (side * DRAWN, side * DRAWN)
    one, other = (_jitter(rng, base, 10) for _ in range(2))
    mask = Image.linear_gradient("L").resize(size, Image.Resampling.NEAREST)
    mask = mask if rng.random() < 0.5 else mask.transpose(Image.Transpose.ROTATE_90)
    mask = mask if rng.random() < 0.5 else ImageChops.invert(mask)
    return Image.composite(Image.new("RGB", size, one), Image.new("RGB", size, other), mask)


def draw_shape(rng: random.Random, canvas: ImageDraw.ImageDraw, shape: Shape, *, jitter: int = 10) -> None:
    """Draws a shape, turned a little, in a colour that is off by at most `jitter` in each of its three values."""
    x, y, r = shape.x * DRAWN, shape.y * DRAWN, shape.size / 2 * DRAWN
    fill = _jitter(rng, COLOURS[shape.colour], jitter)
    if shape.kind == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill)
        return
    corners, inner, turn = {"square": (4, 1.0, 45), "star": (5, 0.42, -90), "triangle": (3, 1.0, -90)}[shape.kind]
    turn += rng.uniform(-12, 12)
    steps = corners if inner == 1.0 else 2 * corners
    points = []
    for i in range(steps):
        radius = r if inner == 1.0 or i % 2 == 0 else r * inner
        angle = math.radians(turn + 360 * i / steps)
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    canvas.polygon(points, fill)


def draw_clutter(
    rng: random.Random, canvas: ImageDraw.ImageDraw, kind: str, base: tuple, boxes: list, side: int = SIDE
) -> None:
    """Draws small things that no question is about, clear of shapes and print."""
    for _ in range(rng.randrange(0, 5 * side // SIDE + 1)):
        x, y, reach = (
            rng.uniform(4, side - 4),
            rng.uniform(4, side - 4),
            rng.uniform(2, 12 if kind in ("lines", "arcs", "dashes") else 3),
        )
        if any(_overlap((x - reach, y - reach, x + reach, y + reach), box) for box in boxes):
            continue
        colour = _jitter(rng, base, 70)
        x, y, reach = x * DRAWN, y * DRAWN, reach * DRAWN
        angle = rng.uniform(0, math.pi)
        dx, dy = reach * math.cos(angle), reach * math.sin(angle)
        width = rng.choice((1, 2, 3))
        if kind == "lines":
            canvas.line((x - dx, y - dy, x + dx, y + dy), colour, width)
        elif kind == "dots":
            canvas.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        elif kind == "blobs":
            canvas.rectangle((x - reach, y - reach / 2, x + reach, y + reach / 2), colour)
        elif kind == "arcs":
            canvas.arc(
                (x - reach, y - reach, x + reach, y + reach),
                math.degrees(angle),
                math.degrees(angle) + 150,
                colour,
                width,
            )
        elif kind == "crosses":
            canvas.line((x - dx, y - dy, x + dx, y + dy), colour, width)
            canvas.line((x - dy, y + dx, x + dy, y - dx), colour, width)
        else:
            for at in (-0.8, 0.0, 0.8):
                canvas.line((x + at * dx, y + at * dy, x + (at + 0.4) * dx, y + (at + 0.4) * dy), colour, width)
