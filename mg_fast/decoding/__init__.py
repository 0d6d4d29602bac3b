"""Decoding: a token at a time over keys and values that are kept."""

from .lean import LeanDecoder, LeanRequest
from .prefixes import PrefixStore

__all__ = ["LeanDecoder", "LeanRequest", "PrefixStore"]
