"""The two pointwise layers of a ConvNeXt block: y = gelu(x W^T + b) and y = r + x W^T + b, one launch each.

Bias, GELU (of the error function) and residual are applied to the float32 accumulator before it is rounded for the only
time: the bare product never touches memory. The caller folds layer scale into W and b. x [M, K] and r [M, N] have unit
stride along a row and any stride between rows; W [N, K] is contiguous. M, N and K may be any sizes; where K, N or a
stride is not a multiple of 16, elements are loaded one by one.

There is one exception to "float32 from the load on": 16-bit operands go to the tensor cores as they are, which sum
their exact products in float32. Triton's interpreter computes garbage from bfloat16, so operands are widened there, and
only there; widening is exact. float32 is multiplied as IEEE float32, without tensor cores. It has not been measured
where the PyTorch form, which is the library's product and one more pass, is faster.
"""

import torch
import triton
import triton.language as tl

from .configs import pointwise_tile


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    stride_xm,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """This program's tile [BM, BN] of x W^T in float32, with its rows [BM] and its columns [BN]."""
    # Tiles are taken column by column within groups of GROUP rows of tiles, so that programs that run at the same time
    # share operands in L2.
    i = tl.program_id(0)
    columns = tl.cdiv(N, BN)
    first = i // (GROUP * columns) * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    i_m = (first + i % (GROUP * columns) % height).to(tl.int64)
    i_n = (i % (GROUP * columns) // height).to(tl.int64)

    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_x = (o_m < M)[:, None]
    m_w = (o_n < N)[:, None]
    p_x = x_ptr + o_m[:, None] * stride_xm + o_k[None, :]
    p_w = weight_ptr + o_n[:, None] * K + o_k[None, :]
    b_product = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, K, BK):
        if K % BK == 0:
            b_x = tl.load(p_x, mask=m_x, other=0.0)  # [BM, BK]
            b_w = tl.load(p_w, mask=m_w, other=0.0)  # [BN, BK]
        else:
            m_k = (i_k + o_k < K)[None, :]
            b_x = tl.load(p_x, mask=m_x & m_k, other=0.0)
            b_w = tl.load(p_w, mask=m_w & m_k, other=0.0)
        if WIDEN:
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        b_product = tl.dot(b_x, tl.trans(b_w), b_product, input_precision="ieee")
        p_x += BK
        p_w += BK
    return b_product, o_m, o_n


@triton.jit
def gelu_of_16_bits(b_x):
    """x * (1 + erf(x / sqrt 2)) / 2, right to 6e-5 of the result, for results that are rounded to 16 bits.

    It is x - |x| q above zero and x q below. q = erfc(|x| / sqrt 2) / 2 is a polynomial of t = 1 / (1 + p |x|) times
    exp(-x^2 / 2), as in Abramowitz and Stegun, 7.1.26. The coefficients were fitted to the least relative error of q
    from 0 to 40, so that small results are right as well. It takes about half of the instructions of tl.erf.
    """
    b_size = tl.abs(b_x)
    # From 30 on, q is zero, and its product with infinity would be NaN. NaN stays NaN. Minus infinity becomes NaN, as
    # by the formula itself.
    b_size = tl.minimum(b_size, 30.0, propagate_nan=tl.PropagateNan.ALL)
    b_t = 1.0 / (1.0 + 0.39 * b_size)
    b_q = 0.165085938 - 0.0872047404 * b_t
    b_q = b_q * b_t + 0.108102205
    b_q = b_q * b_t + 0.158513898
    b_q = b_q * b_t + 0.155472732
    b_q *= b_t * tl.exp2(-0.72134752 * b_size * b_size)
    return tl.where(b_x > 0.0, b_x - b_size * b_q, b_x * b_q)


@triton.jit(do_not_specialize=["M"])
def linear_gelu_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_xm,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    b_product, o_m, o_n = _product(x_ptr, weight_ptr, stride_xm, M, N, K, BM, BN, BK, GROUP, WIDEN)
    m_n = o_n < N
    b_out = b_product + tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if out_ptr.dtype.element_ty == tl.float32:
        b_out = 0.5 * b_out * (1.0 + tl.erf(b_out * 0.7071067811865476))
    else:
        b_out = gelu_of_16_bits(b_out)
    p_out = out_ptr + o_m[:, None] * N + o_n[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=(o_m < M)[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["M"])
def linear_residual_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    stride_xm,
    stride_rm,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    b_product, o_m, o_n = _product(x_ptr, weight_ptr, stride_xm, M, N, K, BM, BN, BK, GROUP, WIDEN)
    m_n = o_n < N
    m_out = (o_m < M)[:, None] & m_n[None, :]
    b_out = b_product + tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_out += tl.load(residual_ptr + o_m[:, None] * stride_rm + o_n[None, :], mask=m_out, other=0.0).to(tl.float32)
    p_out = out_ptr + o_m[:, None] * N + o_n[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)


def _launch(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[int, dict]:
    """Number of programs and common arguments of a launch on matrices whose rows are contiguous."""
    (m, k), n = x.shape, weight.shape[0]
    architecture = triton.runtime.driver.active.get_current_target().arch if x.is_cuda else None
    strides = [x.stride(0), k, n, *([] if residual is None else [residual.stride(0)])]
    tile = pointwise_tile(architecture, x.element_size(), m, n, strides, gelu=residual is None)
    arguments = {
        "stride_xm": x.stride(0),
        "M": m,
        "N": n,
        "K": k,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "GROUP": tile.group,
        "WIDEN": triton.knobs.runtime.interpret,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        # A limit that is no limit would let the compiler take all registers.
        "maxnreg": tile.registers if tile.registers < 255 else None,
    }
    return triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns), arguments


def _rows_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def linear_gelu_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Computes gelu(x W^T + b), with the GELU of the error function.

    Args:
        x: [M, K], fp16/bf16/fp32; rows of unit stride are read in place, others are copied.
        weight: [N, K], of x's dtype.
        bias: [N], of x's dtype.

    Returns:
        [M, N] of x's dtype, contiguous.
    """
    x, weight, bias = _rows_contiguous(x), weight.contiguous(), bias.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    programs, arguments = _launch(x, weight)
    if programs > 0:
        linear_gelu_fwd_kernel[(programs,)](x, weight, bias, out, **arguments)
    return out


def linear_residual_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes r + x W^T + b.

    Args:
        x, weight, bias: as in `linear_gelu_fwd`.
        residual: [M, N], fp16/bf16/fp32; rows of unit stride are read in place, others are copied.
        out: [M, N], contiguous, fp16/bf16/fp32. It may be the residual itself, because one program both reads and
            writes each element.

    Returns:
        `out`; if it is None, a new contiguous [M, N] in the wider dtype of x and residual.
    """
    x, weight, bias, residual = _rows_contiguous(x), weight.contiguous(), bias.contiguous(), _rows_contiguous(residual)
    if out is None:
        out = x.new_empty(residual.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    programs, arguments = _launch(x, weight, residual)
    if programs > 0:
        linear_residual_fwd_kernel[(programs,)](
            x, weight, bias, residual, out, stride_rm=residual.stride(0), **arguments
        )
    return out
