"""Linear layers by the faster library, and the pointwise layers of a ConvNeXt block: the `torch` backend.

On CPUs oneDNN's float32 products are faster than F.linear's, but their rounding errors are larger, because each sums
all of its terms one after the other, or in few blocks. They are used as far as the accuracy rule allows.
"""

import contextlib
import math
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...private_interfaces import find

# Rows from which oneDNN's convolution is faster than F.linear. In float16 no measurement found it faster.
_FEWEST_ROWS = {torch.float32: 512, torch.bfloat16: 1024}
_FEWEST_WEIGHTS = 2**17
# The most terms that a float32 convolution, or a float32 product with GELU, may sum up within the accuracy rule. In
# bfloat16 the rounding of the result is far larger than the errors of the sum. Without AVX-512, newer releases of torch
# no longer sum the terms of a product in blocks: with 768 terms and AVX2 the error of torch 2.14.1 is 8.97e-7 of the
# largest value, that of torch 2.11.0 is 2.91e-7.
_IN_BLOCKS = torch.__version__ < (2, 12) or torch.backends.cpu.get_cpu_capability() == "AVX512"
_MOST_TERMS = {"convolution": 512, "gelu": 1024 if _IN_BLOCKS else 512}

_onednn_product = find("torch.ops.mkldnn._linear_pointwise")

_thread = threading.local()


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, precise: bool = False
) -> torch.Tensor:
    """F.linear by the faster library: on CPUs, from a certain size on, oneDNN's 1x1 convolution.

    Set `precise` where the product is itself a result that must pass the accuracy rule. Otherwise the product is one
    step among several: its error, in float32 up to four times that of F.linear, is lost among the errors of the others.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cpu" or weight.numel() < _FEWEST_WEIGHTS or rows < _FEWEST_ROWS.get(x.dtype, math.inf):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, rows, 1, x.shape[-1]).permute(0, 3, 1, 2)
    parts = -(-x.shape[-1] // _MOST_TERMS["convolution"]) if precise and x.dtype == torch.float32 else 1
    out = None
    for part, taken in zip(pixels.chunk(parts, 1), weight[:, :, None, None].chunk(parts, 1)):
        out = F.conv2d(part, taken, bias) if out is None else out.add_(F.conv2d(part, taken))
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Computes gelu(x W^T + b): on CPUs as one oneDNN product, else as a product with bias and one pass in place."""
    if _has_epilogue(x, weight, bias) and x.shape[-1] <= _MOST_TERMS["gelu"]:
        return _onednn_product(x, weight, bias, "gelu", [], "none")
    y = linear(x, weight, bias, precise=True)
    # GELU's gradient needs y, which GELU in place would overwrite.
    return F.gelu(y) if y.requires_grad else torch.ops.aten.gelu_(y)


def linear_residual(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Computes r + x W^T + b: on CPUs as one oneDNN product, otherwise as a product with bias and one pass in place.

    `torch.addmm(residual, x, weight.T)` would copy the residual first. With `out=residual`, as in `feed_forward_`, it
    copies nothing, but it has no place for a bias beside the residual.
    """
    if _has_epilogue(x, weight, bias, residual):
        return _onednn_product.binary(x, residual, weight, bias, "add")
    y = linear(x, weight, bias, precise=True)
    return y.add_(residual) if y.dtype == torch.promote_types(y.dtype, residual.dtype) else y + residual


def linear_residual_(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Computes `linear_residual` and writes it into the residual."""
    if _has_epilogue(x, weight, bias, residual):
        return residual.copy_(_onednn_product.binary(x, residual, weight, bias, "add"))
    return residual.add_(linear(x, weight, bias, precise=True))


class WideProducts(NamedTuple):
    """Both pointwise layers of a block with EXTRA more hidden channels, of which the first is CONSTANT in every row.

    Its column of the contraction carries the bias. `expand` is [4 C + EXTRA, C] with `expand_bias`, and `contract`
    [C, 4 C + EXTRA].
    """

    expand: torch.Tensor
    expand_bias: torch.Tensor
    contract: torch.Tensor


# Products of 16-bit numbers are fastest where all widths are multiples of eight.
EXTRA = 8
# gelu(8) is 8 in every dtype, and an eighth of a bias is exact, unless it is smaller than the dtype's normal numbers.
CONSTANT = 8.0


def widen(
    expand: torch.Tensor, expand_bias: torch.Tensor, contract: torch.Tensor, contract_bias: torch.Tensor
) -> WideProducts:
    """The pointwise layers of a block, [4 C, C] and [C, 4 C] with their biases, for `feed_forward_`."""
    hidden, channels = expand.shape
    wide = WideProducts(
        expand.new_zeros(hidden + EXTRA, channels),
        expand_bias.new_zeros(hidden + EXTRA),
        contract.new_zeros(channels, hidden + EXTRA),
    )
    wide.expand[:hidden], wide.expand_bias[:hidden], wide.contract[:, :hidden] = expand, expand_bias, contract
    wide.expand_bias[hidden] = CONSTANT
    wide.contract[:, hidden] = contract_bias / CONSTANT
    return wide


def feed_forward_(x: torch.Tensor, wide: WideProducts, residual: torch.Tensor) -> None:
    """Adds both pointwise layers of a block to the residual, in three launches: product, GELU, product.

    The second product adds to the residual in its own epilogue. With `out=` the residual itself, addmm copies nothing
    (torch's aten/src/ATen/native/cuda/Blas.cpp). What is saved is a pass over the map, which would read two maps and
    write one, and the rounding before it. What it costs is 8 / (4 C) of the products and of the activation between
    them, and memory for a copy of the expansion's weights. By count, with the wider activation, all blocks of
    ConvNeXt-L at 768 pixels take 108 in place of 144 launches and move 3518 in place of 3833 MB; at 1536 pixels 12936
    in place of 14200 MB.

    Args:
        x: [M, C].
        residual: [M, C], contiguous, in the dtype of x and of the products.
    """
    expanded = linear_gelu(x, wide.expand, wide.expand_bias)
    torch.addmm(residual, expanded, wide.contract.t(), out=residual)


class OneDNNLinear(nn.Linear):
    """A Linear that computes large float32 products on a CPU with oneDNN, within `by_onednn()` in the same thread.

    Everywhere else it is a plain Linear. It is for a language model, whose layers come from transformers. Timed by hand
    on an AMD machine with 1 row (a decoded token) to 256 rows, oneDNN was faster except for layers of 1280 x 1280 at 16
    to 32 rows. Its errors are those of `linear` without `precise`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Weights that were quantized since also report float32 as their dtype.
        plain = type(self.weight) is nn.Parameter
        if plain and getattr(_thread, "by_onednn", False) and _has_epilogue(x := x.contiguous(), self.weight):
            return _onednn_product(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def take_onednn(module: nn.Module) -> None:
    """Turns the large plain float32 Linears of a module on a CPU into `OneDNNLinear`s.

    Outside `by_onednn()` they compute as before.
    """
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if type(part) is nn.Linear and type(weight) is nn.Parameter and _has_epilogue(weight.detach(), weight.detach()):
            part.__class__ = OneDNNLinear


@contextlib.contextmanager
def by_onednn():
    """Within the block and its thread, `OneDNNLinear`s use oneDNN's products."""
    before, _thread.by_onednn = getattr(_thread, "by_onednn", False), True
    try:
        yield
    finally:
        _thread.by_onednn = before


def _has_epilogue(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether oneDNN's products that end in more than a bias take these tensors.

    They are the products that torch.compile calls, and have no gradients.
    """
    if _onednn_product is None or torch.compiler.is_compiling():
        return False
    tensors = (x, weight, *others)
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and x.dim() > 1
        and x.numel() > 0
        and weight.numel() >= _FEWEST_WEIGHTS
        and all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )
