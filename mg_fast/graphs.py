"""Capturing CUDA graphs, from any thread."""

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch

# torch captures one graph at a time in a process
_CAPTURING = threading.Lock()


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to capture on; graphs that share a pool must have been captured on one. torch's own is on whatever device came first."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple | None = None) -> Iterator[None]:
    """Captures what is launched within the block, while other threads may go on allocating.

    Args:
        graph: an empty one.
        stream: that everything in the block goes to.
        pool: as of `torch.cuda.graph`.
    """
    with _CAPTURING, torch.cuda.device(stream.device):
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield
        finally:
            # torch stays on the other one where a capture's end fails
            torch.cuda.set_stream(before)
