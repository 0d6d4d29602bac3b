"""Decoding: a token at a time over keys and values that are kept."""

from .lean import LeanDecoder, LeanRequest
from .prefixes import DEFAULT_BYTES, PrefixStore

__all__ = ["DEFAULT_BYTES", "LeanDecoder", "LeanRequest", "PrefixStore"]
