"""Does the work of the first use of an interleaved pipeline before anybody waits for it."""

import time

from PIL import Image

from .conversation import InterleavedConversation
from .loop import Stages

# Steps of the drawings, which are as many as a capture needs.
_STEPS = 2


def warm_up(stages: Stages) -> dict[str, float]:
    """Writes and draws after a picture of noise, twice; see `InterleavedPipeline.warm_up`.

    Returns:
        Seconds of each part, and `all` of them.
    """
    began = time.perf_counter()
    noise = Image.effect_noise((64, 64), 64).convert("RGB")
    # A pass is captured when its shape comes for the second time.
    for _ in range(2):
        # The whole sequence must be computed both times.
        stages.answers.forget_prompts()
        conversation = InterleavedConversation(stages)
        conversation.chat([noise, "What is shown here?"], max_new_tokens=4, min_new_tokens=4)
        conversation.draw(["And this is"], num_inference_steps=_STEPS)
    stages.answers.forget_prompts()
    done = {**stages.vision.first_use, **stages.answers.first_use, **stages.drawing.first_use}
    return {**done, "all": time.perf_counter() - began}
