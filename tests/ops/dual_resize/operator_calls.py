"""Calls of dual_resize's operator (see tests/ops/operator_calls.py)."""

import torch

from tests.ops.operator_calls import meta

PICTURE = meta(30, 40, 3, dtype=torch.uint8)
CALLS = {
    "standard": ("dual_resize", (PICTURE, 32, 14, 1, False, True, "triton"), 2),
    "HD": ("dual_resize", (PICTURE, 32, 14, 2, True, True, "triton"), 2),
}
COPIED = {"columns": ("dual_resize", (PICTURE, 32, 14, 2, True, True, "triton"), 31 * 3 * 32)}
