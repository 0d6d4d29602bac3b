"""Calls of deformable attention's operators (see tests/ops/operator_calls.py)."""

import torch

from tests.ops.operator_calls import meta, slanted

SIDES = [3, 4, 2, 2]
# Two pictures, 16 pixels, 3 heads of 8 channels, 5 queries, two levels of 2 points.
VALUE, GRAD = meta(2, 16, 3, 8), meta(2, 5, 24)
LOCATIONS, WEIGHTS = meta(2, 5, 3, 2, 2, 2, dtype=torch.float32), meta(2, 5, 3, 2, 2)
ORDER, ENDS = meta(480, dtype=torch.int64), meta(97, dtype=torch.int64)
ALL, NONE = [True] * 3, [False] * 3

CALLS = {
    "some queries": ("deformable_attention", (VALUE, SIDES, LOCATIONS, WEIGHTS), 1),
    "no query": ("deformable_attention", (VALUE, SIDES, LOCATIONS[:, :0], WEIGHTS[:, :0]), 0),
    "no point": ("deformable_attention", (VALUE, SIDES, meta(2, 5, 3, 2, 0, 2), meta(2, 5, 3, 2, 0)), 1),
    "all gradients": ("deformable_attention_backward", (GRAD, VALUE, SIDES, LOCATIONS, WEIGHTS, ALL), 1),
    "one gradient": (
        "deformable_attention_backward",
        (GRAD, VALUE, SIDES, LOCATIONS, WEIGHTS, [False, True, False]),
        1,
    ),
    "no gradient": ("deformable_attention_backward", (GRAD, VALUE, SIDES, LOCATIONS, WEIGHTS, NONE), 0),
    "gradients of no query": (
        "deformable_attention_backward",
        (GRAD[:, :0], VALUE, SIDES, LOCATIONS[:, :0], WEIGHTS[:, :0], ALL),
        0,
    ),
    "sum": ("deformable_attention_sum", (GRAD, SIDES, LOCATIONS, WEIGHTS, ORDER, ENDS, torch.float16), 1),
    "sum of no picture": (
        "deformable_attention_sum",
        (GRAD[:0], SIDES, LOCATIONS[:0], WEIGHTS[:0], ORDER[:0], ENDS[:1], torch.float32),
        0,
    ),
}
# The channels of the value, and everything else, lie apart.
COPIED = {
    "value, locations and weights": (
        "deformable_attention",
        (slanted(2, 16, 3, 8), SIDES, slanted(2, 5, 3, 2, 2, 2), slanted(2, 5, 3, 2, 2)),
        2 * (768 + 240 + 120),
    ),
    "heads of more": ("deformable_attention", (meta(2, 16, 6, 8)[:, :, ::2], SIDES, LOCATIONS, WEIGHTS), 0),
    "gradient and value": (
        "deformable_attention_backward",
        (slanted(2, 5, 24), slanted(2, 16, 3, 8), SIDES, LOCATIONS, WEIGHTS, ALL),
        2 * (240 + 768),
    ),
    "gradient of a sum": (
        "deformable_attention_sum",
        (GRAD.transpose(0, 1).contiguous().transpose(0, 1), SIDES, LOCATIONS, WEIGHTS, ORDER, ENDS, torch.float16),
        2 * 240,
    ),
}
