"""Calls of one function on a GPU, replayed as CUDA graphs."""

import logging
import threading
import time
from collections.abc import Callable, Hashable

import torch

from .graphs import CapturedGraph, Captures, GraphCache, NoStreamLeft
from .numerics import numerics

logger = logging.getLogger(__name__)


class GraphedCall:
    """Replays CUDA graphs of what one owner computes, one graph for each shape and dtype of the inputs.

    Threads may share an object. Its calls then run one after the other, because a graph's inputs and outputs are the
    same memory in every call.

    Args:
        device: the GPU.
        limit: most graphs that are kept.
        captures: the owner's `Captures`.
    """

    def __init__(self, device: torch.device, limit: int, captures: Captures):
        self.device, self._captures = device, captures
        self._graphs = GraphCache(limit, captures)
        # The next call waits for this event, which says that the results of the call before have been copied.
        self._copied = torch.cuda.Event()
        self._lock = threading.Lock()

    def __call__(
        self, work: Callable[..., torch.Tensor | tuple], inputs: tuple[torch.Tensor, ...], key: Hashable, what: str
    ) -> torch.Tensor | tuple:
        """The result of `work` for these inputs; without a graph where none can be captured.

        Args:
            work: takes as many tensors as there are inputs, and returns a tensor or a tuple of tensors. It must be the
                same in every call with the same key, apart from values of tensors that stay in their places.
            inputs: tensors on the device.
            key: everything that `work` depends on apart from the inputs and the numeric settings.
            what: name of the work in the log.
        """
        with self._lock, torch.cuda.device(self.device):
            # The key includes the numeric settings, because a graph keeps the arithmetic that it was captured with.
            shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
            captured = self._graphs.entry(
                (shapes, key, numerics(self.device)), lambda: self._capture(work, inputs, what)
            )
            if captured is None:
                return work(*inputs)
            graph, kept = captured
            stream = torch.cuda.current_stream()
            stream.wait_event(self._copied)
            for place, tensor in zip(kept, inputs):
                place.copy_(tensor)
            result = graph.replay()
            self._copied.record(stream)
            return result

    def _capture(
        self, work: Callable, inputs: tuple[torch.Tensor, ...], what: str
    ) -> tuple[CapturedGraph, list[torch.Tensor]] | None:
        """A graph and its inputs, or None where it cannot be captured."""
        if not self._captures.allowed:
            return None
        began = time.perf_counter()
        try:
            capturing = self._graphs.stream(self.device)
        except NoStreamLeft as error:
            logger.warning("%s: runs without a CUDA graph: %s", what, error)
            return None
        kept = [tensor.clone() for tensor in inputs]
        # Before a capture, kernels must be compiled, and libraries' workspaces and tables must be made.
        capturing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(capturing):
            for _ in range(2):
                work(*kept)
        graph = self._graphs.capture(lambda: work(*kept), self.device, what, began)
        torch.cuda.current_stream().wait_stream(capturing)
        return None if graph is None else (graph, kept)
