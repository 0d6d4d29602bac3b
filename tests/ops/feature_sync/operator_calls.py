"""Calls of feature_sync's operator (see tests/ops/operator_calls.py)."""

import torch

from tests.ops.operator_calls import meta, slanted

SIDES = [4, 4, 2, 2]


def arguments(batch=2, queries=5, pictures=3, values=None, query=None, table=None, ignore=None) -> tuple:
    """Arguments of the operator for 2 heads of 8 channels and 2 points."""
    return (
        meta(batch, pictures, 20, 2, 8) if values is None else values,
        meta(batch, queries, 16) if query is None else query,
        meta(4, 16) if table is None else table,
        meta(batch, queries, pictures, dtype=torch.int64),
        meta(1, 1, 2, dtype=torch.float32),
        SIDES,
        4,
        ignore,
    )


CALLS = {
    "several rows": ("feature_sync", arguments(ignore=meta(16)), 1),
    "no picture": ("feature_sync", arguments(pictures=0), 1),
    "no query": ("feature_sync", arguments(queries=0), 0),
    "no row": ("feature_sync", arguments(batch=0), 0),
}
COPIED = {
    "values, queries, table and what is ignored": (
        "feature_sync",
        arguments(values=slanted(2, 3, 20, 2, 8), query=slanted(2, 5, 16), table=slanted(4, 16), ignore=meta(32)[::2]),
        2 * (2 * 3 * 20 * 2 * 8 + 2 * 5 * 16 + 4 * 16 + 16),
    ),
    "none": ("feature_sync", arguments(), 0),
}
