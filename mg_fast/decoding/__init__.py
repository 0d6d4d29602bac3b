"""Decoding one token at a time, with the keys and values of all earlier positions in memory."""

from .loop import Decoder, DecodingRequest
from .prefix_store import PrefixStore

__all__ = ["Decoder", "DecodingRequest", "PrefixStore"]
