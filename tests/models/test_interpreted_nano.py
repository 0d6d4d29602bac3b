"""Nano with our kernels, from the picture to the words."""

import torch

import mg_fast
from recipes.nano.scenes import draw_scene
from tests.interpreting import INTERPRETED

QUESTION = "What does the sign say?"
# The largest number of tokens in an answer. The longest answer that nano learned has fewer.
MOST = 64


def test_the_same_words_as_by_torch():
    scene = draw_scene(20, 0, split="unseen", number="4083")
    nano = mg_fast.load("nano", device="cpu" if INTERPRETED else "cuda")
    words, tokens = {}, {}
    for backend in ("torch", "triton"):
        pipeline = mg_fast.Pipeline(nano.model, nano.processor, backend=backend)
        tokens[backend] = pipeline.see(scene.image)
        words[backend] = pipeline.chat(QUESTION, [scene.image], max_new_tokens=MOST).text
    assert words["triton"] == words["torch"] != ""
    # The arithmetic differs, so equal tokens would mean that the kernels were not used.
    assert not torch.equal(tokens["triton"], tokens["torch"])
    torch.testing.assert_close(tokens["triton"], tokens["torch"], rtol=1e-3, atol=1e-3)
