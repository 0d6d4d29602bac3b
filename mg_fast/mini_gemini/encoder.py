"""From a picture's pixels to image tokens, frozen for inference: both towers packed and, on a GPU, at once and in one graph."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from .. import backend as backends
from .modeling import MiniGeminiModel
from .packed_clip import PackedClip

# graphs kept, each with memory of its own for everything between the pixels and the tokens
MAX_GRAPHS = 4


class PictureEncoder:
    """Image tokens of pictures by packed copies of a model's towers.

    What is packed is a snapshot; mining and projector are the model's own. A call refuses once a tower's weights were changed in place;
    after the model was moved or converted, make another. On a GPU the towers run at once on two streams, and all of it is captured in a
    CUDA graph for each shape: a call then is one launch.

    Args:
        model: the MiniGeminiModel, its picture side on one device.
        graphs: capture CUDA graphs.

    Raises:
        ValueError: a tower computes something else than its weights say; the message says what.
    """

    def __init__(self, model: MiniGeminiModel, *, graphs: bool = True):
        self._model = model
        self._clip = PackedClip.from_tower(model.vision_tower, model.config.mm_vision_select_layer)
        self._tower = model.vision_tower_aux.pack()
        parts = (model.vision_tower, model.vision_tower_aux, model.patch_mining, model.mm_projector)
        devices = {p.device for part in parts for p in part.parameters()}
        if len(devices) > 1:
            raise ValueError(f"PictureEncoder: expected the picture side on one device, got {', '.join(sorted(map(str, devices)))}")
        [self.device] = devices
        self._storages = _storages(parts)
        self._graphs: OrderedDict | None = OrderedDict() if graphs and self.device.type == "cuda" else None
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # a graph's inputs and outputs are the same memory in every call
        self._lock = threading.Lock()

    def is_current(self) -> bool:
        """Whether the model is as it was packed: not changed, moved or converted since."""
        model = self._model
        if _storages((model.vision_tower, model.vision_tower_aux, model.patch_mining, model.mm_projector)) != self._storages:
            return False
        try:
            self._check_unchanged()
        except RuntimeError:
            return False
        return True

    def _check_unchanged(self) -> None:
        self._clip.check_unchanged()
        self._tower.check_unchanged()

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
            stage: as of `get_image_features`; where it is given the stages run one after the other, to be measured.
        """
        self._model.check_pixels(pixel_values, pixel_values_hr)
        pixels = pixel_values.to(self.device), pixel_values_hr.to(self.device)
        if stage is not None:
            return self._encode(*pixels, backend, stage)
        if self._graphs is None:
            return self._encode_at_once(*pixels, backend)
        with self._lock, torch.cuda.device(self.device):
            return self._replay(pixels, backend)

    def _encode(self, pixel_values, pixel_values_hr, backend: str | None, stage: Callable) -> torch.Tensor:
        with stage("LR tower"):
            queries = self._queries(pixel_values, backend)
        with stage("HR tower"):
            pyramid = self._tower(pixel_values_hr, backend=backend)
        return self._model.mine_and_project(queries, pyramid, backend=backend, stage=stage)[0]

    def _encode_at_once(self, pixel_values, pixel_values_hr, backend: str | None) -> torch.Tensor:
        """The towers need nothing of each other."""
        if self._side is None:
            return self._encode(pixel_values, pixel_values_hr, backend, contextlib.nullcontext)
        main = torch.cuda.current_stream(self.device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            queries = self._queries(pixel_values, backend)
        pyramid = self._tower(pixel_values_hr, backend=backend)
        main.wait_stream(self._side)
        for tensor, stream in ((pixel_values, self._side), (queries, main)):
            tensor.record_stream(stream)
        return self._model.mine_and_project(queries, pyramid, backend=backend)[0]

    def _queries(self, pixel_values: torch.Tensor, backend: str | None) -> torch.Tensor:
        return self._model.low_resolution_queries(pixel_values, tower=lambda views: self._clip(views, backend=backend))

    def _replay(self, pixels: tuple[torch.Tensor, ...], backend: str | None) -> torch.Tensor:
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (*((t.shape, t.dtype) for t in pixels), backends.requested(backend), autocast)
        if key not in self._graphs:
            self._graphs[key] = self._capture(pixels, backend)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, inputs, tokens = self._graphs[key]
        self._check_unchanged()
        for kept, tensor in zip(inputs, pixels):
            kept.copy_(tensor)
        graph.replay()
        return tokens.clone()

    def _capture(self, pixels: tuple[torch.Tensor, ...], backend: str | None):
        inputs = [t.clone() for t in pixels]
        # kernels are compiled, libraries make their workspaces, and tables are made before anything is captured
        warm = torch.cuda.Stream(self.device)
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(2):
                self._encode_at_once(*inputs, backend)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens = self._encode_at_once(*inputs, backend)
        return graph, inputs, tokens


def _storages(parts: Iterable[nn.Module]) -> list[int]:
    """Where the parameters lie: elsewhere after they were moved, converted or replaced."""
    return [p.data_ptr() for part in parts for p in part.parameters()]
