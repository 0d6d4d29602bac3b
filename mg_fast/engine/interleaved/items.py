"""Texts and pictures in any order, as callers give them, and the one text that they make."""

import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ...errors import PromptError, quoted
from ...models.mm_interleaved.prompts import join_items
from ...models.templates import IMAGE_TAG
from ...runtime.arguments import check_text

logger = logging.getLogger(__name__)

# What `open_picture` takes, apart from a str, which is a text here, and apart from open files.
_PICTURES = (Image.Image, os.PathLike, bytes, bytearray, memoryview, np.ndarray, torch.Tensor)
_EXPECTED = "a text (str), or a picture (a Pillow image, a pathlib.Path, bytes, or a uint8 array or tensor)"


class Items(NamedTuple):
    """A row of texts and pictures.

    Attributes:
        text: the texts, joined by one blank, with an `<image>` in the place of every picture.
        pictures: the pictures in their order, as they came.
    """

    text: str
    pictures: list

    @property
    def empty(self) -> bool:
        return not self.text

    def before_picture(self) -> "Items":
        """The items as they stand before a picture: blanks beside a picture vanish, as in the original."""
        return self._replace(text=self.text.rstrip())


def read_items(items, images: Sequence | None = None) -> Items:
    """Reads texts and pictures in any order.

    Args:
        items: a list of texts and pictures. A str in it is a text, so a picture's file is given as a `pathlib.Path`. Or
            one text, in which `<image>` may mark the places of `images`; without such marks the pictures come first. Or
            one picture.
        images: the pictures of a text, as a list or alone; only with a text.

    A text that is the name of a file gives a warning, because a picture may have been meant.

    Raises:
        PromptError: an item is neither, a text is empty or holds marks for other pictures than came.
    """
    if isinstance(items, str):
        return _of_text(items, images)
    if images is not None:
        raise PromptError(
            f"images are for one text with {IMAGE_TAG} marks: a list of items holds its pictures itself, got both"
        )
    if isinstance(items, _PICTURES) or hasattr(items, "read"):
        items = [items]
    if not isinstance(items, (list, tuple)):
        raise PromptError(f"expected a list of texts and pictures, got {quoted(items)}: an item is {_EXPECTED}")
    for number, item in enumerate(items, 1):
        if isinstance(item, str):
            _check(item, f"item {number} of {len(items)}")
            if _names_a_file(item):
                logger.warning(
                    "item %d of %d, %s, is read as a text, and there is a file of this name: a picture's file is given "
                    "as a pathlib.Path",
                    number,
                    len(items),
                    quoted(item),
                )
        elif not (isinstance(item, _PICTURES) or hasattr(item, "read")):
            raise PromptError(f"item {number} of {len(items)}: expected {_EXPECTED}, got {quoted(item)}")
    return Items(*join_items(items)) if items else Items("", [])


def _of_text(text: str, images) -> Items:
    _check(text, "the text")
    if not isinstance(images, (list, tuple)):
        images = [] if images is None else [images]
    pictures = list(images)
    marks = text.count(IMAGE_TAG)
    if marks not in (0, len(pictures)) or (marks and not pictures):
        raise PromptError(
            f"the text has {marks} place(s) for pictures ({IMAGE_TAG}), but {len(pictures)} picture(s) came"
        )
    return Items(text if marks else " ".join([IMAGE_TAG] * len(pictures) + [text]), pictures)


def _names_a_file(text: str) -> bool:
    try:
        return os.path.isfile(text)
    except ValueError:
        return False


def _check(text: str, what: str) -> None:
    check_text(text, what)
    if not text.strip():
        raise PromptError(f"{what}: expected words, got {quoted(text)}")
