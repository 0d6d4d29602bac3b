"""What changes float arithmetic, as one key for everything that is kept of results or captured."""

import torch
from torch import _C

# torch's public properties read these, too, and take several times as long.
_PRECISIONS = tuple((backend, operation) for backend in ("cuda", "mkldnn") for operation in ("matmul", "conv", "rnn"))
_SETTINGS = (
    torch.get_default_dtype,
    # How sums within products of 16-bit numbers are kept. The first two are pairs: in reduced precision, and in several
    # parts.
    _C._get_cublas_allow_fp16_reduced_precision_reduction,
    _C._get_cublas_allow_bf16_reduced_precision_reduction,
    _C._get_cublas_allow_fp16_accumulation,
    _C._get_cpu_allow_fp16_reduced_precision_reduction,
    # Which kernels attention may take.
    _C._get_flash_sdp_enabled,
    _C._get_mem_efficient_sdp_enabled,
    _C._get_math_sdp_enabled,
    _C._get_cudnn_sdp_enabled,
    _C._get_math_sdp_allow_fp16_bf16_reduction,
    # Which libraries, and which of their kernels, multiply and convolve.
    _C._get_cudnn_enabled,
    _C._get_cudnn_benchmark,
    _C._get_cudnn_deterministic,
    _C._get_mkldnn_enabled,
    _C._get_mkldnn_deterministic,
    _C._get_deterministic_algorithms,
)


def numerics(device: torch.device) -> tuple:
    """All of torch's settings by which the same operation on the same numbers may round differently on a device.

    Results that were kept, and CUDA graphs that were captured, under one key are of use under an equal one alone.
    Settings of the other types of devices are in it, too: they are seldom changed, and a model may be spread over
    several.

    Two things are not in it. `torch.set_flush_denormal` cannot be asked for. The number of threads changes the order of
    sums on a CPU, as the choice of a kernel does in many other places, but is not a setting of precision.

    Returns:
        Strings, numbers, dtypes and None, in an order of their own: to be hashed, compared, or written by `repr`.
    """
    return (
        # `torch.set_float32_matmul_precision` and the older `allow_tf32` set these as well.
        *(_C._get_fp32_precision_getter(backend, operation) for backend, operation in _PRECISIONS),
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None,
        *(setting() for setting in _SETTINGS),
        # In which order kernels of attention are tried, and which library multiplies on a GPU.
        *_C._get_sdp_priority_order(),
        int(_C._get_blas_preferred_backend()),
    )
