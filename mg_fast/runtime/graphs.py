"""Capturing CUDA graphs, from any thread, and keeping those that were captured."""

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

    cuBLAS keeps one workspace for each thread and stream, and a captured product goes on writing to the workspace of
    the stream that it was captured on. Two graphs that were captured on one stream must therefore never be replayed at
    the same time. An owner that may have two replays in flight at once needs two of these.

    One case is not covered. The streams are torch's, so a caller who takes streams of his own from torch may be given
    the same one. He must not multiply matrices on it, in the thread that captured, while a replay runs on another
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
            # graphs and the caches that they are of refer to each other, so that those that were dropped may not be
            # gone yet
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


class Captures:
    """Whether one owner may still capture graphs, and how long it took so far, over all of its caches of graphs.

    Attributes:
        allowed: False from when a capture failed: what it left of torch's state is not to be relied on for another.
        first_use: seconds by what was done once, every capture among them.
    """

    def __init__(self):
        self.allowed = True
        self.first_use: dict[str, float] = {}

    def noted(self, what: str, began: float) -> None:
        """Keeps, and logs, what something took that is done once and began at that `time.perf_counter()`."""
        self.first_use[what] = time.perf_counter() - began
        logger.info("%s: %.2f s", what, self.first_use[what])


class CapturedGraph:
    """Work of fixed shapes that was captured.

    Args:
        graph: holds the work.
        output: what the work writes its result to, in every replay.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor):
        self._graph, self._output = graph, output

    def replay(self) -> torch.Tensor:
        """Does the work again on whatever its inputs hold now; a copy of the result, as the next replay writes over it."""
        self._graph.replay()
        return self._output.clone()


class GraphCache:
    """A bounded cache of one owner's captured graphs, one for each shape of its work; the graph that was used longest
    ago goes first.

    All graphs of one cache are captured on one stream, which no other owner has, so only one of them may be replayed at
    a time.

    Args:
        limit: most entries.
        captures: of the owner, who may have several caches.
        shared_memory: graphs take what lies between their inputs and their results from one pool of memory. Each then
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
        """What is kept under the key, or what `make` returns and is kept from now on."""
        if key not in self._entries:
            self._entries[key] = make()
            while len(self._entries) > self.limit:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key]

    def entries(self) -> list[object]:
        return list(self._entries.values())

    def clear(self) -> None:
        """Drops all graphs and their memory; a pool that no graph is left of takes no other."""
        self._entries.clear()
        self.pool = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream that the graphs are captured on, taken at the first call.

        Raises:
            NoStreamLeft: all of torch's streams on this device are in use.
        """
        if self._leased is None:
            self._leased = CaptureStream(device)
        return self._leased.stream

    def capture(
        self, work: Callable[[], torch.Tensor], device: torch.device, what: str, began: float | None = None
    ) -> CapturedGraph | None:
        """Captures work on a device; None, with a warning, where it cannot be captured, or captures are not allowed any
        more.

        Where memory or streams are short, other work may still be captured. After any other failure nothing is, see
        `Captures`.

        Args:
            work: launches everything and returns what its result lies in.
            what: it is, for the log.
            began: the time from which seconds are counted, where preparing for the capture took some.
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
            logger.warning("%s: goes without a CUDA graph: %s", what, error)
            return None
        except RuntimeError as error:
            self.captures.allowed = False
            logger.warning("%s: goes without a CUDA graph, and no more are captured: %s", what, error)
            return None
        self.captures.noted(what, began)
        return CapturedGraph(graph, output)
