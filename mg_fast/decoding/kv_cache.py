"""Keys and values of the sequences that are decoded now, in memory that is taken once and written in place."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


def position_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one position, of a language model's configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize


class KVCache(Cache):
    """A cache of fixed capacity for `B` sequences of one length, which transformers' models write and read like their
    own.

    Nothing grows or is concatenated: a pass writes its keys and values at `length` and attends to a view of what is
    written. Whoever runs the model moves `length` on (`mg_fast.decoding.model_runner`), so a pass that is given up
    leaves no trace. Memory is taken layer by layer, on the layer's device, when it is first written.

    Args:
        layers: of the language model.
        batch: sequences B.
        capacity: positions of a sequence.
        masked: passes also attend to positions not yet written, with a weight of 0: there must be no NaN, which would
            survive it.

    Attributes:
        length: positions written.
        positions: on a GPU while a graph is captured: int64 [Q] where the pass writes, read at every replay; it then
            attends to all of `window` positions, under the mask it is given.
        window: positions that a captured pass attends to.
    """

    def __init__(self, layers: int, batch: int, capacity: int, *, masked: bool):
        super().__init__(layers=[CachedLayer(self) for _ in range(layers)])
        self.batch, self.capacity, self.masked = batch, capacity, masked
        self.length = 0
        self.positions: torch.Tensor | None = None
        self.window = 0

    @property
    def devices(self) -> list[torch.device]:
        """The devices on which memory was taken so far."""
        return list(dict.fromkeys(layer.keys.device for layer in self.layers if layer.is_initialized))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells torch's allocator that a stream uses the memory on its device, beside the stream that it was taken on."""
        for layer in self.layers:
            if layer.is_initialized and layer.keys.device == stream.device:
                layer.keys.record_stream(stream)
                layer.values.record_stream(stream)

    @property
    def nbytes(self) -> int:
        """Bytes taken so far."""
        return sum(part.nbytes for layer in self.layers if layer.is_initialized for part in (layer.keys, layer.values))

    def read(self, start: int, stop: int) -> list[torch.Tensor]:
        """Copies of what one sequence's layers hold between two positions: keys and values [2, heads, stop - start, d]
        a layer.
        """
        return [torch.stack([layer.keys[0, :, start:stop], layer.values[0, :, start:stop]]) for layer in self.layers]

    def write(self, segments: Sequence[Sequence[torch.Tensor]]) -> None:
        """Begins with what `read` gave, segment after segment."""
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

        # the memory outlives the call, which may be in inference mode
        with torch.inference_mode(False):
            self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, Q, d] of new positions to those of all positions that they may attend to."""
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
