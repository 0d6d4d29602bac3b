"""Calls of the pointwise layers' operators (see tests/ops/operator_calls.py)."""

from tests.ops.operator_calls import meta, slanted

CALLS = {
    "linear_gelu": ("linear_gelu", (meta(7, 8), meta(9, 8), meta(9)), 1),
    "linear_gelu of nothing": ("linear_gelu", (meta(0, 8), meta(9, 8), meta(9)), 0),
    "linear_residual": ("linear_residual", (meta(7, 8), meta(9, 8), meta(9), meta(7, 9)), 1),
    "linear_residual in place": ("linear_residual_", (meta(7, 8), meta(9, 8), meta(9), meta(7, 9)), 1),
    "linear_residual in place, of nothing": ("linear_residual_", (meta(7, 8), meta(0, 8), meta(0), meta(7, 0)), 0),
}
COPIED = {
    "rows, weight and bias": ("linear_gelu", (slanted(7, 8), slanted(9, 8), meta(18)[::2]), 2 * (56 + 72 + 9)),
    "rows, weight and residual": (
        "linear_residual",
        (slanted(7, 8), slanted(9, 8), meta(9), slanted(7, 9)),
        2 * (56 + 72 + 63),
    ),
    "in place": ("linear_residual_", (slanted(7, 8), slanted(9, 8), meta(9), meta(7, 9)), 2 * (56 + 72)),
}
