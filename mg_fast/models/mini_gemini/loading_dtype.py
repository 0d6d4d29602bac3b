"""Chooses the dtype in which a checkpoint's weights are loaded on this machine's CPU."""

import logging
import math
import os
from collections.abc import Callable

import torch

from ...runtime import cpu_dtype
from ...runtime.dtypes import wanted_dtype
from .checkpoint import open_checkpoint

logger = logging.getLogger(__name__)


def resolve(
    dtype: str | torch.dtype | dict | None,
    path: str | os.PathLike,
    *,
    quantize=None,
    base_model: str | os.PathLike | None = None,
    find: Callable | None = None,
) -> str | torch.dtype | dict:
    """The `dtype` to pass to `from_pretrained` for a model on this machine's CPU.

    A dtype that was asked for is kept, with a warning where it is slow. `auto` stays where the checkpoint's own dtype
    is right. Only the headers of the checkpoint's files are read, no weights.

    Args:
        dtype: as in `mg_fast.load`.
        path, base_model: the checkpoint, as in `open_checkpoint`.
        quantize: as in `mg_fast.load`. A scheme by name calls for bfloat16, which the kernels for quantized weights
            take. A configuration object decides for itself.
        find: finds the checkpoint at `path`, where it belongs to another family.
    """
    wanted = wanted_dtype(dtype)
    if wanted != "auto":
        # A dict of dtypes is left to the caller.
        if quantize is None and isinstance(wanted, torch.dtype):
            cpu_dtype.check(wanted)
        return dtype
    dtype = wanted
    checkpoint = open_checkpoint(path, base_model=base_model) if find is None else find(path)
    stored = checkpoint.stored_dtype()
    if getattr(checkpoint.config, "quantization_config", None) is not None or not (
        quantize is None or isinstance(quantize, str)
    ):
        return dtype
    if quantize is not None:
        if stored != torch.float16:
            return dtype
        logger.warning(
            "weights are loaded in bfloat16, not in the checkpoint's float16: kernels for %s weights take bfloat16",
            quantize,
        )
        return torch.bfloat16
    chosen = cpu_dtype.choose(stored, sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()))
    return dtype if chosen == stored else chosen


def of_weights(
    dtype: str | torch.dtype | dict | None,
    path: str | os.PathLike,
    *,
    base_model: str | os.PathLike | None = None,
    find: Callable | None = None,
) -> torch.dtype:
    """The dtype that `from_pretrained` loads a checkpoint's weights in, for a value of `dtype` that it is given.

    Of a dict of dtypes the one under the empty key counts. The arguments are those of `resolve`.
    """
    wanted = wanted_dtype(dtype.get("") if isinstance(dtype, dict) else dtype)
    if wanted != "auto":
        return wanted
    return (open_checkpoint(path, base_model=base_model) if find is None else find(path)).stored_dtype()
