"""The packed synchronizer computes what the module and the layers around it compute, with a hundredth of the work."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mg_fast.modules import FeatureSynchronizer, PackedFeatureSynchronizer
from mg_fast.testing.tolerances import assert_accurate, relative_error
from tests.draws import normal
from tests.synchronizers import build, draw
from tests.waiting import no_waiting

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
# Packed against unpacked in float32, relative to the largest value.
PACKED = 1e-5


@pytest.fixture(autouse=True)
def quick(one_thread):
    """All modules here are tiny, so one thread is fastest."""


def call(packed, inputs, **options):
    return packed(inputs.query, packed.values(inputs.features), inputs.reference_points, inputs.mask, **options)


@BACKENDS
def test_packed_equals_unpacked(backend):
    module = build()
    inputs = draw(module)
    assert relative_error(call(module.pack(), inputs, backend=backend), module(*inputs, backend=backend)) <= PACKED


# What can be folded: an option of pack with its shape, and the layer before or after the module that it stands for.
FOLDS = {
    "query_gain": ([20], lambda x, y, t: (x * t, y), None),
    "query_shift": ([20], lambda x, y, t: (x + t, y), None),
    "query_shift of each query": ([5, 20], lambda x, y, t: (x + t, y), None),
    "feature_gain": ([12], lambda x, y, t: (x, y * t), None),
    "feature_shift": ([12], lambda x, y, t: (x, y + t), None),
    "output_gain": ([24], None, lambda out, t: out * t),
    "output_gain of one number": ([1], None, lambda out, t: out * t),
    "output_weight": ([7, 24], None, lambda out, t: F.linear(out, t)),
    "output_weight of a convolution": (
        [7, 24, 1, 1],
        None,
        lambda out, t: F.conv2d(out.transpose(1, 2)[..., None], t)[..., 0].transpose(1, 2),
    ),
    "output_bias": ([24], None, lambda out, t: out + t),
}


@pytest.mark.parametrize("fold", FOLDS)
def test_each_fold_alone(fold):
    module = build()
    inputs = draw(module)
    shape, before, after = FOLDS[fold]
    tensor = normal(7, *shape)
    given = before(*inputs[:2], tensor) if before else inputs[:2]
    expected = module(*given, *inputs[2:])
    expected = after(expected, tensor) if after else expected
    packed = module.pack(**{fold.split(" ")[0]: tensor})
    assert relative_error(call(packed, inputs), expected) <= PACKED
    assert relative_error(call(module.pack(), inputs)[..., :7], expected[..., :7]) > 1e-2


def unet_block(module, side=4):
    """A block of the original's U-Net around a synchronizer: norms, positions, and a 1x1 convolution after it."""
    sizes = module.sizes
    block = nn.ModuleDict(
        {
            "query_norm": nn.LayerNorm(sizes.query, eps=1e-6),
            "feat_norm": nn.LayerNorm(sizes.value, eps=1e-6),
            "conv": nn.Conv2d(sizes.out, sizes.out, 1),
        }
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in block.parameters():
        parameter.data = normal(generator, *parameter.shape)
    return block, normal(generator, side * side, sizes.query)


@BACKENDS
def test_a_whole_block_of_the_u_net(backend):
    module = build(d_out=20)
    block, positions = unet_block(module)
    inputs = draw(module, queries=16, pictures=1)
    mask = torch.tensor([[1], [0]])
    x, y = 2 * inputs.query + 1, 3 * inputs.features - 1
    q, f = block["query_norm"](x) + positions, block["feat_norm"](y)
    out = module(q, f, inputs.reference_points, mask)
    expected = block["conv"](out.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
    packed = module.pack(
        query_gain=block["query_norm"].weight,
        query_shift=block["query_norm"].bias + positions,
        feature_gain=block["feat_norm"].weight,
        feature_shift=block["feat_norm"].bias,
        output_weight=block["conv"].weight,
        output_bias=block["conv"].bias,
    )
    x, y = F.layer_norm(x, (20,), eps=1e-6), F.layer_norm(y, (12,), eps=1e-6)
    ours = packed(x, packed.values(y), inputs.reference_points, mask, backend=backend)
    assert relative_error(ours, expected) <= PACKED
    torch.testing.assert_close(ours[1], packed.without_pictures.expand(16, -1), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="expected 16 queries, because as many rows of query_shift .* got 15"):
        packed(x[:, 1:], packed.values(y), inputs.reference_points[:, 1:], mask)


@BACKENDS
def test_a_whole_layer_of_the_language_model(backend):
    """RMSNorm's gains before, and the tanh of a gate after, as in the original's decoder layers."""
    module = build(d_out=20)
    inputs, gate = draw(module), torch.tensor([0.3])
    norm1, norm2 = nn.RMSNorm(20, eps=1e-6), nn.RMSNorm(12, eps=1e-6)
    norm1.weight.data, norm2.weight.data = normal(3, 20), normal(4, 12)
    x, y = 2 * inputs.query, 3 * inputs.features
    expected = gate.tanh() * module(norm1(x), norm2(y), *inputs[2:])
    packed = module.pack(query_gain=norm1.weight, feature_gain=norm2.weight, output_gain=gate.tanh())
    x, y = F.rms_norm(x, (20,), eps=1e-6), F.rms_norm(y, (12,), eps=1e-6)
    ours = packed(x, packed.values(y), *inputs[2:], backend=backend)
    assert relative_error(ours, expected) <= PACKED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accuracy_in_16_bits(dtype):
    module = build().to(dtype)
    inputs = draw(module)
    exact = copy.deepcopy(module).double()
    doubled = [tensor.double() for tensor in inputs[:3]]
    oracle = exact(*doubled, inputs.mask, backend="reference").detach()
    for packed in (module.pack(), exact.pack(dtype=dtype)):
        out = call(packed, inputs, backend="torch")
        assert out.dtype == dtype
        assert_accurate(out, module(*inputs, backend="reference").detach(), oracle)


# ---- values, index, rows without pictures


def test_values_of_pictures_are_independent():
    module = build()
    packed, inputs = module.pack(), draw(module)
    values = packed.values(inputs.features)
    assert list(values.shape) == [2, 3, 33, 4, 4]
    apart = torch.cat([packed.values(picture) for picture in inputs.features.split(1, dim=1)], dim=1)
    torch.testing.assert_close(apart, values, rtol=0, atol=1e-6)
    shared = values[:1].expand(2, -1, -1, -1, -1)
    ours = packed(inputs.query, shared, inputs.reference_points, inputs.mask)
    expected = module(inputs.query, inputs.features[:1].expand(2, -1, -1, -1), inputs.reference_points, inputs.mask)
    assert relative_error(ours, expected) <= PACKED


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_an_index_stands_for_its_mask(kind):
    module = build()
    packed, inputs = module.pack(), draw(module)
    values = packed.values(inputs.features)
    index = packed.index(inputs.mask)
    assert packed.index(torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]])).tolist() == [[3, 0, 2, 1], [0, 0, 0, 0]]
    given = inputs.query, values, inputs.reference_points
    assert torch.equal(packed(*given, index=index.to(kind)), packed(*given, inputs.mask))
    newest = inputs.query[:, -1:], values, inputs.reference_points[:, -1:]
    for rows in (index, index[:, -1]):
        assert torch.equal(packed(*newest, index=rows), packed(*newest, inputs.mask))


def test_rows_without_pictures():
    module = build()
    packed, inputs = module.pack(), draw(module)
    constant = module.output_proj(module.ignore_token.flatten())
    torch.testing.assert_close(packed.without_pictures, constant, rtol=0, atol=1e-6)
    none = packed(inputs.query, packed.values(inputs.features[:, :0]), inputs.reference_points)
    torch.testing.assert_close(none, constant.expand(2, 5, -1), rtol=0, atol=1e-6)
    none.zero_()
    torch.testing.assert_close(packed.without_pictures, constant, rtol=0, atol=1e-6)


# ---- a frozen copy


def test_nothing_is_trainable_or_saved():
    module = build()
    packed, inputs = module.pack(), draw(module)
    assert not list(packed.parameters()) and not packed.state_dict()
    out = packed(inputs.query.requires_grad_(), packed.values(inputs.features), *inputs[2:])
    assert not out.requires_grad
    shared = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    assert not shared & {tensor.untyped_storage().data_ptr() for tensor in packed.buffers()}


def test_copies_and_conversions():
    module = build()
    packed, inputs = module.pack(), draw(module)
    expected = call(packed, inputs)
    assert torch.equal(call(copy.deepcopy(packed), inputs), expected)
    assert torch.equal(call(pickle.loads(pickle.dumps(packed)), inputs), expected)
    half = copy.deepcopy(packed).to(torch.bfloat16)
    given = inputs._replace(query=inputs.query.bfloat16(), features=inputs.features.bfloat16())
    assert torch.equal(call(half, given), call(module.pack(dtype=torch.bfloat16), given))
    assert "heads=4" in repr(packed)


def test_changed_weights_are_seen():
    module = build()
    packed, inputs = module.pack(), draw(module)
    values = packed.values(inputs.features)
    with torch.no_grad():
        module.dynamic_offset_mask.bias.add_(1)
    with pytest.raises(RuntimeError, match="weights were changed since it was packed: pack it again"):
        packed(inputs.query, values, inputs.reference_points, inputs.mask)
    with pytest.raises(RuntimeError, match="pack it again"):
        packed.values(inputs.features)
    assert relative_error(call(module.pack(), inputs), module(*inputs)) <= PACKED
    # The copy does not need the module.
    packed = module.pack()
    expected = module(*inputs).detach()
    del module
    assert relative_error(call(packed, inputs), expected) <= PACKED


def test_subclasses_are_not_packed():
    class Other(FeatureSynchronizer):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    module = build()
    module.__class__ = Other
    with pytest.raises(ValueError, match="FeatureSynchronizer.pack: it is .*Other, expected a plain layer"):
        module.pack()


# ---- compilers, graphs, work


def test_compiles_to_one_graph():
    module = build()
    packed, inputs = module.pack(), draw(module)
    given = inputs.query, packed.values(inputs.features), *inputs[2:]
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), packed(*given), rtol=0, atol=1e-6)


def test_autocast():
    module = build()
    packed, inputs = module.pack(), draw(module)
    oracle = copy.deepcopy(module).double()(*(tensor.double() for tensor in inputs[:3]), inputs.mask).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, plain = call(packed, inputs, backend="torch"), module(*inputs, backend="reference")
    assert ours.dtype == torch.bfloat16
    assert_accurate(ours, plain, oracle)


def test_waits_for_nothing():
    module = build()
    packed, inputs = module.pack(), draw(module)
    with no_waiting():
        values = packed.values(inputs.features)
        index = packed.index(inputs.mask)
        packed(inputs.query, values, inputs.reference_points, inputs.mask, backend="torch")
        packed(inputs.query, values, inputs.reference_points, index=index, backend="torch")
        packed(inputs.query, values, inputs.reference_points, backend="torch")


def test_a_decoded_token_takes_a_hundredth_of_the_work():
    """Counted for the published width with four pictures.

    torch counts products alone, so the packed form's sampling is added to them.
    """
    with torch.device("meta"):
        module = FeatureSynchronizer(
            5120, 1024, 5120, inner_dim=1024, heads=16, points=8, spatial_shapes=[32, 16, 8], base=16, max_images=50
        )
        query, features = torch.empty(1, 1, 5120), torch.empty(1, 4, 1344, 1024)
        points, mask = torch.empty(1, 1, 1, 2), torch.empty(1, 4)
        packed = module.pack()
        values = packed.values(features)
    flop = []
    for run in (
        lambda: module(query, features, points, mask, backend="reference"),
        lambda: packed(query, values, points, mask),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        flop.append(counter.get_total_flops())
    original, ours = flop
    samples = values[0, :, 0, :, 0].numel() * 3 * 8
    ours += 4 * 2 * samples * 64
    assert 11.4e9 < original < 11.6e9 and 16e6 < ours < 19e6
    assert 100 * ours <= original


# ---- what is refused


@pytest.mark.parametrize(
    "option, shape, message",
    [
        ("query_gain", [19], r"query_gain must be \[20\], got \[19\]"),
        ("query_gain", [1], r"query_gain must be \[20\], got \[1\]"),
        ("query_shift", [3, 4, 20], r"query_shift must be \[20\] or \[any, 20\], got \[3, 4, 20\]"),
        ("feature_gain", [20], r"feature_gain must be \[12\], got \[20\]"),
        ("feature_shift", [2, 12], r"feature_shift must be \[12\], got \[2, 12\]"),
        ("output_gain", [20], r"output_gain must be \[\] or \[1\] or \[24\], got \[20\]"),
        ("output_weight", [24, 20], r"output_weight must be \[any, 24\] or \[any, 24, 1, 1\], got \[24, 20\]"),
        ("output_weight", [8, 24, 3, 3], r"output_weight must be .* got \[8, 24, 3, 3\]"),
        ("output_bias", [7], r"output_bias must be \[24\], got \[7\]"),
    ],
)
def test_layers_around_it_that_do_not_fit(option, shape, message):
    with pytest.raises(ValueError, match=f"FeatureSynchronizer.pack: {message}"):
        build().pack(**{option: torch.ones(shape)})


def test_integer_dtypes_are_refused():
    with pytest.raises(ValueError, match="dtype must be floating point, got torch.int8"):
        build().pack(dtype=torch.int8)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(2, 5, 19)), r"query must be \[B, Q, 20\], got \[2, 5, 19\]"),
        (dict(query=torch.zeros(2, 5, 20).double()), "query must be torch.float32 as the weights are"),
        (dict(query=torch.zeros(2, 5, 20, device="meta")), "query must be on cpu, got meta"),
        (dict(values=torch.zeros(2, 3, 33, 16)), r"values must be \[B, n, 33, 4, 4\], as values\(\) returns them"),
        (dict(values=torch.zeros(2, 3, 32, 4, 4)), r"values must be .* got \[2, 3, 32, 4, 4\]"),
        (dict(values=torch.zeros(2, 3, 33, 4, 4).half()), "values must be torch.float32 as the weights are"),
        (dict(values=torch.zeros(1, 3, 33, 4, 4)), r"values must be of batch 2 .* got \[1, 3, 33, 4, 4\]"),
        (dict(mask=torch.zeros(2, 5, 4)), r"mask must be \[2, 5, 3\] or \[2, 3\], got \[2, 5, 4\]"),
        (dict(mask=None, index=torch.zeros(2, 5, 4).long()), r"index must be \[2, 5, 3\] or \[2, 3\], got \[2, 5, 4\]"),
        (dict(mask=None, index=torch.ones(2, 3)), "index must be torch.int64, as .* got torch.float32"),
        (dict(index=torch.zeros(2, 3).long()), "expected a mask or an index, got both"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    module = build()
    packed, inputs = module.pack(), draw(module)
    given = dict(
        query=inputs.query,
        values=packed.values(inputs.features),
        reference_points=inputs.reference_points,
        mask=inputs.mask,
    )
    with pytest.raises(ValueError, match=f"PackedFeatureSynchronizer: .*{message}"):
        packed(**given | change)


def test_too_many_pictures():
    packed = build(max_images=3).pack()
    assert isinstance(packed, PackedFeatureSynchronizer)
    with pytest.raises(ValueError, match="PackedFeatureSynchronizer: .* at most 2 pictures.* sees 3"):
        packed.index(torch.ones(1, 3))
