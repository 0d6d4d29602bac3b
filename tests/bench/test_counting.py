"""The count at the dispatcher, against known functions, torch's FLOP, and the memory that was allocated."""

import contextlib
import functools
import importlib
import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.costs.mining import Sizes
from bench.counting import Count
from mg_fast import ops
from mg_fast.modules import ConvNeXtPyramid
from mg_fast.ops import reference
from mg_fast.ops.operation import OPERATIONS, operators
from mg_fast.ops.torch import patch_mining as torch_form
from tests.bench.test_formulas import inputs
from tests.ops.operator_calls import meta, of_all_operations
from tests.paths import ROOT


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
@pytest.mark.parametrize(
    "call, read, written",
    [
        (lambda x, y: x + y, 80, 40),
        (lambda x, y: x * x, 40, 40),
        (lambda x, y: x[:5] * x[5:], 40, 20),
        (lambda x, y: x.expand(7, 10) + 1, 40, 280),
        (lambda x, y: x.view(2, 5).t()[1:].detach(), 0, 0),
        (lambda x, y: torch.ops.aten._unsafe_view(x, [2, 5]), 0, 0),
        (lambda x, y: x.half(), 40, 20),
        (lambda x, y: x.sub_(y), 80, 40),
        (lambda x, y: x.copy_(y), 40, 40),
        (lambda x, y: x[:5].zero_(), 0, 20),
        (lambda x, y: torch.add(x, 1, out=y), 40, 40),
        (lambda x, y: torch.empty_like(x), 0, 0),
        (lambda x, y: torch.zeros_like(x), 0, 40),
        (lambda x, y: x.view(5, 2).index_select(0, torch.zeros_like(y[:3], dtype=torch.int64)), 24 + 24, 24 + 24),
        # The index is counted as it is made and read.
        (lambda x, y: x.index_copy_(0, torch.zeros(3, dtype=torch.int64, device=x.device), y[:3]), 24 + 12, 24 + 12),
        (lambda x, y: torch.cat([x, y]).split(5), 80, 80),
    ],
)
def test_counter(call, read, written, device):
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        x, y = torch.ones(10, device=device), torch.ones(10, device=device)
        with Count() as counter:
            call(x, y)
    assert (counter.total.bytes_read, counter.total.bytes_written) == (read, written)


@pytest.mark.parametrize("device, read, written", [("cuda", 80, 40), ("cpu", 4, 40), (None, 84, 80)])
def test_counter_of_one_device(device, read, written):
    with FakeTensorMode():
        x, number = torch.ones(10, device="cuda"), torch.ones((), device="cpu")
        with Count(device) as counter:
            x.cpu()
            x.add_(number)
    assert (counter.total.bytes_read, counter.total.bytes_written) == (read, written)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "call, launches",
    [
        (lambda x: x + x, 1),
        (lambda x: x.mul_(2).add_(1), 2),
        (lambda x: x[1:].t().view(4, 3, 1).detach().expand(4, 3, 7), 0),
        (lambda x: x.reshape(-1), 0),
        (lambda x: x.t().reshape(-1), 1),
        (lambda x: x.contiguous().to(x.dtype), 0),
        (lambda x: x.half(), 1),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: torch.zeros_like(x), 1),
        (lambda x: torch.add(x, 1, out=x), 1),
        (lambda x: x.clone(), 1),
        (lambda x: torch.cat([x, x]).split(2), 1),
        (lambda x: F.linear(x, x, x[0]), 1),
        (lambda x: F.linear(x[None], x, x[0]), 1),
        (lambda x: F.layer_norm(x, (4,), x[0], x[0]), 1),
        (lambda x: x * torch.sigmoid(1.702 * x), 3),
        (lambda x: F.silu(x, inplace=True), 1),
        (lambda x: F.dropout(x, training=False), 0),
        (lambda x: F.conv2d(x.view(1, 1, 4, 4), x[:3, :3].reshape(1, 1, 3, 3)), 1),
    ],
)
def test_launches(call, launches, device, inference):
    with torch.inference_mode(inference):
        x = torch.ones(4, 4, device=device)
        with Count() as counter:
            call(x)
    assert counter.launches.total() == launches


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_one_launch(device):
    with torch.inference_mode():
        q = torch.ones(1, 2, 3, 4, device=device)
        with Count() as counter:
            F.scaled_dot_product_attention(q, q, q)
    assert counter.launches == {"aten.scaled_dot_product_attention.default": 1}


# Arguments of mg_fast's operators on the meta device, and their numbers of launches.
OPERATORS = of_all_operations("CALLS")
# More arguments, which the launchers cannot read in place, and the bytes of the copies that they make.
COPIED = of_all_operations("COPIED")


@pytest.fixture
def launches(monkeypatch):
    """The grids of the kernels that launchers call; the kernels do not run."""
    pytest.importorskip("triton")
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(grid)

    for path in (ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"mg_fast.kernels.{path.stem}")
        kernels = [kernel for kernel in vars(module) if kernel.endswith("_kernel")]
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, Kernel())
    return launched


def run_body(operator, arguments):
    """Runs an operator's own code, which the meta device does not: it computes shapes alone."""
    return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)


@pytest.mark.parametrize("case", OPERATORS)
def test_what_is_declared_is_what_is_launched(case, launches):
    """The launches are counted where the launchers call their kernels."""
    name, arguments, expected = OPERATORS[case]
    operator = getattr(torch.ops.mg_fast, name).default
    with torch.inference_mode(), Count() as counter:
        operator(*arguments)
    assert not launches and counter.launches == Counter({str(operator): expected} if expected else {})
    run_body(operator, arguments)
    assert len(launches) == expected


@pytest.mark.parametrize("case", [*OPERATORS, *COPIED])
def test_what_is_declared_is_what_is_allocated(case, launches):
    """The bytes are counted where the launchers allocate results, workspaces and copies."""
    name, arguments, expected = (COPIED.get(case) or OPERATORS[case])[:3]
    operator = getattr(torch.ops.mg_fast, name).default
    with torch.inference_mode():
        # The first call makes the tables.
        run_body(operator, arguments)
        with Count() as declared:
            out = operator(*arguments)
            held = declared.live
        with Count() as allocated:
            kept = run_body(operator, arguments)
            assert allocated.live == held
    assert declared.peak == allocated.peak
    if case in COPIED:
        assert declared.peak - held == expected
    del out, kept
    assert declared.live == allocated.live == 0


def test_every_operator_with_a_kernel_is_declared():
    tested = {f"mg_fast::{name}" for name, _, _ in OPERATORS.values()}
    assert tested == operators().keys()


def test_resizing_without_kernels_is_refused():
    picture = meta(30, 40, 3, dtype=torch.uint8)
    with torch.inference_mode(), Count(), pytest.raises(ValueError, match="not what the torch backend does within it"):
        torch.ops.mg_fast.dual_resize(picture, 32, 14, 1, False, True, "torch")


def test_an_operator_that_declares_nothing_is_refused(monkeypatch):
    monkeypatch.delitem(OPERATIONS, "patch_mining")
    queries, pyramid = torch.empty(1, 1, 1, 5, device="meta"), [torch.empty(1, 4, 4, 5, device="meta")]
    with torch.inference_mode(), Count(), pytest.raises(KeyError, match="mg_fast::patch_mining declares no launches"):
        ops.pool_windows(queries, pyramid, 1)


@pytest.mark.parametrize("device, block", [("cpu", 1), ("cuda", 512)])
def test_memory_of_steps(device, block):
    """Older tensors and views do not count, and a freed tensor counts no more."""

    def blocks(size):
        return -(-size // block) * block

    with FakeTensorMode():
        x = torch.empty(1000, device=device)
        with Count(device) as count:
            y = x + 1
            assert count.live == count.peak == blocks(4000)
            z = y[:10].view(5, 2)
            y.add_(x)
            torch.empty(300, device="meta")
            assert count.live == count.peak == blocks(4000)
            y = torch.cat([y, y])
            # A view keeps the storage.
            assert count.live == count.peak == blocks(4000) + blocks(8000)
            del z
            assert count.live == blocks(8000)
            w = torch.empty(1, device=device)
            assert (count.live, count.peak) == (blocks(8000) + blocks(4), blocks(4000) + blocks(8000))
    del y, w
    assert count.live == 0


def test_what_a_gpu_makes_of_fake_tensors():
    """bfloat16 convolutions, norms of tensors that are not contiguous, and attention.

    The results have the strides that they have on a GPU, and what is allocated beside them counts.
    """
    with FakeTensorMode(), torch.inference_mode(), Count("cuda") as count:
        x = torch.empty(1, 64, 32, 32, dtype=torch.bfloat16, device="cuda")
        out = F.conv2d(x, torch.empty(64, 1, 7, 7, dtype=torch.bfloat16, device="cuda"), padding=3, groups=64)
        assert (out.dtype, out.shape) == (torch.bfloat16, x.shape)
        assert count.total.flop == 2 * 49 * x.numel()
        before = count.live
        normed = F.layer_norm(x.permute(0, 2, 3, 1), (64,))
        # The map and its statistics in float32 are allocated, and for the moment a copy.
        assert normed.is_contiguous() and count.live == before + x.nbytes
        assert count.peak == before + 2 * x.nbytes + 2 * 4 * 32 * 32
        q = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="cuda")
        before, count.peak = count.live, 0
        mixed = F.scaled_dot_product_attention(q, q, q)
        assert mixed.shape == q.shape and mixed.transpose(1, 2).is_contiguous()
        assert count.live == before + q.nbytes and count.peak == count.live + 4 * 2 * 256
        scalar = torch.tensor(1.0, device="cuda")
        assert scalar.device.type == "cuda" and count.launches["aten._to_copy.default"] == 1


def small_tower(dtype=torch.float32):
    torch.manual_seed(0)
    return ConvNeXtPyramid.from_dims((24, 48, 64, 96), (2, 1, 1, 1)).eval().to(dtype)


SMALL = {
    "standard": Sizes(torch.float32, side=6, dim=256, levels=((48, 64), (24, 128), (12, 256))),
    "HD": Sizes(torch.float32, grid=2, views=5, side=3, dim=256, levels=((48, 64), (24, 128), (12, 256))),
}


def calls_on(device):
    """Calls whose memory is measured, by name."""
    found = {}
    for name, sizes in SMALL.items():
        for form in (reference.patch_mining, torch_form.patch_mining):
            tensors = inputs(sizes, device)
            found[f"mining, {form.__module__.split('.')[-1]}, {name}"] = functools.partial(
                form, *tensors, grid=sizes.grid
            )
    tower = small_tower().to(device)
    pixels = torch.randn(1, 3, 128, 128, device=device)
    return found | {
        "tower, timm": functools.partial(tower, pixels, backend="reference"),
        "tower, packed": functools.partial(tower.pack(), pixels, backend="torch"),
    }


def allocated_on_cpu(call):
    """Bytes that torch's allocator had given out, at the peak and in the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = call()
    events = [
        (e.start_ns(), i, e.nbytes())
        for i, e in enumerate(profiled.profiler.kineto_results.events())
        if e.name() == "[memory]"
    ]
    live = list(itertools.accumulate(size for *_, size in sorted(events)))
    del out
    return max(live), live[-1]


@pytest.mark.parametrize("name", calls_on("meta"))
def test_memory_is_what_was_allocated_on_a_cpu(name):
    """torch's profiler measures it, without the tables, which are made once; oneDNN may keep memory of its own."""
    call = calls_on("cpu")[name]
    with torch.inference_mode():
        call()
        with Count("cpu") as count:
            out = call()
            held = count.live
        del out
        peak, left = allocated_on_cpu(call)
    assert count.peak == pytest.approx(peak, rel=0.03)
    assert held == left


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's allocator: no GPU")
@pytest.mark.parametrize("name", calls_on("meta"))
def test_memory_is_what_was_allocated_on_a_gpu(name):
    """The caching allocator may give up to 1 MiB more with each of the few blocks that are live at the peak."""
    call = calls_on("cuda")[name]
    with torch.inference_mode():
        # The first call makes the tables and the workspaces of the libraries.
        call()
        with Count("cuda") as count:
            call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    assert count.peak == pytest.approx(peak, rel=0.05, abs=4 * 2**20)


@pytest.mark.parametrize("name", calls_on("meta"))
def test_flop_are_torchs(name):
    call = calls_on("meta")[name]
    with torch.inference_mode():
        call()
        with FlopCounterMode(display=False) as flop:
            call()
        with Count("meta") as count:
            call()
    assert count.total.flop == flop.get_total_flops() > 0


def test_flop_of_attention():
    """Grouped queries count too, as the language models have them."""
    with torch.inference_mode():
        q, kv = torch.ones(2, 6, 5, 8), torch.ones(2, 2, 7, 8)
        with Count() as count:
            F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)
    assert count.total.flop == 2 * 2 * (2 * 6 * 5 * 7 * 8)
