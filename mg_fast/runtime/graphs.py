"""Captures CUDA graphs from any thread, and keeps them."""

import contextlib
import gc
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import torch

logger = logging.getLogger(__name__)

# torch captures one graph at a time in a process.
_CAPTURING = threading.Lock()
# torch hands out this many streams of a device in turn, and then begins again.
_TORCH_STREAMS = 32

_leases_lock = threading.Lock()
# For each device, the addresses of the streams that belong to a living CaptureStream.
_leases: dict[torch.device, set[int]] = {}


class NoStreamLeft(RuntimeError):
    """As many owners of graphs are alive on a device as torch has streams; the next owner does without graphs."""


class CaptureStream:
    """A stream on which one owner captures its CUDA graphs, and no other owner as long as this object lives.

    cuBLAS keeps one workspace for each thread and stream, and a captured product goes on writing to the workspace of
    the stream that it was captured on. Two graphs that were captured on one stream must therefore never be replayed at
    the same time. An owner that may have two replays in flight at once needs two of these.

    One case is not covered. The streams are torch's, so a caller that takes streams from torch itself may be given the
    same one. It must not multiply matrices on that stream, in the thread that captured, while a replay runs on another
    stream.

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
            # Graphs and the caches that hold them refer to each other, so dropped ones may not be collected yet.
            gc.collect()
            stream = _lease(device)
        if stream is None:
            owners = len(_leases[device])
            raise NoStreamLeft(
                f"no stream is left on {device} to capture CUDA graphs on: {owners} owners of graphs are alive"
            )
        self.stream = stream
        weakref.finalize(self, _leases[device].discard, stream.cuda_stream)


def _lease(device: torch.device) -> torch.cuda.Stream | None:
    """Leases a stream that no other owner has; None if there is none."""
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
    """Captures the work that is launched within the block, while other threads may go on allocating.

    Args:
        graph: an empty graph.
        stream: the stream that everything in the block is launched on.
        pool: as in `torch.cuda.graph`; graphs that share a pool must be captured on the same stream.
    """
    with _CAPTURING, torch.cuda.device(stream.device):
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield
        finally:
            # torch leaves the capture's stream current if the end of a capture fails.
            torch.cuda.set_stream(before)


class Captures:
    """Whether one owner may still capture graphs, and how long its captures took, over all of its graph caches.

    Attributes:
        allowed: False once a capture has failed, because torch's state after that cannot be relied on.
        first_use: seconds that each one-time step took, including every capture.
    """

    def __init__(self):
        self.allowed = True
        self.first_use: dict[str, float] = {}

    def noted(self, what: str, began: float) -> None:
        """Records and logs how long a one-time step took that began at `began`, a value of `time.perf_counter()`."""
        self.first_use[what] = time.perf_counter() - began
        logger.info("%s: %.2f s", what, self.first_use[what])


class CapturedGraph:
    """A captured graph of work with fixed shapes.

    Args:
        graph: the graph that holds the work.
        output: the tensor, or the tuple of tensors, that every replay writes its result to.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor | tuple):
        self._graph, self._output = graph, output

    def replay(self) -> torch.Tensor | tuple:
        """Repeats the work on what its inputs hold now; returns a copy, as the next replay overwrites the result."""
        self._graph.replay()
        if isinstance(self._output, tuple):
            return tuple(tensor.clone() for tensor in self._output)
        return self._output.clone()


class GraphCache:
    """A bounded cache of one owner's captured graphs, one for each shape of its work.

    The least recently used graph is dropped first. All graphs of a cache are captured on one stream, which no other
    owner has, so only one of them may be replayed at a time.

    Args:
        limit: most entries.
        captures: the owner's `Captures`; an owner may have several caches.
        shared_memory: let all graphs take their intermediate tensors from one pool of memory. Each graph then
            overwrites what the others left there, so a result must be copied before another graph runs.
    """

    def __init__(self, limit: int, captures: Captures, *, shared_memory: bool = False):
        self.limit, self.captures, self._shared = limit, captures, shared_memory
        self.pool: tuple | None = None
        self._entries: OrderedDict[Hashable, object] = OrderedDict()
        self._leased: CaptureStream | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, key: Hashable, make: Callable[[], object]) -> object:
        """The object under the key; if there is none, the result of `make`, which is kept from now on."""
        if key not in self._entries:
            self._entries[key] = make()
            while len(self._entries) > self.limit:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key]

    def entries(self) -> list[object]:
        return list(self._entries.values())

    def clear(self) -> None:
        """Drops all graphs and their memory; a pool without graphs cannot take new ones."""
        self._entries.clear()
        self.pool = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream that the graphs are captured on, which is leased at the first call.

        Raises:
            NoStreamLeft: all of torch's streams on this device are in use.
        """
        if self._leased is None:
            self._leased = CaptureStream(device)
        return self._leased.stream

    def capture(
        self, work: Callable[[], torch.Tensor | tuple], device: torch.device, what: str, began: float | None = None
    ) -> CapturedGraph | None:
        """Captures work on a device; None, with a warning, if it cannot be captured.

        After a lack of memory or of streams, other work may still be captured. After any other failure nothing is
        captured any more (see `Captures`).

        Args:
            work: launches everything, and returns the tensor, or the tuple of tensors, that holds its result.
            what: name of the work in the log.
            began: the time from which seconds are counted, if preparing for the capture took time.
        """
        if not self.captures.allowed:
            return None
        began = time.perf_counter() if began is None else began
        try:
            stream = self.stream(device)
            if self._shared and self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with capture(graph, stream, self.pool):
                output = work()
        except (torch.OutOfMemoryError, NoStreamLeft) as error:
            logger.warning("%s: runs without a CUDA graph: %s", what, error)
            return None
        except RuntimeError as error:
            self.captures.allowed = False
            logger.warning("%s: runs without a CUDA graph, and no more graphs are captured: %s", what, error)
            return None
        self.captures.noted(what, began)
        return CapturedGraph(graph, output)
