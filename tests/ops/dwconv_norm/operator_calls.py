"""Calls of dwconv_norm's operator (see tests/ops/operator_calls.py)."""

from tests.ops.operator_calls import meta, slanted

CALLS = {
    "a map": ("dwconv_norm", (meta(1, 5, 6, 8), meta(49, 8), meta(8), meta(8), meta(8), 1e-6), 1),
    "a map on tensor cores": (
        "dwconv_norm",
        (meta(1, 5, 6, 32), meta(49, 32), meta(32), meta(32), meta(32), 1e-6),
        2,
    ),
    "nothing": ("dwconv_norm", (meta(0, 5, 6, 8), meta(49, 8), meta(8), meta(8), meta(8), 1e-6), 0),
}
COPIED = {
    "map and weights": (
        "dwconv_norm",
        (slanted(1, 5, 6, 8), slanted(49, 8), meta(8), meta(16)[::2], meta(8), 1e-6),
        2 * (240 + 392 + 8),
    ),
    "a map of float16 on tensor cores": (
        "dwconv_norm",
        (meta(1, 5, 6, 32), meta(49, 32), meta(32), meta(32), meta(32), 1e-6),
        4 * 960,
    ),
}
