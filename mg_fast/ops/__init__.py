"""The functional API: every operation checks its inputs, chooses a backend and calls it; kernels are operators of torch."""

from .mining import (
    MAX_WINDOW,
    patch_mining,
    pool_windows,
    pool_windows_backward,
    pool_windows_backward_pyramid,
)
from .resize import dual_resize, resize_picture

__all__ = [
    "MAX_WINDOW",
    "dual_resize",
    "patch_mining",
    "pool_windows",
    "pool_windows_backward",
    "pool_windows_backward_pyramid",
    "resize_picture",
]
