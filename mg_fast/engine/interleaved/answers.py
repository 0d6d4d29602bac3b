"""The answer stage of sequences of texts and pictures: texts, and the states from which pictures are drawn."""

import logging
import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from ...decoding import Decoder
from ...errors import PromptError
from ...models.mm_interleaved.packed import PackedInterleavedDecoding
from ...models.mm_interleaved.visible_pictures import in_rows, picture_index, visible
from ...ops.backend import choose, requested, use_backend
from ...runtime.weights import Fingerprint
from ..answers import Answer, AnswerStage, Request
from ..image_cache import ImageCache
from ..options import CacheOptions, Sampling
from .items import Items
from .pictures import SeenFeatures
from .sequence import InterleavedSequence

logger = logging.getLogger(__name__)

# On a GPU, a sequence has room for a multiple of this number of pictures.
PICTURES_AT_ONCE = 4


class InterleavedAnswers(AnswerStage):
    """Writes texts after sequences of texts and pictures, and gives the states of sequences.

    Texts are decoded by the model's packed form, which is made at the first answer. It is made again when weights of
    the language model have changed, and everything remembered is dropped then. Where it cannot be packed (hooks,
    adapters, quantized synchronizers), the model itself decodes. What the synchronizers read of a picture is computed
    once. It is kept in the cache, and as long as a conversation holds the picture.

    Args:
        model: the MMInterleavedForConditionalGeneration.
        processor: its MMInterleavedProcessor.
        cache: keeps what the synchronizers read of pictures, beside the pictures' other features.
        backend, caches, compiled, cuda_graphs: as in `AnswerStage`.

    Attributes:
        pictures_at_once: a sequence that is decoded alone has room for a multiple of this number of pictures.
    """

    def __init__(
        self,
        model,
        processor,
        cache: ImageCache,
        *,
        backend: str | None = None,
        caches: CacheOptions | None = None,
        compiled: bool = False,
        cuda_graphs: bool = True,
    ):
        caches = caches or CacheOptions()
        self._decoding = {"kv_cache_bytes": caches.kv_cache_bytes, "graphs": cuda_graphs, "compiled": compiled}
        super().__init__(model, processor, backend=backend, caches=caches, compiled=compiled, cuda_graphs=cuda_graphs)
        self._cache, self._version = cache, 0
        # By picture: the version, and what the synchronizers read. The cache may have room for fewer pictures.
        self._values: WeakKeyDictionary[SeenFeatures, tuple[int, torch.Tensor]] = WeakKeyDictionary()
        self.pictures_at_once = PICTURES_AT_ONCE if cuda_graphs and self.device.type == "cuda" else 1
        self._packed_of: Fingerprint | None = None
        self._packing = threading.Lock()

    @property
    def tokenizer(self):
        return _Writer(self.processor)

    def read(self, text: str, *, first: bool) -> list[int]:
        """The ids of a text with `<image>` for pictures; `first` where it begins a sequence."""
        return self.processor.encode(text, add_special_tokens=first)

    def request_after(self, sequence: InterleavedSequence, sampling: Sampling) -> Request:
        """A request for a text after a sequence.

        Raises:
            PromptError: the sequence does not fit its pictures or the model, or leaves no room for a text.
        """
        sequence.check(self.model.config)
        length = len(sequence.ids)
        new = min(sampling.max_new_tokens, max(1, self.positions - length))
        self.model.check_length(length, new)
        return sequence.request(self.model.config, new)

    def request_of(self, items: Items, sampling: Sampling) -> Request:
        """A request for a text after some items whose pictures are not seen yet; errors as in `request_after`."""
        if items.empty:
            raise PromptError("expected at least one text or picture, got an empty list")
        ids = self.read(items.text, first=True)
        return self.request_after(InterleavedSequence(tuple(ids), tuple(items.pictures)), sampling)

    def answer(self, rows: Sequence[tuple[Request, Sequence[SeenFeatures]]], sampling: Sampling, **how) -> list[Answer]:
        self._pack()
        return super().answer(rows, sampling, **how)

    @torch.inference_mode()
    def states(self, sequence: InterleavedSequence) -> torch.Tensor:
        """The last layer's hidden states [1, L, D] of a sequence, of which only what is not remembered is run."""
        self._pack()
        with use_backend(self.backend):
            rows = [(sequence.request(self.model.config, 1), sequence.pictures)]
            inputs = self._prepared(rows)
            decoder = self.decoder
            if requested() == "reference":
                decoder = Decoder(self.model, kv_cache_bytes=0, graphs=False, keep_states=True)
            ids = inputs.pop("input_ids")
            return decoder.states(ids, inputs, self.digests(rows))

    @torch.inference_mode()
    def inputs(self, rows: Sequence[tuple[Request, Sequence[SeenFeatures]]]) -> dict:
        """The inputs of `generate`, with the tokens of all pictures and with what the synchronizers read of them."""
        requests = [request for request, _ in rows]
        inputs = {
            "input_ids": self.padded([request.ids for request in requests], self.processor.pad_token_id),
            "attention_mask": self.padded([[1] * len(request.ids) for request in requests], 0),
            "num_image_per_seq": torch.tensor([len(pictures) for _, pictures in rows], device=self.device),
        }
        pictures = [picture for _, pictures in rows for picture in pictures]
        if not pictures:
            return inputs
        inputs["image_tokens"] = torch.stack([picture.tokens for picture in pictures])
        if choose("feature_sync", self.backend, self.device) == "reference":
            inputs["image_maps"] = torch.stack([picture.maps for picture in pictures])
            return inputs
        most = self._room(rows)
        values = torch.stack([self._values_of(picture) for picture in pictures])
        seen = visible(inputs["input_ids"], inputs["num_image_per_seq"], self.model.config, most)
        inputs["picture_values"] = in_rows(values, inputs["num_image_per_seq"], most)
        inputs["picture_index"] = picture_index(seen)
        return inputs

    def digests(self, rows: Sequence[tuple[Request, Sequence[SeenFeatures]]]) -> list[bytes]:
        found = super().digests(rows)
        # Pictures that fill up the room are seen by no position, so that their digests do not matter.
        return found + found[-1:] * (self._room(rows) - len(found)) if len(rows) == 1 else found

    def _room(self, rows: Sequence[tuple[Request, Sequence[SeenFeatures]]]) -> int:
        """The number of pictures that every row has room for.

        A single row has room for a multiple of `pictures_at_once`, because captured passes serve one number of pictures
        alone, and a story gets more and more of them.
        """
        most = max(len(pictures) for _, pictures in rows)
        reads_maps = choose("feature_sync", self.backend, self.device) == "reference"
        return most if len(rows) > 1 or reads_maps else -(-most // self.pictures_at_once) * self.pictures_at_once

    def _prepared(self, rows: Sequence[tuple[Request, Sequence[SeenFeatures]]]) -> dict:
        """The inputs as `generate` hands them to the decode loop."""
        inputs = self.inputs(rows)
        ids = inputs["input_ids"]
        return {**inputs, **self.model.with_pictures(ids, inputs)}

    def _values_of(self, picture: SeenFeatures) -> torch.Tensor:
        """What all synchronizers read of a picture: [S, layers * inner]."""
        version, values = self._values.get(picture, (None, None))
        if version == self._version:
            return values
        key = picture.digest, "values", self._version
        if (values := self._cache.get(key)) is None:
            values = self.decoder.model.language_model.project_pictures(picture.maps[None])[0]
            self._cache.put(key, values)
        self._values[picture] = self._version, values
        return values

    def _pack(self) -> None:
        """Packs the language model, unless this was done for the weights as they are now."""
        with self._packing:
            # Keys and values depend on what is added to the embedding of a picture's first token, too.
            state = Fingerprint((self.model.language_model, self.model.head, self.model.picture_mark))
            if state == self._packed_of:
                return
            try:
                with torch.inference_mode(False):
                    model = PackedInterleavedDecoding(self.model)
            except ValueError as error:
                logger.info("texts are decoded by the model's own modules: %s", error)
                model = self.model
            self._version += 1
            self.decoder = Decoder(model, keep_states=True, **self._decoding)
            self._packed_of = state


class _Writer:
    """Writes ids as text. The id that fills up batches is no text, even where the model chose it."""

    def __init__(self, processor):
        self._processor, self._tokenizer = processor, processor.tokenizer
        self.decode, self.convert_ids_to_tokens = processor.decode, processor.tokenizer.convert_ids_to_tokens

    @property
    def all_special_ids(self) -> list[int]:
        return [*self._tokenizer.all_special_ids, self._processor.pad_token_id]


def check_room(answers: InterleavedAnswers, sequence: InterleavedSequence) -> None:
    """Raises PromptError where no picture fits after the sequence."""
    if reason := sequence.why_no_picture_fits(answers.model.config):
        raise PromptError(f"no picture can be drawn here: {reason}")
