"""Keys and values of the sequences being decoded, in memory that is allocated once and written in place."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


def position_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one position, from the configuration of a language model."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize


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

    Attributes:
        length: number of positions written.
        positions: int64 [Q], the positions that a pass writes, while a pass for a CUDA graph runs; every replay reads
            them again. The pass then attends to all `window` positions, under the mask that it is given. None
            otherwise.
        window: number of positions that a pass for a CUDA graph attends to.
    """

    def __init__(self, layers: int, batch: int, capacity: int, *, masked: bool):
        super().__init__(layers=[CachedLayer(self) for _ in range(layers)])
        self.batch, self.capacity, self.masked = batch, capacity, masked
        self.length = 0
        self.positions: torch.Tensor | None = None
        self.window = 0

    @property
    def devices(self) -> list[torch.device]:
        """The devices on which memory has been allocated so far."""
        return list(dict.fromkeys(layer.keys.device for layer in self.layers if layer.is_initialized))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells torch's allocator that this stream, too, uses the memory that was allocated on its device."""
        for layer in self.layers:
            if layer.is_initialized and layer.keys.device == stream.device:
                layer.keys.record_stream(stream)
                layer.values.record_stream(stream)

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return sum(part.nbytes for layer in self.layers if layer.is_initialized for part in (layer.keys, layer.values))

    def read(self, start: int, stop: int) -> list[torch.Tensor]:
        """Copies of one sequence's keys and values between two positions: [2, heads, stop - start, d] of each layer."""
        return [torch.stack([layer.keys[0, :, start:stop], layer.values[0, :, start:stop]]) for layer in self.layers]

    def write(self, segments: Sequence[Sequence[torch.Tensor]]) -> None:
        """Fills the first positions with segments that `read` returned, one after another."""
        at = 0
        for segment in segments:
            size = segment[0].shape[-2]
            for layer, tensor in zip(self.layers, segment):
                layer.lazy_initialization(tensor[:1], tensor[1:])
                layer.keys[0, :, at : at + size].copy_(tensor[0])
                layer.values[0, :, at : at + size].copy_(tensor[1])
            at += size
        self.length = at


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
