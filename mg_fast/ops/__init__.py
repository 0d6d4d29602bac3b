"""The functional API: every operation checks its inputs, chooses a backend and calls it; kernels are operators of torch."""

from .dual_resize import dual_resize, resize_picture
from .dwconv_norm import MAX_CHANNELS, dwconv_norm, dwconv_norm_backward, dwconv_norm_kernel
from .patch_mining import MAX_WINDOW, patch_mining, pool_windows, pool_windows_backward, pool_windows_backward_pyramid
from .pointwise import linear_gelu, linear_residual, linear_residual_

__all__ = [
    "MAX_CHANNELS",
    "MAX_WINDOW",
    "dual_resize",
    "dwconv_norm",
    "dwconv_norm_backward",
    "dwconv_norm_kernel",
    "linear_gelu",
    "linear_residual",
    "linear_residual_",
    "patch_mining",
    "pool_windows",
    "pool_windows_backward",
    "pool_windows_backward_pyramid",
    "resize_picture",
]
