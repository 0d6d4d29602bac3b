"""Calls of patch mining's operators (see tests/ops/operator_calls.py)."""

import torch

from tests.ops.operator_calls import meta, slanted


def mining_of(views):
    return meta(1, views, 1, 5), [meta(1, 4, 4, 5)]


CALLS = {
    "standard": ("patch_mining", (*mining_of(1), 1), 1),
    "HD": ("patch_mining", (*mining_of(5), 2), 2),
    "cells alone": ("patch_mining", (*mining_of(4), 2), 1),
    # One launch more goes over the pyramid.
    "standard, coarse pixels": ("patch_mining", (*mining_of(1), 1, "coarse"), 2),
    "HD, coarse pixels": ("patch_mining", (*mining_of(5), 2, "coarse"), 3),
    "backward": (
        "patch_mining_backward",
        (meta(1, 5, 1, 5), *mining_of(5), meta(1, 5, 1, 3, 4, dtype=torch.float32), 2),
        2,
    ),
}
COPIED = {
    "queries and maps": ("patch_mining", (slanted(1, 1, 4, 5), [slanted(1, 4, 4, 5)], 1), 2 * (4 * 5 + 16 * 5)),
    "rows apart": ("patch_mining", (meta(1, 1, 1, 5), [meta(1, 4, 4, 10)[..., :5]], 1), 0),
    # Means and squares of every pixel, in float32.
    "rows apart, coarse pixels": (
        "patch_mining",
        (meta(1, 1, 1, 5), [meta(1, 4, 4, 10)[..., :5]], 1, "coarse"),
        2 * 16 * 4,
    ),
    "gradient and maps": (
        "patch_mining_backward",
        (slanted(1, 5, 1, 5), meta(1, 5, 1, 5), [slanted(1, 4, 4, 5)], meta(1, 5, 1, 3, 4), 2),
        2 * (5 * 5 + 16 * 5),
    ),
}
