"""The settings that change float arithmetic, as one key for kept results and captured graphs."""

import torch
from torch import backends

from ..private_interfaces import find, setting

# Names in torch._C. torch's public properties read the same settings, but take several times as long.
_NAMES = (
    # How products of 16-bit numbers accumulate their sums. The first two are pairs: whether in reduced precision, and
    # whether in several parts.
    "_get_cublas_allow_fp16_reduced_precision_reduction",
    "_get_cublas_allow_bf16_reduced_precision_reduction",
    "_get_cublas_allow_fp16_accumulation",
    "_get_cpu_allow_fp16_reduced_precision_reduction",
    # Which kernels attention may take.
    "_get_flash_sdp_enabled",
    "_get_mem_efficient_sdp_enabled",
    "_get_math_sdp_enabled",
    "_get_cudnn_sdp_enabled",
    "_get_math_sdp_allow_fp16_bf16_reduction",
    # Which libraries, and which of their kernels, compute products and convolutions.
    "_get_cudnn_enabled",
    "_get_cudnn_benchmark",
    "_get_cudnn_deterministic",
    "_get_cudnn_depthwise_kernel",
    "_get_mkldnn_enabled",
    "_get_mkldnn_deterministic",
    "_get_deterministic_algorithms",
    "_get_blas_preferred_backend",
    "_get_cublaslt_prefer_grouped_gemm",
)
_SETTINGS = (torch.get_default_dtype, *filter(None, map(setting, _NAMES)))
_PRECISIONS = {
    ("cuda", "matmul"): backends.cuda.matmul,
    ("cuda", "conv"): backends.cudnn.conv,
    ("cuda", "rnn"): backends.cudnn.rnn,
    ("mkldnn", "matmul"): backends.mkldnn.matmul,
    ("mkldnn", "conv"): backends.mkldnn.conv,
    ("mkldnn", "rnn"): backends.mkldnn.rnn,
}
_precision = find("torch._C._get_fp32_precision_getter") or (lambda *part: _PRECISIONS[part].fp32_precision)
_attention_order = find("torch._C._get_sdp_priority_order") or list


def numerics(device: torch.device) -> tuple:
    """All settings of torch by which the same operation on the same numbers may round differently on a device.

    Results that were kept, and CUDA graphs that were captured, under one key may only be used under an equal key. The
    key includes the settings of other types of devices: they are seldom changed, and a model may be spread over several
    devices.

    Two things are not included. `torch.set_flush_denormal` cannot be queried. The number of threads changes the order
    of sums on a CPU, as the choice of a kernel does in many other places, but it is not a setting of precision.

    Returns:
        Strings, numbers, dtypes, enumerations and None in a fixed order, to be hashed, compared, or written by `repr`.
    """
    return (
        # `torch.set_float32_matmul_precision` and the older `allow_tf32` set these as well.
        *(_precision(backend, operation) for backend, operation in _PRECISIONS),
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None,
        *(read() for read in _SETTINGS),
        # In which order attention's kernels are tried.
        *_attention_order(),
    )
