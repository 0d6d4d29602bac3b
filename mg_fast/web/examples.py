"""Pictures and questions to begin with."""

import base64
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .uploads import written

# Pixels along a side. Print of a thirteenth of it is what the model in the package reads best.
SIDE = 384
# The side of the pictures on the page's buttons.
THUMB = 96
_COLOURS = {"red": (205, 30, 40), "orange": (245, 130, 20), "blue": (35, 75, 215)}
_GROUNDS = {"beige": (224, 202, 160), "white": (240, 240, 238), "teal": (60, 160, 165)}


@dataclass(frozen=True)
class ExampleScene:
    """A picture that is drawn here: a number on a plate, and a circle.

    Attributes:
        number: digits.
        colour, ground: names of colours, of the circle and of the background.
    """

    number: str
    colour: str
    ground: str

    def picture(self) -> Image.Image:
        """The picture, of `SIDE` pixels each way."""
        rng = random.Random(f"{self.number} circle {self.colour}")
        picture = Image.new("RGB", (SIDE, SIDE), _GROUNDS[self.ground])
        canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(SIDE * 5 / 64)
        x, y = (rng.uniform(0.08, 0.35) * SIDE for _ in range(2))
        _, _, right, bottom = canvas.textbbox((x, y), self.number, font=font)
        edge = SIDE / 48
        canvas.rectangle((x - edge, y - edge, right + edge, bottom + edge), fill=(250, 250, 250))
        canvas.text((x, y), self.number, fill=(15, 15, 15), font=font)
        middle, radius = 0.72 * SIDE, 0.13 * SIDE
        box = (middle - radius, middle - radius, middle + radius, middle + radius)
        canvas.ellipse(box, fill=_COLOURS[self.colour])
        return picture

    def file(self) -> tuple[bytes, str]:
        """The picture as a file in memory, and its kind."""
        return written(self.picture())

    def thumbnail(self) -> str:
        """A small form of the picture as a `data:` URL."""
        data, kind = written(self.picture().resize((THUMB, THUMB), Image.Resampling.LANCZOS))
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class ExampleQuestion:
    """A question to begin with.

    Attributes:
        text: the question.
        scene: the picture that it is about; None for a question without one.
        draw: whether the question asks for a picture.
    """

    text: str
    scene: ExampleScene | None = None
    draw: bool = False


EXAMPLES = (
    ExampleQuestion("What does the sign say?", ExampleScene("4083", "orange", "teal")),
    ExampleQuestion("Where is the blue circle?", ExampleScene("275", "blue", "beige")),
    ExampleQuestion("Describe the picture.", ExampleScene("61", "red", "white")),
    # The model in the package draws from a wish such as this one, and only where no picture was asked about before.
    ExampleQuestion("Draw a blue circle, a red star on a white background.", draw=True),
)
