"""Measures exact answers about unseen scenes by type of question, which shows what the high-resolution branch is worth.

python -m recipes.nano.evaluate CHECKPOINT --without CHECKPOINT --out RESULT.json

Every scene is asked one question of every type that it allows, each as the first of a conversation. Numbers that no
training scene ever showed are also counted separately.
"""

import argparse
import copy
import hashlib
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast.testing.environment import environment

from .model import forget_mined
from .scenes import TYPES, Scene, draw_scene, held_out
from .talk import ask

KINDS = ("number", "number, never seen", "no number", *TYPES[1:])
# The number of scenes in memory together, of questions answered together, and of tokens in an answer.
CHUNK = 50
BATCH = 64
MOST = 64


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


def evaluate(
    pipelines: dict[str, mg_fast.Pipeline], *, seed: int, count: int
) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Measures the share of exact answers.

    Args:
        pipelines: the pipelines to compare, by name.
        seed, count: the seed and the number of the unseen scenes.

    Returns:
        The shares by pipeline and type, `number, never seen` included, with `asked` for the number of questions of each
        type; and every wrong answer.
    """
    right = {name: defaultdict(int) for name in pipelines}
    asked: dict[str, int] = defaultdict(int)
    wrong = []
    for first in range(0, count, CHUNK):
        questions = list(unseen_questions(seed, first, min(first + CHUNK, count)))
        for question in questions:
            for kind in question.kinds:
                asked[kind] += 1
        for name, pipeline in pipelines.items():
            turns = [(question.text, [question.scene.image]) for question in questions]
            answers = pipeline.chat_batch(turns, max_new_tokens=MOST, batch_size=BATCH, progress=False)
            for question, answer in zip(questions, answers):
                if answer.error is not None:
                    raise answer.error
                if answer.text == question.answer:
                    for kind in question.kinds:
                        right[name][kind] += 1
                else:
                    said = {"asked": question.text, "said": answer.text, "right": question.answer}
                    wrong.append({"model": name, "scene": question.number, **said})
    kinds = [kind for kind in KINDS if kind in asked]
    shares = {name: {kind: round(counts[kind] / asked[kind], 4) for kind in kinds} for name, counts in right.items()}
    return {**shares, "asked": {kind: asked[kind] for kind in kinds}}, wrong


def answer_seconds(pipeline: mg_fast.Pipeline, seed: int, count: int = 5) -> list[float]:
    """Seconds from a new picture to the whole answer, beginning with the very first answer."""
    seconds = []
    for i in range(count):
        image = draw_scene(seed, i, split="unseen").image
        began = time.perf_counter()
        pipeline.conversation().chat("What does the sign say?", [image], max_new_tokens=MOST)
        seconds.append(time.perf_counter() - began)
    return seconds


def accuracy_table(recorded: dict, *others: dict) -> str:
    """The Markdown table of a recorded result, with a model trained without mining, and of results of other seeds.

    The other seeds are those of trainings with mining.
    """
    columns = {name: recorded["exact"][name] for name in ("with mining", "mined features zero", "trained without")}
    for other in others:
        seed = other["conditions"]["training"]["with mining"]["seed"]
        columns[f"with mining, training seed {seed}"] = other["exact"]["with mining"]
    rows = [f"| {' | '.join(['question', *columns, 'asked'])} |", f"|{'---|' * (len(columns) + 2)}"]
    for kind, asked in recorded["exact"]["asked"].items():
        rows.append(f"| {' | '.join([kind, *(f'{shares[kind]:.1%}' for shares in columns.values()), str(asked)])} |")
    return "\n".join(rows) + "\n"


def _digest(folder: Path) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.nano.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint trained with the high-resolution branch")
    parser.add_argument("--without", type=Path, help="a checkpoint trained without the high-resolution branch")
    parser.add_argument("--seed", type=int, default=7000, help="seed of the unseen scenes (default: 7000)")
    parser.add_argument("--count", type=int, default=500, help="number of scenes (default: 500)")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"expected at least one scene, got --count {args.count}")
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
    began = time.perf_counter()
    pipeline = mg_fast.load(args.checkpoint, dtype="float32")
    blind = copy.deepcopy(pipeline.model)
    forget_mined(blind)
    pipelines = {"with mining": pipeline, "mined features zero": mg_fast.Pipeline(blind, pipeline.processor)}
    if args.without is not None:
        pipelines["trained without"] = mg_fast.load(args.without, dtype="float32")
    seconds = answer_seconds(pipeline, args.seed)
    shares, wrong = evaluate(pipelines, seed=args.seed, count=args.count)
    kinds = list(shares["asked"])
    print(f"{'':22}" + "".join(f"{name:>22}" for name in (*pipelines, "asked")))
    for kind in kinds:
        print(
            f"{kind:22}" + "".join(f"{shares[name][kind]:22.1%}" for name in pipelines) + f"{shares['asked'][kind]:22}"
        )
    result = {
        "exact": shares,
        "conditions": {
            "scenes": args.count,
            "seed": args.seed,
            "split": "unseen",
            "decoding": "greedy, float32",
            "seconds": round(time.perf_counter() - began, 1),
            "machine": environment(),
            "sha256 of weights": {name: _digest(folder) for name, folder in folders.items()},
            "training": training,
        },
        "speed": {"load_s": round(pipeline.load_seconds, 2), "answer_s": [round(s, 3) for s in seconds]},
        "wrong, first 40": [row for row in wrong if row["model"] == "with mining"][:40],
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
