"""Draws pictures: the loop over a scheduler's steps, each of which is one CUDA graph on a GPU, and the decoding."""

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ...ops import backend as backends
from ...runtime.graphs import CapturedGraph, Captures, GraphCache, NoStreamLeft
from ...runtime.layer_dtypes import compute_dtype
from ...runtime.numerics import numerics
from ...runtime.weights import Fingerprint, why_more_than_weights
from .drawing_options import DrawingOptions, Steps
from .packed_unet_synchronizer import PackedUNetSynchronizer, why_not_packable
from .residuals import call_unet

logger = logging.getLogger(__name__)

# The number of CUDA graphs that are kept. Each has its own memory for a step of the U-Net, and for the values of all
# synchronizers.
MAX_GRAPHS = 2


class Constants(NamedTuple):
    """What is the same in all steps of a batch of B pictures.

    Attributes:
        condition: [B * halves, L, W]; with guidance, each picture's negative condition comes before its own.
        pictures, places: what the synchronizer has prepared of the previous pictures.
        guidance: [], the scale; None without guidance.
    """

    condition: torch.Tensor
    pictures: torch.Tensor | None
    places: torch.Tensor | None
    guidance: torch.Tensor | None

    @property
    def halves(self) -> int:
        return 1 if self.guidance is None else 2


class PictureDrawer:
    """Draws pictures with packed synchronizers and, on a GPU, with one CUDA graph for a step.

    U-Net and autoencoder are the decoder's own, and the packed synchronizers a snapshot: a call refuses to run once
    their weights were changed in place. Several threads may call one drawer; their batches take turns.

    The autoencoder decodes in the dtype of its weights. Its configuration's `force_upcast` says that its intermediate
    tensors leave the range of float16; float16 weights are then copied to float32 once. Latents and the scheduler's
    arithmetic have float32 at least.

    Args:
        decoder: the ImageDecoder. It must be on one device.
        packed: pack the synchronizers. Otherwise they run the original's steps, with their weights as they are.
        fall_back: do without packing where the synchronizers compute something other than their weights say.
        graphs: capture CUDA graphs.

    Raises:
        ValueError: the synchronizers cannot be packed; the message says why.
    """

    def __init__(self, decoder: nn.Module, *, packed: bool = True, fall_back: bool = False, graphs: bool = True):
        self._decoder, parts = decoder, decoder.decoder
        self.device = decoder.neg_prompt_embeds.device
        self.dtype = compute_dtype(parts.unet)
        self._synchronizer = parts.mmfs_module
        if packed and not (fall_back and why_not_packable(parts.mmfs_module)):
            self._synchronizer = PackedUNetSynchronizer(parts.mmfs_module, self.dtype)
        self._vae = decoding_autoencoder(parts.vae)
        self._captures = Captures()
        cuda = self.device.type == "cuda"
        self._graphs = GraphCache(MAX_GRAPHS, self._captures) if graphs and cuda else None
        # A graph's inputs are the same memory in every batch. The next batch waits for this event.
        self._done = torch.cuda.Event() if cuda else None
        self._places = Fingerprint([parts.unet]).places
        # A copy of the autoencoder does not follow its weights.
        self._copied = Fingerprint([] if self._vae is parts.vae else [parts.vae])
        self._lock = threading.Lock()

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent on every capture."""
        return self._captures.first_use

    @torch.no_grad()
    def __call__(
        self,
        condition: torch.Tensor,
        maps: torch.Tensor | None = None,
        maps_mask: torch.Tensor | None = None,
        options: DrawingOptions | None = None,
        *,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Pictures [num_images * T, 3, H, W] in 0..1, in float32 at least; the first round's come first.

        Args:
            condition: [T, L, W] for T targets, from `ImageDecoder.condition`.
            maps: [T, 1, 5440, C], the feature maps of the picture before each target; None: no target has one, and
                nothing of the synchronizers is computed but constants.
            maps_mask: [T, 1], not 0 where there is such a picture; None: everywhere.
            options: None: the defaults.
            backend: overrides the choice in force.

        Raises:
            ValueError: shapes or options do not fit; the message names what was expected and what came.
            RuntimeError: the decoder was moved or converted, or the synchronizers were changed, since the drawer was
                made.
        """
        options = options or DrawingOptions()
        self._check_current()
        self._decoder.check_options(len(condition), options)
        _check_inputs(self._decoder.config, condition, maps, maps_mask)
        pictures, targets, size = [], len(condition), options.batch_size

        def constants_of(some: slice) -> Constants:
            return self.constants(condition[some], _rows(maps, some), _rows(maps_mask, some), options)

        # All rounds share what is made of a batch where there is only one.
        shared = constants_of(slice(0, targets)) if targets <= size else None
        for k, generator in enumerate(options.generators(self._decoder.config.sd_base_seed, self.device)):
            for first in range(0, targets, size):
                some = slice(first, min(first + size, targets))
                latents = None
                if options.latents is not None:
                    latents = options.latents[k * targets + some.start : k * targets + some.stop]
                constants = constants_of(some) if shared is None else shared
                # A graph's inputs belong to one batch at a time.
                with self._lock if self._graphs is not None else contextlib.nullcontext():
                    latents = self._denoise(constants, some.stop - some.start, latents, generator, options, backend)
                # One picture is enough to fill a GPU, and needs the least memory.
                pictures += [self.decode(one[None]) for one in latents]
        return torch.cat(pictures)

    def _check_current(self) -> None:
        unet, device = self._decoder.decoder.unet, self._decoder.neg_prompt_embeds.device
        if (device, compute_dtype(unet)) != (self.device, self.dtype) or self._copied.weights_written():
            raise RuntimeError(
                "PictureDrawer: the decoder was moved, converted or changed since the drawer was made: make another one"
            )

    def constants(
        self, condition: torch.Tensor, maps: torch.Tensor | None, mask: torch.Tensor | None, options: DrawingOptions
    ) -> Constants:
        """What all steps of a batch share, for `predict`; the arguments are those of a call."""
        condition, guidance = condition.to(self.device, self.dtype), None
        if options.guided:
            negative = self._decoder.neg_prompt_embeds.to(self.dtype).expand_as(condition)
            condition = torch.stack([negative, condition], 1).flatten(0, 1)
            guidance = torch.full((), options.guidance_scale, dtype=self._wide, device=self.device)
        maps = None if maps is None else maps.to(self.device, self.dtype)
        mask = None if mask is None else mask.to(self.device)
        return Constants(condition, *self._synchronizer.prepare(maps, mask), guidance)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _denoise(self, constants, count: int, latents, generator, options: DrawingOptions, backend) -> torch.Tensor:
        """The latents of a batch after all steps. The host waits for the device at no step."""
        steps = Steps(options, self._decoder.config.scheduler_config)
        if latents is None:
            # diffusers was needed for the decoder's parts, so it is there.
            from diffusers.utils.torch_utils import randn_tensor

            shape = self._decoder.latents_shape(count)
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=self._wide)
        latents = latents.to(self.device, self._wide) * steps.first_deviation
        try:
            predict = self._predictor(constants, latents.shape, backend)
            at = steps.timesteps.to(self.device)
            for i, timestep in enumerate(steps.timesteps):
                predicted = predict(steps.model_input(latents, timestep), at[i])
                latents = steps.next(predicted, timestep, latents, generator)
                if options.on_step is not None:
                    options.on_step(i, latents)
        finally:
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self.device))
        return latents

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, constants: Constants, backend: str | None = None
    ) -> torch.Tensor:
        """The noise [B, channels, h, w] that is predicted for latents of this shape, with guidance if there is any."""
        halves = constants.halves
        rows = latents.to(self.dtype)
        rows = rows.repeat_interleave(halves, 0) if halves > 1 else rows
        residuals = self._synchronizer.residuals(constants.pictures, constants.places, halves=halves, backend=backend)
        predicted = call_unet(self._decoder.decoder.unet, rows, timestep, constants.condition, residuals)
        predicted = predicted.to(self._wide)
        if halves == 1:
            return predicted
        negative, own = predicted.unflatten(0, (-1, 2)).unbind(1)
        return negative + constants.guidance * (own - negative)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [n, 3, H, W] in 0..1, in float32 at least, from latents [n, channels, h, w]."""
        scaled = latents.to(self._wide) / self._vae.config.scaling_factor
        pictures = self._vae.decode(scaled.to(compute_dtype(self._vae)), return_dict=False)[0]
        return (pictures.to(self._wide) / 2 + 0.5).clamp(0, 1)

    def _predictor(self, constants: Constants, shape, backend: str | None) -> Callable:
        """`predict` for these constants: a CUDA graph where one can be captured, and otherwise the call itself."""

        def call(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.predict(latents, timestep, constants, backend)

        if self._graphs is None or not self._graph_shows_all():
            return call
        # The key includes the numeric settings, because a graph keeps the arithmetic that it was captured with.
        shapes = tuple(None if tensor is None else tensor.shape for tensor in constants)
        key = shape, shapes, backends.requested(backend), numerics(self.device)
        captured = self._graphs.entry(key, lambda: self._capture(constants, shape, backend))
        if captured is None:
            return call
        graph, latents, timestep, kept = captured
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)
        for place, tensor in zip(kept, constants):
            if tensor is not None:
                place.copy_(tensor)

        def replay(now: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
            latents.copy_(now)
            timestep.copy_(when)
            return graph.replay()

        return replay

    def _graph_shows_all(self) -> bool:
        """Whether a replay does what a call would do. Hooks on the U-Net would run only at the capture."""
        unet = self._decoder.decoder.unet
        if why_more_than_weights(unet, None, placed=True):
            return False
        if (places := Fingerprint([unet]).places) != self._places:
            self._graphs.clear()
            self._places = places
        return True

    def _capture(
        self, constants: Constants, shape, backend: str | None
    ) -> tuple[CapturedGraph, torch.Tensor, torch.Tensor, Constants] | None:
        """A graph and its inputs; None where it cannot be captured."""
        if not self._captures.allowed:
            return None
        began = time.perf_counter()
        latents = torch.zeros(shape, dtype=self._wide, device=self.device)
        timestep = torch.zeros((), dtype=self._wide, device=self.device)
        kept = Constants(*(None if tensor is None else tensor.clone() for tensor in constants))

        def work() -> torch.Tensor:
            return self.predict(latents, timestep, kept, backend)

        if self.device.type == "cuda":
            try:
                stream = self._graphs.stream(self.device)
            except NoStreamLeft as error:
                logger.warning("pictures are drawn without CUDA graphs: %s", error)
                return None
            # Before a capture, kernels must be compiled, and libraries' workspaces and the tables must be made.
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(2):
                    work()
        graph = self._graphs.capture(work, self.device, f"CUDA graph of a step for {shape[0]} picture(s)", began)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(stream)
        return None if graph is None else (graph, latents, timestep, kept)


def _rows(tensor: torch.Tensor | None, some: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[some]


def _check_inputs(config, condition, maps, maps_mask) -> None:
    rows, width = config.condition_length, config.condition_width
    if condition.dim() != 3 or len(condition) == 0 or list(condition.shape[1:]) != [rows, width]:
        raise ValueError(f"condition must be [T, {rows}, {width}] with at least one row, got {list(condition.shape)}")
    if maps is not None and (maps.dim() != 4 or list(maps.shape[:2]) != [len(condition), 1]):
        raise ValueError(f"maps must be [{len(condition)}, 1, S, C], got {list(maps.shape)}")
    if maps_mask is not None and (maps is None or maps_mask.shape != maps.shape[:2]):
        expected = f"[{len(condition)}, 1]" if maps is not None else "None without maps"
        raise ValueError(f"maps_mask must be {expected}, got {list(maps_mask.shape)}")


def decoding_autoencoder(vae: nn.Module) -> nn.Module:
    """The autoencoder that decodes safely: itself, or a copy of its decoder in float32.

    Its configuration's `force_upcast`, which is true for Stable Diffusion's, says that intermediate tensors leave the
    range of float16. bfloat16 has the range of float32.
    """
    if compute_dtype(vae) != torch.float16 or not vae.config.force_upcast:
        return vae
    wide = copy.deepcopy(vae).float()
    # Nothing here encodes.
    wide.encoder = wide.quant_conv = None
    return wide
