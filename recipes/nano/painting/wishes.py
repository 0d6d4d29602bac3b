"""The pictures from which the painter learns, and the words that ask for them.

They are nano's scenes without what its prompts do not speak of: no clutter and no plates, one bold font, larger shapes,
and the flat colours that every prompt names. Shapes stand from left to right in the order in which the prompt names
them, and a number stands below them. In scattered scenes they stand at any height, else about in a row, so that little
is left to chance.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..scenes import (
    BACKGROUNDS,
    COLOURS,
    DRAWN,
    KINDS,
    PRINT_WIDTH,
    Scene,
    Shape,
    apart,
    clear_of_edges,
    draw_number,
    draw_print,
    draw_shape,
)
from ..scenes import SIDE as SCENE_SIDE
from ..talk import STYLE, wish

# The side of a drawn picture in pixels.
SIDE = 128
# The diameters of shapes in pixels of 192: nano's larger ones, whose edges are clear at the painter's size.
SIZES = (34.0, 40.0)
FONT = "DejaVuSans-Bold.ttf"
# How often a wish has no shape, one, two, three or four.
SHAPES = (0.03, 0.27, 0.3, 0.2, 0.2)
# How often a wish names its shapes in nano's order. Others are put in people's words.
ORDERED = 0.7
# The centres of shapes lie at least this far from the upper edge and from what is below, and those of numbers lie
# between these heights, in pixels of 192.
MARGIN = 40.0
PRINT_HEIGHTS = (166.0, 180.0)
# The heights of the centres of shapes in a row, and how far things stand from the middle of their column, in pixels of
# 192.
ROW = (71.0, 90.0)
LOOSE = 10.0
# A colour is not wished for on a background that is nearer to it than this, such as white on white.
LEAST_CONTRAST = 60


@dataclass(frozen=True)
class Wish:
    """What a picture has to show.

    Attributes:
        shapes: (kind, colour) of each, from left to right. Equal ones are allowed.
        background: the name of its colour.
        number: whether there is a number.
    """

    shapes: tuple[tuple[str, str], ...]
    background: str
    number: bool

    @property
    def prompt(self) -> str:
        """The words in which nano asks for the picture between its tags."""
        return f"{wish(list(self.shapes), self.background, self.number)}, {STYLE}"


def random_wish(
    rng: random.Random, shapes: int | None = None, number: bool | None = None, *, ordered: bool = True
) -> Wish:
    """A wish with as many shapes as asked for, or with a random number of them, and with or without a number.

    Args:
        ordered: whether the shapes stand in the order in which nano names them.
    """
    background = rng.choice(list(BACKGROUNDS))
    colours = [name for name, rgb in COLOURS.items() if apart(rgb, BACKGROUNDS[background]) > LEAST_CONTRAST]
    count = rng.choices(range(len(SHAPES)), SHAPES)[0] if shapes is None else shapes
    wanted = [(rng.choice(KINDS), rng.choice(colours)) for _ in range(count)]
    return Wish(
        tuple(in_order(wanted) if ordered else wanted), background, rng.random() < 0.5 if number is None else number
    )


def in_order(shapes: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Shapes (kind, colour) in the order in which nano names them: by colour, then by kind."""
    return sorted(shapes, key=lambda shape: shape[::-1])


def draw_wish(seed: int, index: int, *, split: str = "train", scattered: bool = False) -> tuple[Wish, Scene]:
    """A random wish and a picture that grants it, the same for the same seed and index. See `grant`."""
    rng, wished = _numbered(seed, index, split)
    return wished, grant(rng, wished, scattered=scattered)


def numbered_wish(seed: int, index: int, *, split: str = "train") -> Wish:
    """The wish of `draw_wish`, without its picture."""
    return _numbered(seed, index, split)[1]


def _numbered(seed: int, index: int, split: str) -> tuple[random.Random, Wish]:
    rng = random.Random(f"wish/{split}/{seed}/{index}")
    return rng, random_wish(rng, ordered=rng.random() < ORDERED)


def grant(rng: random.Random, wished: Wish, *, scattered: bool = False) -> Scene:
    """A scene that shows just what was wished for: the shapes from left to right in their order, the number below.

    Args:
        scattered: lets shapes stand at any height, and anywhere in their columns, instead of about in a row; and
            numbers anywhere in theirs.

    Raises:
        ValueError: there is no room for so many shapes.
    """
    if len(wished.shapes) >= len(SHAPES):
        raise ValueError(f"grant: expected at most {len(SHAPES) - 1} shapes, got {len(wished.shapes)}")
    base = BACKGROUNDS[wished.background]
    low = PRINT_HEIGHTS[0] - 12 if wished.number else SCENE_SIDE
    heights = (MARGIN, low - MARGIN) if scattered else ROW
    shapes = []
    for i, (kind, colour) in enumerate(wished.shapes):
        size, column = rng.uniform(*SIZES), SCENE_SIDE / len(wished.shapes)
        reach = column / 2 - size / 2 - 2
        x = _near(rng, (i + 0.5) * column, reach if scattered else min(reach, LOOSE))
        shapes.append(Shape(kind, colour, x, _clear(rng, *heights), size))
    image = Image.new("RGB", (SCENE_SIDE * DRAWN,) * 2, base)
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        draw_shape(rng, canvas, shape, jitter=0)
    prints = []
    if wished.number:
        reach = SCENE_SIDE / 2 - PRINT_WIDTH / 2 if scattered else LOOSE
        spot = _near(rng, SCENE_SIDE / 2, reach), _clear(rng, *PRINT_HEIGHTS)
        prints = [draw_print(rng, image, draw_number(rng, training=True), *spot, base, plated=False, fonts=[FONT])]
    return Scene(wished.background, shapes, prints, image)


def _near(rng: random.Random, middle: float, reach: float) -> float:
    return _clear(rng, middle - reach, middle + reach)


def _clear(rng: random.Random, low: float, high: float) -> float:
    """A random place between two that is no nearer to an edge between nano's queries, or thirds, than its scenes'."""
    while True:
        place = rng.uniform(low, high)
        if clear_of_edges(place):
            return place


def picture(scene: Scene) -> Image.Image:
    """The scene at the painter's size."""
    return scene.image.resize((SIDE, SIDE), Image.Resampling.BOX)


def phrased(wished: Wish, rng: random.Random) -> str:
    """A prompt for the wish: in nano's own words where the order is nano's, sometimes as people would put it."""
    if list(wished.shapes) == in_order(wished.shapes) and rng.random() < 0.8:
        return wished.prompt
    things = [f"a{'n' * (colour == 'orange')} {colour} {kind}" for kind, colour in wished.shapes]
    said = ", ".join(things) or "nothing"
    if rng.random() < 0.5:
        said = " and ".join(said.rsplit(", ", 1))
    if rng.random() < 0.8:
        said += f" on a {wished.background} background"
    else:
        said += f", {wished.background} background"
    said += rng.choice((", with a number", " with a number", " and a number")) * wished.number
    return said + f", {STYLE}" * (rng.random() < 0.5)
