"""Measures exact answers about unseen scenes by type of question, which shows what the high-resolution branch is worth.

python -m recipes.nano.evaluate CHECKPOINT --without CHECKPOINT --out RESULT.json

Every scene is asked one question of every type that it allows, each as the first of a conversation. Numbers that no
training scene ever showed are also counted separately. After that come the questions of `varied_questions.py`. A model
that RESULT.json tells about already, with the same weights and the same questions, is not asked again.
"""

import argparse
import copy
import hashlib
import itertools
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast.testing.environment import environment

from .model import forget_mined
from .scenes import TYPES, Scene, draw_scene, held_out
from .talk import ask
from .varied_questions import VARIED_KINDS, varied_questions

KINDS = ("number", "number, never seen", "no number", *TYPES[1:])
# The number of scenes in memory together, of questions answered together, and of tokens in an answer.
CHUNK = 50
BATCH = 64
MOST = 64
# The models that are compared: the same weights with the mined features and without them, and other weights.
COLUMNS = ("with mining", "mined features zero", "trained without")


class UnseenQuestion(NamedTuple):
    """A question about an unseen scene, the first of a conversation.

    Attributes:
        number: the number of the scene.
        scene: the scene, with its picture.
        kinds: what the answer counts for, of `KINDS`.
        text: the question.
        answer: the one right answer.
    """

    number: int
    scene: Scene
    kinds: list[str]
    text: str
    answer: str


def unseen_questions(seed: int, first: int, last: int) -> Iterator[UnseenQuestion]:
    """The questions about the unseen scenes `first` to `last - 1` of a seed: one of every type that a scene allows."""
    for i in range(first, last):
        scene = draw_scene(seed, i, split="unseen")
        for kind in TYPES:
            turn = ask(scene, kind, random.Random(f"{kind}/{seed}/{i}"))
            if turn is not None:
                yield UnseenQuestion(i, scene, _kinds(kind, scene), *turn)


class Asked(NamedTuple):
    """A question as it is put to a pipeline.

    Attributes:
        number: the number by which it is found again.
        kinds: what the answer counts for.
        turns: the turns of its conversation, each a text and its pictures. The last one is answered with `answer`.
        answer: the one right answer.
    """

    number: int
    kinds: Sequence[str]
    turns: list[tuple[str, list[Image.Image]]]
    answer: str


def evaluate(
    pipelines: dict[str, mg_fast.Pipeline], *, seed: int, count: int
) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Measures the share of exact answers about ordinary scenes.

    Args:
        pipelines: the pipelines to compare, by name.
        seed, count: the seed and the number of the unseen scenes.

    Returns:
        The shares by pipeline and type, `number, never seen` included, with `asked` for the number of questions of each
        type; and every wrong answer.
    """
    questions = unseen_questions(seed, 0, count)
    return measure(
        pipelines, (Asked(q.number, q.kinds, [(q.text, [q.scene.image])], q.answer) for q in questions), KINDS
    )


def evaluate_varied(
    pipelines: dict[str, mg_fast.Pipeline], *, seed: int, count: int
) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Measures the share of exact answers to `count` questions of each of `VARIED_KINDS`, as `evaluate` does."""
    questions = varied_questions(seed, 0, count)
    return measure(pipelines, (Asked(q.number, [q.kind], q.turns, q.answer) for q in questions), VARIED_KINDS)


def measure(
    pipelines: dict[str, mg_fast.Pipeline], questions: Iterator[Asked], kinds: Iterable[str], *, batch: int = BATCH
) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Asks every pipeline every question; see `evaluate`."""
    right = {name: defaultdict(int) for name in pipelines}
    asked: dict[str, int] = defaultdict(int)
    wrong = []
    while chunk := list(itertools.islice(questions, CHUNK)):
        for question in chunk:
            for kind in question.kinds:
                asked[kind] += 1
        for name, pipeline in pipelines.items():
            for question, said in zip(chunk, _answers(pipeline, chunk, batch)):
                if said == question.answer:
                    for kind in question.kinds:
                        right[name][kind] += 1
                else:
                    texts = " | ".join(text for text, _ in question.turns)
                    told = {"kind": question.kinds[0], "asked": texts, "said": said, "right": question.answer}
                    wrong.append({"model": name, "scene": question.number, **told})
    there = [kind for kind in kinds if kind in asked]
    shares = {name: {kind: round(counts[kind] / asked[kind], 4) for kind in there} for name, counts in right.items()}
    return {**shares, "asked": {kind: asked[kind] for kind in there}}, wrong


def _answers(pipeline: mg_fast.Pipeline, questions: Sequence[Asked], batch: int) -> list[str]:
    """The answers to the last turns. Conversations of one turn are answered in batches."""
    single = [question.turns[0] for question in questions if len(question.turns) == 1]
    answers = iter(pipeline.chat_batch(single, max_new_tokens=MOST, batch_size=batch, progress=False) if single else [])
    said = []
    for question in questions:
        if len(question.turns) == 1:
            answer = next(answers)
            if answer.error is not None:
                raise answer.error
        else:
            conversation = pipeline.conversation()
            for text, images in question.turns:
                answer = conversation.chat(text, images, max_new_tokens=MOST)
        said.append(answer.text)
    return said


def answer_seconds(pipeline: mg_fast.Pipeline, seed: int, count: int = 5) -> list[float]:
    """Seconds from a new picture to the whole answer, beginning with the very first answer."""
    seconds = []
    for i in range(count):
        image = draw_scene(seed, i, split="unseen").image
        began = time.perf_counter()
        pipeline.conversation().chat("What does the sign say?", [image], max_new_tokens=MOST)
        seconds.append(time.perf_counter() - began)
    return seconds


def accuracy_table(recorded: dict, *others: dict, part: str = "exact") -> str:
    """The Markdown table of a recorded result, with a model trained without mining, and of results of other seeds.

    Args:
        recorded: a result of this command.
        others: results of trainings with mining and other seeds.
        part: `exact` for ordinary scenes, `varied` for the questions of `varied_questions.py`.
    """
    columns = {name: recorded[part][name] for name in COLUMNS}
    for other in others:
        seed = other["conditions"]["training"]["with mining"]["seed"]
        columns[f"with mining, training seed {seed}"] = other[part]["with mining"]
    rows = [f"| {' | '.join(['question', *columns, 'asked'])} |", f"|{'---|' * (len(columns) + 2)}"]
    for kind, asked in recorded[part]["asked"].items():
        rows.append(f"| {' | '.join([kind, *(f'{shares[kind]:.1%}' for shares in columns.values()), str(asked)])} |")
    return "\n".join(rows) + "\n"


def digest(folder: Path) -> str:
    """The first digits of the SHA-256 of a checkpoint's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def _training(folder: Path) -> dict | None:
    """What `recipes.nano.train` recorded of the checkpoint, or None for a checkpoint from elsewhere."""
    file = folder / "training.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _kinds(kind: str, scene: Scene) -> list[str]:
    if kind != "number":
        return [kind]
    if scene.print is None:
        return ["no number"]
    return ["number", "number, never seen"] if held_out(scene.print.text) else ["number"]


def _known(out: Path | None, asked: dict, weights: dict[str, str]) -> dict | None:
    """The result that a file holds already, if it is about the same questions and the same weights, or some of them."""
    if out is None or not out.is_file():
        return None
    result = json.loads(out.read_text())
    conditions = result.get("conditions", {})
    theirs = conditions.get("sha256 of weights")
    # One of them may tell about a model more than the other.
    same = isinstance(theirs, dict) and all(theirs.get(name, its) == its for name, its in weights.items())
    return result if same and asked.items() <= conditions.items() else None


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.nano.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint trained with the high-resolution branch")
    parser.add_argument("--without", type=Path, help="a checkpoint trained without the high-resolution branch")
    parser.add_argument("--seed", type=int, default=7100, help="seed of the unseen scenes (default: 7100)")
    parser.add_argument("--count", type=int, default=500, help="number of scenes (default: 500)")
    parser.add_argument(
        "--varied", type=int, default=200, help="number of further questions of each kind (default: 200; 0 for none)"
    )
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"expected at least one scene, got --count {args.count}")
    if args.varied < 0:
        parser.error(f"expected a number of questions, got --varied {args.varied}")
    folders = {"with mining": args.checkpoint} | ({} if args.without is None else {"trained without": args.without})
    for folder in folders.values():
        if not (folder / "tokenizer.model").is_file():
            parser.error(f"expected a folder that recipes.nano.train wrote, with a tokenizer.model in it; got {folder}")
    if len({(folder / "tokenizer.model").read_bytes() for folder in folders.values()}) > 1:
        parser.error("the two checkpoints have different tokenizers")
    training = {name: _training(folder) for name, folder in folders.items()}
    for name, hr in (("with mining", True), ("trained without", False)):
        if training.get(name) and training[name]["hr"] != hr:
            parser.error(f"{folders[name]} was trained {'without' if hr else 'with'} the high-resolution branch")
    transformers_logging.set_verbosity_error()
    asked = {
        "scenes": args.count,
        "varied questions of each kind": args.varied,
        "seed": args.seed,
        "split": "unseen",
        "decoding": "greedy, float32",
    }
    weights = {name: digest(folder) for name, folder in folders.items()}
    known = _known(args.out, asked, weights)
    if known is not None and set(weights) <= set(known["conditions"]["sha256 of weights"]):
        parser.exit(0, f"{args.out} holds the answers of these models to these questions already\n")
    began = time.perf_counter()
    pipelines, speed = {}, known["speed"] if known else None
    if known is None:
        pipeline = mg_fast.load(args.checkpoint, dtype="float32")
        blind = copy.deepcopy(pipeline.model)
        forget_mined(blind)
        pipelines = {"with mining": pipeline, "mined features zero": mg_fast.Pipeline(blind, pipeline.processor)}
        answer_s = [round(seconds, 3) for seconds in answer_seconds(pipeline, args.seed)]
        speed = {"load_s": round(pipeline.load_seconds, 2), "answer_s": answer_s}
    if args.without is not None:
        pipelines["trained without"] = mg_fast.load(args.without, dtype="float32")
    parts = {"exact": evaluate(pipelines, seed=args.seed, count=args.count)}
    if args.varied:
        parts["varied"] = evaluate_varied(pipelines, seed=args.seed, count=args.varied)
    if known is not None and any(known[part]["asked"] != its["asked"] for part, (its, _) in parts.items()):
        parser.error(f"{args.out} holds answers to other questions of the same seed: give another file")
    shares = {part: (known[part] if known else {}) | its for part, (its, _) in parts.items()}
    columns = [name for name in COLUMNS if name in shares["exact"]]
    print(f"{'':24}" + "".join(f"{name:>22}" for name in (*columns, "asked")))
    for its in shares.values():
        for kind, count in its["asked"].items():
            print(f"{kind:24}" + "".join(f"{its[name][kind]:22.1%}" for name in columns) + f"{count:22}")
    result = {
        **shares,
        "conditions": {
            **asked,
            "seconds": round(time.perf_counter() - began + (known["conditions"]["seconds"] if known else 0.0), 1),
            # The speed is that of the machine that was there first.
            "machine": known["conditions"]["machine"] if known else environment(),
            "sha256 of weights": weights,
            "training": training,
        },
        "speed": speed,
        "wrong, first 40": known["wrong, first 40"]
        if known
        else {part: [row for row in wrong if row["model"] == "with mining"][:40] for part, (_, wrong) in parts.items()},
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
