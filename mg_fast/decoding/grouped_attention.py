"""Grouped-query attention of one token, whose keys and values are not repeated for every head of a group.

Under a mask, transformers' `sdpa` copies all keys and values once for each query head of their group: its other way,
torch's `enable_gqa`, has no fast kernel that takes a mask. For one token the copies are not needed. The heads of a
group take the place that several tokens would have, because the same mask holds for all of them. Releases of
transformers from 5.24 on do the same in passes that are not compiled.
"""

import contextlib
import inspect
import threading
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

# The name of the attention that this form stands in for, and its own name among transformers' attention functions.
SDPA, GROUPED = "sdpa", "mg_fast_grouped"

_sdpa = AttentionInterface()[SDPA]
# Arguments that change what `sdpa` computes and that this form does not know: capped scores, learned sinks, biases by
# position, and what later releases add. A sliding window is none of them, because `sdpa` finds it in the mask alone.
_COMMON = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
_UNKNOWN = tuple(sorted({"softcap", "s_aux", "position_bias", *inspect.signature(_sdpa).parameters} - _COMMON))

_lock = threading.Lock()
# For each configuration, by its identity, the number of blocks of `grouped` that are running.
_running: Counter[int] = Counter()


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **further,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' `sdpa` computes it, which also runs whatever is not one token of grouped heads.

    Args:
        module: the layer of attention.
        query: [B, H, Q, d]. Head h attends to the keys and values of head h // (H // K).
        key, value: [B, K, S, d].
        attention_mask: broadcastable to [B, H, Q, S], boolean or added to the scores.
        dropout, scaling: as in `scaled_dot_product_attention`.
        **further: what a layer gives beside.

    Returns:
        The result [B, Q, H, d], and None in the place of the weights.
    """
    batch, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    one_mask = attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[1] == 1
    if groups == 1 or tokens != 1 or not one_mask or any(further.get(name) is not None for name in _UNKNOWN):
        return _sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **further)
    grouped_heads = query.reshape(batch, key.shape[1], groups, width)
    out = F.scaled_dot_product_attention(
        grouped_heads, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(GROUPED, attend)
AttentionMaskInterface.register(GROUPED, AttentionMaskInterface()[SDPA])


def in_force(config: PreTrainedConfig) -> str | None:
    """The name of the attention that was chosen for a model, also while a block of `grouped` runs."""
    name = config._attn_implementation
    return SDPA if name == GROUPED else name


@contextlib.contextmanager
def grouped(model: nn.Module) -> Iterator[None]:
    """Within the block, a language model's layers attend by `attend`, if `sdpa` is in force and its heads share keys.

    Models whose layers do not look up their attention by its name at every pass are left alone. Threads may be in such
    blocks at once. A pass of another thread that runs meanwhile computes the same as without, because `attend` leaves
    everything but one token of grouped heads to `sdpa`.
    """
    config = getattr(model, "config", None)
    shared = _heads_share_keys(config) and getattr(model, "is_backend_compatible", bool)()
    with _lock:
        used = shared and in_force(config) == SDPA
        if used:
            _running[id(config)] += 1
            if config._attn_implementation != GROUPED:
                _choose(config, GROUPED)
    try:
        yield
    finally:
        if used:
            with _lock:
                _running[id(config)] -= 1
                if not _running[id(config)]:
                    del _running[id(config)]
                    # The caller may have chosen another attention meanwhile.
                    if config._attn_implementation == GROUPED:
                        _choose(config, SDPA)


def _heads_share_keys(config: PreTrainedConfig | None) -> bool:
    heads, keys = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    # Some models have a list with a number for every layer, and are left alone.
    return isinstance(heads, int) and isinstance(keys, int) and keys < heads


def _choose(config: PreTrainedConfig, name: str) -> None:
    config.update({"_attn_implementation": name})
