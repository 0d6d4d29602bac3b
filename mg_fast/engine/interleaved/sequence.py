"""A sequence of texts and pictures as the model reads it, which grows at its end."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import PromptError
from ...models.mm_interleaved.configuration import LLM_MAX_IMAGES, MMInterleavedConfig
from ..answers import Request
from .pictures import SeenFeatures


@dataclass(frozen=True)
class InterleavedSequence:
    """Ids, and the pictures whose places they hold. A sequence is never changed; longer ones are made of it.

    Attributes:
        ids: one token that begins the sequence, and then texts and the tokens of pictures. Empty at first.
        pictures: the pictures in their order.
    """

    ids: tuple[int, ...] = ()
    pictures: tuple[SeenFeatures, ...] = ()

    def extended(self, ids: Sequence[int], pictures: Sequence[SeenFeatures] = ()) -> "InterleavedSequence":
        """The sequence with these ids, which hold the places of these pictures, at its end."""
        return InterleavedSequence((*self.ids, *ids), (*self.pictures, *pictures))

    def with_picture(self, picture: SeenFeatures, config: MMInterleavedConfig) -> "InterleavedSequence":
        """The sequence with a picture at its end."""
        return self.extended([config.soi_token_id, *[config.image_token_id] * config.num_img_token], [picture])

    def request(self, config: MMInterleavedConfig, new: int) -> Request:
        """A request for at most `new` tokens after this sequence."""
        marks = [int(token == config.image_token_id) for token in self.ids]
        return Request(list(self.ids), marks, new)

    def begins(self, config: MMInterleavedConfig) -> int:
        """The position of the last token that begins a document: what stands before it is not seen after it."""
        places = [i for i, token in enumerate(self.ids) if token == config.bos_token_id]
        return places[-1] if places else 0

    def visible_pictures(self, config: MMInterleavedConfig) -> int:
        """The number of pictures that the end of the sequence sees."""
        return sum(token == config.soi_token_id for token in self.ids[self.begins(config) :])

    def why_no_picture_fits(self, config: MMInterleavedConfig) -> str | None:
        """Why no picture can follow, as a sentence; None where one can."""
        positions = min(config.seq_len, config.text_config.max_position_embeddings)
        needed = len(self.ids) + 1 + config.num_img_token
        if needed > positions:
            return f"a picture after {len(self.ids)} positions needs {needed}, the model has {positions}"
        if (seen := self.visible_pictures(config)) >= LLM_MAX_IMAGES - 1:
            return f"{seen} pictures are visible already, the model has relative positions for {LLM_MAX_IMAGES - 1}"
        return None

    def check(self, config: MMInterleavedConfig) -> None:
        """Raises PromptError where the pictures do not fit the ids, or more are visible than the model can tell."""
        tokens = sum(token == config.image_token_id for token in self.ids)
        if tokens != len(self.pictures) * config.num_img_token:
            raise PromptError(
                f"the texts hold {tokens} tokens of pictures, expected {config.num_img_token} for each of "
                f"{len(self.pictures)} picture(s): a text must not spell out special tokens"
            )
        if (seen := self.visible_pictures(config)) >= LLM_MAX_IMAGES:
            raise PromptError(
                f"{seen} pictures are visible at once, the model has relative positions for {LLM_MAX_IMAGES - 1}"
            )


def split_end(ids: Sequence[int], config: MMInterleavedConfig) -> tuple[list[int], int | None]:
    """The ids of a text without the one that ended it, and this one: an end token, or the one that begins a picture."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    if ids and ids[-1] in (*ends, config.soi_token_id):
        return list(ids[:-1]), ids[-1]
    return list(ids), None
