"""The floors of the stages around the high-resolution tower and mining: preprocessing, CLIP, projector, language model.

Norms, biases and positions are left out.
"""

from transformers import PretrainedConfig

from mg_fast.ops.operation import product_flop

from ..cases.settings import PICTURE
from ..registry import Cost
from .operators import FLOAT32, attention_flop


def preprocess(high: int, low: int, views: int) -> Cost:
    """A camera's 8-bit picture to float32 pixels: high x high, and low x low for each low-resolution view."""
    return Cost(0, 3 * PICTURE[0] * PICTURE[1], FLOAT32 * 3 * (high**2 + views * low**2))


def clip_layer_weights(config: PretrainedConfig) -> int:
    """Elements of the matrices of one layer of CLIP."""
    return 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size


def clip(config: PretrainedConfig, layers: int, views: int, itemsize: int) -> Cost:
    """The first layers of CLIP over the views of all pictures; the weights are read once."""
    patches, width, pixels = (config.image_size // config.patch_size) ** 2, config.hidden_size, config.image_size**2
    rows, layer, patch = views * (patches + 1), clip_layer_weights(config), config.num_channels * config.patch_size**2
    flop = product_flop(rows, layer, 1) + attention_flop(rows * (patches + 1), width)
    read = layers * layer + patch * width + config.num_channels * pixels * views
    written = views * patches * width
    return Cost(layers * flop + product_flop(views * patches, patch, width), itemsize * read, itemsize * written)


def projector(rows: int, width: int, hidden: int, itemsize: int) -> Cost:
    """Both layers of the projector over all image tokens, `rows`."""
    weights = width * hidden + hidden * hidden
    read = weights + rows * width
    return Cost(product_flop(rows, weights, 1), itemsize * read, itemsize * rows * hidden)


def head_width(text: PretrainedConfig) -> int:
    """Channels of one head of the language model's attention."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def text_layer_weights(text: PretrainedConfig) -> tuple[int, int]:
    """Elements of the matrices of one layer of the language model: attention and router; all experts.

    A dense model has one expert and no router.
    """
    experts = getattr(text, "num_local_experts", 1)
    attention = 2 * text.hidden_size * head_width(text) * (text.num_attention_heads + text.num_key_value_heads)
    router = text.hidden_size * experts if experts > 1 else 0
    return attention + router, experts * 3 * text.hidden_size * text.intermediate_size


def cache_bytes_per_token(text: PretrainedConfig, itemsize: int) -> int:
    """Bytes of one token's keys and values in every layer."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_width(text) * itemsize


def prefill(text: PretrainedConfig, batch: int, tokens: int, itemsize: int) -> Cost:
    """Prompts through the language model, and the logits of their last tokens; causal attention is half a square."""
    rows = batch * tokens
    return _layers(text, rows, rows * tokens // 2, itemsize) + _logits(text, batch, itemsize)


def decode(text: PretrainedConfig, batch: int, context: int, itemsize: int) -> Cost:
    """One more token for each sequence, which reads a cache of `context` tokens."""
    cache = Cost(0, batch * context * cache_bytes_per_token(text, itemsize))
    return _layers(text, batch, batch * context, itemsize) + cache + _logits(text, batch, itemsize)


def _layers(text: PretrainedConfig, rows: int, pairs: int, itemsize: int) -> Cost:
    """All layers over `rows` tokens, with `pairs` of a query and a key in each layer; the cache is written."""
    dense, experts = text_layer_weights(text)
    count = getattr(text, "num_local_experts", 1)
    # A token is multiplied with some of the experts; several tokens, each of which goes its own way, read more of them.
    part = text.num_experts_per_tok / count if count > 1 else 1
    multiplied, read = round(part * experts), round((1 - (1 - part) ** rows) * experts)
    flop = product_flop(rows, dense + multiplied, 1)
    flop += attention_flop(pairs, text.num_attention_heads * head_width(text))
    layer = Cost(flop, itemsize * (dense + read))
    return layer * text.num_hidden_layers + Cost(0, 0, rows * cache_bytes_per_token(text, itemsize))


def _logits(text: PretrainedConfig, batch: int, itemsize: int) -> Cost:
    """The logits of one token for each sequence."""
    weight = text.hidden_size * text.vocab_size
    return Cost(product_flop(batch, weight, 1), itemsize * weight, itemsize * batch * text.vocab_size)
