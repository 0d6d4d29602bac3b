"""The high-resolution tower on channels-last maps agrees with timm's, refuses other trunks, and bounds its memory."""

import copy

import pytest
import torch
from timm.models.convnext import ConvNeXt
from torch.utils._python_dispatch import TorchDispatchMode

from mg_fast.modules import ConvNeXtPyramid
from mg_fast.modules import convnext_channels_last as convnext
from mg_fast.testing.tolerances import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = dict(dims=(8, 12, 20, 36), depths=(2, 1, 3, 1), num_classes=0, global_pool="")
TRUNKS = {
    "linear": {},
    "1x1 convolutions": dict(conv_mlp=True),
    "eps of the xxlarge": dict(norm_eps=1e-5),
    "no layer scale": dict(ls_init_value=None),
    "odd widths": dict(dims=(7, 13, 29, 5)),
}


def make(dtype=torch.float32, seed=0, **changes):
    """A trunk in which every parameter matters.

    timm's own initialisation sets biases to zero and layer scales to one millionth.
    """
    trunk = ConvNeXt(**(SMALL | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in trunk.named_parameters():
        scale = 0.5 if name.endswith(("gamma", "bias")) else 1.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.2
        p.data = torch.randn(p.shape, generator=generator) * scale + (
            1.0 if "norm" in name and name.endswith("weight") else 0.0
        )
    return ConvNeXtPyramid.from_timm(trunk.to(dtype))


def pictures(side, batch=1, dtype=torch.float32, seed=1):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_tower_accurate(tower, pixels):
    with torch.no_grad():
        ours, plain = tower(pixels, backend="torch"), tower(pixels, backend="reference")
        exact = copy.deepcopy(tower).double()(pixels.double(), backend="reference")
    for s, (level, expected, oracle) in enumerate(zip(ours, plain, exact, strict=True)):
        assert level.dtype == pixels.dtype and level.shape == expected.shape and level.is_contiguous(), s
        assert_accurate(level, expected, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_accuracy(trunk, dtype):
    assert_tower_accurate(make(dtype, **TRUNKS[trunk]), pictures(96, batch=2, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_widths(dtype):
    """The widths of the large model are accurate, with one or two blocks a stage, at 192 pixels."""
    assert_tower_accurate(make(dtype, dims=(192, 384, 768, 1536), depths=(1, 1, 2, 1)), pictures(192, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_wide_products(dtype):
    """A tower that is packed for the library on a GPU has wider products; here it runs on a CPU."""
    tower, pixels = make(dtype), pictures(96, batch=2, dtype=dtype)
    with torch.no_grad():
        stem, stages = tower.read()
        wide = convnext.run_tower(stem, convnext.widened(stages), pixels, "torch")
        narrow, plain = convnext.run_tower(stem, stages, pixels, "torch"), tower(pixels, backend="reference")
        exact = copy.deepcopy(tower).double()(pixels.double(), backend="reference")
    for level, before, expected, oracle in zip(wide, narrow, plain, exact, strict=True):
        assert_accurate(level, expected, oracle)
        # They are other steps with other roundings.
        assert not torch.equal(level, before)


def test_kernels_and_gradients_take_the_narrow_products(monkeypatch):
    stage = convnext.widened([make().read()[1][0]])[0]
    narrow = stage.blocks[0]
    assert torch.equal(narrow.contract, make().read()[1][0].blocks[0].contract)
    x = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(convnext.library, "feed_forward_", None)
    assert convnext.run_stage(stage, x).requires_grad
    with torch.no_grad(), pytest.raises(TypeError):
        convnext.run_stage(stage, x)
    with torch.no_grad():
        convnext.run_stage(stage, x, backend="reference")


@pytest.mark.parametrize("shape", [(64, 96), (100, 68), (33, 47), (32, 32)])
def test_pictures_that_are_not_square_or_do_not_divide(shape):
    assert_tower_accurate(make(), torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(2)))


def test_no_picture():
    assert [list(level.shape) for level in make()(pictures(64, batch=0), backend="torch")] == [
        [0, 16, 16, 8],
        [0, 8, 8, 12],
        [0, 4, 4, 20],
        [0, 2, 2, 36],
    ]


def test_a_stage_is_not_changed_by_the_next():
    """Blocks add in place only to maps that belong to their stage."""
    tower, pixels = make(), pictures(64)
    with torch.no_grad():
        alone = convnext.run_tower(*(part if i == 0 else part[:1] for i, part in enumerate(tower.read())), pixels)
        assert torch.equal(tower(pixels, backend="torch")[0], alone[0])


@pytest.mark.parametrize("in_place", [True, False])
def test_a_block_overwrites_its_input_only_where_it_may(in_place):
    block = make().vision_stages[0].blocks[0]
    x = torch.randn(1, 9, 9, 8)
    before = x.clone()
    with torch.no_grad():
        out = convnext.run_block(convnext.read_block(block), x, "torch", in_place=in_place)
    assert torch.equal(x, before) != in_place
    assert (out.data_ptr() == x.data_ptr()) == in_place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_rows(monkeypatch, dtype):
    # 4 * 8 channels a row make chunks of 7 rows, the last of them shorter.
    monkeypatch.setattr(convnext, "CPU_EXPANSION", 7 * 4 * 8 * dtype.itemsize)
    assert_tower_accurate(make(dtype), pictures(96, batch=2, dtype=dtype))


def test_autocast_casts_weights_once_a_block(monkeypatch):
    """Weights are cast once for each block, however many chunks there are."""
    block, casts = convnext.read_block(make().vision_stages[0].blocks[0]), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                casts.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(convnext, "CPU_EXPANSION", 7 * 4 * 8 * 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts():
        convnext.run_block(block, torch.randn(1, 9, 9, 8), "torch")
    assert casts.count((32, 8)) == casts.count((8, 32)) == 1


def test_gradients_reach_every_parameter_and_the_picture():
    tower = make()

    def gradients(backend):
        pixels = pictures(64).requires_grad_()
        loss = sum(
            (level * torch.linspace(-1, 1, level.numel()).view_as(level)).sum()
            for level in tower(pixels, backend=backend)
        )
        return torch.autograd.grad(loss, [pixels, *tower.parameters()])

    for (name, _), ours, expected in zip(
        [("pixels", None), *tower.named_parameters()], gradients("torch"), gradients("reference")
    ):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_a_bias_alone_is_trained():
    """In a block whose other tensors are frozen, nothing may be overwritten."""
    gradients = []
    for backend in ("torch", "reference"):
        tower = make().requires_grad_(False)
        bias = tower.vision_stages[0].blocks[1].mlp.fc1.bias.requires_grad_()
        tower(pictures(64), backend=backend)[0].square().sum().backward()
        gradients.append(bias.grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[1].abs().max()


def test_autocast():
    """The tower is right under autocast, with float32 weights and maps narrower from the first downsampling on."""
    tower = make()
    with torch.no_grad():
        exact = copy.deepcopy(tower).double()(pictures(96).double(), backend="reference")
        with torch.autocast("cpu", torch.bfloat16):
            ours, plain = tower(pictures(96), backend="torch"), tower(pictures(96), backend="reference")
    for level, expected, oracle in zip(ours, plain, exact, strict=True):
        assert level.dtype == expected.dtype
        assert_accurate(level, expected, oracle)


@pytest.mark.slow
def test_one_graph_under_compile():
    tower, pixels = make(), pictures(64)
    compiled = torch.compile(lambda x: tower(x, backend="torch"), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ours, expected in zip(compiled(pixels), tower(pixels, backend="torch"), strict=True):
            assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_names_are_the_published_ones():
    names = set(make().state_dict())
    assert {
        "vision_stem.0.weight",
        "vision_stem.1.bias",
        "vision_stages.1.downsample.0.weight",
        "vision_stages.0.blocks.1.gamma",
    } <= names
    assert all(name.startswith(("vision_stem.", "vision_stages.")) for name in names)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(use_grn=True), "stages.0: expected a ConvNeXt of the first version, got one with GlobalResponseNorm"),
        (dict(drop_path_rate=0.1), "drop_path_rate=0"),
        (
            dict(stem_type="overlap"),
            "expected a stem of one convolution and a LayerNorm, got Conv2d, Conv2d, LayerNorm2d",
        ),
        (dict(act_layer="gelu_tanh"), "blocks.0: expected the exact GELU, got GELUTanh"),
        (dict(act_layer="silu"), "expected the exact GELU, got SiLU"),
        (dict(kernel_sizes=5), "expected a 7x7 depthwise convolution with padding 3, got Conv2d"),
        (dict(output_stride=16), "stages.3: downsample: expected a convolution of pixels that do not overlap"),
        (dict(conv_bias=False), "expected"),
        (dict(norm_layer="rmsnorm"), "expected a stem of one convolution and a LayerNorm, got Conv2d, RmsNorm2d"),
    ],
    ids=str,
)
def test_refused(changes, reason):
    with pytest.raises(ValueError, match=f"ConvNeXtPyramid: .*{reason}"):
        ConvNeXtPyramid.from_timm(ConvNeXt(**(SMALL | changes)))


def test_not_a_convnext():
    with pytest.raises(ValueError, match="expected a timm ConvNeXt, got Linear"):
        ConvNeXtPyramid.from_timm(torch.nn.Linear(2, 2))


def by_modules_only(tower):
    """Whether every backend gives what the tower's modules give, and the tower's weights alone do not."""
    pixels = pictures(64)
    with torch.no_grad():
        expected, ours = tower(pixels, backend="reference"), tower(pixels, backend="torch")
        weights_alone = convnext.run_tower(*tower.read(), pixels, "torch")
    assert not all(torch.allclose(level, other, rtol=1e-3, atol=1e-3) for level, other in zip(weights_alone, expected))
    return all(torch.equal(level, other) for level, other in zip(ours, expected))


def test_a_hook_within_is_run():
    tower = make()
    tower.vision_stages[1].blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, out: 2 * out)
    assert by_modules_only(tower)


def test_an_adapter_within_is_run_and_trained():
    peft = pytest.importorskip("peft")
    tower = make()
    tower = peft.get_peft_model(
        tower, peft.LoraConfig(target_modules=["fc1"], init_lora_weights=False)
    ).base_model.model
    assert by_modules_only(tower)
    sum(level.square().sum() for level in tower(pictures(64))).backward()
    assert all(p.grad is not None for name, p in tower.named_parameters() if "lora" in name)


def test_an_exchanged_activation_is_run():
    tower = make()
    for block in tower.vision_stages[0].blocks:
        block.mlp.act = torch.nn.ReLU()
    assert by_modules_only(tower)
    with pytest.raises(
        ValueError, match="PackedPyramid: vision_stages.0.blocks.0.mlp.act is torch.nn.*ReLU, expected a plain layer"
    ):
        tower.pack()


def test_other_padding_is_refused():
    trunk = ConvNeXt(**SMALL)
    trunk.stages[0].blocks[0].conv_dw.padding_mode = "reflect"
    with pytest.raises(ValueError, match="expected a 7x7 depthwise convolution with padding 3"):
        ConvNeXtPyramid.from_timm(trunk)


def test_a_tower_on_the_meta_device_is_that_of_the_cpu():
    """Its weights are not filled there, and everything else is as on a CPU, whose weights are timm's own."""
    dims, depths = (8, 16, 24, 32), (1, 1, 2, 1)
    with torch.device("meta"):
        shapes = ConvNeXtPyramid.from_dims(dims, depths)
    tower = ConvNeXtPyramid.from_dims(dims, depths)
    assert all(p.is_meta and p.requires_grad for p in shapes.parameters())
    found = [[(name, p.shape, p.dtype) for name, p in made.state_dict().items()] for made in (shapes, tower)]
    assert found[0] == found[1]
    weight = tower.vision_stages[1].blocks[0].mlp.fc1.weight
    assert 0.015 < weight.std() < 0.025 and weight.abs().max() <= 2
