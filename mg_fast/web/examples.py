"""Pictures and questions to begin with."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .uploads import written

# Pixels along a side. Print of a thirteenth of it is what the model in the package reads best.
SIDE = 384
_COLOURS = {"red": (205, 30, 40), "orange": (245, 130, 20), "blue": (35, 75, 215), "green": (35, 150, 60)}
_GROUNDS = {"beige": (224, 202, 160), "white": (240, 240, 238), "teal": (60, 160, 165)}


@dataclass(frozen=True)
class ExampleQuestion:
    """A question about a picture that is drawn here.

    Attributes:
        title: what the page's button says.
        text: the question.
        number, shape, colour, ground: what the picture shows: a number on a plate, and a shape.
        draw: whether the question asks for a picture.
    """

    title: str
    text: str
    number: str
    shape: str
    colour: str
    ground: str
    draw: bool = False

    def picture(self) -> tuple[bytes, str]:
        """The picture as a file in memory, and its kind."""
        rng = random.Random(f"{self.number} {self.shape} {self.colour}")
        picture = Image.new("RGB", (SIDE, SIDE), _GROUNDS[self.ground])
        canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(SIDE * 5 / 64)
        x, y = (rng.uniform(0.08, 0.35) * SIDE for _ in range(2))
        _, _, right, bottom = canvas.textbbox((x, y), self.number, font=font)
        edge = SIDE / 48
        canvas.rectangle((x - edge, y - edge, right + edge, bottom + edge), fill=(250, 250, 250))
        canvas.text((x, y), self.number, fill=(15, 15, 15), font=font)
        middle, radius = 0.72 * SIDE, 0.13 * SIDE
        box = (middle - radius, middle - radius, middle + radius, middle + radius)
        (canvas.ellipse if self.shape == "circle" else canvas.rectangle)(box, fill=_COLOURS[self.colour])
        return written(picture)


EXAMPLES = (
    ExampleQuestion("What does the sign say?", "What does the sign say?", "4083", "circle", "orange", "teal"),
    ExampleQuestion("Where is the circle?", "Where is the blue circle?", "275", "circle", "blue", "beige"),
    ExampleQuestion("Describe the picture", "Describe the picture.", "61", "square", "red", "white"),
    ExampleQuestion("Draw this again", "Draw this again.", "912", "square", "green", "beige", draw=True),
)
