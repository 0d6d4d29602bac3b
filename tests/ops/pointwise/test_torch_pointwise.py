"""The language model's products by oneDNN: which layers take them, when, and what remains as in a Linear."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from mg_fast.ops.torch import pointwise as linear
from mg_fast.ops.torch.pointwise import OneDNNLinear, by_onednn, take_onednn


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 384), nn.Linear(384, 512, bias=False), nn.Linear(512, 16))


@pytest.fixture
def taken():
    module = layers()
    take_onednn(module)
    return module


@pytest.fixture
def products(monkeypatch):
    """A list that grows by one entry for every call of oneDNN."""
    calls, plain = [], linear._onednn_product

    def counted(*args):
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(linear, "_onednn_product", counted)
    return calls


X = torch.randn(3, 5, 512, generator=torch.Generator().manual_seed(1))


def test_large_float32_layers_only(taken):
    assert [type(part) for part in taken] == [OneDNNLinear, OneDNNLinear, nn.Linear]
    half = layers().bfloat16()
    take_onednn(half)
    assert {type(part) for part in half} == {nn.Linear}


def test_within_the_block_only(taken, products):
    with torch.no_grad():
        expected = layers().double()(X.double())
        plain = taken(X)
        assert not products
        with by_onednn():
            ours = taken(X)
        assert len(products) == 2
        taken(X)
        assert len(products) == 2
    error, allowed = (ours - expected).abs().max(), (plain - expected).abs().max()
    assert error <= 4 * allowed


def test_gradients_are_those_of_a_linear(taken, products):
    plain = layers()
    with by_onednn():
        taken(X).sum().backward()
    plain(X).sum().backward()
    assert not products
    for ours, theirs in zip(taken.parameters(), plain.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


def test_weights_quantized_since(taken, products):
    """A layer whose weights are quantized later keeps its class, and computes as before."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(taken, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    assert isinstance(taken[0], OneDNNLinear)
    with torch.no_grad():
        expected = taken(X)
        with by_onednn():
            assert torch.equal(taken(X), expected)
    assert not products


def test_converted_since(taken, products):
    taken.bfloat16()
    with torch.no_grad(), by_onednn():
        assert taken(X.bfloat16()).dtype == torch.bfloat16
    assert not products


def test_copies(taken):
    for copied in (copy.deepcopy(taken), pickle.loads(pickle.dumps(taken))):
        with torch.no_grad(), by_onednn():
            assert torch.equal(copied(X), taken(X))
    assert taken.state_dict().keys() == layers().state_dict().keys()


def test_compiled(taken, products):
    torch._dynamo.reset()
    compiled = torch.compile(taken, fullgraph=True, backend="eager")
    with torch.no_grad(), by_onednn():
        assert torch.equal(compiled(X), layers()(X))
    assert not products


def test_only_in_its_thread(taken):
    seen = []
    with by_onednn():
        thread = threading.Thread(target=lambda: seen.append(getattr(linear._thread, "by_onednn", False)))
        thread.start()
        thread.join()
    assert seen == [False]
