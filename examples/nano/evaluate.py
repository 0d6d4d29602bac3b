"""Exact answers about unseen scenes, by type of question: what the high-resolution branch is worth.

python -m examples.nano.evaluate CHECKPOINT --without CHECKPOINT --out RESULT.json

Every scene is asked one question of every type that it allows, each as the first of a conversation. Numbers are counted once more among
those that no training scene ever showed.
"""

import argparse
import copy
import hashlib
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

import mg_fast
from bench.records import environment
from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.conversation import render, with_picture_tags

from .model import forget_mined
from .scenes import TYPES, Scene, draw_scene, held_out
from .talk import ask

CHUNK = 50


def evaluate(
    models: dict[str, MiniGeminiForConditionalGeneration], processor: MiniGeminiProcessor, *, seed: int, count: int
) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Share of exact answers.

    Args:
        models: by the name of what is compared.
        seed, count: of the unseen scenes.

    Returns:
        Per model and type, with `number, never seen`, `asked` for how many there were of each; and every wrong answer.
    """
    right = {name: defaultdict(int) for name in models}
    asked: dict[str, int] = defaultdict(int)
    wrong = []
    for first in range(0, count, CHUNK):
        scenes = [draw_scene(seed, i, split="unseen") for i in range(first, min(first + CHUNK, count))]
        pixels = processor.image_processor([scene.image for scene in scenes])
        seen = {name: model.get_image_features(**pixels).pooler_output for name, model in models.items()}
        for kind in TYPES:
            turns = [ask(scene, kind, random.Random(f"{kind}/{seed}/{first + i}")) for i, scene in enumerate(scenes)]
            rows = [i for i, turn in enumerate(turns) if turn is not None]
            if not rows:
                continue
            kinds = [_kinds(kind, scenes[i]) for i in rows]
            for names in kinds:
                for name in names:
                    asked[name] += 1
            for model_name, model in models.items():
                answers = answer(model, processor, [turns[i][0] for i in rows], seen[model_name][rows])
                for i, names, said in zip(rows, kinds, answers):
                    if said == turns[i][1]:
                        for name in names:
                            right[model_name][name] += 1
                    else:
                        wrong.append({"model": model_name, "scene": first + i, "asked": turns[i][0], "said": said, "right": turns[i][1]})
    shares = {name: {kind: round(counts[kind] / asked[kind], 4) for kind in asked} for name, counts in right.items()}
    return {**shares, "asked": dict(asked)}, wrong


def answer_seconds(pipeline: mg_fast.Pipeline, seed: int, count: int = 5) -> list[float]:
    """Seconds from a picture that was not seen before to the whole answer, the first of all first."""
    seconds = []
    for i in range(count):
        image = draw_scene(seed, i, split="unseen").image
        began = time.perf_counter()
        pipeline.conversation().chat("What does the sign say?", [image], max_new_tokens=64)
        seconds.append(time.perf_counter() - began)
    return seconds


def accuracy_table(recorded: dict, *others: dict) -> str:
    """The README's table of a recorded result with a model trained without, and of ones with other seeds of training."""
    columns = {name: recorded["exact"][name] for name in ("with mining", "mined features zero", "trained without")}
    for number, other in enumerate(others, start=1):
        columns[f"with mining, training seed {number}"] = other["exact"]["with mining"]
    rows = [f"| {' | '.join(['question', *columns, 'asked'])} |", f"|{'---|' * (len(columns) + 2)}"]
    for kind, asked in recorded["exact"]["asked"].items():
        rows.append(f"| {' | '.join([kind, *(f'{shares[kind]:.1%}' for shares in columns.values()), str(asked)])} |")
    return "\n".join(rows) + "\n"


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def _kinds(kind: str, scene: Scene) -> list[str]:
    if kind != "number":
        return [kind]
    if scene.print is None:
        return ["no number"]
    return ["number", "number, never seen"] if held_out(scene.print.text) else ["number"]


@torch.inference_mode()
def answer(
    model: MiniGeminiForConditionalGeneration, processor: MiniGeminiProcessor, questions: Sequence[str], image_tokens: torch.Tensor
) -> list[str]:
    """Greedy answers to first questions, one picture [n, T, hidden] each."""
    rows = [processor.encode(render(processor.template, [(with_picture_tags(question, 1), None)])) for question in questions]
    longest = max(len(ids) for ids, _ in rows)
    padded = [([0] * (longest - len(ids)) + ids, [0] * (longest - len(ids)) + marks, len(ids)) for ids, marks in rows]
    ids, marks = (torch.tensor([row[part] for row in padded]) for part in (0, 1))
    mask = torch.tensor([[0] * (longest - length) + [1] * length for _, _, length in padded])
    out = model.generate(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=marks, image_tokens=image_tokens, max_new_tokens=64, do_sample=False
    )
    return [text.strip() for text in processor.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="trained with the high-resolution branch")
    parser.add_argument("--without", type=Path, help="trained without")
    parser.add_argument("--seed", type=int, default=5000, help="of the unseen scenes")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folders = {"with mining": args.checkpoint} | ({} if args.without is None else {"trained without": args.without})
    if len({(folder / "tokenizer.model").read_bytes() for folder in folders.values()}) > 1:
        parser.error("the two checkpoints have different tokenizers")
    transformers_logging.set_verbosity_error()
    began = time.perf_counter()
    pipeline = mg_fast.load(args.checkpoint, dtype="float32")
    model, processor = pipeline.model, pipeline.processor
    seconds = answer_seconds(pipeline, args.seed)
    models = {"with mining": model, "mined features zero": copy.deepcopy(model)}
    forget_mined(models["mined features zero"])
    if args.without is not None:
        models["trained without"] = MiniGeminiForConditionalGeneration.from_pretrained(args.without, dtype=torch.float32).eval()
    shares, wrong = evaluate(models, processor, seed=args.seed, count=args.count)
    kinds = list(shares["asked"])
    print(f"{'':22}" + "".join(f"{name:>22}" for name in (*models, "asked")))
    for kind in kinds:
        print(f"{kind:22}" + "".join(f"{shares[name][kind]:22.1%}" for name in models) + f"{shares['asked'][kind]:22}")
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
        },
        "speed": {"load_s": round(pipeline.load_seconds, 2), "answer_s": [round(s, 3) for s in seconds]},
        "wrong, first 40": [row for row in wrong if row["model"] == "with mining"][:40],
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
