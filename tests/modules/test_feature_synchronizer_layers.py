"""The feature synchronizer calls layers that are more than their weights: adapters, hooks, quantized layers."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mg_fast.testing.tolerances import relative_error
from tests.synchronizers import build, draw

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


@pytest.fixture(autouse=True)
def quick(one_thread):
    """All modules here are tiny, so one thread is fastest."""


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def hook(layer):
    layer.register_forward_hook(lambda module, args, output: output + output.sin())


def replace(layer):
    original = layer.forward
    layer.forward = lambda x: 3 * original(x)


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Twice())


LAYERS = ("dynamic_offset_mask", "sampling_offsets", "attention_weights", "value_proj", "output_proj", "query_relpos")


@pytest.mark.parametrize("layer, change", itertools.product(LAYERS, (hook, replace, parametrized)))
def test_layers_that_are_more_than_their_weights(layer, change):
    module = build()
    inputs = draw(module)
    before = module(*inputs)
    change(module.get_submodule(layer))
    ours, original = (module(*inputs, backend=backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(ours, original, rtol=0, atol=1e-5)
    assert relative_error(ours, before) > 1e-3
    with pytest.raises(ValueError, match=f"{layer}|hooks|forward"):
        module.pack()


@BACKENDS
def test_adapters_are_trained(backend):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    module = build()
    inputs, before = draw(module), build()(*draw(module))
    module = inject_adapter_in_model(LoraConfig(r=2, target_modules=list(LAYERS[:-1]), init_lora_weights=False), module)
    out = module(*inputs, backend=backend)
    assert relative_error(out, before) > 1e-3
    out.square().sum().backward()
    adapters = {name: p.grad for name, p in module.named_parameters() if "lora" in name}
    assert len(adapters) == 10 and all(gradient.abs().max() > 0 for gradient in adapters.values())
    with pytest.raises(ValueError, match="peft"):
        module.pack()


def test_quantized_layers_are_called():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = build()
    inputs = draw(module)
    plain = copy.deepcopy(module)
    quantize_(module, Int8WeightOnlyConfig())
    with torch.no_grad():
        for layer in LAYERS[:-1]:
            plain.get_submodule(layer).weight.copy_(module.get_submodule(layer).weight.dequantize())
        torch.testing.assert_close(module(*inputs, backend="torch"), plain(*inputs), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="Int8Tensor|AffineQuantized|expected a plain parameter"):
        module.pack()
