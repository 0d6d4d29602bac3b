"""The count at the dispatcher: bytes and launches of functions that are known, FLOP against torch's, memory against what was allocated."""

import contextlib
import importlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import counting
from bench.counting import Count
from mg_fast.ops import mining


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


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def mining_of(views):
    return meta(1, views, 1, 5), [meta(1, 4, 4, 5)]


# arguments of mg_fast's operators on the meta device, and what they launch
OPERATORS = {
    "standard": ("pool_windows", (*mining_of(1), 1), 1),
    "HD": ("pool_windows", (*mining_of(5), 2), 2),
    "cells alone": ("pool_windows", (*mining_of(4), 2), 1),
    "backward": ("pool_windows_backward", (meta(1, 5, 1, 5), *mining_of(5), meta(1, 5, 1, 3, 4, dtype=torch.float32), 2), 2),
    "dwconv_norm": ("dwconv_norm", (meta(1, 5, 6, 8), meta(49, 8), meta(8), meta(8), meta(8), 1e-6), 1),
    "dwconv_norm of nothing": ("dwconv_norm", (meta(0, 5, 6, 8), meta(49, 8), meta(8), meta(8), meta(8), 1e-6), 0),
    "linear_gelu": ("linear_gelu", (meta(7, 8), meta(9, 8), meta(9)), 1),
    "linear_gelu of nothing": ("linear_gelu", (meta(0, 8), meta(9, 8), meta(9)), 0),
    "linear_residual": ("linear_residual", (meta(7, 8), meta(9, 8), meta(9), meta(7, 9)), 1),
    "linear_residual in place": ("linear_residual_", (meta(7, 8), meta(9, 8), meta(9), meta(7, 9)), 1),
    "linear_residual in place, of nothing": ("linear_residual_", (meta(7, 8), meta(0, 8), meta(0), meta(7, 0)), 0),
    "dual_resize": ("dual_resize", (meta(30, 40, 3, dtype=torch.uint8), 32, 14, 1, False, True, "triton"), 2),
    "dual_resize, HD": ("dual_resize", (meta(30, 40, 3, dtype=torch.uint8), 32, 14, 2, True, True, "triton"), 2),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_what_is_declared_is_what_is_launched(case, monkeypatch):
    """Counted where the launchers call their kernels."""
    pytest.importorskip("triton")
    name, arguments, expected = OPERATORS[case]
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: launches.append(grid)

    for family in ("dual_resize", "dwconv_norm", "patch_mining", "pointwise"):
        module = importlib.import_module(f"mg_fast.kernels.{family}")
        kernels = [kernel for kernel in vars(module) if kernel.endswith("_kernel")]
        assert kernels
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, Kernel())
    operator = getattr(torch.ops.mg_fast, name).default
    with torch.inference_mode(), Count() as counter:
        operator(*arguments)
    assert not launches and counter.launches == Counter({str(operator): expected} if expected else {})
    # what it does, where the meta device has its shapes alone
    operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)
    assert len(launches) == expected


def test_every_operator_with_a_kernel_declares_its_launches():
    tested = {f"mg_fast::{name}" for name, _, _ in OPERATORS.values()}
    assert tested == counting.LAUNCHES.keys()


def test_resizing_without_kernels_is_refused():
    picture = meta(30, 40, 3, dtype=torch.uint8)
    with torch.inference_mode(), Count(), pytest.raises(ValueError, match="not what the torch backend does within it"):
        torch.ops.mg_fast.dual_resize(picture, 32, 14, 1, False, True, "torch")


def test_an_operator_that_declares_nothing_is_refused(monkeypatch):
    monkeypatch.delitem(counting.LAUNCHES, "mg_fast::pool_windows")
    queries, pyramid = torch.empty(1, 1, 1, 5, device="meta"), [torch.empty(1, 4, 4, 5, device="meta")]
    with torch.inference_mode(), Count(), pytest.raises(KeyError, match="mg_fast::pool_windows declares no launches"):
        mining.pool_windows(queries, pyramid, 1)
