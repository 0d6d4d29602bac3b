"""Reads the text in a picture with RapidOCR, and words it as the hint that Mini-Gemini was trained with."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BackendError
from ..models.pictures import open_picture
from ..models.templates import without_picture_tags

# Lines with a lower score are left out of a hint, as in the original.
LEAST_SCORE = 0.1
MISSING_RAPIDOCR = (
    "reading text in pictures needs rapidocr and onnxruntime, which are not installed here: pip install 'mg_fast[ocr]'"
)
# An engine of RapidOCR keeps state during a call.
_reading = threading.Lock()


@dataclass(frozen=True)
class TextLine:
    """A line of text in a picture.

    Attributes:
        text: what it says.
        score: how sure the reading is, from 0 to 1.
    """

    text: str
    score: float


def read(picture, *, allow_urls: bool = False) -> list[TextLine]:
    """The lines of text in a picture, in reading order, by RapidOCR's models for Chinese and Latin script.

    The models are part of RapidOCR's package; nothing is downloaded. They run on the CPU.

    Args:
        picture: a Pillow image, path, bytes, or uint8 array or tensor; also a URL if `allow_urls` is set.
        allow_urls: fetch a picture that is given as a URL.

    Raises:
        PictureError: this is no picture.
        BackendError: rapidocr or onnxruntime is not installed.
    """
    engine, image = _engine(), open_picture(picture, allow_urls=allow_urls)
    with _reading:
        found = engine(image)
    return [TextLine(text, float(score)) for text, score in zip(found.txts or (), found.scores or ())]


def hint(lines: Sequence[TextLine]) -> str:
    """What Mini-Gemini's command line adds to a question for a picture with these lines; empty where there are none.

    A tag of a picture that stands in the lines is broken up, so that it is read as text.
    """
    text = ", ".join(line.text for line in lines if line.score > LEAST_SCORE)
    return f"\nReference OCR Token: {without_picture_tags(text)}\n" if text else ""


@functools.cache
def _engine():
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise BackendError(MISSING_RAPIDOCR) from error
    # RapidOCR's own limit would leave out lines that the original keeps.
    return RapidOCR(params={"Global.log_level": "error", "Global.text_score": 0.0})
