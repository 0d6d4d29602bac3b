"""The pictures from which the painter learns, and the words that ask for them.

They are nano's scenes without what its prompts do not speak of: no clutter and no plates, one bold font, larger shapes,
and the flat colours that every prompt names.
"""

import random
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
    draw_number,
    draw_print,
    draw_shape,
    place,
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
# How often a place is looked for anew, before a wish is given up for which there is no room.
TRIES = 20
# A colour is not wished for on a background that is nearer to it than this, such as white on white.
LEAST_CONTRAST = 60


@dataclass(frozen=True)
class Wish:
    """What a picture has to show: shapes (kind, colour), equal ones allowed, a background, and whether a number."""

    shapes: tuple[tuple[str, str], ...]
    background: str
    number: bool

    @property
    def prompt(self) -> str:
        """The words in which nano asks for the picture between its tags."""
        return f"{wish(list(self.shapes), self.background, self.number)}, {STYLE}"


def random_wish(rng: random.Random, shapes: int | None = None, number: bool | None = None) -> Wish:
    """A wish with as many shapes as asked for, or with a random number of them, and with or without a number."""
    background = rng.choice(list(BACKGROUNDS))
    colours = [name for name, rgb in COLOURS.items() if apart(rgb, BACKGROUNDS[background]) > LEAST_CONTRAST]
    count = rng.choices(range(len(SHAPES)), SHAPES)[0] if shapes is None else shapes
    return Wish(
        tuple((rng.choice(KINDS), rng.choice(colours)) for _ in range(count)),
        background,
        rng.random() < 0.5 if number is None else number,
    )


def draw_wish(seed: int, index: int, *, split: str = "train") -> tuple[Wish, Scene]:
    """A random wish and a picture that grants it, the same for the same seed and index."""
    rng = random.Random(f"wish/{split}/{seed}/{index}")
    while True:
        wished = random_wish(rng)
        for _ in range(TRIES):
            scene = grant(rng, wished)
            if scene is not None:
                return wished, scene


def grant(rng: random.Random, wished: Wish) -> Scene | None:
    """A scene that shows just what was wished for; None where no room was found for all of it."""
    base = BACKGROUNDS[wished.background]
    boxes: list[tuple[float, float, float, float]] = []
    taken: set[tuple[int, int]] = set()
    number = place(rng, PRINT_WIDTH / 2 - 4, 7, boxes, taken) if wished.number else None
    if wished.number and number is None:
        return None
    shapes = []
    for kind, colour in wished.shapes:
        size = rng.uniform(*SIZES)
        spot = place(rng, size / 2, size / 2, boxes, taken)
        if spot is None:
            return None
        shapes.append(Shape(kind, colour, *spot, size))
    image = Image.new("RGB", (SCENE_SIDE * DRAWN,) * 2, base)
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        draw_shape(rng, canvas, shape, jitter=0)
    prints = []
    if number is not None:
        prints = [draw_print(rng, image, draw_number(rng, training=True), *number, base, plated=False, fonts=[FONT])]
    return Scene(wished.background, shapes, prints, image)


def picture(scene: Scene) -> Image.Image:
    """The scene at the painter's size."""
    return scene.image.resize((SIDE, SIDE), Image.Resampling.BOX)


def phrased(wished: Wish, rng: random.Random) -> str:
    """A prompt for the wish: mostly in nano's own words and order, sometimes as people would put it."""
    if rng.random() < 0.6:
        return wished.prompt
    things = [f"a{'n' * (colour == 'orange')} {colour} {kind}" for kind, colour in wished.shapes]
    rng.shuffle(things)
    said = ", ".join(things) or "nothing"
    if rng.random() < 0.5:
        said = " and ".join(said.rsplit(", ", 1))
    if rng.random() < 0.8:
        said += f" on a {wished.background} background"
    else:
        said += f", {wished.background} background"
    said += rng.choice((", with a number", " with a number", " and a number")) * wished.number
    return said + f", {STYLE}" * (rng.random() < 0.5)
