"""Scenes as training batches: pixels, what lies in every cell, and conversations as token ids."""

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

# the high-resolution tower's finest map has a position every so many pixels
STRIDE = 4
IGNORED = -100
# shapes and numbers of a crowded scene
CROWD = 6
# shapes of scenes that are described: long lists are the hardest
DESCRIBED = (2, 3, 4, 4)
# what of a short answer depends on the scene, besides digits
CONTENT = {"colour": (*COLOURS, *BACKGROUNDS), "count": WORDS, "place": (*THIRDS[0], *THIRDS[1])}
CELL_KINDS = (None, *KINDS, "number")

Batch = dict[str, "torch.Tensor | Batch"]
# ids of a conversation, marks of its pictures, and 1 at every token that is to be said
Row = tuple[list[int], list[int], list[int]]


def pages(draw: Callable, seed: int, step: int, size: int) -> Batch:
    """Pages drawn by `draw_lines` or `draw_numbers`: `pixels` uint8 [B, side, side, 3] and the towers' labels of
    `label`.
    """
    drawn = [draw(seed, step * size + i) for i in range(size)]
    side = drawn[0][0].width // DRAWN
    labels = _stack([label(prints, [], None, side) for _, prints in drawn])
    return labels | {
        "pixels": torch.from_numpy(np.stack([np.asarray(square(image, side, True)) for image, _ in drawn]))
    }


def scenes(seed: int, step: int, size: int) -> Batch:
    """Scenes: `pixels` uint8 [B, 192, 192, 3] and the towers' labels of `label`. Every second one is crowded, to show
    more.
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
    """Conversations about scenes that are told in codes, or shown.

    Args:
        cells: so many of the 36 stand where image tokens will stand: those with a thing in them, and some without.
        turns: of a conversation.
        answers_only: short answers follow one another as `bare` leaves them. Of those without a question only the words
            that depend on the scene are to be said.
        shown: all cells stand, as a picture.
        described: the share of the scenes that hold more shapes than others, half of them no number, and are described
            first, where there are answers only. Then follow places and the number, which a description does not tell.

    Returns:
        As `conversations`, with `pixels` of scenes that are shown, and `cells` [n, cells]: the numbers of those that
        stand.
    """
    content = {i for ids in content_ids(processor).values() for i in ids}
    rows, drawn, labels, standing = [], [], [], []
    for i in range(step * size, (step + 1) * size):
        rng = random.Random(f"told/{seed}/{i}")
        describes = answers_only and rng.random() < described
        # a description must learn to leave the number out, too
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
    """As `encode`, of answers that follow so many cells, each after its question or none; without one only `content` is
    to be said.
    """
    tokens = functools.partial(processor.tokenizer, add_special_tokens=False)
    words, wanted = [], []
    for question, answer in said:
        asked, given = (tokens(text).input_ids if text else [] for text in (question, answer))
        words += asked + given
        # with its question an answer is settled to the last word
        wanted += [0] * len(asked) + [int(bool(asked) or i in content) for i in given]
    ids = [processor.tokenizer.bos_token_id, *[0] * cells, *words]
    return ids, [0, *[1] * cells, *[0] * len(words)], [0, *[0] * cells, *wanted]


def content_ids(processor: MiniGeminiProcessor) -> dict[str, list[int]]:
    """Tokens of what depends on the scene: `digit`, and the words of `CONTENT`."""
    tokenize = functools.partial(processor.tokenizer, add_special_tokens=False)
    words = {name: [i for word in words for i in tokenize(f" {word}").input_ids] for name, words in CONTENT.items()}
    return {"digit": processor.tokenizer.convert_tokens_to_ids(list("0123456789")), **words}


def conversations(processor: MiniGeminiProcessor, seed: int, step: int, size: int, *, turns: int = 6) -> Batch:
    """Conversations about scenes, one in sixteen without a picture.

    Returns:
        `ids`, `marks` (1 where a picture stands), `answers` (1 where a token of an answer or its end is to be said),
        `mask` [B, L], padded on the right; of the pictures `pixels` uint8 [n, 192, 192, 3] and what `label` returns.
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
    """Ids of a conversation, marks of its pictures, and 1 at every token of an answer, its end included."""
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
    """What towers are pretrained to tell, with n = side / 32 cells and m = side / 4 positions along a side.

    Returns:
        kind [n, n]: index into `CELL_KINDS` of the thing whose centre lies there. colour [n, n] of shapes. digits [n,
        n, 4]: of the number that stands alone, 0 for none, else 1 + digit. background []. character, rank [m, m]: 1 +
        digit, and 1 + its place in its number. `IGNORED` where there is nothing to tell.
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
            # of a number that runs over a page's edge nobody can tell which digit is the first
            whole = all(0 <= v < fine for spot in at for v in spot)
            for place, (digit, spot) in enumerate(zip(number, at)):
                if min(spot) >= 0 and max(spot) < fine:
                    character[spot], rank[spot] = 1 + int(digit), 1 + place if whole else IGNORED
    ground = np.array(IGNORED if background is None else list(BACKGROUNDS).index(background))
    return dict(kind=kind, colour=colour, digits=digits, background=ground, character=character, rank=rank)


def _stack(labels: Sequence[dict[str, np.ndarray]]) -> Batch:
    return {name: torch.from_numpy(np.stack([row[name] for row in labels])) for name in labels[0]}


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch, and one that goes along with it, on a device."""
    return {
        name: to_device(value, device) if isinstance(value, dict) else value.to(device) for name, value in batch.items()
    }


class Steps(Dataset):
    """Batches by the number of their step, so that a resumed run sees what the first would have seen."""

    def __init__(self, make, first: int, last: int):
        self.make, self.first, self.last = make, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int):
        return self.make(self.first + index)


def loader(make, first: int, last: int, workers: int = 1) -> DataLoader:
    """Batches of the steps from `first` up to `last`, drawn beside the training. `make` takes a step's number."""
    return DataLoader(
        Steps(make, first, last), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
