"""The counters at the dispatcher, on functions whose bytes and launches are known."""

import contextlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import counting
from bench.counting import CountBytes, CountLaunches
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
        with CountBytes() as counter:
            call(x, y)
    assert (counter.total.bytes_read, counter.total.bytes_written) == (read, written)


@pytest.mark.parametrize("device, read, written", [("cuda", 80, 40), ("cpu", 4, 40), (None, 84, 80)])
def test_counter_of_one_device(device, read, written):
    with FakeTensorMode():
        x, number = torch.ones(10, device="cuda"), torch.ones((), device="cpu")
        with CountBytes(device) as counter:
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
        with CountLaunches() as counter:
            call(x)
    assert counter.total == launches


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_one_launch(device):
    with torch.inference_mode():
        q = torch.ones(1, 2, 3, 4, device=device)
        with CountLaunches() as counter:
            F.scaled_dot_product_attention(q, q, q)
    assert counter.by_operator == {"aten.scaled_dot_product_attention.default": 1}


@pytest.mark.parametrize("grid, views, launches", [(1, 1, 1), (2, 4, 1), (2, 5, 2)])
def test_what_our_operators_declare(grid, views, launches):
    queries, pyramid = torch.empty(1, views, 1, 5, device="meta"), [torch.empty(1, 4, 4, 5, device="meta")]
    with torch.inference_mode(), CountLaunches() as counter:
        mining.pool_windows(queries, pyramid, grid)
    assert counter.by_operator == {"mg_fast.pool_windows.default": launches}


@pytest.mark.parametrize("grid, views", [(1, 1), (2, 4), (2, 5)])
def test_what_is_declared_is_what_is_launched(grid, views):
    launcher = pytest.importorskip("mg_fast.kernels.patch_mining", exc_type=ImportError)
    queries, pyramid = torch.empty(1, views, 1, 5, device="meta"), [torch.empty(1, 4, 4, 5, device="meta")]
    declared = counting.LAUNCHES["mg_fast::pool_windows"](queries, pyramid, grid)
    assert declared == len(list(launcher._launches(queries, pyramid, grid)))


def test_an_operator_that_declares_nothing_is_refused(monkeypatch):
    monkeypatch.delitem(counting.LAUNCHES, "mg_fast::pool_windows")
    queries, pyramid = torch.empty(1, 1, 1, 5, device="meta"), [torch.empty(1, 4, 4, 5, device="meta")]
    with torch.inference_mode(), CountLaunches(), pytest.raises(KeyError, match="mg_fast::pool_windows declares no launches"):
        mining.pool_windows(queries, pyramid, 1)


@pytest.fixture(scope="module", params=[False, True], ids=["768", "1536 HD"])
def picture(request):
    return counting.picture_launches(hd=request.param)


def test_launches_of_a_packed_tower(picture):
    """A layer: two norms, four products, attention, SiLU, two residuals; before the layers: patches, class token, positions, norm."""
    assert picture["CLIP, packed"].total() == 23 * 10 + 4
    assert picture["CLIP, packed"]["aten.addmm.default"] == 23 * 4


def test_launches_of_timms_tower(picture):
    """40 convolutions, 40 norms, and in each of 36 blocks two products, GELU, gamma and the residual."""
    assert picture["ConvNeXt-L, timm"].total() == 40 + 40 + 36 * 5


def test_table(capsys, monkeypatch):
    monkeypatch.setattr(counting, "picture_launches", lambda hd=False: {"CLIP, packed": Counter(addmm=92 + hd)})
    counting.main()
    assert capsys.readouterr().out.splitlines()[1].split() == ["CLIP,", "packed", "92", "93"]
