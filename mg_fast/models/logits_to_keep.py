"""Which positions of a pass get logits."""

import torch

from ..errors import quoted
from ..runtime.arguments import whole_number


def kept_positions(logits_to_keep) -> "slice | torch.Tensor | list":
    """The index of the positions that get logits.

    Python's own numbers and tensors take only steps that torch.compile can trace.
    """
    if isinstance(logits_to_keep, (int, torch.SymInt)):
        return slice(-logits_to_keep, None)
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim:
        return logits_to_keep
    number = whole_number(logits_to_keep)
    if number is not None:
        return slice(-number, None)
    if not (isinstance(logits_to_keep, (list, slice)) or getattr(logits_to_keep, "ndim", 0) == 1):
        raise ValueError(
            f"logits_to_keep: expected a whole number, or a list or tensor of positions, got {quoted(logits_to_keep)}"
        )
    return logits_to_keep
