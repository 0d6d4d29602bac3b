"""Capturing CUDA graphs, from any thread."""

import contextlib
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


class CaptureStream:
    """A stream that one owner captures its CUDA graphs on, and no other owner while this one lives.

    cuBLAS keeps one workspace for each thread and stream, and a captured product goes on writing to the workspace of the stream that it was
    captured on. Two graphs that were captured on one stream must therefore never be replayed at the same time. An owner that may have two
    replays in flight at once needs two of these.

    Args:
        device: the GPU.

    Attributes:
        stream: the torch.cuda.Stream.

    Raises:
        RuntimeError: all of torch's streams on this device are in use.
    """

    def __init__(self, device: torch.device):
        with _leases_lock:
            taken = _leases.setdefault(device, set())
            for _ in range(_TORCH_STREAMS):
                stream = torch.cuda.Stream(device)
                if stream.cuda_stream not in taken:
                    break
            else:
                raise RuntimeError(f"no stream is left on {device} to capture CUDA graphs on: {len(taken)} owners of graphs are alive")
            taken.add(stream.cuda_stream)
        self.stream = stream
        weakref.finalize(self, taken.discard, stream.cuda_stream)


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
