"""Encodes pictures from pixels to tokens and feature maps, frozen for inference."""

import contextlib
import functools
import time
from collections.abc import Callable

import torch
from torch import nn

from ...modules.clip import PackedClip
from ...ops import backend as backends
from ...runtime.graphed_call import GraphedCall
from ...runtime.graphs import Captures
from ...runtime.weights import Fingerprint, why_not_plain
from .configuration import MAP_SIDES
from .positions import resized_positions
from .visual_tokenizer import VisualFeatures, VisualTokenizer

# The number of CUDA graphs that are kept. Each has its own memory for everything between the pixels and the features.
MAX_GRAPHS = 4


class FeatureEncoder:
    """Computes the features of pictures with a packed copy of CLIP's layers.

    The packed layers are a snapshot; the other parts are the tokenizer's own. A call refuses to run once any weight was
    written in place, or once the tokenizer was moved, converted, or changed by hooks or adapters: make another encoder
    then. Writes through `.data` are not seen. On a GPU everything is captured in a CUDA graph for each number of
    pictures, so that a call is one launch.

    Args:
        tokenizer: the model's visual tokenizer, on one device.
        graphs: capture CUDA graphs.

    Raises:
        ValueError: a part computes something else than its weights say. The message says what.
    """

    def __init__(self, tokenizer: VisualTokenizer, *, graphs: bool = True):
        began = time.perf_counter()
        if reason := _unsuited(tokenizer):
            raise ValueError(f"FeatureEncoder: {reason}")
        [self.device] = {parameter.device for parameter in tokenizer.parameters()}
        self._tokenizer = tokenizer
        self._clip = PackedClip.from_layers(tokenizer.vision_model)
        # Graphs read this table in place, so it must stay as long as they do.
        self._positions = resized_positions(
            tokenizer.pos_embed, MAP_SIDES, skip=1, dtype=tokenizer.pos_proj.weight.dtype
        )
        self._packed = Fingerprint([tokenizer])
        self._captures = Captures()
        cuda = self.device.type == "cuda"
        self._graphed = GraphedCall(self.device, MAX_GRAPHS, self._captures) if graphs and cuda else None
        self.first_use["vision tower packed"] = time.perf_counter() - began

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent on work that is done once: packing, and every capture."""
        return self._captures.first_use

    def __call__(self, pixel_values: torch.Tensor, **options) -> VisualFeatures:
        """Encodes as `encode` does, after a check of everything that the tokenizer computes with."""
        if Fingerprint([self._tokenizer]) != self._packed:
            raise RuntimeError(
                "FeatureEncoder: the visual tokenizer was changed, moved or converted since it was packed: make "
                "another encoder"
            )
        return self.encode(pixel_values, **options)

    @torch.inference_mode()
    def encode(
        self, pixel_values: torch.Tensor, *, backend: str | None = None, stage: Callable | None = None
    ) -> VisualFeatures:
        """The features of pictures. Of all changes to the tokenizer, only weights that were written are noticed.

        Args:
            pixel_values: [n, 3, 224, 224], floating point in 0..1.
            backend: overrides the choice in force.
            stage: as in `VisualTokenizer.forward`. Where it is given, no graph is used, so that steps can be measured.

        Raises:
            ValueError: the pixels have another shape or dtype.
            RuntimeError: a weight was changed in place since the encoder was made.
        """
        if self._packed.weights_written():
            raise RuntimeError(
                "FeatureEncoder: weights of the visual tokenizer were changed since it was packed: make another encoder"
            )
        self._tokenizer.check_pixels(pixel_values)
        pixels = pixel_values.to(self.device)
        if self._graphed is None or stage is not None or not len(pixels):
            return VisualFeatures(*self._encode(pixels, backend=backend, stage=stage))
        work = functools.partial(self._encode, backend=backend)
        what = f"kernels and CUDA graph of {len(pixels)} picture(s)"
        return VisualFeatures(*self._graphed(work, (pixels,), backends.requested(backend), what))

    def _encode(
        self, pixels: torch.Tensor, *, backend: str | None, stage: Callable | None = None
    ) -> tuple[torch.Tensor, ...]:
        see = functools.partial(
            self._tokenizer.vision_model,
            embed=self._clip.embed,
            run_layers=functools.partial(self._clip.run_layers, backend=backend),
        )
        return tuple(self._tokenizer(pixels, see=see, backend=backend, stage=stage or contextlib.nullcontext))


def picture_state(tokenizer: VisualTokenizer) -> tuple:
    """What features depend on apart from pixels and encoding. It is compared by `==`; see `Fingerprint`."""
    return Fingerprint([tokenizer]), tokenizer.vision_model.config._attn_implementation


def _unsuited(tokenizer: nn.Module) -> str | None:
    """Why a tokenizer cannot be packed, as a sentence; None where it can."""
    if tokenizer.training:
        return "the visual tokenizer is in training mode, in which it drops values at random: call eval() first"
    devices = {parameter.device for parameter in tokenizer.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        found = ", ".join(sorted(map(str, devices)))
        return f"expected the visual tokenizer on one device with its values, got {found}"
    for name, part in tokenizer.named_modules():
        if reason := why_not_plain(name or "the visual tokenizer", part, placed=True):
            return reason
    return None
