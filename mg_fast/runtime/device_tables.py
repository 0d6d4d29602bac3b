"""Tables that depend only on sizes, kept on each device instead of made, or copied there, in every call."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch

from .byte_lru import ByteLRU


def cached_on_device(limit: int | None = None) -> Callable:
    """A decorator that keeps the tensors which a function returns, by its arguments.

    The function returns tensors, alone or in tuples and lists, and one of its arguments is a torch.device. Within a
    trace they are always made anew, because they belong to the trace alone. Within a CUDA graph capture they are made
    anew unless they are kept already, and are not kept, because they hold no values until a replay.

    Args:
        limit: most bytes of one function's tensors. The least recently used ones are dropped first, and larger ones are
            not kept. Tensors that a CUDA graph was captured with are kept beyond the limit, because a replay may read
            them at any time. None keeps everything for good.
    """

    def decorate(make: Callable) -> Callable:
        store = DeviceTables(make, limit)

        @functools.wraps(make)
        def get(*arguments):
            if torch.compiler.is_compiling():
                return make(*arguments)
            return get.make_fake(*arguments) if tensors_are_fake() else store.get(*arguments)

        get.store, get.make_fake = store, make
        return get

    return decorate


@contextlib.contextmanager
def caching_fake_tensors(*functions: Callable) -> Iterator[Callable[[], int]]:
    """Within the block, these functions of `cached_on_device` cache fake tensors, too, as they do on a real device.

    Yields:
        A call that returns how many fake results were made.
    """
    for function in functions:
        function.make_fake = functools.cache(function.__wrapped__)
    try:
        yield lambda: sum(function.make_fake.cache_info().misses for function in functions)
    finally:
        for function in functions:
            function.make_fake = function.__wrapped__


class DeviceTables:
    """The tensors that are kept for one function (see `cached_on_device`).

    Attributes:
        held_bytes: bytes of the tensors held now, without those of captured graphs.
    """

    def __init__(self, make: Callable, limit: int | None):
        self._make, self._tables = make, ByteLRU(limit)
        self._captured, self._lock = {}, threading.Lock()

    @property
    def held_bytes(self) -> int:
        return self._tables.held_bytes

    def __len__(self) -> int:
        return len(self._tables)

    def get(self, *arguments):
        """The function's result for these arguments, kept or made now."""
        device = next(a for a in arguments if isinstance(a, torch.device))
        cuda = device.type == "cuda"
        capturing = cuda and torch.cuda.is_current_stream_capturing()
        recent = self._tables.get(arguments)
        with self._lock:
            made = self._captured.get(arguments, recent)
            if made is not None and capturing:
                self._captured[arguments] = made
        if made is None:
            if capturing:
                return self._make(*arguments)
            # Tensors that are made in inference mode could not be used for training later.
            with torch.inference_mode(False):
                made = self._make(*arguments)
            if cuda:
                # Other streams will read the tensors, so they must be complete.
                torch.cuda.current_stream(device).synchronize()
            self._tables.put(arguments, made, _bytes(made), replace=False)
        if cuda and self._tables.limit is not None and not capturing:
            # The tensors may be dropped before this stream has read them.
            for tensor in _tensors(made):
                tensor.record_stream(torch.cuda.current_stream(device))
        return made

    def clear(self) -> None:
        """Drops all tables except those of captured graphs."""
        self._tables.clear()


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on a device; without its values where tensors are fake."""
    tensor = torch.from_numpy(array)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if tensors_are_fake() else tensor.to(device)


def tensors_are_fake() -> bool:
    """Whether new tensors have no values here, because code is traced or compiled."""
    return type(torch.empty(0, device="cpu")) is not torch.Tensor


def _tensors(made) -> Iterator[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        yield made
    elif isinstance(made, (tuple, list)):
        for part in made:
            yield from _tensors(part)


def _bytes(made) -> int:
    return sum(tensor.nbytes for tensor in _tensors(made))
