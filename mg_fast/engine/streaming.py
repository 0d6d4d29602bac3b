"""Turns token ids into text while they are generated, in pieces that join to the text of the whole answer."""

import queue
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ..ops.backend import requested, use_backend

# A byte piece of sentencepiece. Several of them make one character, and a run of them decodes as a whole.
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def decode_answer(tokenizer, ids: list[int]) -> str:
    """The text of an answer, without special tokens and without white space at both ends, as in the original."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


class PieceStream(BaseStreamer):
    """A streamer for `generate` that emits text as it becomes final.

    Text is held back while it may still change: a run of byte pieces, an incomplete character, trailing white space.

    Args:
        tokenizer: the model's tokenizer.
        emit: called with each piece of text.
        on_token: called when a token comes, before its text is known.
    """

    def __init__(
        self, tokenizer, emit: Callable[[str], None] | None = None, on_token: Callable[[], None] | None = None
    ):
        self.tokenizer = tokenizer
        self.emit = emit or (lambda piece: None)
        self.on_token = on_token or (lambda: None)
        self.ids: list[int] = []
        self.sent = ""
        self._special = set(tokenizer.all_special_ids)
        self._prompt_seen = False

    def put(self, value) -> None:
        if not self._prompt_seen:
            # `generate` hands over the prompt first.
            self._prompt_seen = True
            return
        self.on_token()
        self.ids.extend(value.flatten().tolist())
        settled = len(self.ids)
        while settled and self._open_ended(self.ids[settled - 1]):
            settled -= 1
        self._send(decode_answer(self.tokenizer, self.ids[:settled]).rstrip("\ufffd").rstrip())

    def end(self) -> None:
        self._send(decode_answer(self.tokenizer, self.ids))

    def _open_ended(self, token: int) -> bool:
        """Whether later tokens may still change how this token decodes.

        Special tokens count as such, because they are left out of the text and a run of bytes may go on after them.
        """
        return token in self._special or bool(_BYTE_PIECE.fullmatch(self.tokenizer.convert_ids_to_tokens(token) or ""))

    def _send(self, text: str) -> None:
        if len(text) > len(self.sent) and text.startswith(self.sent):
            self.emit(text[len(self.sent) :])
            self.sent = text


class Abandoned(StoppingCriteria):
    """Ends a generation whose pieces are no longer read.

    Args:
        abandoned: set when nobody reads the pieces any more.
    """

    def __init__(self, abandoned: threading.Event):
        self.abandoned = abandoned

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.abandoned.is_set(), device=input_ids.device)


@dataclass(frozen=True)
class _Ended:
    """The end of a generation: its result, or the error that ended it."""

    result: object = None
    error: BaseException | None = None


class AnswerStream:
    """An iterator over the pieces of an answer as they come, such as those of its text.

    Attributes:
        answer: what the call returns without `stream`, once the stream has been read to its end; None before.
    """

    def __init__(self, found: Iterator):
        self._found = found
        self.answer = None

    def __iter__(self) -> "AnswerStream":
        return self

    def __next__(self):
        piece = next(self._found)
        if not isinstance(piece, _Ended):
            return piece
        self.answer = piece.result
        # Nothing comes after the end.
        next(self._found, None)
        raise StopIteration

    def close(self) -> None:
        """Ends the generation; the conversation stays as it was unless the text has been read to its end."""
        self._found.close()

    @property
    def image_prompts(self) -> list[str]:
        """Those of the answer; empty before the end."""
        return [] if self.answer is None else self.answer.image_prompts

    @property
    def images(self) -> list:
        """Those of the answer; empty before the end."""
        return [] if self.answer is None else self.answer.images

    @property
    def no_image_reason(self) -> str | None:
        """That of the answer."""
        return "the stream has not been read to its end" if self.answer is None else self.answer.no_image_reason

    @property
    def image_error(self) -> Exception | None:
        """That of the answer."""
        return None if self.answer is None else self.answer.image_error


def pieces(run: Callable, keep: Callable, device: torch.device) -> AnswerStream:
    """What a generation that runs in its own thread gives piece by piece. Reading raises the errors of that thread.

    Args:
        run: the generation; called with `emit`, which takes pieces, such as those of a text, and `criterion`, which
            ends the generation when the pieces are no longer read.
        keep: called with the result of `run` when all pieces have been read; returns the answer of the stream.
        device: the device of the generation.
    """
    found: queue.SimpleQueue = queue.SimpleQueue()
    abandoned = threading.Event()
    # Settings of this thread are handed over: the choice of backend, autocast, and the stream on which the pictures
    # were seen.
    backend, kind = requested(), device.type
    autocast = torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    def work() -> None:
        try:
            with use_backend(backend), autocast, torch.cuda.stream(stream):
                found.put(_Ended(run(emit=found.put, criterion=Abandoned(abandoned))))
        except BaseException as error:  # Any error is handed over to the reader.
            found.put(_Ended(error=error))

    def read() -> Iterator:
        thread = threading.Thread(target=work, name="mg_fast-stream", daemon=True)
        thread.start()
        try:
            while not isinstance(piece := found.get(), _Ended):
                yield piece
            if piece.error is not None:
                raise piece.error
            yield _Ended(keep(piece.result))
        finally:
            abandoned.set()
            thread.join()

    return AnswerStream(read())
