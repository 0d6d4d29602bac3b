"""Makes training batches of scenes: pixels, the content of every cell, and conversations as token ids."""

import functools
import itertools
import os
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mg_fast import MiniGeminiProcessor
from mg_fast.models.templates import IMAGE_TAG, render
from mg_fast.ops.torch.dual_resize import square

from .pairs import about, conversation_about_two, questions_about_both
from .scenes import BACKGROUNDS, CELL, COLOURS, DRAWN, KINDS, MAX_DIGITS, SIDE, THIRDS, WORDS, Print, Scene, draw_scene
from .talk import MIXED, NAMED, PLACES, SHORT, ask, bare, careless, conversation, text_only
from .varied import draw_varied

# The distance in pixels between two positions of the high-resolution tower's finest map.
STRIDE = 4
IGNORED = -100
# The number of shapes, and of numbers, in a crowded scene.
CROWD = 6
# Numbers of shapes in scenes that are described. Long lists are the hardest.
DESCRIBED = (2, 3, 4, 4)
MANY = (0, 2, 3, 4, 5, 6, 6)
# The share of varied scenes in conversations.
VARIED = 0.5
# The largest number of tokens of bare answers in a row. Few rows would be longer, and all would be padded to them.
MOST_TOKENS = 150
CELLS = (SIDE // CELL) ** 2
# The words of a short answer that depend on the scene, apart from digits.
CONTENT = {"colour": (*COLOURS, *BACKGROUNDS), "count": (*WORDS, "another"), "place": (*THIRDS[0], *THIRDS[1])}
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
    """Draws a batch of scenes, half of them varied. Every second one is crowded, so that it shows more.

    Returns:
        `pixels` uint8 [B, 192, 192, 3], and the labels for the towers that `label` returns.
    """
    crowd = dict(shapes=CROWD, numbers=CROWD)
    drawn = []
    for i in range(step * size, (step + 1) * size):
        draw = draw_varied if i // 2 % 2 else draw_scene
        drawn.append(draw(seed, i, **(crowd if i % 2 else {})))
    return _of_scenes(drawn)


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
    pictures: tuple[float, float, float] = (0.0, 1.0, 0.0),
) -> Batch:
    """Makes conversations about scenes that are told in codes or shown. Half of the scenes are varied.

    Args:
        cells: how many of the 36 cells of a scene are present where image tokens will stand later: all cells with a
            thing in them, and some without.
        turns: the number of turns of a conversation.
        answers_only: short answers follow one another as `bare` returns them. In an answer without a question, only the
            words that depend on the scene have to be said.
        shown: all cells are present, as a picture.
        described: the share of single scenes that hold more shapes than others, half of them without a number, and that
            are described first, if there are only answers. Places and the number follow, which a description does not
            tell.
        pictures: the shares of conversations about no picture, one, and two.

    Returns:
        `ids`, `marks` (1 where a picture stands), `answers` (1 where a token of an answer or its end has to be said)
        and `mask`, all [B, L] and padded on the right; for the n scenes, in the order of their marks, `pixels` uint8
        [n, 192, 192, 3] if they are shown, what `label` returns, and `cells` [n, cells], the numbers of the cells that
        are present.
    """
    content = {i for ids in content_ids(processor).values() for i in ids}
    rows, drawn, standing = [], [], []
    for i in range(step * size, (step + 1) * size):
        rng = random.Random(f"told/{seed}/{i}")
        count = rng.choices(range(3), pictures)[0]
        describes = answers_only and count == 1 and rng.random() < described
        its = [_scene(rng, seed, 2 * i + k, describes) for k in range(count)]
        if answers_only:
            rows.append(_facts(processor, its, rng, turns, describes, cells, content))
        else:
            rows.append(_cut(encode(processor, _talk(its, rng, turns)), CELLS, cells))
        for scene in its:
            full = label(scene.prints, scene.shapes, scene.background, SIDE)["kind"].flatten() > 0
            empty = rng.sample(np.flatnonzero(~full).tolist(), cells - int(full.sum()))
            standing.append(sorted([*np.flatnonzero(full).tolist(), *empty]))
        drawn += its
    if not drawn:
        return _padded(rows)
    seen = _of_scenes(drawn) if shown else _stack(_labels(drawn))
    return _padded(rows) | seen | {"cells": torch.tensor(standing)}


def _scene(rng: random.Random, seed: int, index: int, describes: bool) -> Scene:
    """The scene of a conversation. One that is described has more shapes, and a number in half of the cases."""
    varied = rng.random() < VARIED
    # The model must also learn to leave the number out of a description.
    things = dict(shapes=rng.choice(MANY if varied else DESCRIBED), numbers=rng.choice((0, 1))) if describes else {}
    return (draw_varied if varied else draw_scene)(seed, index, **things)


def _talk(scenes: Sequence[Scene], rng: random.Random, turns: int) -> list[tuple[str, str]]:
    """A conversation about none, one or two scenes, with a tag for each picture."""
    if not scenes:
        return [(careless(question, rng), answer) for question, answer in (text_only(rng) for _ in range(4))]
    if len(scenes) == 2:
        return conversation_about_two(scenes, rng, turns - 1, (*MIXED, *NAMED))
    said = conversation(scenes[0], rng, turns, others=(*MIXED, *NAMED))
    return [(f"{IMAGE_TAG}\n{said[0][0]}", said[0][1]), *said[1:]]


def _facts(
    processor: MiniGeminiProcessor,
    scenes: Sequence[Scene],
    rng: random.Random,
    turns: int,
    describes: bool,
    cells: int,
    content: set[int],
) -> Row:
    """Bare answers about one scene or two, encoded after their cells."""
    if len(scenes) == 2:
        both = questions_about_both(scenes, rng, (*SHORT, *NAMED, "describe"), turns)
        said = []
        for which, turn in both:
            named = about(which, turn)
            asks = bare(*turn)[0] or " on a " in turn[1]
            said.append((careless(named[0], rng) if asks else "", named[1]))
        return _answers(processor, said, ["Image 1:", "Image 2:"], cells, content)
    (scene,) = scenes
    description = []
    if describes:
        question, answer = ask(scene, "describe", rng)
        description = [(careless(question, rng), answer)]
    said = conversation(scene, rng, turns, others=PLACES if describes else (*SHORT, *NAMED))
    return _answers(processor, [*description, *itertools.starmap(bare, said)], [""], cells, content)


def _answers(
    processor: MiniGeminiProcessor, said: Iterable[tuple[str, str]], names: Sequence[str], cells: int, content: set[int]
) -> Row:
    """Encodes answers, each with its question or without one, after pictures of `cells` cells; see `encode`.

    In an answer without a question, only the tokens in `content` have to be said. `names` are the texts that stand
    before the pictures. The first answer that goes beyond `MOST_TOKENS`,
    and those after it, are left out.
    """
    tokens = functools.partial(processor.tokenizer, add_special_tokens=False)
    ids, marks = [processor.tokenizer.bos_token_id], [0]
    for name in names:
        named = tokens(name).input_ids if name else []
        ids, marks = [*ids, *named, *[0] * cells], [*marks, *[0] * len(named), *[1] * cells]
    answers = [0] * len(ids)
    longest = len(ids) + MOST_TOKENS
    for question, answer in said:
        asked, given = (tokens(text).input_ids if text else [] for text in (question, answer))
        if len(ids) + len(asked) + len(given) > longest:
            break
        ids += asked + given
        # With its question, an answer is determined to the last word.
        answers += [0] * len(asked) + [int(bool(asked) or i in content) for i in given]
    return ids, [*marks, *[0] * (len(ids) - len(marks))], answers


def _cut(row: Row, whole: int, cells: int) -> Row:
    """The row with only the first `cells` marks of each picture, which has `whole` of them."""
    seen, kept = 0, []
    for at, mark in enumerate(row[1]):
        if not mark or seen % whole < cells:
            kept.append(at)
        seen += mark
    return tuple([values[at] for at in kept] for values in row)


def content_ids(processor: MiniGeminiProcessor) -> dict[str, list[int]]:
    """The tokens that depend on the scene: `digit`, and the words of `CONTENT`."""
    tokenize = functools.partial(processor.tokenizer, add_special_tokens=False)
    words = {name: [i for word in words for i in tokenize(f" {word}").input_ids] for name, words in CONTENT.items()}
    return {"digit": processor.tokenizer.convert_tokens_to_ids(list("0123456789")), **words}


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
        shapes. alike [n, n]: how many shapes of the same kind and colour stand before the one there, row by row. digits
        [n, n, 5]: the digits of the single number there, 0 for none and otherwise 1 + digit. background [].
        character, rank [m, m]: 1 + digit, and 1 + the digit's place in its number. `IGNORED` stands where there is
        nothing to tell.
    """
    cells, fine = side // CELL, side // STRIDE
    kind = np.zeros((cells, cells), np.int64)
    colour = np.full((cells, cells), IGNORED)
    digits = np.full((cells, cells, MAX_DIGITS), IGNORED)
    alike = np.zeros((cells, cells), np.int64)
    character, rank = np.zeros((fine, fine), np.int64), np.zeros((fine, fine), np.int64)
    for shape in shapes:
        at = int(shape.y // CELL), int(shape.x // CELL)
        kind[at], colour[at] = CELL_KINDS.index(shape.kind), list(COLOURS).index(shape.colour)
        alike[at] = sum(
            (other.kind, other.colour) == (shape.kind, shape.colour)
            and (int(other.y // CELL), int(other.x // CELL)) < at
            for other in shapes
        )
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
    return dict(kind=kind, colour=colour, alike=alike, digits=digits, background=ground, character=character, rank=rank)


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
        Steps(make, first, last),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_give_way,
    )


def _give_way(worker: int) -> None:
    """Lets the drawing of scenes wait for the training, whose threads would otherwise wait for each other."""
    os.nice(10)
    torch.set_num_threads(1)
