"""Image tokens of pictures seen before, found by the contents of the pictures."""

import hashlib
from collections.abc import Callable, Hashable

import numpy as np
import torch
from PIL import Image

from ..runtime.arguments import byte_limit
from ..runtime.byte_lru import ByteLRU

# Room for the image tokens of 56 pictures of a 7B model in half precision, or of 11 in HD.
DEFAULT_BYTES = 256 * 2**20
# Number of pixels that are read at once for a digest.
_STRIP = 2**22


def picture_digest(picture: Image.Image) -> bytes:
    """SHA-256 of a decoded picture's mode, size and pixels; it is the same for all files with these pixels."""
    digest = hashlib.sha256(f"{picture.mode} {picture.width}x{picture.height} ".encode())
    # NumPy gets a copy of the pixels, so a large picture is read in strips.
    rows = max(1, _STRIP // picture.width)
    for top in range(0, picture.height, rows):
        strip = (
            picture.crop((0, top, picture.width, min(top + rows, picture.height))) if rows < picture.height else picture
        )
        digest.update(np.ascontiguousarray(np.asarray(strip)))
    return digest.digest()


class ImageCache:
    """Tensors by key, bounded in bytes; the tensor used longest ago is dropped first.

    Threads may share a cache. It keeps copies and returns copies, so writing into a tensor does not change what others
    get.

    Args:
        limit: most bytes of tensors held; 0 keeps nothing. A tensor that exceeds the limit by itself is not kept.

    Attributes:
        held_bytes: bytes of the tensors held now, on all devices together.
    """

    def __init__(self, limit: int = DEFAULT_BYTES):
        self.limit = byte_limit("image_cache_bytes", limit)
        # An entry is a tensor and, for a tensor on a GPU, the event after which it is completely written.
        self._tokens = ByteLRU(self.limit)

    @property
    def held_bytes(self) -> int:
        return self._tokens.held_bytes

    def __len__(self) -> int:
        return len(self._tokens)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """A copy of what is kept under the key, or None."""
        if (found := self._tokens.get(key)) is None:
            return None
        tensor, written = found
        if written is None:
            return tensor.clone()
        with torch.cuda.device(tensor.device):
            # The tensor may have been written on another stream, and may be dropped before this stream has read it.
            stream = torch.cuda.current_stream()
            stream.wait_event(written)
            tensor.record_stream(stream)
            return tensor.clone()

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keeps a copy of the tensor under the key."""
        if not self._tokens.fits(tensor.nbytes):
            return
        # The copy is contiguous, so that the copy of a slice neither keeps nor counts the tensor that it was cut from.
        tensor, written = tensor.detach().clone(memory_format=torch.contiguous_format), None
        if tensor.is_cuda:
            with torch.cuda.device(tensor.device):
                written = torch.cuda.current_stream().record_event()
        self._tokens.put(key, (tensor, written), tensor.nbytes)

    def drop(self, unwanted: Callable[[Hashable], bool]) -> None:
        """Drops the tensors whose keys are unwanted."""
        self._tokens.drop(unwanted)

    def clear(self) -> None:
        self._tokens.clear()
