"""Measures what rounding does to nano's answers: by 16-bit and quantized weights, and by every backend.

python -m recipes.nano.rounding CHECKPOINT --out RESULT.json
TRITON_INTERPRET=1 python -m recipes.nano.rounding CHECKPOINT --backend triton --out RESULT.json

Every form of the model answers the questions of the evaluation. Beside the shares of right answers, the result tells
how many answers are those of float32, word for word, right or wrong. The second command adds the Triton kernels to the
result of the first. They are interpreted on the CPU, which takes minutes a scene, so they are asked about a
few scenes only.
"""

import argparse
import json
import os
import time
from pathlib import Path

from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast.testing.environment import environment

from .evaluate import digest, evaluate, evaluate_varied

# The form that the others are compared with comes first.
FORMS = {
    "float32": dict(dtype="float32"),
    "float32, reference": dict(dtype="float32", backend="reference"),
    "bfloat16": dict(dtype="bfloat16"),
    "int8": dict(dtype="float32", quantize="int8"),
    "int4": dict(dtype="float32", quantize="int4"),
    "fp8": dict(dtype="float32", quantize="fp8"),
}
TRITON = {"float32": dict(dtype="float32"), "float32, triton": dict(dtype="float32", backend="triton")}


def measure_rounding(checkpoint: Path, forms: dict[str, dict], *, seed: int, count: int, varied: int) -> dict:
    """Asks every form of a checkpoint the questions of the evaluation.

    Args:
        checkpoint: a folder that `recipes.nano.train` wrote.
        forms: options of `mg_fast.load`, by name. The first form is the one that the others are compared with.
        seed, count, varied: as in `recipes.nano.evaluate`.

    Returns:
        For `exact` and `varied`: the shares of right answers by form and kind of question, with `asked`, as `evaluate`
        returns them; and for each form `as float32`, the share of answers that are those of the first form.
    """
    pipelines = {name: mg_fast.load(checkpoint, device="cpu", **options) for name, options in forms.items()}
    parts = {"exact": evaluate(pipelines, seed=seed, count=count)}
    if varied:
        parts["varied"] = evaluate_varied(pipelines, seed=seed, count=varied)
    return {
        part: shares | {"as float32": as_first(list(forms), shares, wrong)} for part, (shares, wrong) in parts.items()
    }


def as_first(forms: list[str], shares: dict, wrong: list[dict]) -> dict[str, float]:
    """The share of each form's answers that are those of the first form, from the wrong answers of all."""
    asked = _asked(shares)
    said = {form: {} for form in forms}
    for row in wrong:
        said[row["model"]][row["kind"], row["scene"]] = row["said"]
    first = said[forms[0]]
    return {
        form: round(1 - sum(first.get(at) != its.get(at) for at in {*first, *its}) / asked, 4)
        for form, its in said.items()
    }


def rounding_table(recorded: dict) -> str:
    """The Markdown table of a recorded result."""
    parts = {"exact": "ordinary scenes", "varied": "varied questions"}
    parts = {part: title for part, title in parts.items() if part in recorded}
    titles = ["weights and backend", "number", *parts.values(), "as float32", "questions"]
    rows = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for result in (recorded, recorded.get("triton", {})):
        for form in result.get("exact", {}).get("as float32", ()):
            if result is not recorded and form == "float32":
                continue
            right = [f"{_right(result[part], form):.1%}" if part in result else "" for part in parts]
            its = [result[part] for part in parts if part in result]
            asked = sum(_asked(part) for part in its)
            same = sum(part["as float32"][form] * _asked(part) for part in its) / asked
            number = f"{result['exact'][form]['number']:.1%}"
            rows.append(f"| {' | '.join([form, number, *right, f'{same:.1%}', str(asked)])} |")
    return "\n".join(rows) + "\n"


def _asked(part: dict) -> int:
    return sum(_kinds_asked(part).values())


def _right(part: dict, form: str) -> float:
    return sum(part[form][kind] * count for kind, count in _kinds_asked(part).items()) / _asked(part)


def _kinds_asked(part: dict) -> dict[str, int]:
    """How many questions of each kind were asked. A number that was never seen is counted twice, and asked once."""
    return {kind: count for kind, count in part["asked"].items() if kind != "number, never seen"}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.nano.rounding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that recipes.nano.train wrote")
    parser.add_argument(
        "--backend", choices=("all", "triton"), default="all", help="what to measure (default: all but triton)"
    )
    parser.add_argument("--seed", type=int, default=7100, help="seed of the unseen scenes (default: 7100)")
    parser.add_argument("--count", type=int, help="number of scenes (default: 500; with triton 20)")
    parser.add_argument(
        "--varied", type=int, help="number of further questions of each kind (default: 200; with triton 0)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file of the result")
    args = parser.parse_args()
    triton = args.backend == "triton"
    count, varied = args.count, args.varied
    if count is None:
        count = 20 if triton else 500
    if varied is None:
        varied = 0 if triton else 200
    if count < 1 or varied < 0:
        parser.error(f"expected at least one scene, and no less than 0 further questions, got {count} and {varied}")
    if not (args.checkpoint / "tokenizer.model").is_file():
        parser.error(
            f"expected a folder that recipes.nano.train wrote, with a tokenizer.model in it; got {args.checkpoint}"
        )
    if triton and not (args.out.is_file() and "exact" in json.loads(args.out.read_text())):
        parser.error(f"expected the result of the first command in {args.out}, to which that of the kernels is added")
    if triton and not os.environ.get("TRITON_INTERPRET"):
        parser.error("the kernels are interpreted here: set TRITON_INTERPRET=1")
    if triton and json.loads(args.out.read_text())["conditions"]["sha256 of weights"] != digest(args.checkpoint):
        parser.error(f"{args.out} is the result of other weights than those of {args.checkpoint}")
    transformers_logging.set_verbosity_error()
    began = time.perf_counter()
    measured = measure_rounding(
        args.checkpoint, TRITON if triton else FORMS, seed=args.seed, count=count, varied=varied
    )
    measured["conditions"] = {
        "scenes": count,
        "varied questions of each kind": varied,
        "seed": args.seed,
        "split": "unseen",
        "decoding": "greedy",
        "interpreted": bool(os.environ.get("TRITON_INTERPRET")),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": environment(),
        "sha256 of weights": digest(args.checkpoint),
    }
    result = json.loads(args.out.read_text()) | {"triton": measured} if triton else measured
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(rounding_table(result), end="")


if __name__ == "__main__":
    main()
