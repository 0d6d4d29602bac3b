"""Makes training batches of scenes: pixels, the content of every cell, and conversations as token ids."""

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mg_fast import MiniGeminiProcessor
from mg_fast.models.templates import IMAGE_TAG, render
from mg_fast.ops.torch.dual_resize import square

from .scenes import BACKGROUNDS, CELL, COLOURS, DRAWN, KINDS, MAX_DIGITS, SIDE, THIRDS, WORDS, Print, Scene, draw_scene
from .talk import PLACES, SHORT, ask, bare, careless, conversation, text_only

# The distance in pixels between two positions of the high-resolution tower's finest map.
STRIDE = 4
IGNORED = -100
# The number of shapes, and of numbers, in a crowded scene.
CROWD = 6
# Numbers of shapes in scenes that are described. Long lists are the hardest.
DESCRIBED = (2, 3, 4, 4)
# The words of a short answer that depend on the scene, apart from digits.
CONTENT = {"colour": (*COLOURS, *BACKGROUNDS), "count": WORDS, "place": (*THIRDS[0], *THIRDS[1])}
CELL_KINDS = (None, *KINDS, "number")

Batch = dict[str, "torch.Tensor | Batch"]
# The ids of a conversation, the marks of its pictures, and 1 at every token that the model has to say.
Row = tuple[list[int], list[int], list[int]]


def pages(draw: Callable, seed: int, step: int, size: int) -> Batch:
    """Draws a batch of pages with `draw_lines` or `draw_numbers`.

    Returns:
        `pixels` uint8 [B, side, side, 3], and the labels for the towers that `label` returns.
    """
    drawn = [draw(seed, step * size + i) for i in range(size)]
    side = drawn[0][0].width // DRAWN
    labels = _stack([label(prints, [], None, side) for _, prints in drawn])
    return labels | {
        "pixels": torch.from_numpy(np.stack([np.asarray(square(image, side, True)) for image, _ in drawn]))
    }


def scenes(seed: int, step: int, size: int) -> Batch:
    """Draws a batch of scenes. Every second one is crowded, so that it shows more.

    Returns:
        `pixels` uint8 [B, 192, 192, 3], and the labels for the towers that `label` returns.
    """
    crowd = dict(shapes=CROWD, numbers=CROWD)
    return _of_scenes([draw_scene(seed, i, **(crowd if i % 2 else {})) for i in range(step * size, (step + 1) * size)])


def _of_scenes(drawn: Sequence[Scene]) -> Batch:
    return _stack(_labels(drawn)) | {
        "pixels": torch.from_numpy(np.stack([np.asarray(square(s.image, SIDE, True)) for s in drawn]))
    }


def _labels(drawn: Sequence[Scene]) -> list[dict[str, np.ndarray]]:
    return [label(s.prints, s.shapes, s.background, SIDE) for s in drawn]


def told(
    processor: MiniGeminiProcessor,
    seed: int,
    step: int,
    size: int,
    *,
    cells: int,
    turns: int,
    answers_only: bool,
    shown: bool = False,
    described: float = 0.0,
) -> Batch:
    """Makes conversations about scenes that are told in codes or shown.

    Args:
        cells: how many of the 36 cells are present where image tokens will stand later: all cells with a thing in them,
            and some without.
        turns: the number of turns of a conversation.
        answers_only: short answers follow one another as `bare` returns them. In an answer without a question, only the
            words that depend on the scene have to be said.
        shown: all cells are present, as a picture.
        described: the share of scenes that hold more shapes than others, half of them without a number, and that are
            described first, if there are only answers. Places and the number follow, which a description does not tell.

    Returns:
        The same as `conversations`, with `pixels` of scenes that are shown, and `cells` [n, cells], the numbers of the
        cells that are present.
    """
    content = {i for ids in content_ids(processor).values() for i in ids}
    rows, drawn, labels, standing = [], [], [], []
    for i in range(step * size, (step + 1) * size):
        rng = random.Random(f"told/{seed}/{i}")
        describes = answers_only and rng.random() < described
        # The model must also learn to leave the number out of a description.
        things = dict(shapes=rng.choice(DESCRIBED), numbers=rng.choice((0, 1))) if describes else {}
        scene = draw_scene(seed, i, **things)
        drawn.append(scene)
        (labelled,) = _labels([scene])
        full = labelled["kind"].flatten() > 0
        empty = rng.sample(np.flatnonzero(~full).tolist(), cells - int(full.sum()))
        standing.append(sorted([*np.flatnonzero(full).tolist(), *empty]))
        labels.append(labelled)
        if answers_only:
            said = conversation(scene, rng, turns, others=PLACES if describes else SHORT)
            description = []
            if describes:
                question, answer = ask(scene, "describe", rng)
                description = [(careless(question, rng), answer)]
            row = _answers(processor, [*description, *itertools.starmap(bare, said)], full.size, content)
        else:
            said = conversation(scene, rng, turns)
            row = encode(processor, [(f"{IMAGE_TAG}\n{said[0][0]}", said[0][1]), *said[1:]])
        first, dropped = row[1].index(1), full.size - cells
        rows.append(tuple(values[:first] + values[first + dropped :] for values in row))
    return _padded(rows) | (_of_scenes(drawn) if shown else _stack(labels)) | {"cells": torch.tensor(standing)}


def _answers(processor: MiniGeminiProcessor, said: Iterable[tuple[str, str]], cells: int, content: set[int]) -> Row:
    """Encodes answers that follow `cells` cells, each with its question or without one; see `encode`.

    In an answer without a question, only the tokens in `content` have to be said.
    """
    tokens = functools.partial(processor.tokenizer, add_special_tokens=False)
    words, wanted = [], []
    for question, answer in said:
        asked, given = (tokens(text).input_ids if text else [] for text in (question, answer))
        words += asked + given
        # With its question, an answer is determined to the last word.
        wanted += [0] * len(asked) + [int(bool(asked) or i in content) for i in given]
    ids = [processor.tokenizer.bos_token_id, *[0] * cells, *words]
    return ids, [0, *[1] * cells, *[0] * len(words)], [0, *[0] * cells, *wanted]


def content_ids(processor: MiniGeminiProcessor) -> dict[str, list[int]]:
    """The tokens that depend on the scene: `digit`, and the words of `CONTENT`."""
    tokenize = functools.partial(processor.tokenizer, add_special_tokens=False)
    words = {name: [i for word in words for i in tokenize(f" {word}").input_ids] for name, words in CONTENT.items()}
    return {"digit": processor.tokenizer.convert_tokens_to_ids(list("0123456789")), **words}


def conversations(processor: MiniGeminiProcessor, seed: int, step: int, size: int, *, turns: int = 6) -> Batch:
    """Makes conversations about scenes. One in sixteen has no picture.

    Returns:
        `ids`, `marks` (1 where a picture stands), `answers` (1 where a token of an answer or its end has to be said)
        and `mask`, all [B, L] and padded on the right; for the pictures, `pixels` uint8 [n, 192, 192, 3] and what
        `label` returns.
    """
    rows, pictures = [], []
    for i in range(step * size, (step + 1) * size):
        rng = random.Random(f"talk/{seed}/{i}")
        if i % 16:
            scene = draw_scene(seed, i)
            said = conversation(scene, rng, turns)
            said[0] = (f"{IMAGE_TAG}\n{said[0][0]}", said[0][1])
            pictures.append(scene)
        else:
            said = [(careless(question, rng), answer) for question, answer in (text_only(rng) for _ in range(3))]
        rows.append(encode(processor, said))
    return _padded(rows) | _of_scenes(pictures) if pictures else _padded(rows)


def _padded(rows: Sequence[Row]) -> Batch:
    longest = max(len(ids) for ids, _, _ in rows)
    out = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("ids", "marks", "answers", "mask")}
    for row, (ids, marks, answers) in enumerate(rows):
        for name, values in (("ids", ids), ("marks", marks), ("answers", answers), ("mask", [1] * len(ids))):
            out[name][row, : len(ids)] = torch.tensor(values)
    return out


def encode(processor: MiniGeminiProcessor, turns: Sequence[tuple[str, str]]) -> Row:
    """The ids of a conversation, the marks of its pictures, and 1 at every token of an answer, its end included."""
    ids, marks = processor.encode(render(processor.template, turns))
    to_id = processor.tokenizer.convert_tokens_to_ids
    opening = processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    answers, speaking = [0] * len(ids), False
    for i in range(len(ids)):
        answers[i] = int(speaking)
        if ids[i] == to_id("<|im_end|>"):
            speaking = False
        elif ids[i + 1 - len(opening) : i + 1] == opening:
            speaking = True
    return ids, marks, answers


def label(prints: Sequence[Print], shapes: Sequence, background: str | None, side: int) -> dict[str, np.ndarray]:
    """The labels that the towers are pretrained on, with n = side / 32 cells and m = side / 4 positions along a side.

    Returns:
        kind [n, n]: index into `CELL_KINDS` of the thing whose centre lies in the cell. colour [n, n]: the colours of
        shapes. digits [n, n, 4]: the digits of the single number there, 0 for none and otherwise 1 + digit.
        background []. character, rank [m, m]: 1 + digit, and 1 + the digit's place in its number. `IGNORED` stands
        where there is nothing to tell.
    """
    cells, fine = side // CELL, side // STRIDE
    kind = np.zeros((cells, cells), np.int64)
    colour = np.full((cells, cells), IGNORED)
    digits = np.full((cells, cells, MAX_DIGITS), IGNORED)
    character, rank = np.zeros((fine, fine), np.int64), np.zeros((fine, fine), np.int64)
    for shape in shapes:
        at = int(shape.y // CELL), int(shape.x // CELL)
        kind[at], colour[at] = CELL_KINDS.index(shape.kind), list(COLOURS).index(shape.colour)
    for sign in prints:
        numbers = sign.text.split()
        if len(numbers) == 1:
            at = int(sign.y // CELL), int(sign.x // CELL)
            kind[at] = CELL_KINDS.index("number")
            digits[at] = [1 + int(d) for d in sign.text] + [0] * (MAX_DIGITS - len(sign.text))
        spots = iter((int(y // STRIDE), int(x // STRIDE)) for x, y in sign.digits)
        for number in numbers:
            at = [next(spots) for _ in number]
            # If a number runs over the edge of the page, nobody can tell which digit is the first.
            whole = all(0 <= v < fine for spot in at for v in spot)
            for place, (digit, spot) in enumerate(zip(number, at)):
                if min(spot) >= 0 and max(spot) < fine:
                    character[spot], rank[spot] = 1 + int(digit), 1 + place if whole else IGNORED
    ground = np.array(IGNORED if background is None else list(BACKGROUNDS).index(background))
    return dict(kind=kind, colour=colour, digits=digits, background=ground, character=character, rank=rank)


def _stack(labels: Sequence[dict[str, np.ndarray]]) -> Batch:
    return {name: torch.from_numpy(np.stack([row[name] for row in labels])) for name in labels[0]}


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Moves a batch, and the batches inside it, to a device."""
    return {
        name: to_device(value, device) if isinstance(value, dict) else value.to(device) for name, value in batch.items()
    }


class Steps(Dataset):
    """A dataset of batches by the number of their step, so that a resumed run sees what an unbroken run would see."""

    def __init__(self, make, first: int, last: int):
        self.make, self.first, self.last = make, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int):
        return self.make(self.first + index)


def loader(make, first: int, last: int, workers: int = 1) -> DataLoader:
    """Batches for the steps from `first` up to `last`, drawn while training runs. `make` takes the number of a step."""
    return DataLoader(
        Steps(make, first, last), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
