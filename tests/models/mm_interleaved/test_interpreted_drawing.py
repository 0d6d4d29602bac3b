"""The original's pictures by the kernels: a whole request, and a step of one that follows on another picture."""

import torch

import mg_fast
from mg_fast.models.mm_interleaved.image_decoder import ImageDecoder
from mg_fast.models.mm_interleaved.packed_unet_synchronizer import PackedUNetSynchronizer
from mg_fast.models.mm_interleaved.residuals import call_unet
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded
from tests.models.mm_interleaved.loaded import inputs, load

NAME, MAP_SIDES = "mmi-tiny", (64, 32, 16, 8)
# One block of every size: those of a size differ in their weights alone, and interpreting all takes minutes.
BLOCKS = (2, 5, 8, 12)


@torch.no_grad()
def test_a_guided_step_of_a_picture_that_follows_on_another_one():
    """Both rows of the guided picture share the values of the one before it."""
    device = torch.get_default_device()
    decoder = ImageDecoder(recorded.read_config(NAME)).eval().to(device)
    decoder.load_state_dict(recorded.state(NAME, "image_decoder."))
    was = {key: tensor.to(device) for key, tensor in recorded.answers(NAME).items()}
    maps = torch.cat([was[f"image0.map{side}"].flatten(1).T for side in MAP_SIDES])[None, None]
    packed = PackedUNetSynchronizer(decoder.decoder.mmfs_module)
    prepared = packed.prepare(maps, None)
    residuals, kernels = (packed.residuals(*prepared, halves=2, backend=backend) for backend in ("torch", "triton"))
    for block in BLOCKS:
        residuals[block] = kernels[block]
    condition = torch.cat([decoder.neg_prompt_embeds, was["segm.prompt_embeds"]])
    timestep = torch.tensor(751, device=device)
    predicted = call_unet(decoder.decoder.unet, was["segm.steps4.unet_in"], timestep, condition, residuals)
    assert relative_error(predicted, was["segm.steps4.unet_out"]) < 2e-5


def test_a_picture_is_drawn_as_recorded():
    """A whole request without a picture before it. The features of its place holder come from PyTorch."""
    answers, model = recorded.answers(NAME), load(NAME)
    with mg_fast.use_backend("torch"):
        given = inputs(NAME, "t2i", answers)
    generator = torch.Generator("cpu").manual_seed(model.config.sd_base_seed)
    with mg_fast.use_backend("triton"):
        drawn = model.generate_images(**given, num_inference_steps=4, generator=generator, output_type="pt")
    assert (drawn.cpu() - answers["t2i.steps4.picture"]).abs().max() <= 1e-4
