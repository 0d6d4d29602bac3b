"""Decoding: a token at a time over keys and values that are kept."""

from .loop import LeanDecoder, LeanRequest
from .prefix_store import PrefixStore

__all__ = ["LeanDecoder", "LeanRequest", "PrefixStore"]
