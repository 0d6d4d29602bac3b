"""The vision stage: pictures to image tokens, with those of pictures seen before kept by what the pictures show."""

import contextlib
import hashlib
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..models.pictures import open_picture
from ..models.protocol import PackedPictureEncoder, SeeingModel
from ..ops.backend import OPERATIONS, choose, requested, use_backend
from ..runtime.layer_dtypes import mixed_dtypes_named
from ..runtime.meter import Meter
from ..runtime.numerics import numerics
from ..runtime.placement import execution_device
from .image_cache import ImageCache, picture_digest
from .options import CacheOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SeenPicture:
    """A picture as the language model gets it: image tokens [T, hidden], and a digest that only the same tokens have."""

    tokens: torch.Tensor
    digest: bytes


class VisionStage:
    """Turns pictures into image tokens.

    Pictures go through packed copies of the towers (the model's `picture_encoder`), made at the first picture and of a
    third of their size; by the `reference` backend, or where a tower is more than its weights, through the model's own
    modules. Image tokens are kept by picture content. Both are made anew once the picture side has changed: weights
    that were written to in place, moved or exchanged, hooks, and adapters that were added, switched, scaled or merged.
    Whoever writes to weights through `.data` (or to offloaded ones, or to inference tensors) calls `clear`. Threads may
    share a stage.

    Args:
        model: what sees, as MiniGeminiForConditionalGeneration does.
        image_processor: its image processor: pictures to pixels.
        backend: for every call of this stage; None leaves the choice to what is in force where it is called.
        caches: `image_cache_bytes` of it counts here.
        cuda_graphs: on a GPU, capture the towers and the mining in CUDA graphs; without, less memory is taken.

    Attributes:
        cache: the image tokens kept.
        encoder: the packed towers; None before the first picture, and where they cannot be packed.
        version: a number that is another one once image tokens of the same picture may be others.
    """

    def __init__(
        self,
        model: SeeingModel,
        image_processor,
        *,
        backend: str | None = None,
        caches: CacheOptions | None = None,
        cuda_graphs: bool = True,
    ):
        self.model, self.image_processor, self.backend = model, image_processor, backend
        self.cache = ImageCache((caches or CacheOptions()).image_cache_bytes)
        self.encoder: PackedPictureEncoder | None = None
        self.version = 0
        self._cuda_graphs = cuda_graphs
        self._packing = threading.Lock()
        self._state: tuple | None = None

    @property
    def device(self) -> torch.device:
        """The device that pixels go to: that of the language model's input, or the one that offloaded weights are
        brought to.
        """
        return execution_device(self.model.get_input_embeddings())

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on what is done once: packing towers, capturing graphs."""
        return self.encoder.first_use if self.encoder is not None else {}

    @torch.inference_mode()
    def see(
        self,
        image,
        *,
        allow_urls: bool = False,
        meter: Meter | None = None,
        at_hand: Iterable[SeenPicture] | None = None,
        with_digest: bool = False,
    ) -> SeenPicture:
        """Image tokens [T, hidden] of one picture (T 576, HD 2880; unscaled, global view first).

        A picture that was seen before, in whatever file, is decoded and found in the cache by its pixels. The tokens
        are inference tensors, which gradients do not pass; `Pipeline.see` gives copies that are not.

        Args:
            image: a Pillow image, path, bytes, or uint8 array or tensor; a URL where `allow_urls` is set.
            allow_urls: fetch pictures given as URLs.
            meter: measures the steps.
            at_hand: pictures that are not encoded again, whatever the cache holds.
            with_digest: give a digest, even where nothing is kept by it here, if the towers are no more than their
                weights.
        """
        stage = meter.stage if meter is not None else contextlib.nullcontext
        with use_backend(self.backend):
            with stage("preprocess"):
                # This comes first, because it forgets what was seen with other weights.
                version, encoder = self._current_encoder(packed=requested() != "reference")
                digest = b""
                # Towers that cannot be packed may be changed by what no digest knows, as a hook that does something
                # else each time.
                if self.cache.limit or at_hand is not None or (with_digest and encoder is not None):
                    image = decoded(image, allow_urls)
                    digest = hashlib.sha256(
                        repr((picture_digest(image), version, *self.circumstances())).encode()
                    ).digest()
                    if (
                        known := next((picture for picture in at_hand or () if picture.digest == digest), None)
                    ) is not None:
                        return known
                    if (tokens := self.cache.get(digest)) is not None:
                        return SeenPicture(tokens, digest)
                # The pixels are the same to the last bit on either device; on a CPU Pillow is the faster one.
                device = self.device if self.device.type == "cuda" and requested() != "reference" else None
                pixels = self.image_processor(image, allow_urls=allow_urls, device=device).to(self.device)
            measured = {"stage": meter.stage} if meter is not None else {}
            if encoder is not None:
                tokens = encoder.encode(**pixels, **measured)[0]
            else:
                with mixed_dtypes_named(self.model.picture_parts):
                    tokens = self.model.get_image_features(**pixels, **measured).pooler_output[0]
            if digest:
                self.cache.put(digest, tokens)
            return SeenPicture(tokens, digest)

    def see_all(
        self, images: Sequence, at_hand: Iterable[SeenPicture], *, allow_urls: bool = False
    ) -> list[SeenPicture]:
        """Pictures of one question of a batch; none is encoded twice, nor one of those at hand again."""
        seen = list(at_hand)
        before = len(seen)
        for image in images:
            seen.append(self.see(image, allow_urls=allow_urls, at_hand=seen))
        return seen[before:]

    def clear(self) -> None:
        """Forgets the image tokens of pictures seen before, and the packed towers."""
        self.cache.clear()
        self.encoder = None
        self.version += 1

    def circumstances(self) -> tuple:
        """What image tokens depend on beside the picture and the state of the model: how it is processed, and what
        computes it.
        """
        device, images = self.device, self.image_processor
        backends = tuple(choose(operation, None, device) for operation in OPERATIONS)
        return str(device), self.model.dtype, backends, numerics(device), images.settings

    def _current_encoder(self, *, packed: bool) -> tuple[int, PackedPictureEncoder | None]:
        """The number of the picture side's present state, and the packed towers of it.

        Image tokens and towers of another state are dropped. The towers are None where none are asked for, or the model
        cannot be packed.
        """
        with self._packing:
            state = self.model.picture_state()
            if state != self._state:
                if self._state is not None:
                    self.clear()
                self._state = state
            if packed and self.encoder is None:
                try:
                    # The encoder's weights must not be inference tensors, which count no changes.
                    with torch.inference_mode(False):
                        self.encoder = self.model.picture_encoder(graphs=self._cuda_graphs)
                except ValueError as error:
                    logger.info("pictures go through the model's own modules: %s", error)
            return self.version, self.encoder if packed else None


def decoded(image, allow_urls: bool) -> Image.Image:
    """The picture in RGB, named as what it was read from."""
    picture = open_picture(image, allow_urls=allow_urls)
    if name := getattr(image, "filename", None):
        picture.filename = name
    return picture
