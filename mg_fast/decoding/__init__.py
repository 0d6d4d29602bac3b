"""Decoding one token at a time, over keys and values that are kept."""

from .loop import Decoder, DecodingRequest
from .prefix_store import PrefixStore

__all__ = ["Decoder", "DecodingRequest", "PrefixStore"]
