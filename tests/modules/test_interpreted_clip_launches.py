"""Counts CLIP's launches with the kernels, at the dispatcher; tests/bench/test_memory.py counts those of the rest."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from bench.counting import Count
from mg_fast.modules.clip import PackedClip


@pytest.mark.parametrize("views", [1, 5], ids=["768", "HD"])
def test_launches_of_clip(views):
    """A layer takes 9 launches, since the product that adds to the residual is one launch of the kernel.

    With 130 for all the rest, a picture takes at most 350.
    """
    vit = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=14
    )
    # In float32 a CPU's products take no factor, and need passes that products on a GPU do not need.
    clip = PackedClip.from_tower(CLIPVisionModel(CLIPVisionConfig(**vit)).eval().to(torch.bfloat16))
    pixels = torch.zeros(views, 3, 28, 28, dtype=torch.bfloat16)
    with torch.inference_mode(), Count() as counter:
        clip(pixels, backend="triton")
    assert counter.launches.total() == 23 * 9 + 4 <= 350 - 130
