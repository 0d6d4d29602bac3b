"""The drawing stage: from a sequence to the picture that follows it."""

import logging
import threading
from dataclasses import fields

import torch
from PIL import Image

from ...errors import PromptError, quoted
from ...models.mm_interleaved.context import place_pictures
from ...models.mm_interleaved.drawing_options import DrawingOptions
from ...ops.backend import requested, use_backend
from ...runtime.arguments import whole_number
from ...runtime.weights import Fingerprint
from .answers import InterleavedAnswers, check_room
from .sequence import InterleavedSequence

logger = logging.getLogger(__name__)


class DrawingStage:
    """Draws the picture that follows a sequence.

    The language model runs only positions that the answer stage does not remember. The U-Net's synchronizers are packed
    at the first drawing, and again when their weights have changed. With the `reference` backend, and where they cannot
    be packed, they run as they are.

    Args:
        model: the MMInterleavedForConditionalGeneration.
        answers: the stage that gives the states of sequences.
        backend: the backend of every call of this stage; None leaves the choice to what is in force at the call.
        cuda_graphs: on a GPU, capture a step in a CUDA graph; without graphs less memory is needed.

    Attributes:
        drawer: the packed drawer; None before the first picture, and where it cannot be packed.
    """

    def __init__(self, model, answers: InterleavedAnswers, *, backend: str | None = None, cuda_graphs: bool = True):
        self.model, self.answers, self.backend = model, answers, backend
        self.drawer = None
        self._cuda_graphs = cuda_graphs
        self._packed_of: Fingerprint | None = None
        self._packing = threading.Lock()

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on capturing graphs."""
        return self.drawer.first_use if self.drawer is not None else {}

    def check(self, options: DrawingOptions) -> None:
        """Raises ValueError where the options do not fit the model; nothing is computed."""
        self.model.image_decoder.check_options(1, options)

    @torch.inference_mode()
    def draw(self, sequence: InterleavedSequence, options: DrawingOptions) -> list[Image.Image]:
        """Draws `options.num_images` pictures that could follow the sequence.

        Args:
            sequence: what comes before the picture.
            options: how the picture is drawn.

        Raises:
            PromptError: the sequence has no room for a picture, or does not fit its own.
        """
        sequence.check(self.model.config)
        check_room(self.answers, sequence)
        with use_backend(self.backend):
            begun = sequence.extended([self.model.config.soi_token_id])
            states = self.answers.states(begun)
            [target] = place_pictures(torch.tensor([begun.ids]), None, self.model.config)[-1:]
            maps = None
            if target.previous is not None:
                # Only the picture before the target is read.
                maps, target = sequence.pictures[target.previous].maps[None], target._replace(previous=0)
            drawer = self._current_drawer() if requested() != "reference" else None
            return self.model.draw_targets(states, [target], maps, options, drawer=drawer)

    def clear(self) -> None:
        """Drops the packed synchronizers and captured graphs."""
        with self._packing:
            self.drawer = self._packed_of = None

    def _current_drawer(self):
        with self._packing:
            state = Fingerprint((self.model.image_decoder,))
            if state != self._packed_of:
                try:
                    with torch.inference_mode(False):
                        self.drawer = self.model.picture_drawer(graphs=self._cuda_graphs)
                except ValueError as error:
                    logger.info("pictures are drawn by the model's own modules: %s", error)
                    self.drawer = None
                self._packed_of = state
            return self.drawer


def drawing_options(seed: int | None, config, device: torch.device, **options) -> DrawingOptions:
    """How pictures are drawn, with a generator of its own for each.

    Args:
        seed: of the first of `num_images` pictures; the others take the numbers after it. None: the checkpoint's own.
        config: the model's configuration.
        device: where the noise is drawn.
        **options: the other fields of `DrawingOptions`. A `generator` takes the place of the seed.

    Raises:
        PromptError: the seed is no whole number, or too large.
        ValueError: an option is out of range or unknown.
    """
    first = config.sd_base_seed if seed is None else whole_number(seed)
    if first is None or not -(2**63) <= first < 2**63:
        raise PromptError(f"seed: expected a whole number of at most 63 bits, got {quoted(seed)}")
    options = {name: value for name, value in options.items() if value is not None}
    known = {field.name for field in fields(DrawingOptions)}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{unknown[0]} is no option of a drawing: expected {', '.join(sorted(known))}, or seed")
    if "generator" in options:
        return DrawingOptions(**options)
    checked = DrawingOptions(**options)
    generators = [torch.Generator(device).manual_seed(first + k) for k in range(checked.num_images)]
    return DrawingOptions(**{**options, "generator": generators})
