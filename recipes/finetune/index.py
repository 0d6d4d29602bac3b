"""Finds the samples of a large file without keeping them: where each begins, how long it is, and what is wrong with it.

The file is read once, in pieces, and each sample again when it is trained on. 1.5 million samples take 50 MB.
"""

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .config import ConfigError
from .samples import BadSample, words_of

# Bytes that are read at once, and the most characters that one sample may have.
_PIECE = 2**22
_LONGEST = 2**26
_BLANK = " \t\r\n"
# A text, which may lack its end, or one bracket.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
# Python refuses to read a whole number of more than 4300 digits.
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 4300 else float(digits))
TOO_DEEP = "lists or objects are nested too deeply"


class SampleIndex(NamedTuple):
    """The samples of a file.

    Attributes:
        offsets, sizes: where each begins, and its length, in bytes.
        words: see `words_of`; 0 for a sample that cannot be used.
        faults: by index the reason why a sample cannot be used.
        pictures: a hash for every picture of every sample, the same for the same path. Other processes hash otherwise.
    """

    offsets: array
    sizes: array
    words: array
    faults: dict[int, str]
    pictures: array


def empty_index() -> SampleIndex:
    """The index of a source whose samples are yet to be added."""
    return SampleIndex(array("q"), array("q"), array("q"), {}, array("q"))


def index_file(path: Path, check: Callable[[Any], Iterable[str]]) -> SampleIndex:
    """Reads a .json file that holds one list, or a .jsonl file with a sample on each line.

    Args:
        check: gives the paths of a sample's pictures, and raises BadSample for a sample that cannot be used.

    Raises:
        ConfigError: the file is missing, holds no list, or is broken between or within samples; the message says where.
    """
    found = empty_index()
    try:
        with open(path, "rb") as file:
            for offset, size, sample in (_lines if path.suffix == ".jsonl" else _items)(file, path):
                index = len(found.offsets)
                words = 0
                try:
                    if isinstance(sample, BadSample):
                        raise sample
                    pictures = [hash(picture) for picture in check(sample)]
                    words = words_of(sample)
                    found.pictures.extend(pictures)
                except BadSample as fault:
                    found.faults[index] = str(fault)
                found.offsets.append(offset)
                found.sizes.append(size)
                found.words.append(words)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    return found


def read_item(file: int, offset: int, size: int) -> Any:
    """The sample at a place of an open file, given by its descriptor. Processes may share the file.

    Raises:
        BadSample: there is no JSON any more, so the file was changed after it was indexed.
    """
    try:
        return _DECODER.decode(os.pread(file, size, offset).decode())
    except (ValueError, RecursionError):
        raise BadSample(f"the file was changed during the run: no sample is left at byte {offset:,}") from None


def _lines(file, path: Path) -> Iterator[tuple[int, int, Any]]:
    """The lines of a file that are not blank; for one that is no JSON, a BadSample in the place of its sample."""
    offset = 0
    for line in file:
        if line.strip():
            try:
                sample = _DECODER.decode(line.decode("utf-8-sig"))
            except ValueError as error:
                sample = BadSample(f"the line is no JSON: {error}")
            except RecursionError:
                sample = BadSample(TOO_DEEP)
            yield offset, len(line), sample
        offset += len(line)


def _items(file, path: Path) -> Iterator[tuple[int, int, Any]]:
    """The items of the list that a file holds."""
    text = _Text(file, path)
    text.skip(_BLANK + "\ufeff")
    if text.next() != "[":
        raise ConfigError(f"{path}: expected a list of samples, which begins with [, got {text.next()!r}")
    text.take(1)
    number = 0
    while True:
        text.skip(_BLANK)
        if number and text.next() == ",":
            text.take(1)
            text.skip(_BLANK)
        elif number and text.next() != "]":
            raise text.broken(number, f"expected , or ] after sample {number - 1}")
        if text.next() == "]":
            text.take(1)
            text.skip(_BLANK)
            if text.next():
                raise text.broken(number, "expected nothing after the list's ]")
            return
        yield text.value(number)
        number += 1


class _Text:
    """The text of a file, of which only the part ahead is kept."""

    def __init__(self, file, path: Path):
        self._file, self._path = file, path
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._scan = _DECODER.raw_decode
        # The text that was read, the place in it, the place of that in the file, and whether everything was read.
        self._text, self._at, self._offset, self._ended = "", 0, 0, False

    def next(self) -> str:
        """The next character; an empty text at the end."""
        while self._at == len(self._text) and not self._ended:
            self._more()
        return self._text[self._at : self._at + 1]

    def skip(self, characters: str) -> None:
        while (character := self.next()) and character in characters:
            self.take(1)

    def take(self, count: int) -> int:
        """Goes on by so many characters; returns their bytes."""
        size = len(self._text[self._at : self._at + count].encode())
        self._at, self._offset = self._at + count, self._offset + size
        return size

    def value(self, number: int) -> tuple[int, int, Any]:
        """Goes on by one value: where it began, its bytes, and the value, or a BadSample for one nested too deeply."""
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except RecursionError:
                value, end = BadSample(TOO_DEEP), self._end()
                if end is None:
                    if self._ended or len(self._text) - self._at > _LONGEST:
                        raise self.broken(number, TOO_DEEP) from None
                    self._more()
                    continue
            except ValueError as error:
                if self._ended or len(self._text) - self._at > _LONGEST:
                    raise self.broken(number, f"sample {number} is no JSON: {error}") from None
                self._more()
                continue
            if end == len(self._text) and not self._ended:
                # A number could go on.
                self._more()
                continue
            offset = self._offset
            return offset, self.take(end - self._at), value

    def _end(self) -> int | None:
        """Where the list or object ends that begins here, by its brackets alone; None where more must be read."""
        depth = 0
        for token in _TOKEN.finditer(self._text, self._at):
            if not token[0].startswith('"'):
                depth += 1 if token[0] in "[{" else -1
                if depth == 0:
                    return token.end()
        return None

    def broken(self, number: int, reason: str) -> ConfigError:
        where = f"at byte {self._offset:,}, before sample {number}"
        return ConfigError(f"{self._path} is broken {where}: {reason}. What follows cannot be told apart into samples")

    def _more(self) -> None:
        piece = self._file.read(_PIECE)
        self._ended = not piece
        try:
            self._text, self._at = self._text[self._at :] + self._decode(piece, final=self._ended), 0
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._path} is not in UTF-8, near byte {self._offset:,}: {error.reason}") from None
