"""The small case of drawing runs on a CPU; the others are the same at SDXL's size."""

import pytest
import torch

from bench.cases import drawing

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_tiny_case():
    tiny, *published = drawing.cases()
    assert tiny.name == "drawing/tiny-32-b1-float32" and tiny.devices == ("cpu",)
    inputs, drawn = tiny.make("cpu"), {}
    for name, provider in tiny.providers.items():
        drawn[name], _ = provider.build(inputs)()
        stages = provider.stages(inputs)
        assert [stage["name"] for stage in stages] == ["encode", "per step", "decode"]
        assert all(stage["ms"] >= 0 for stage in stages) and stages[1]["ms"] > 0
    tiny.release()
    assert torch.equal(drawn["painter"], drawn["reference"])
    # Fused projections are one product in the place of three, which may round otherwise.
    assert (drawn["painter, fused projections"] - drawn["reference"]).abs().max() <= 1
    assert inputs.plain.unet is not inputs.painted.unet and inputs.plain.vae is inputs.painted.vae
    assert "painter, 30 steps" in published[0].providers and published[0].least.flop > 0
