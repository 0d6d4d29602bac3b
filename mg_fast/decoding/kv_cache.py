"""Keys and values of the sequences being decoded, in memory that is allocated once and written in place."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


def position_bytes(config, dtype: torch.dtype, *, states: bool = False) -> int:
    """Bytes of the keys and values of one position, from the configuration of a language model.

    Args:
        states: count the last layer's hidden state as well.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (2 * config.num_hidden_layers * heads * width + config.hidden_size * states) * dtype.itemsize


class KVCache(Cache):
    """A cache of fixed capacity for `B` sequences of one length, which transformers' models use like their own caches.

    Nothing grows and nothing is concatenated: a pass writes its keys and values at `length` and attends to a view of
    the positions written so far. The code that runs the model (`mg_fast.decoding.model_runner`) advances `length`, so a
    pass that is given up leaves no trace. The memory of a layer is allocated on the layer's device at its first write.

    Args:
        layers: number of layers of the language model.
        batch: number of sequences, B.
        capacity: number of positions of each sequence.
        masked: passes also attend, with a weight of 0, to positions that are not yet written. The memory then begins as
            zeros, because 0 times NaN would be NaN.
        with_states: also keep the hidden states of the last layer, after the final norm.

    Attributes:
        length: number of positions written.
        states: the hidden states [B, capacity, hidden] that `write_states` got; None before its first call.
        positions: int64 [Q], the positions that a pass writes, while a pass for a CUDA graph runs; every replay reads
            them again. The pass then attends to all `window` positions, under the mask that it is given. None
            otherwise.
        window: number of positions that a pass for a CUDA graph attends to.
    """

    def __init__(self, layers: int, batch: int, capacity: int, *, masked: bool, with_states: bool = False):
        super().__init__(layers=[CachedLayer(self) for _ in range(layers)])
        self.batch, self.capacity, self.masked, self.with_states = batch, capacity, masked, with_states
        self.length = 0
        self.states: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.window = 0

    @property
    def devices(self) -> list[torch.device]:
        """The devices on which memory has been allocated so far."""
        return list(dict.fromkeys(tensor.device for tensor in self._tensors()))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells torch's allocator that this stream, too, uses the memory that was allocated on its device."""
        for tensor in self._tensors():
            if tensor.device == stream.device:
                tensor.record_stream(stream)

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def write_states(self, hidden: torch.Tensor) -> None:
        """Keeps the hidden states [B, Q, hidden] of a pass at the positions that the pass writes, if they are kept."""
        if not self.with_states:
            return
        self._allocate_states(hidden)
        if self.positions is not None:
            self.states.index_copy_(1, self.positions, hidden)
        else:
            self.states[:, self.length : self.length + hidden.shape[1]].copy_(hidden)

    def read(self, start: int, stop: int) -> list[torch.Tensor]:
        """Copies of what is kept of one sequence between two positions.

        Returns:
            Keys and values [2, heads, stop - start, d] of each layer, and then the states [1, 1, stop - start, hidden],
            if they are kept.
        """
        segment = [torch.stack([layer.keys[0, :, start:stop], layer.values[0, :, start:stop]]) for layer in self.layers]
        return [*segment, self.states[:1, None, start:stop].clone()] if self.with_states else segment

    def write(self, segments: Sequence[Sequence[torch.Tensor]]) -> None:
        """Fills the first positions with segments that `read` returned, one after another."""
        at = 0
        for segment in segments:
            size = segment[0].shape[-2]
            for layer, tensor in zip(self.layers, segment):
                layer.lazy_initialization(tensor[:1], tensor[1:])
                layer.keys[0, :, at : at + size].copy_(tensor[0])
                layer.values[0, :, at : at + size].copy_(tensor[1])
            if self.with_states:
                self._allocate_states(segment[-1][0])
                self.states[0, at : at + size].copy_(segment[-1][0, 0])
            at += size
        self.length = at

    def _allocate_states(self, hidden: torch.Tensor) -> None:
        if self.states is None:
            with torch.inference_mode(False):
                self.states = hidden.new_empty(self.batch, self.capacity, hidden.shape[-1])

    def _tensors(self) -> list[torch.Tensor]:
        """Everything that is allocated."""
        kept = [part for layer in self.layers if layer.is_initialized for part in (layer.keys, layer.values)]
        return kept if self.states is None else [*kept, self.states]


class CachedLayer(CacheLayerMixin):
    """One layer's keys and values [B, heads, capacity, d]."""

    is_sliding = False

    def __init__(self, cache: KVCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.is_initialized:
            return

        def room(states: torch.Tensor) -> torch.Tensor:
            shape = (self.cache.batch, states.shape[1], self.cache.capacity, states.shape[-1])
            return states.new_zeros(shape) if self.cache.masked else states.new_empty(shape)

        # The call may run in inference mode, but the memory outlives it and must not be inference tensors.
        with torch.inference_mode(False):
            self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values [B, heads, Q, d] of new positions; returns all that these positions may attend to."""
        self.lazy_initialization(key_states, value_states)
        cache = self.cache
        if cache.positions is not None:
            self.keys.index_copy_(2, cache.positions, key_states)
            self.values.index_copy_(2, cache.positions, value_states)
            return self.keys[:, :, : cache.window], self.values[:, :, : cache.window]
        stop = cache.length + key_states.shape[-2]
        self.keys[:, :, cache.length : stop].copy_(key_states)
        self.values[:, :, cache.length : stop].copy_(value_states)
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return self.cache.capacity
