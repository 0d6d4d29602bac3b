"""The vision stage: it turns pictures into image tokens, and keeps those of earlier pictures by their contents."""

import contextlib
import hashlib
import logging
import threading
from collections.abc import Hashable, Iterable, Sequence
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
    """A picture as the language model gets it: image tokens [T, hidden], and a digest that only these tokens have."""

    tokens: torch.Tensor
    digest: bytes


class VisionStage:
    """Turns pictures into image tokens.

    Pictures go through packed copies of the towers (the model's `picture_encoder`), which are made at the first picture
    and have a third of the towers' size. With the `reference` backend, or where a tower computes something that its
    weights alone do not tell, pictures go through the model's own modules. Image tokens are kept by the contents of the
    pictures.

    The packed towers and the kept image tokens are dropped when the picture side has changed: when weights were written
    in place, moved or exchanged, when hooks changed, or when adapters were added, switched, scaled or merged. A change
    of weights through `.data`, of offloaded weights or of inference tensors is not noticed: call `clear` after it.
    Threads may share a stage.

    Args:
        model: the model that sees, such as MiniGeminiForConditionalGeneration.
        image_processor: the model's image processor, which makes pixels of pictures.
        backend: the backend of every call of this stage; None leaves the choice to what is in force at the call.
        caches: only `image_cache_bytes` counts here.
        cuda_graphs: on a GPU, capture the towers and the mining in CUDA graphs; without graphs less memory is needed.

    Attributes:
        cache: the image tokens kept.
        encoder: the packed towers; None before the first picture, and where they cannot be packed.
        version: a number that changes when the same picture may get other image tokens than before.
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
        """The device of the pixels, which is that of the language model's input; see `AnswerStage.device`."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on work that is done once: packing the towers, and capturing graphs."""
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
        scope: Hashable = None,
    ) -> SeenPicture:
        """Image tokens [T, hidden] of one picture (T is 576, in HD 2880; unscaled, the global view first).

        A picture that was seen before, from any file, is decoded and then found in the cache by its pixels. The tokens
        are inference tensors, through which no gradients pass; `Pipeline.see` returns ordinary copies.

        Args:
            image: a Pillow image, path, bytes, or uint8 array or tensor; also a URL if `allow_urls` is set.
            allow_urls: fetch pictures that are given as URLs.
            meter: measures the steps.
            at_hand: pictures that are not encoded again, whether the cache holds them or not.
            with_digest: make a digest even if this stage keeps no tokens by it, provided that the towers can be packed.
            scope: tokens are found in the cache only if they were made for the same scope; see `drop`.
        """
        stage = meter.stage if meter is not None else contextlib.nullcontext
        with use_backend(self.backend):
            with stage("preprocess"):
                # This comes first, because it drops image tokens that were made with other weights.
                version, encoder = self.current_encoder(packed=requested() != "reference")
                digest = b""
                # Towers that cannot be packed may depend on something that no digest covers, such as a hook that does
                # something else each time.
                if self.cache.limit or at_hand is not None or (with_digest and encoder is not None):
                    image = decoded(image, allow_urls)
                    digest = hashlib.sha256(
                        repr((picture_digest(image), version, *self.circumstances())).encode()
                    ).digest()
                    if (
                        known := next((picture for picture in at_hand or () if picture.digest == digest), None)
                    ) is not None:
                        return known
                    if (tokens := self.cache.get((scope, digest))) is not None:
                        return SeenPicture(tokens, digest)
                # Both ways give the same pixels to the last bit; on a CPU Pillow is the faster one.
                device = self.device if self.device.type == "cuda" and requested() != "reference" else None
                pixels = self.image_processor(image, allow_urls=allow_urls, device=device).to(self.device)
            measured = {"stage": meter.stage} if meter is not None else {}
            if encoder is not None:
                tokens = encoder.encode(**pixels, **measured)[0]
            else:
                with mixed_dtypes_named(self.model.picture_parts):
                    tokens = self.model.get_image_features(**pixels, **measured).pooler_output[0]
            if digest:
                self.cache.put((scope, digest), tokens)
            return SeenPicture(tokens, digest)

    def see_all(
        self, images: Sequence, at_hand: Iterable[SeenPicture], *, allow_urls: bool = False
    ) -> list[SeenPicture]:
        """The pictures of one question of a batch; a picture that comes twice or is at hand is not encoded again."""
        seen = list(at_hand)
        before = len(seen)
        for image in images:
            seen.append(self.see(image, allow_urls=allow_urls, at_hand=seen))
        return seen[before:]

    def drop(self, scope: Hashable) -> None:
        """Drops the image tokens that were made for a scope."""
        self.cache.drop(lambda key: key[0] == scope)

    def clear(self) -> None:
        """Drops the image tokens of pictures seen before, and the packed towers."""
        self.cache.clear()
        self.encoder = None
        self.version += 1

    def circumstances(self) -> tuple:
        """What image tokens depend on beside picture and model: device, dtype, backends, arithmetic, processing."""
        device, images = self.device, self.image_processor
        backends = tuple(choose(operation, None, device) for operation in OPERATIONS)
        return str(device), self.model.dtype, backends, numerics(device), images.settings

    def current_encoder(self, *, packed: bool) -> tuple[int, PackedPictureEncoder | None]:
        """The version of the picture side, and its packed towers.

        Image tokens and towers of an earlier state are dropped. The towers are None if none are asked for, or if the
        model cannot be packed.
        """
        with self._packing:
            state = self.model.picture_state()
            if state != self._state:
                if self._state is not None:
                    self.clear()
                self._state = state
            if packed and self.encoder is None:
                try:
                    # The encoder's weights must not be inference tensors, which do not count changes.
                    with torch.inference_mode(False):
                        self.encoder = self.model.picture_encoder(graphs=self._cuda_graphs)
                except ValueError as error:
                    logger.info("pictures go through the model's own modules: %s", error)
            return self.version, self.encoder if packed else None


def decoded(image, allow_urls: bool) -> Image.Image:
    """The picture in RGB, with the name of the file that it was read from."""
    picture = open_picture(image, allow_urls=allow_urls)
    if name := getattr(image, "filename", None):
        picture.filename = name
    return picture
