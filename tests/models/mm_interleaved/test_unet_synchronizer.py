"""The synchronizers of the U-Net: the original's recorded tensors, the real sizes, and how they join the U-Net."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.counting import Count
from bench.fake_models import on_gpu
from mg_fast.models.mm_interleaved.configuration import MMInterleavedConfig
from mg_fast.models.mm_interleaved.context import previous_maps
from mg_fast.models.mm_interleaved.packed_unet_synchronizer import PackedUNetSynchronizer
from mg_fast.models.mm_interleaved.residuals import Residual, call_unet
from mg_fast.models.mm_interleaved.unet_synchronizer import UNetSynchronizer, pixel_centres
from mg_fast.runtime.device_tables import caching_fake_tensors
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved.drawing_parts import RECORDED_MAPS, STAGE, recorded
from tests.models.mm_interleaved.recorded import NAMES

pytestmark = pytest.mark.usefixtures("one_thread")

# The U-Net of Stable Diffusion 2.1.
STABLE_DIFFUSION = {
    "sample_size": 64,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("name", "request_", "form"),
    [(name, "segm", form) for name in NAMES for form in ("reference", "packed")]
    + [("mmi-tiny", "segm", "torch"), ("mmi-tiny", "t2i", "reference"), ("mmi-wide", "t2i", "packed")],
)
def test_the_first_step(name, request_, form):
    """From the U-Net's input to its output, with the maps before and after the synchronizers on the way."""
    given = recorded(name)
    was = {key: given.answers[f"{request_}.steps4.unet_{key}"] for key in ("in", "out")}
    # The original's batch has both negative rows first; here a picture's two rows are next to each other.
    condition = torch.cat([given.model.image_decoder.neg_prompt_embeds, given.answers[f"{request_}.prompt_embeds"]])
    parts = given.model.image_decoder.decoder
    module = PackedUNetSynchronizer(parts.mmfs_module) if form == "packed" else parts.mmfs_module
    prepared = module.prepare(*previous_maps(given.maps, given.targets(request_)))
    found = {}

    def watched(i: int, residual: Residual) -> Residual:
        def function(skip: torch.Tensor) -> torch.Tensor:
            added = residual.function(skip)
            found[i] = skip, skip + added
            return added

        return Residual(function)

    backend = "torch" if form == "packed" else form
    residuals = module.residuals(*prepared, halves=2, backend=backend)
    residuals = [watched(i, residual) for i, residual in enumerate(residuals)]
    predicted = call_unet(parts.unet, was["in"], torch.tensor(751), condition, residuals)
    assert sorted(found) == list(range(13)), "the U-Net adds every residual"
    for i, key in RECORDED_MAPS.items():
        for tensor, when in zip(found[i], ("before", "after")):
            expected = given.answers[f"{request_}.steps4.unet_{key}_{when}"]
            assert relative_error(tensor, expected) < STAGE, f"{key} {when}"
    assert relative_error(predicted, was["out"]) < STAGE


def test_the_published_sizes_and_the_launches_of_a_step():
    """Names and shapes of the published model, and what a step of it launches and computes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(STABLE_DIFFUSION).half().eval()
        module = UNetSynchronizer(MMInterleavedConfig(unet_config=STABLE_DIFFUSION)).half().eval()
        packed = PackedUNetSynchronizer(module)
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    assert len(shapes) == 13 * 19 and sum(p.numel() for p in module.parameters()) == 101_554_112
    sides, widths = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 4, [320] * 4 + [640] * 3 + [1280] * 6
    for block, side, width in zip(module.blocks, sides, widths):
        assert (block.side, block.width, block.mmfs.sizes.base) == (side, width, side)
    block = "mmfs_down_blocks.4"
    assert shapes[f"{block}.pos_embed"] == [4096, 640] and shapes[f"{block}.conv.weight"] == [640, 640, 1, 1]
    assert shapes[f"{block}.mmfs.attention_weights.weight"] == [576, 640]
    assert shapes["mmfs_mid_block.mmfs.query_relpos.weight"] == [10, 1280]

    like = {"dtype": torch.float16, "device": "cuda"}
    with FakeTensorMode(), torch.inference_mode(), caching_fake_tensors(pixel_centres):
        on_gpu(unet), on_gpu(packed)
        latents, timestep = torch.empty(2, 4, 64, 64, **like), torch.empty((), dtype=torch.int64, device="cuda")
        condition, maps = torch.empty(2, 77, 1024, **like), torch.empty(1, 1, 5440, 1024, **like)
        with Count("cuda") as plain:
            unet(latents, timestep, condition)
        with Count("cuda") as preparing:
            prepared = packed.prepare(maps, torch.empty(1, 1, dtype=torch.bool, device="cuda"))
        counts = []
        for each in (prepared, packed.prepare(None, None)):
            for _ in range(2):  # The first call makes the tables of reference points.
                with Count("cuda") as count:
                    call_unet(unet, latents, timestep, condition, packed.residuals(*each, halves=2, backend="triton"))
            counts.append(count)
    launches = [sum(count.launches.values()) for count in counts]
    most = sum(plain.launches.values())
    assert launches == [most + 6 * 13, most + 13] and launches[0] <= 1.2 * most
    flop = [count.total.flop - plain.total.flop for count in counts]
    # The table of spec section 6.2: 28.4 GFLOP of a row, and 148.3 for the values.
    assert round(flop[0] / 2e9, 1) == 28.4 and flop[1] == 0 and round(preparing.total.flop / 1e9, 1) == 148.3


def test_a_residual_is_a_summand_and_nothing_else():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    residual = Residual(torch.sin)
    y = x.clone()
    y += residual
    assert torch.equal(x + residual, x + x.sin()) and torch.equal(y, x + x.sin())
    # The expression is traced without a break.
    compiled = torch.compile(lambda tensor: tensor * 2 + residual, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x + (2 * x).sin())
    for misuse in (lambda: torch.cat([x, residual]), lambda: x * residual, lambda: torch.add(x, residual, alpha=2)):
        with pytest.raises(TypeError, match="can only be added|unsupported operand"):
            misuse()


def test_what_is_refused():
    given = recorded("mmi-tiny")
    module = copy.deepcopy(given.model.image_decoder.decoder.mmfs_module)
    packed = PackedUNetSynchronizer(module)
    for one in (module, packed):
        residual = one.residuals(*one.prepare(given.maps[:, None], None))[0]
        with pytest.raises(ValueError, match=r"expected a map of the U-Net \[B, 16, 8, 8\], got \[1, 16, 4, 8\]"):
            torch.zeros(1, 16, 4, 8) + residual
    with pytest.raises(ValueError, match="5440 pixels"):
        packed.prepare(given.maps[:, None, :-1], None)
    with torch.no_grad():
        module.mmfs_mid_block.conv.bias.add_(1)
    with pytest.raises(RuntimeError, match="pack it again"):
        packed.prepare(None, None)
    module.mmfs_mid_block.conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        PackedUNetSynchronizer(module)
    for size in (96, 32):
        config = copy.copy(given.model.config)
        config.image_size = size
        with pytest.raises(ValueError, match="image_size must divide 512"):
            UNetSynchronizer(config)
