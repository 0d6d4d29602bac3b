"""From pictures to image tokens and feature maps, which are kept by the contents of the pictures."""

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...ops.backend import OPERATIONS, choose, use_backend
from ...runtime.meter import Meter
from ...runtime.numerics import numerics
from ...runtime.placement import execution_device
from ...runtime.weights import Fingerprint
from ..image_cache import ImageCache, picture_digest
from ..options import CacheOptions
from ..vision import decoded


@dataclass(frozen=True, eq=False)
class SeenFeatures:
    """A picture as the model reads it.

    Attributes:
        tokens: image tokens [T, hidden], which stand in the sequence.
        maps: feature maps [S, C] of all levels, which synchronizers read.
        digest: bytes that only these features have.
    """

    tokens: torch.Tensor
    maps: torch.Tensor
    digest: bytes


class FeatureStage:
    """Turns pictures into image tokens and feature maps, and keeps those of earlier pictures.

    What is kept is dropped when the picture side has changed, as by `VisionStage`. Threads may share a stage.

    Args:
        model: the model that sees, such as MMInterleavedForConditionalGeneration.
        image_processor: the model's image processor, which makes pixels of pictures.
        backend: the backend of every call of this stage; None leaves the choice to what is in force at the call.
        caches: only `image_cache_bytes` counts here. It limits image tokens and maps together.

    Attributes:
        cache: the tokens and maps kept.
        version: a number that changes when the same picture may get other features than before.
    """

    def __init__(self, model, image_processor, *, backend: str | None = None, caches: CacheOptions | None = None):
        self.model, self.image_processor, self.backend = model, image_processor, backend
        self.cache = ImageCache((caches or CacheOptions()).image_cache_bytes)
        self.version = 0
        self._state: Fingerprint | None = None
        self._watching = threading.Lock()

    @property
    def device(self) -> torch.device:
        """The device of the pixels, which is that of the language model's input."""
        return execution_device(self.model.get_input_embeddings())

    @torch.inference_mode()
    def see(
        self,
        image,
        *,
        allow_urls: bool = False,
        meter: Meter | None = None,
        at_hand: Iterable[SeenFeatures] = (),
    ) -> SeenFeatures:
        """The image tokens and maps of one picture.

        A picture that was seen before, from any file, is decoded and then found by its pixels. The features are
        inference tensors, through which no gradients pass.

        Args:
            image: a Pillow image, path, bytes, or uint8 array or tensor; also a URL if `allow_urls` is set.
            allow_urls: fetch pictures that are given as URLs.
            meter: measures the steps.
            at_hand: pictures that are not encoded again, whether the cache holds them or not.
        """
        stage = meter.stage if meter is not None else contextlib.nullcontext
        with use_backend(self.backend):
            with stage("preprocess"):
                # This comes first, because it drops features that were made with other weights.
                version, picture = self._current_version(), decoded(image, allow_urls)
                digest = hashlib.sha256(repr((picture_digest(picture), version, *self._circumstances())).encode())
                digest = digest.digest()
                if (known := next((seen for seen in at_hand if seen.digest == digest), None)) is not None:
                    return known
                parts = [self.cache.get((digest, part)) for part in ("tokens", "maps")]
                if all(part is not None for part in parts):
                    return SeenFeatures(*parts, digest)
                pixels = self.image_processor(picture).to(self.device)
            features = self.model.get_image_features(**pixels, stage=stage)
            tokens, maps = features.pooler_output[0], features.last_hidden_state[0]
            for part, tensor in (("tokens", tokens), ("maps", maps)):
                self.cache.put((digest, part), tensor)
            return SeenFeatures(tokens, maps, digest)

    def see_all(
        self, images: Sequence, at_hand: Iterable[SeenFeatures], *, allow_urls: bool = False
    ) -> list[SeenFeatures]:
        """Several pictures; one that comes twice or is at hand is not encoded again."""
        seen = list(at_hand)
        before = len(seen)
        for image in images:
            seen.append(self.see(image, allow_urls=allow_urls, at_hand=seen))
        return seen[before:]

    def clear(self) -> None:
        """Drops the tokens and maps of pictures seen before."""
        self.cache.clear()
        self.version += 1

    def _circumstances(self) -> tuple:
        """What features depend on beside picture and model."""
        device = self.device
        return str(device), self.model.dtype, tuple(choose(name, None, device) for name in OPERATIONS), numerics(device)

    def _current_version(self) -> int:
        with self._watching:
            state = Fingerprint((self.model.visual_tokenizer,))
            if state != self._state:
                if self._state is not None:
                    self.clear()
                self._state = state
            return self.version
