"""The sequences of one request, and what the passes over them share and read."""

from dataclasses import dataclass, field

import torch

from ..models.protocol import NO_PASS_INPUTS, PassInputs
from ..runtime.graphs import GraphCache
from .kv_cache import KVCache


@dataclass
class Sequences:
    """`B` sequences that are decoded side by side, and what the passes over them share.

    Attributes:
        cache: keys and values of the sequences; position j of every row lies at index j.
        by_graph: whether passes are captured in CUDA graphs.
        pads: int64 [B], the number of filling positions at the beginning of each row; None where there is no filling.
        mask: int64 [B, capacity], 0 at the filling; None where there is no filling.
        pass_inputs: further inputs of every pass. Where passes are captured, these are the tensors that the captured
            passes read, with a row for every position of the cache.
        graphs: captured passes over this cache, by the dtype of tokens or embeddings, width, window and arithmetic.
            They share their memory, because only one of them runs at a time. Their stream is not shared with other
            caches, whose graphs may run at the same time.
        arithmetic: the settings that change the arithmetic of passes (see `numerics`), as they were when the prompt
            came.
        written: for each GPU, an event that was recorded after the last pass of the request that gave the cache back.
    """

    cache: KVCache
    by_graph: bool
    graphs: GraphCache
    pads: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    pass_inputs: PassInputs = NO_PASS_INPUTS
    arithmetic: tuple = ()
    written: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)

    def hand_back(self) -> None:
        """Ends a request's use of the cache. Called on the request's stream.

        A pass that ran ahead of the end of the answer may still be writing to the cache on that stream.
        """
        if not self.by_graph:
            # A request's features must not stay in memory for as long as its cache does.
            self.pass_inputs = NO_PASS_INPUTS
        gpus = [device for device in self.cache.devices if device.type == "cuda"]
        self.written = {device: torch.cuda.current_stream(device).record_event() for device in gpus}

    def take_over(self) -> None:
        """Begins the next request's use of the cache. Called on that request's stream.

        The stream waits for the last pass of the request before, which may have run on another stream.
        """
        for device, event in self.written.items():
            stream = torch.cuda.current_stream(device)
            stream.wait_event(event)
            # torch must not give the memory to anything else before this stream, too, is done with it.
            self.cache.record_stream(stream)
            for tensor in self._read_by_passes():
                if tensor.device == device:
                    tensor.record_stream(stream)
        self.written = {}

    def _read_by_passes(self) -> list[torch.Tensor]:
        """Tensors beside the cache and the weights that passes read."""
        tensors = [tensor for tensor in (self.mask, self.pads, *self.pass_inputs.tensors) if tensor is not None]
        return tensors + [
            tensor
            for graph in self.graphs.entries()
            for tensor in (graph.inputs, graph.places, graph.start, graph.last)
        ]

    def fill(self, attention_mask: torch.Tensor | None, pass_inputs: PassInputs = NO_PASS_INPUTS) -> None:
        """Empties the cache, and takes over what the passes of the next request read.

        Args:
            attention_mask: [B, L], 0 at the filling on the left.
            pass_inputs: further inputs of every pass.
        """
        self.cache.length = 0
        self._take_pass_inputs(pass_inputs)
        padded = attention_mask is not None and not bool(attention_mask.all())
        if not padded:
            if self.mask is not None:
                self.graphs.clear()
            self.pads = self.mask = None
            return
        mask = attention_mask.new_ones(self.cache.batch, self.cache.capacity, dtype=torch.long)
        mask[:, : attention_mask.shape[1]] = attention_mask
        if self.mask is None:
            self.graphs.clear()
            self.mask, self.pads = mask, (mask == 0).sum(dim=1)
        else:
            # Captured graphs read these tensors, so their contents are replaced.
            self.mask.copy_(mask)
            self.pads.copy_((mask == 0).sum(dim=1))

    def _take_pass_inputs(self, given: PassInputs) -> None:
        if self.by_graph:
            # Captured passes go on reading the tensors that they were captured with, so later inputs are copied into
            # those tensors.
            given = given.extended(self.cache.capacity)
            if given.layout == self.pass_inputs.layout:
                for kept, tensor in zip(self.pass_inputs.tensors, given.tensors):
                    kept.copy_(tensor)
                return
            self.graphs.clear()
            given = given.copied()
        self.pass_inputs = given
