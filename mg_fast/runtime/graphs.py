"""Capturing CUDA graphs, from any thread."""

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator

import torch

# torch captures one graph at a time in a process
_CAPTURING = threading.Lock()
# torch hands out its streams in turn, and begins again after this many on a device
_TORCH_STREAMS = 32

_leases_lock = threading.Lock()
# device -> addresses of the streams that belong to a living CaptureStream
_leases: dict[torch.device, set[int]] = {}


class NoStreamLeft(RuntimeError):
    """There are as many owners of graphs on a device as torch has streams; whoever comes next does without graphs."""


class CaptureStream:
    """A stream that one owner captures its CUDA graphs on, and no other owner while this one lives.

    cuBLAS keeps one workspace for each thread and stream, and a captured product goes on writing to the workspace of the stream that it was
    captured on. Two graphs that were captured on one stream must therefore never be replayed at the same time. An owner that may have two
    replays in flight at once needs two of these.

    One case is not covered. The streams are torch's, so a caller who takes streams of his own from torch may be given the same one. He must
    not multiply matrices on it, in the thread that captured, while a replay runs on another stream.

    Args:
        device: the GPU.

    Attributes:
        stream: the torch.cuda.Stream.

    Raises:
        NoStreamLeft: all of torch's streams on this device are in use.
    """

    def __init__(self, device: torch.device):
        stream = _lease(device)
        if stream is None:
            # graphs and the caches that they are of refer to each other, so that those that were dropped may not be gone yet
            gc.collect()
            stream = _lease(device)
        if stream is None:
            owners = len(_leases[device])
            raise NoStreamLeft(f"no stream is left on {device} to capture CUDA graphs on: {owners} owners of graphs are alive")
        self.stream = stream
        weakref.finalize(self, _leases[device].discard, stream.cuda_stream)


def _lease(device: torch.device) -> torch.cuda.Stream | None:
    """A stream that nobody else has, which is noted; None where there is none."""
    with _leases_lock:
        taken = _leases.setdefault(device, set())
        for _ in range(_TORCH_STREAMS):
            stream = torch.cuda.Stream(device)
            if stream.cuda_stream not in taken:
                taken.add(stream.cuda_stream)
                return stream
    return None


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple | None = None) -> Iterator[None]:
    """Captures what is launched within the block, while other threads may go on allocating.

    Args:
        graph: an empty one.
        stream: that everything in the block goes to.
        pool: as of `torch.cuda.graph`; graphs that share one must be captured on one stream.
    """
    with _CAPTURING, torch.cuda.device(stream.device):
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield
        finally:
            # torch stays on the other one where a capture's end fails
            torch.cuda.set_stream(before)
