"""Nano, the Mini-Gemini in the package, reads a new picture, has one drawn, and reads that one: `make demo`.

python -m recipes.demo                    # a fresh scene with a random number, and a fresh wish
python -m recipes.demo --seed 7           # the scene and the wish of that seed again
python -m recipes.demo --photo FILE       # your own picture; nano understands only print and simple shapes in it
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast.models.pictures import open_picture

from .nano.painting.wishes import random_wish
from .nano.scenes import draw_number, draw_scene
from .nano.talk import NO_NUMBER, ask, wish

# The number of turns of each backend. The backends take turns, so that both meet the same state of the machine.
TURNS = 5
# The largest number of tokens in an answer. The longest answer that nano learned has fewer.
MOST = 64
# The questions about a picture whose right answers are not known.
QUESTIONS = ("What does the sign say?", "Describe the picture.", "What colour is the background?")


def draw(seed: int, folder: Path) -> tuple[Path, list[tuple[str, str | None]]]:
    """Draws and saves the scene of a seed, and returns its file and the questions with their right answers."""
    rng = random.Random(seed)
    scene = draw_scene(seed, 0, split="unseen", number=draw_number(rng, training=False))
    file = folder / f"mg_fast-demo-{seed}.png"
    scene.image.save(file)
    asked = [
        ("What does the sign say?", f"The number is {scene.print.text}."),
        ask(scene, "colour", rng) or ask(scene, "count", rng),
    ]
    return file, [*asked, ask(scene, "where", rng)]


def talk(pipeline: mg_fast.Pipeline, file: Path, turns: list[tuple[str, str | None]]) -> None:
    """Holds one conversation and prints its answers token by token, with the right answers beside them."""
    for i, (question, right) in enumerate(turns):
        print(f"\nyou:    {question}\nnano:   ", end="", flush=True)
        began, pieces = time.perf_counter(), []
        for piece in pipeline.chat(question, [file] if i == 0 else None, max_new_tokens=MOST, stream=True):
            pieces.append(piece)
            print(piece, end="", flush=True)
        seconds = time.perf_counter() - began
        verdict = "" if right is None else "  (correct)" if "".join(pieces) == right else f"  (WRONG: {right})"
        print(f"{verdict}  [{seconds:.2f} s]")


def have_drawn(pipeline: mg_fast.Pipeline, seed: int, file: Path) -> list[tuple[str, str | None]]:
    """Wishes for a picture, shows how it is drawn, and saves it.

    Returns:
        Questions about the picture, with the right answers that follow from the wish.
    """
    wished = random_wish(random.Random(f"demo/{seed}"), shapes=2, number=False)
    said = wish(list(wished.shapes), wished.background)

    def on_step(done: int, total: int) -> None:
        print(f"\r        drawing, step {done} of {total}", end="" if done < total else "\n", flush=True)

    question = f"Draw {said}."
    print(f"\nyou:    {question}\nnano:   ", end="", flush=True)
    began = time.perf_counter()
    # Nano never learned to draw in the middle of a conversation about a picture.
    stream = pipeline.conversation().chat(
        question, draw={"seed": seed, "on_step": on_step}, max_new_tokens=MOST, stream=True
    )
    for piece in stream:
        # The tag that ends the prompt comes last. The painter begins after it, on a line of its own.
        print(piece, end="\n" if piece.endswith("</h>") else "", flush=True)
    if not stream.images:
        raise SystemExit(f"no picture came: {stream.no_image_reason}")
    stream.images[0].save(file)
    print(f"        {file}  [{time.perf_counter() - began:.2f} s]")
    return [
        ("Describe the picture.", f"{said[0].upper()}{said[1:]}."),
        ("What colour is the background?", f"The background is {wished.background}."),
        ("What does the sign say?", NO_NUMBER),
    ]


def compare(pipeline: mg_fast.Pipeline, file: Path) -> None:
    """Compares the stages of one answer with the original's own steps and with mg_fast, in turns, both warm."""
    model, processor, question = pipeline.model, pipeline.processor, "What does the sign say?"
    names = {"reference": "the original's steps", "auto": "mg_fast"}
    # Nothing is cached. Otherwise the second answer would have no stages.
    pipelines = {
        name: mg_fast.Pipeline(model, processor, backend=name, image_cache_bytes=0, kv_cache_bytes=0) for name in names
    }
    times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    texts = {}
    for turn in range(-2, TURNS):
        for name, one in pipelines.items():
            answer = one.chat(question, [file], max_new_tokens=MOST, profile=True)
            one.reset()
            texts[name] = answer.text
            # The first turns include work that is done only once.
            if turn >= 0:
                for stage in answer.stages:
                    times[name].setdefault(stage.name, []).append(stage.seconds * 1e3)
    print(f"\n{'one answer':<24}" + "".join(f"{title:>24}" for title in names.values()))
    medians = {name: {stage: statistics.median(row) for stage, row in stages.items()} for name, stages in times.items()}
    for stage in medians["auto"]:
        print(f"{stage:<24}" + "".join(f"{medians[name][stage]:>21.1f} ms" for name in names))
    print(f"{'all':<24}" + "".join(f"{sum(medians[name].values()):>21.1f} ms" for name in names))
    same = "The words are the same." if len(set(texts.values())) == 1 else f"THE WORDS DIFFER: {texts}"
    print(
        f"Medians of {TURNS} turns, {pipeline.device}, {model.dtype}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}. {same}"
    )
    print("This says little about the published sizes. The README links to what was measured there.")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seed", type=int, help="seed of the scene (default: a random one, which is printed)")
    what.add_argument("--photo", type=Path, metavar="FILE", help="ask about this picture instead of a scene")
    args = parser.parse_args()
    for libraries in (transformers_logging, diffusers_logging):
        libraries.set_verbosity_error()
        libraries.disable_progress_bar()
    folder = Path(tempfile.gettempdir())
    if args.photo is not None:
        file, turns = args.photo, [(question, None) for question in QUESTIONS]
        try:
            open_picture(file)
        except mg_fast.MgFastError as error:
            parser.error(str(error))
        print(f"picture: {file}")
        print("nano knows 108 words, four shapes and small numbers: its answers about a photograph mean nothing")
    else:
        seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
        file, turns = draw(seed, folder)
        print(f"picture: {file}  (seed {seed}; --seed {seed} draws it again)")

    pipeline = mg_fast.load("nano", painter="nano" if args.photo is None else None)
    config, parameters = pipeline.model.config, sum(p.numel() for p in pipeline.model.parameters())
    print(f"loaded nano, {parameters / 1e6:.1f} M parameters, in {pipeline.load_seconds:.1f} s on {pipeline.device}")
    with Image.open(file) as image:
        size = f"{image.width}x{image.height}"
    grid = int(config.tokens_per_view**0.5)
    lr, hr = config.vision_config.image_size, config.image_size_aux
    print(f"{size} pixels -> {hr}x{hr} for the high-resolution tower, {lr}x{lr} for the low-resolution one")
    print(
        f"{grid}x{grid} queries, each mines its own window of the high-resolution pyramid "
        f"-> {config.tokens_per_picture} image tokens"
    )
    talk(pipeline, file, turns)
    heat = folder / f"mg_fast-demo-{file.stem.removeprefix('mg_fast-demo-')}-heat.png"
    pipeline.explain(file, turns[0][0]).image.save(heat)
    saved = {"where the first answer came from": heat}
    if args.photo is None:
        saved |= {"the scene": file, "nano's picture": file.with_stem(f"{file.stem}-drawn")}
        turns = have_drawn(pipeline, seed, saved["nano's picture"])
        pipeline.reset()
        talk(pipeline, saved["nano's picture"], turns)
    print("\nsaved:  " + "\n        ".join(f"{path}  ({what})" for what, path in saved.items()))
    compare(pipeline, file)


if __name__ == "__main__":
    main()
