"""accelerate() on timm's ConvNeXt stages: in timm's models, in OpenCLIP's, in a stand-in for the original's tower."""

import copy
import pickle
import re
import warnings
import weakref
from unittest import mock

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import nn

import mg_fast
from mg_fast.errors import MgFastError
from mg_fast.modules import convnext_channels_last as convnext
from mg_fast.testing.tolerances import assert_accurate, relative_error
from tests.integrations.test_unified_resampler import Original

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = dict(dims=(8, 12, 20, 36), depths=(2, 1, 3, 1), num_classes=5)


def make(dtype=torch.float32, **changes):
    """A timm model in which every parameter matters.

    timm's own initialisation makes biases zero and layer scales one in a million.
    """
    return matter(ConvNeXt(**(SMALL | changes))).to(dtype).eval()


def matter(model):
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        scale = 0.5 if name.endswith(("gamma", "bias")) else 1.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.2
        p.data = torch.randn(p.shape, generator=generator) * scale + (
            1.0 if "norm" in name and name.endswith("weight") else 0.0
        )
    return model


class Tower(nn.Module):
    """The original's high-resolution tower, written after the specification (3.2).

    It is in training mode, as the original leaves it.
    """

    def __init__(self, drop_path_rate=0.1):
        super().__init__()
        trunk = matter(ConvNeXt(**(SMALL | dict(drop_path_rate=drop_path_rate))))
        self.vision_stem, self.vision_stages = trunk.stem, trunk.stages

    @property
    def dtype(self):
        return self.vision_stem[0].weight.dtype

    def forward(self, images):
        x, maps = self.vision_stem(images.to(self.dtype)), []
        for stage in self.vision_stages:
            x = stage(x)
            maps.append(x)
        size = maps[0].shape[-2:]
        upsampled = [
            F.interpolate(m.float(), size=size, mode="bilinear", align_corners=False).to(m.dtype) for m in maps[1:]
        ]
        return torch.cat([maps[0], *upsampled], dim=1).to(images.dtype)


def pictures(height=64, width=64, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def state(model):
    """Everything in which a swap and its undo must leave no trace."""
    return [(type(m), sorted(vars(m)), m.training) for m in model.modules()], list(model.state_dict())


def assert_swap_accurate(model, run, *given):
    """Compares `run(model, *given)`, a list of tensors, before and after a swap; returns report and both results."""
    with torch.no_grad():
        plain = run(model, *given)
        oracle = run(copy.deepcopy(model).double(), *(tensor.double() for tensor in given))
        before = [tensor.clone() for tensor in given]
        report = mg_fast.accelerate(model)
        with mock.patch.object(convnext, "run_stage", wraps=convnext.run_stage) as ran:
            ours = run(model, *given)
    # The swap took place.
    assert ran.call_count and not ran.call_count % len(report.swapped)
    assert not report.skipped and all(map(torch.equal, given, before))
    for mine, expected, exact in zip(ours, plain, oracle, strict=True):
        assert mine.dtype == expected.dtype and mine.shape == expected.shape
        assert_accurate(mine, expected, exact)
    return report


def intermediates(model, x):
    last, maps = model.forward_intermediates(x)
    return [last, *maps, model(x)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(conv_mlp=True),
        dict(ls_init_value=None),
        dict(dims=(7, 13, 29, 5), norm_eps=1e-5),
        dict(head_norm_first=True),
    ],
    ids=str,
)
def test_a_timm_model(changes, dtype):
    """The head's output and every stage's map stay accurate."""
    model = make(dtype, **changes)
    report = assert_swap_accurate(model, intermediates, pictures(96, 64, dtype=dtype))
    assert [e.name for e in report.swapped] == [f"stages.{i}" for i in range(4)]
    assert "swapped      stages.2 (ConvNeXt stage of 3 blocks): now mg_fast.modules.convnext_channels_last" in str(
        report
    )


@pytest.mark.parametrize("wrapped", ["features_only", "open_clip", "stage"])
def test_wherever_it_sits(wrapped):
    if wrapped == "features_only":
        model = matter(timm.create_model("convnext_atto", features_only=True)).eval()
        names, run = [f"stages_{i}" for i in range(4)], lambda m, x: m(x)
    elif wrapped == "open_clip":
        tower = dict(
            timm_model_name="convnext_atto",
            timm_model_pretrained=False,
            timm_pool="",
            timm_proj="linear",
            image_size=64,
        )
        text = dict(context_length=8, vocab_size=16, width=8, heads=1, layers=1)
        model = matter(open_clip.model.CLIP(8, tower | dict(timm_drop_path=0.1), text)).eval()
        names, run = [f"visual.trunk.stages.{i}" for i in range(4)], lambda m, x: [m.visual.trunk.forward_features(x)]
    else:
        model, names = make().stages[1], ["model"]
        x = torch.randn(2, 8, 9, 13)
        report = assert_swap_accurate(model, lambda m, x: [m(x)], x)
    if wrapped != "stage":
        report = assert_swap_accurate(model, run, pictures())
    assert [e.name for e in report.swapped] == names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_originals_tower(dtype):
    report = assert_swap_accurate(Tower().eval().to(dtype), lambda m, x: [m(x)], pictures(dtype=dtype))
    assert [e.name for e in report.swapped] == [f"vision_stages.{i}" for i in range(4)]


def test_tower_and_mining_of_one_model():
    model = Original()
    model.vision_tower_aux = Tower()
    report = mg_fast.accelerate(model)
    assert [e.name for e in report.swapped] == [
        "unified_resampler",
        *(f"vision_tower_aux.vision_stages.{i}" for i in range(4)),
    ]
    report.undo()
    assert type(model) is Original and state(model.vision_tower_aux) == state(Tower())


def test_stochastic_depth_at_work_is_timms():
    """Active stochastic depth is timm's to run in the training mode of the call, whatever the mode was at the swap."""
    model, plain = Tower(), Tower()
    report = mg_fast.accelerate(model)
    assert len(
        report.swapped
    ) == 4 and "for now it runs as timm wrote it, because its stochastic depth is at work" in str(report.swapped[3])
    # The trial turned training mode off and put it back.
    assert all(layer.training for layer in model.modules())
    with torch.no_grad():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(2):
                torch.manual_seed(3)
                ours = model(pictures())
        assert [str(w.message) for w in caught] == [
            "mg_fast.accelerate: a ConvNeXt stage runs as timm wrote it, "
            "because its stochastic depth is at work in training mode: "
            "eval() makes it deterministic"
        ]
        torch.manual_seed(3)
        assert torch.equal(ours, plain(pictures()))
        ours, expected = model.eval()(pictures()), plain.eval()(pictures())
        assert not torch.equal(ours, expected) and relative_error(ours, expected) < 1e-5


def test_training_without_stochastic_depth_is_ours():
    model, plain = Tower(0.0), Tower(0.0)
    mg_fast.accelerate(model)
    results = []
    for tower in (model, plain):
        x = pictures().requires_grad_()
        out = tower(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in tower.parameters())])
    assert not torch.equal(results[0][0], results[1][0])
    for name, ours, expected in zip(["map", "picture", *(n for n, _ in model.named_parameters())], *results):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("trained", ["blocks.0.mlp.fc1.bias", "blocks.1.gamma", "blocks.1.conv_dw.weight"])
def test_a_few_parameters_trained(trained):
    stages = [make().stages[0].requires_grad_(False) for _ in range(2)]
    mg_fast.accelerate(stages[0])
    x, gradients = torch.randn(1, 8, 9, 9), []
    for stage in stages:
        parameter = stage.get_parameter(trained).requires_grad_()
        stage(x).square().sum().backward()
        gradients.append(parameter.grad)
    assert relative_error(*gradients) < 1e-4


def test_the_reference_backend_runs_timms_own():
    model, plain = make(), make()
    mg_fast.accelerate(model)
    with torch.no_grad():
        expected = plain(pictures())
        assert not torch.equal(model(pictures()), expected)
        calls = []
        handle = model.stages[2].blocks[1].register_forward_hook(lambda *_: calls.append(1))
        with mg_fast.use_backend("reference"):
            assert torch.equal(model(pictures()), expected) and calls
        handle.remove()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("i", [0, 1])
def test_a_map_is_not_changed_by_the_stage_that_reads_it(i, layout):
    stage, plain = make().stages[i], make().stages[i]
    mg_fast.accelerate(stage)
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=layout)
    before = x.clone()
    with torch.no_grad():
        out = stage(x)
        again = stage(x)
        assert torch.equal(x, before) and torch.equal(out, again) and out.data_ptr() != x.data_ptr()
        assert out.is_contiguous(memory_format=torch.channels_last) and relative_error(out, plain(x)) < 1e-5


def test_maps_between_stages_are_not_copied(monkeypatch):
    """Maps between stages are channels last in memory, so that the next stage takes them without a copy."""
    model, taken = make(), []
    mg_fast.accelerate(model)
    run = convnext.run_stage
    monkeypatch.setattr(
        convnext,
        "run_stage",
        lambda stage, x, *args, **kwargs: taken.append(x.data_ptr()) or run(stage, x, *args, **kwargs),
    )
    with torch.no_grad():
        maps = model.forward_intermediates(pictures(), intermediates_only=True)
    assert taken[1:] == [m.data_ptr() for m in maps[:-1]]


@pytest.mark.parametrize("shape", [(8, 9, 9), (1, 7, 9, 9)])
def test_maps_that_do_not_fit(shape):
    stage = make().stages[0]
    mg_fast.accelerate(stage)
    with pytest.raises(ValueError, match=r"expected a map \[B, C, H, W\], got \[8, 9, 9\]|must be \[49, 7\]"):
        stage(torch.zeros(shape))


def test_no_picture():
    model = make()
    mg_fast.accelerate(model)
    assert [list(m.shape) for m in model.forward_intermediates(pictures(batch=0), intermediates_only=True)][3] == [
        0,
        36,
        2,
        2,
    ]


# timm itself fails with weights in bfloat16 under autocast in float16.
@pytest.mark.parametrize(
    "weights,cast",
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_autocast(weights, cast):
    def run(model, x):
        if x.dtype == torch.float64:
            return model.forward_intermediates(x, intermediates_only=True)
        with torch.autocast("cpu", cast):
            return model.forward_intermediates(x, intermediates_only=True)

    model = make(weights)
    assert_swap_accurate(model, run, pictures(dtype=weights))
    # This is a map as an autocast layer before the stage leaves it.
    x = torch.randn(1, 8, 9, 9).to(cast)
    with torch.no_grad(), torch.autocast("cpu", cast):
        expected = make(weights).stages[0](x)
        ours = model.stages[0](x)
        assert ours.dtype == expected.dtype and relative_error(ours, expected) < 2 * torch.finfo(cast).eps


def test_autocast_without_layer_scale_is_timms():
    model, plain = make(ls_init_value=None), make(ls_init_value=None)
    mg_fast.accelerate(model)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(RuntimeWarning, match="another dtype under autocast"),
    ):
        assert torch.equal(model(pictures()), plain(pictures()))


@pytest.mark.slow
def test_one_graph_under_compile():
    model = make(drop_path_rate=0.1)
    mg_fast.accelerate(model)
    compiled = torch.compile(lambda x: model.forward_features(x), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(pictures()), model.forward_features(pictures())) < 1e-5
        # The warning about stochastic depth is left out in a graph.
        model.train()
        assert compiled(pictures()).shape == (2, 36, 2, 2)


def test_undo_restores_everything():
    model, before = Tower(), state(Tower())
    report = mg_fast.accelerate(model)
    assert (
        state(model) != before
        and list(model.state_dict()) == before[1]
        and isinstance(model.vision_stages[0], ConvNeXtStage)
    )
    assert "already swapped" in str(mg_fast.accelerate(model).skipped[3])
    report.undo()
    report.undo()
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model.eval()(pictures()), Tower().eval()(pictures()))
    assert state(pickle.loads(pickle.dumps(model.train()))) == state(copy.deepcopy(model)) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_use_their_own_weights(duplicate):
    model, changed = make(), make()
    mg_fast.accelerate(model)
    twin = duplicate(model)
    with torch.no_grad():
        expected = model(pictures())
        for one in (twin, changed):
            one.stages[2].blocks[1].mlp.fc1.weight.mul_(3)
        assert relative_error(twin(pictures()), changed(pictures())) < 1e-5 < relative_error(twin(pictures()), expected)
        assert torch.equal(model(pictures()), expected) and not torch.equal(twin(pictures()), changed(pictures()))
    mg_fast.accelerate(twin).undo()
    assert state(twin) == state(make()) and state(model) != state(make())


def test_a_replica_of_data_parallel_runs():
    stage, plain, x = make().stages[0], make().stages[0], torch.randn(1, 8, 9, 9)
    mg_fast.accelerate(stage)
    replica = stage._replicate_for_data_parallel()
    with torch.no_grad():
        assert relative_error(replica(x), plain(x)) < 1e-5


def test_undo_out_of_turn():
    model = make()
    report, swapped = mg_fast.accelerate(model), type(model.stages[1])
    model.stages[1].__class__ = type("Sharded", (swapped,), {})
    with pytest.raises(MgFastError, match="stages.1: its class was exchanged again since, for Sharded"):
        report.undo()
    reference = weakref.ref(model)
    del model
    assert reference() is None


class OtherBlock(ConvNeXtBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherLinear(nn.Linear):
    pass


class OtherStage(ConvNeXtStage):
    def forward(self, x):
        return super().forward(x) + 1


def exchange(module, kind):
    module.__class__ = kind


UNUSUAL = {
    "gradient checkpointing is on": lambda s: setattr(s, "grad_checkpointing", True),
    "blocks.1.mlp has hooks on its Mlp": lambda s: s.blocks[1].mlp.register_forward_hook(lambda *_: None),
    "downsample.1 has hooks on its Conv2d": lambda s: s.downsample[1].register_forward_pre_hook(lambda *_: None),
    "the forward of blocks.0.norm's LayerNorm was replaced": lambda s: setattr(
        s.blocks[0].norm, "forward", s.blocks[0].norm.forward
    ),
    "blocks.2 is .*OtherBlock, not a layer of": lambda s: exchange(s.blocks[2], OtherBlock),
    "blocks.1.mlp.fc2 is .*OtherLinear": lambda s: exchange(s.blocks[1].mlp.fc2, OtherLinear),
    "blocks.1 is .*Identity": lambda s: s.blocks.__setitem__(1, nn.Identity()),
    "blocks.0.mlp.act is .*ReLU": lambda s: setattr(s.blocks[0].mlp, "act", nn.ReLU()),
    "blocks.0: expected the exact GELU, got GELU.*tanh": lambda s: setattr(s.blocks[0].mlp, "act", nn.GELU("tanh")),
    "blocks.0.mlp.fc1 is .*Parametrized": lambda s: nn.utils.parametrizations.weight_norm(s.blocks[0].mlp.fc1),
    "blocks.0.more is .*Linear": lambda s: s.blocks[0].add_module("more", nn.Linear(2, 2)),
    "downsample: expected a LayerNorm and a convolution, got 1": lambda s: s.downsample.__delitem__(1),
    "expected one dtype and one device, got torch.float32 on cpu, torch.float64 on cpu": lambda s: s.blocks[
        0
    ].norm.double(),
}


@pytest.mark.parametrize("after", [False, True], ids=["before the swap", "after it"])
@pytest.mark.parametrize("reason", UNUSUAL)
def test_unusual_stages_are_timms_to_run(reason, after):
    stage, plain, x = make().stages[2], make().stages[2], torch.randn(1, 12, 8, 8)
    if after:
        assert mg_fast.accelerate(stage).swapped
    for one in (stage, plain):
        UNUSUAL[reason](one)
    if not after:
        before = state(stage)
        report = mg_fast.accelerate(stage)
        assert not report.swapped and state(stage) == before
        assert re.search(f"not swapped  model .*{reason}", str(report))
        return
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=reason):
        try:
            expected = plain(x)
        except RuntimeError as error:
            # timm cannot run the stage either, so its own error is raised.
            with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
                stage(x)
        else:
            assert torch.equal(stage(x), expected)


def quantized(stage):
    class Quantized(torch.Tensor):
        pass

    stage.blocks[1].mlp.fc1.weight = nn.Parameter(stage.blocks[1].mlp.fc1.weight.data.as_subclass(Quantized))


REFUSED = {
    "blocks.1.mlp.fc1's Linear is Quantized, expected a plain parameter": quantized,
    "meta device": lambda s: s.to("meta"),
    "forward was set on the object": lambda s: setattr(s, "forward", torch.relu),
    "OtherStage has a forward of its own": lambda s: exchange(s, OtherStage),
    "it has no blocks": lambda s: setattr(s, "blocks", nn.Sequential()),
    "blocks.0: expected a 7x7 depthwise .* padding_mode=reflect": lambda s: setattr(
        s.blocks[0].conv_dw, "padding_mode", "reflect"
    ),
    "blocks.0: expected a 7x7 depthwise": lambda s: setattr(
        s.blocks[0], "conv_dw", nn.Conv2d(20, 20, 5, padding=2, groups=20)
    ),
    # Only a trial shows these.
    "tried on a map of .*away from": lambda s: setattr(s.blocks[0].conv_dw, "_conv_forward", lambda x, *_: 2 * x),
    "tried on a map of .* fails": lambda s: s.blocks[0].conv_dw.register_parameter(
        "bias", nn.Parameter(torch.zeros(3))
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    stage = make().stages[2]
    REFUSED[reason](stage)
    before = state(stage)
    report = mg_fast.accelerate(stage)
    assert re.search(reason, str(report.skipped[0])) and not report.swapped and state(stage) == before


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(use_grn=True), "GlobalResponseNormMlp, not a layer"),
        (dict(kernel_sizes=5), "expected a 7x7 depthwise convolution"),
        (dict(act_layer="gelu_tanh"), "GELUTanh"),
        (dict(norm_layer="rmsnorm"), "RmsNorm"),
        (dict(conv_bias=False), "expected"),
    ],
    ids=str,
)
def test_other_convnexts_stay(changes, reason):
    model = make(**changes)
    report = mg_fast.accelerate(model)
    assert not report.swapped and len(report.skipped) == 4 and all(reason in e.reason for e in report.skipped)
