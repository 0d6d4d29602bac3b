"""Does the work of the first use before anybody waits for it."""

import itertools
import time

import torch
from PIL import Image

from .answers import AnswerStage
from .conversation import Conversation
from .vision import VisionStage


def warm_up(vision: VisionStage, answers: AnswerStage, template: str) -> dict[str, float]:
    """Answers two questions about a picture of noise, twice; see `Pipeline.warm_up`.

    Returns:
        Seconds of each part, and `all` of them.
    """
    began = time.perf_counter()
    noise = Image.effect_noise((64, 64), 64).convert("RGB")
    # A pass is captured when its shape comes for the second time.
    for _ in range(2):
        # The whole prompt must be computed both times.
        answers.forget_prompts()
        conversation = Conversation(vision, answers, template)
        for question, images in (("What is shown here?", [noise]), ("And what else?", None)):
            conversation.chat(question, images, stopping_criteria=[_after(4)])
    answers.forget_prompts()
    return {**vision.first_use, **answers.first_use, "all": time.perf_counter() - began}


def _after(tokens: int):
    """A stopping criterion that ends an answer after this many new tokens."""
    calls = itertools.count(1)
    return lambda ids, scores, **_: torch.full((len(ids),), next(calls) >= tokens, device=ids.device)
