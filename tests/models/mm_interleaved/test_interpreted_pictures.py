"""The kernels give the original's tokens and maps of a picture."""

import torch

from mg_fast.models.mm_interleaved.visual_tokenizer import VisualTokenizer
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded

NAME = "mmi-tiny"


def test_a_picture_is_the_recorded_one():
    tokenizer = VisualTokenizer(recorded.read_config(NAME)).eval()
    # transformers makes the published position_ids by itself.
    tokenizer.load_state_dict(recorded.state(NAME, "visual_tokenizer."), strict=False)
    answers = recorded.answers(NAME)
    pixels = recorded.pixels(NAME, [0], answers).to(tokenizer.pos_embed.device)
    with torch.no_grad():
        features = tokenizer(pixels, backend="triton")
    smallest = features.maps[0, -64:].t().unflatten(1, (8, 8))
    for ours, stage in ((features.tokens[0], "visual_tokens"), (smallest, "map8")):
        assert relative_error(ours.cpu(), answers[f"image0.{stage}"]) <= 2e-5, stage
