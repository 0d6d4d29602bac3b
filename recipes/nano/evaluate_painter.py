"""Wishes for pictures, has them drawn, and checks what was drawn by colours and outlines: the loop from words to words.

python -m recipes.nano.evaluate_painter PIPELINE --out RESULT.json --pictures PICTURE.png

The painter draws every wish, in the words in which nano should put it, with and without guidance, and nano reads what
was drawn. How often nano itself puts a wish in these words is counted apart, for wishes without a number, because it
never learned of numbers in wishes without a picture. Shapes, colours and backgrounds are checked by `painting.check`,
which uses no model. A number counts as readable if nano and RapidOCR, which were trained apart, read the same digits.
"""

import argparse
import hashlib
import json
import random
import re
import textwrap
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw, ImageFont
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast.drawing import load_painter
from mg_fast.hints import ocr
from mg_fast.testing.environment import environment

from .painting.check import Verdict, check
from .painting.reading import read_numbers
from .painting.wishes import Wish, draw_wish, picture, random_wish
from .talk import GEN, described, wish

SEED = 8100
# The shapes of a wish take turns.
COUNTS = (1, 2, 3)
# None is the guidance that the painter's folder recommends.
GUIDANCES = {"with guidance": None, "without guidance": 1.0}
# The number of true pictures that are read by OCR, to see how well it reads such print at all.
TRUE_PICTURES = 100
# A picture is enlarged for OCR, which expects larger print.
OCR_SIDE = 768
MOST = 64
# The number of drawings that are shown.
SHOWN = 12


def wishes(seed: int, count: int) -> list[Wish]:
    """Wishes of one, two and three shapes in turns, every second one with a number, as its seed decides."""
    rng = random.Random(f"evaluation/{seed}")
    return [random_wish(rng, shapes=COUNTS[i % len(COUNTS)]) for i in range(count)]


def prompts(pipeline: mg_fast.Pipeline, asked: list[Wish]) -> list[str]:
    """What nano writes between its tags when it is asked for these wishes in words; empty where it writes no tags."""
    questions = [f"Draw {wish(list(one.shapes), one.background)}.{GEN}" for one in asked]
    answers = pipeline.chat_batch(questions, max_new_tokens=MOST, batch_size=64, progress=False)
    return [(mg_fast.drawing.find_prompts(answer.text) or [""])[0] for answer in answers]


def descriptions(pipeline: mg_fast.Pipeline, pictures: list[Image.Image]) -> list[str]:
    """Nano's descriptions of pictures."""
    questions = [("Describe the picture.", [one]) for one in pictures]
    return [one.text for one in pipeline.chat_batch(questions, max_new_tokens=MOST, batch_size=32, progress=False)]


def ocr_number(drawn: Image.Image) -> str | None:
    """The number that RapidOCR reads in a picture; None where it reads none, or several."""
    lines = [line.text for line in ocr.read(drawn.resize((OCR_SIDE, OCR_SIDE), Image.Resampling.BICUBIC))]
    found = [digits for line in lines for digits in re.findall(r"\d+", line)]
    return found[0] if len(found) == 1 else None


def judge(pipeline: mg_fast.Pipeline, asked: list[Wish], pictures: list[Image.Image]) -> list[dict]:
    """What is right about each picture."""
    verdicts: list[Verdict] = [check(drawn, one) for drawn, one in zip(pictures, asked)]
    said, read = descriptions(pipeline, pictures), read_numbers(pipeline, pictures)
    rows = []
    for one, verdict, text, number, drawn in zip(asked, verdicts, said, read, pictures):
        right = described(list(one.shapes), one.background, one.number) + "."
        row = {
            "shapes": verdict.shapes_right,
            "shapes, in the order of the wish": verdict.order_right,
            "background": verdict.background_right,
            "print where asked for": verdict.number_right,
            "nano describes it as wished": text.lower() == right,
        }
        if one.number:
            row["number seen by nano"] = number is not None
            row["number readable"] = number is not None and number == ocr_number(drawn)
        rows.append(row)
    return rows


def shares(asked: list[Wish], rows: list[dict]) -> dict[str, dict]:
    """The shares of right pictures, for each number of shapes and for all, and how many were asked for."""
    groups = defaultdict(list)
    for one, row in zip(asked, rows):
        groups[f"{len(one.shapes)} shape{'s' * (len(one.shapes) > 1)}"].append(row)
        groups["all"].append(row)
    found = {}
    for name, group in sorted(groups.items()):
        keys = dict.fromkeys(key for row in group for key in row)
        found[name] = {"asked": len(group)}
        for key in keys:
            told = [row[key] for row in group if key in row]
            found[name][key] = round(sum(told) / len(told), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.nano.evaluate_painter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pipeline", help="folder of the painter, or nano for the one in the package")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of the wishes (default: {SEED})")
    parser.add_argument("--count", type=int, default=300, help="number of wishes (default: 300)")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--pictures", type=Path, help="write a picture of twelve random drawings to this file")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"expected at least one wish, got --count {args.count}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    began = time.perf_counter()
    pipeline, painter = mg_fast.load("nano", dtype="float32"), load_painter(args.pipeline, dtype="float32")
    asked = wishes(args.seed, args.count)
    in_words = [one for one in asked if not one.number]
    written = prompts(pipeline, in_words)
    result: dict = {
        "wishes in words": len(in_words),
        "of them, prompts by nano as wished": sum(map(str.__eq__, written, (one.prompt for one in in_words))),
    }
    print(result)
    seconds = []
    for name, guidance in GUIDANCES.items():
        drawn = []
        for i, one in enumerate(asked):
            start = time.perf_counter()
            drawn += painter.draw(one.prompt, seed=args.seed + i, guidance=guidance)
            if guidance is None:
                seconds.append(time.perf_counter() - start)
        rows = judge(pipeline, asked, drawn)
        result[name] = shares(asked, rows)
        if guidance is None:
            failed = [i for i, row in enumerate(rows) if not row["shapes"]]
            result["shapes wrong, first 40"] = [asked[i].prompt for i in failed[:40]]
            if args.pictures is not None:
                show(asked, drawn, rows, args.pictures)
        print(name, json.dumps(result[name], indent=1))
    result["true pictures"] = true_pictures(pipeline, args.seed)
    result["speed"] = {"first drawing_s": round(seconds[0], 2), "median drawing_s": round(median(seconds), 2)}
    folder = Path(painter.name)
    training = folder / "training.json"
    result["conditions"] = {
        "wishes": args.count,
        "seed": args.seed,
        "steps and guidance": {"steps": painter.defaults.steps, "guidance": painter.defaults.guidance},
        "seconds": round(time.perf_counter() - began, 1),
        "machine": environment(),
        "sha256 of weights": digests(folder),
        "training": json.loads(training.read_text()) if training.is_file() else None,
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def drawing_table(recorded: dict) -> str:
    """The Markdown table of a recorded result: the shares by number of shapes, with and without guidance."""
    kinds = [kind for kind in recorded["with guidance"]["all"] if kind != "asked"]
    groups = list(recorded["with guidance"])
    columns = [*groups, "all, without guidance", "true pictures"]
    rows = [f"| {' | '.join(['what is right', *columns])} |", f"|{'---|' * (len(columns) + 1)}"]
    for kind in kinds:
        found = [recorded["with guidance"][group].get(kind) for group in groups]
        found += [recorded["without guidance"]["all"].get(kind), recorded["true pictures"].get(kind)]
        cells = ["" if share is None else f"{share:.1%}" for share in found]
        rows.append(f"| {' | '.join([kind, *cells])} |")
    return "\n".join(rows) + "\n"


def true_pictures(pipeline: mg_fast.Pipeline, seed: int) -> dict[str, float]:
    """The same judgement of pictures that the generator drew: what the check, nano and OCR miss in perfect pictures."""
    drawn = [draw_wish(seed, i, split="unseen") for i in range(TRUE_PICTURES)]
    asked = [one for one, _ in drawn]
    found = shares(asked, judge(pipeline, asked, [picture(scene) for _, scene in drawn]))
    return found["all"]


def show(asked: list[Wish], drawn: list[Image.Image], rows: list[dict], file: Path) -> None:
    """Draws twelve pictures at random, each with its wish and with what is wrong in it."""
    wide, high, columns = 264, 300, 4
    picked = sorted(random.Random("twelve").sample(range(len(asked)), min(SHOWN, len(asked))))
    sheet = Image.new("RGB", (columns * wide, -(-len(picked) // columns) * high), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, i in enumerate(picked):
        x, y = place % columns * wide + 4, place // columns * high + 4
        sheet.paste(drawn[i].resize((256, 256), Image.Resampling.LANCZOS), (x, y))
        one = asked[i]
        words = textwrap.wrap(wish(list(one.shapes), one.background, one.number), 46)[:2]
        wrong = [name for name in ("shapes", "background", "print where asked for") if not rows[i][name]]
        canvas.text((x, y + 258), "\n".join(words), "black" if not wrong else "red", font, spacing=1)
        if wrong:
            canvas.text((x, y + 258 + 13 * len(words)), "wrong: " + ", ".join(wrong), "red", font)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def digests(folder: Path) -> dict[str, str]:
    """The beginnings of the hashes of the weights."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(folder.rglob("*.safetensors"))
    }


if __name__ == "__main__":
    main()
