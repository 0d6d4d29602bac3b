"""What nano reads in pictures."""

import re
from collections.abc import Sequence

from PIL import Image

import mg_fast


def read_numbers(pipeline: mg_fast.Pipeline, pictures: Sequence[Image.Image]) -> list[str | None]:
    """The numbers that a model reads in pictures; None where it sees none."""
    questions = [("What does the sign say?", [picture]) for picture in pictures]
    answers = pipeline.chat_batch(questions, max_new_tokens=16, batch_size=32, progress=False)
    found = (re.fullmatch(r"The number is (\d+)\.", answer.text) for answer in answers)
    return [match and match[1] for match in found]
