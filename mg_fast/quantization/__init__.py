"""Weight-only quantization of the language model.

The towers, patch mining, projector, embeddings, norms, routers and the head keep their dtype.
"""

from .configuration import NAMES, check_cache, check_config, check_savable, named_config
from .products import EXPERTS_FUNCTION, Int8Linear, finish, quantized_experts
from .stored import WeightBytes, tensor_bytes, weight_bytes

__all__ = [
    "EXPERTS_FUNCTION",
    "NAMES",
    "Int8Linear",
    "WeightBytes",
    "check_cache",
    "check_config",
    "check_savable",
    "finish",
    "named_config",
    "quantized_experts",
    "tensor_bytes",
    "weight_bytes",
]
