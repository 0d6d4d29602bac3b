"""The ahead-of-time gate: kernels compile for every architecture with no GPU, without spills, within its shared memory.

A process of its own: what is compiled here must not have been imported under TRITON_INTERPRET. Until the first kernel lands the gate
is held against a kernel of its own, so that a toolchain that cannot compile, or limits that are never reached, fail today.
"""

# ruff: noqa: E402  (the skips below come before the imports they guard)

import os

import pytest

triton = pytest.importorskip("triton", reason="triton is published for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling ahead of time needs a process without TRITON_INTERPRET", allow_module_level=True)

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mg_fast.kernels.configs import SHARED_MEMORY_LIMITS


@triton.jit
def window_softmax_kernel(x_ptr, out_ptr, n, BM: tl.constexpr, BN: tl.constexpr):
    """Rows of scores to weights by way of a matrix product, so that shared memory is used."""
    i_row = tl.program_id(0).to(tl.int64)
    o_m = i_row * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_x = o_n[None, :] < n
    b_x = tl.load(x_ptr + o_m[:, None] * n + o_n[None, :], mask=m_x, other=float("-inf")).to(tl.float32)  # [BM, BN]
    b_w = tl.exp(b_x - tl.max(b_x, axis=1)[:, None])
    b_w = b_w / tl.sum(b_w, axis=1)[:, None]
    b_out = tl.dot(b_w, tl.trans(b_w))  # [BM, BM]
    tl.store(out_ptr + o_m[:, None] * BM + tl.arange(0, BM)[None, :], b_out)


def compile_for(capability, bm, bn):
    signature = {"x_ptr": "*fp16", "out_ptr": "*fp32", "n": "i32", "BM": "constexpr", "BN": "constexpr"}
    source = ASTSource(fn=window_softmax_kernel, signature=signature, constexprs={"BM": bm, "BN": bn})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize("capability", SHARED_MEMORY_LIMITS)
def test_compiles_within_the_limits(capability):
    compiled = compile_for(capability, 32, 64)
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert 0 < compiled.metadata.shared <= SHARED_MEMORY_LIMITS[capability]


@pytest.mark.parametrize("capability", [86, 89, 120])
def test_the_gate_can_fail(capability):
    """A tile that an H100 has room for and these cards have not."""
    shared = compile_for(capability, 64, 512).metadata.shared
    assert shared > SHARED_MEMORY_LIMITS[capability]
