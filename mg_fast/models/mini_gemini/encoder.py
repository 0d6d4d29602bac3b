"""Encodes pictures from pixels to image tokens, frozen for inference.

Both towers are packed. On a GPU they run at the same time and in one CUDA graph.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from ...modules import PatchInfoMining
from ...modules.clip import PackedClip
from ...ops import backend as backends
from ...runtime.graphs import CapturedGraph, Captures, CaptureStream, GraphCache, NoStreamLeft
from ...runtime.layer_dtypes import Chain
from ...runtime.numerics import numerics
from ...runtime.weights import Fingerprint, why_more_than_weights

# The number of CUDA graphs that are kept. Each has its own memory for everything between the pixels and the tokens.
MAX_GRAPHS = 4
# The classes in mining and projector whose calls do no more than a graph of them does.
_PLAIN_AFTER_TOWERS = frozenset({PatchInfoMining, Chain, nn.Sequential, nn.LayerNorm, nn.Linear, nn.GELU, nn.Identity})
# A graph's inputs and outputs belong to one request at a time.
_LOCK = threading.Lock()

logger = logging.getLogger(__name__)


class PictureEncoder:
    """Computes image tokens of pictures with packed copies of a model's towers.

    The packed towers are a snapshot; mining and projector are the model's own. A call refuses to run once a tower was
    changed (its weights in place, by hooks, adapters or otherwise), or once the model was moved or converted: make
    another encoder then. Writes through `.data` are not seen. On a GPU the towers run at the same time on two streams,
    and the whole is captured in a CUDA graph for each shape, so that a call is one launch. While mining or projector
    compute something else than their weights say (hooks, adapters), calls run without graphs.

    Args:
        model: the MiniGeminiModel. Its picture side must be on one device.
        graphs: capture CUDA graphs.

    Raises:
        ValueError: a tower computes something else than its weights say. The message says what.
    """

    def __init__(self, model: nn.Module, *, graphs: bool = True):
        began = time.perf_counter()
        self._model = model
        # This is checked before anything is copied.
        if reason := model.vision_tower_aux.why_more_than_weights():
            raise ValueError(f"PictureEncoder: the high-resolution tower: {reason}")
        devices = {p.device for part in _parts(model) for p in part.parameters()}
        if len(devices) > 1 or torch.device("meta") in devices:
            raise ValueError(
                f"PictureEncoder: expected the picture side on one device, got {', '.join(sorted(map(str, devices)))}"
            )
        [self.device] = devices
        self._select_layer = model.config.mm_vision_select_layer
        self._clip = PackedClip.from_tower(model.vision_tower, self._select_layer)
        self._tower = model.vision_tower_aux.pack()
        self._towers, self._after_towers = Fingerprint(_towers(model)), Fingerprint(_after_towers(model))
        cuda = self.device.type == "cuda"
        self._captures = Captures()
        self._graphs = GraphCache(MAX_GRAPHS, self._captures) if graphs and cuda else None
        self._side = self._take_streams() if cuda else None
        # A graph's inputs and outputs are the same memory in every call. The next call waits for this event, which says
        # that the tokens of the call before have been copied.
        self._copied = torch.cuda.Event() if cuda else None
        self.first_use["towers packed"] = time.perf_counter() - began

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent on work that is done once: packing, and every capture."""
        return self._captures.first_use

    def _take_streams(self) -> torch.cuda.Stream:
        """Takes the stream of the low-resolution tower, and the stream that graphs are captured on.

        No other owner of graphs has these streams, because a capture keeps the workspaces that cuBLAS has for a stream.
        """
        try:
            # This is needed without graphs too: another owner may have captured products on a stream of torch's pool.
            self._leased = CaptureStream(self.device)
            if self._graphs is not None:
                self._graphs.stream(self.device)
        except NoStreamLeft as error:
            logger.warning("pictures are encoded without CUDA graphs: %s", error)
            self._graphs = self._leased = None
            return torch.cuda.Stream(self.device)
        return self._leased.stream

    def _check_current(self) -> None:
        """Raises RuntimeError where the model is no longer as it was when it was packed."""
        towers = Fingerprint(_towers(self._model))
        # A graph reads the weights of mining and projector in place, so only their places must stay the same.
        moved = Fingerprint(_after_towers(self._model)).places != self._after_towers.places
        configured = self._model.config.mm_vision_select_layer != self._select_layer
        if towers == self._towers and not moved and not configured:
            return
        if moved or configured or towers.places != self._towers.places:
            raise RuntimeError(
                "PictureEncoder: the model was moved, converted or configured otherwise since it was packed: "
                "make another one"
            )
        self._clip.check_unchanged()
        self._tower.check_unchanged()
        raise RuntimeError(
            "PictureEncoder: a tower was changed, by a hook, an adapter or otherwise, since it was packed: "
            "make another one"
        )

    @torch.inference_mode()
    def __call__(
        self,
        pixel_values: torch.Tensor,
        pixel_values_hr: torch.Tensor,
        *,
        backend: str | None = None,
        stage: Callable | None = None,
    ) -> torch.Tensor:
        """Image tokens [n_images, T, hidden], T = 576 or 2880, global view first, unscaled.

        Args:
            pixel_values: [n_images, V, 3, LR, LR], as the processor returns them.
            pixel_values_hr: [n_images, 3, HR, HR].
            backend: overrides the choice in force.
            stage: as in `get_image_features`. Where it is given, the stages run one after the other, to be measured.
        """
        self._check_current()
        return self.encode(pixel_values, pixel_values_hr, backend=backend, stage=stage)

    @torch.inference_mode()
    def encode(
        self,
        pixel_values: torch.Tensor,
        pixel_values_hr: torch.Tensor,
        *,
        backend: str | None = None,
        stage: Callable | None = None,
    ) -> torch.Tensor:
        """Encodes as a call does, for a caller who knows that the model is unchanged; a call checks all parameters."""
        self._model.check_pixels(pixel_values, pixel_values_hr)
        pixels = pixel_values.to(self.device), pixel_values_hr.to(self.device)
        if stage is not None:
            return self._encode(*pixels, backend, stage)
        if self._graphs is None or not self._graphs_show_all():
            return self._encode_at_once(*pixels, backend)
        with _LOCK, torch.cuda.device(self.device):
            return self._replay(pixels, backend)

    def _encode(self, pixel_values, pixel_values_hr, backend: str | None, stage: Callable) -> torch.Tensor:
        """Runs the model's own order of steps, with the packed towers in place of the model's."""
        parts = {
            "see_low": functools.partial(self._queries, backend=backend),
            "see_high": functools.partial(self._tower, backend=backend),
        }
        return self._model.picture_features(
            pixel_values, pixel_values_hr, **parts, backend=backend, stage=stage
        ).image_tokens

    def _encode_at_once(self, pixel_values, pixel_values_hr, backend: str | None) -> torch.Tensor:
        """Runs both towers at the same time on a GPU, the low-resolution one on its own stream.

        Neither tower needs results of the other.
        """
        if self._side is None:
            return self._encode(pixel_values, pixel_values_hr, backend, contextlib.nullcontext)
        main = torch.cuda.current_stream(self.device)

        def see_low(pixels: torch.Tensor) -> torch.Tensor:
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                return self._queries(pixels, backend)

        def see_high(pixels: torch.Tensor) -> list[torch.Tensor]:
            levels = self._tower(pixels, backend=backend)
            # Mining comes next and reads the queries.
            main.wait_stream(self._side)
            return levels

        features = self._model.picture_features(
            pixel_values, pixel_values_hr, see_low=see_low, see_high=see_high, backend=backend
        )
        for tensor, stream in ((pixel_values, self._side), (features.queries, main)):
            tensor.record_stream(stream)
        return features.image_tokens

    def _graphs_show_all(self) -> bool:
        """Whether a replay does what a call would do. Hooks on mining or projector would run only at the capture."""
        parts = self._model.patch_mining, self._model.mm_projector
        return not any(why_more_than_weights(part, _PLAIN_AFTER_TOWERS, placed=True) for part in parts)

    def _queries(self, pixel_values: torch.Tensor, backend: str | None) -> torch.Tensor:
        return self._model.low_resolution_queries(pixel_values, tower=lambda views: self._clip(views, backend=backend))

    def _replay(self, pixels: tuple[torch.Tensor, ...], backend: str | None) -> torch.Tensor:
        # The key includes the numeric settings, because a graph keeps the arithmetic that it was captured with.
        key = (*((t.shape, t.dtype) for t in pixels), backends.requested(backend), numerics(self.device))
        captured = self._graphs.entry(key, lambda: self._capture(pixels, backend))
        if captured is None:
            return self._encode_at_once(*pixels, backend)
        graph, inputs = captured
        stream = torch.cuda.current_stream()
        stream.wait_event(self._copied)
        for kept, tensor in zip(inputs, pixels):
            kept.copy_(tensor)
        tokens = graph.replay()
        self._copied.record(stream)
        return tokens

    def _capture(
        self, pixels: tuple[torch.Tensor, ...], backend: str | None
    ) -> tuple[CapturedGraph, list[torch.Tensor]] | None:
        """A graph and its inputs, or None where it cannot be captured."""
        if not self._captures.allowed:
            return None
        began, capturing = time.perf_counter(), self._graphs.stream(self.device)
        inputs = [t.clone() for t in pixels]
        # Before a capture, kernels must be compiled, and libraries' workspaces and the tables must be made.
        capturing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(capturing):
            for _ in range(2):
                self._encode_at_once(*inputs, backend)
        what = f"kernels and CUDA graph of {len(pixels[0])} picture(s)"
        graph = self._graphs.capture(lambda: self._encode_at_once(*inputs, backend), self.device, what, began)
        torch.cuda.current_stream().wait_stream(capturing)
        return None if graph is None else (graph, inputs)


def _towers(model: nn.Module) -> tuple[nn.Module, ...]:
    return model.vision_tower, model.vision_tower_aux


def _parts(model: nn.Module) -> tuple[nn.Module, ...]:
    return *_towers(model), *_after_towers(model)


def _after_towers(model: nn.Module) -> tuple[nn.Module, ...]:
    return model.patch_mining, model.mm_projector


def picture_state(model: nn.Module) -> tuple:
    """What image tokens depend on apart from pixels and encoding. It is compared by `==`; see `Fingerprint`."""
    settings = model.config.mm_vision_select_layer, model.config.vision_config._attn_implementation
    return Fingerprint(_parts(model)), settings
