"""What the commands that draw share: their options, the files that pictures are saved in, and the progress bar."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import DrawingError
from .options import Parser, picture_file, positive

# Steps of MM-Interleaved's own drawings.
OWN_STEPS = 30


def drawing_options(*, required: bool = False) -> Parser:
    """A parent parser with the options that say which painter draws, how, and where its pictures go."""
    parent = Parser(add_help=False)
    group = parent.add_argument_group("drawing (needs the extra `draw`)")
    _add_painter(group, required=required)
    group.add_argument(
        "--out",
        type=picture_file,
        metavar="FILE",
        default="drawn.png",
        help="file of the picture (default: drawn.png); further pictures are numbered",
    )
    group.add_argument("--force", action="store_true", help="overwrite files that exist")
    group.add_argument("--size", metavar="S", type=_size, help="SIDE or WIDTHxHEIGHT in pixels, multiples of 8")
    group.add_argument("--negative", metavar="TEXT", help="what not to draw (default: Mini-Gemini's negative prompt)")
    return parent


def painter_options() -> Parser:
    """A parent parser with the options that say which painter draws, and how."""
    parent = Parser(add_help=False)
    _add_painter(parent.add_argument_group("drawing (needs the extra `draw`)"), required=False)
    return parent


def _add_painter(group, *, required: bool) -> None:
    group.add_argument(
        "--painter",
        required=required,
        metavar="P",
        help="folder or hub id of a text-to-image pipeline of diffusers, such as "
        "stabilityai/stable-diffusion-xl-base-1.0, or `nano`, a small one in the package",
    )
    group.add_argument("--steps", type=positive, metavar="N", help="steps of the diffusion")
    group.add_argument("--guidance", type=float, metavar="G", help="weight of the prompt against the negative prompt")
    group.add_argument("--scheduler", metavar="NAME", help="lcm, lightning, turbo, euler, ddim, ...")
    group.add_argument("--lora", metavar="L", help="file, folder or hub id of a LoRA")
    group.add_argument(
        "--offload", choices=("none", "model", "sequential"), help="keep parts of the painter off the GPU"
    )


def load_painter(args, path: str | None = None):
    """The painter that the options ask for; None where they name none."""
    path = path or args.painter
    if path is None:
        return None
    from ..drawing import load_painter as load

    return load(
        path,
        device=args.device,
        steps=args.steps,
        guidance=args.guidance,
        scheduler=args.scheduler,
        lora=args.lora,
        offload=args.offload,
    )


def of_each_picture(args) -> dict[str, object]:
    """The options of `Painter.draw` that the command line gives."""
    return {name: getattr(args, name) for name in ("size", "negative", "seed") if getattr(args, name) is not None}


def of_own_picture(args, on_step: Callable[[int, int], None]) -> dict[str, object]:
    """The options of `InterleavedPipeline.draw` that the command line gives."""
    steps = args.steps or OWN_STEPS
    given = {"seed": args.seed, "guidance_scale": args.guidance, "num_inference_steps": steps}
    return given | {"on_step": lambda step, latents: on_step(step + 1, steps)}


def check_free(args, count: int = 1) -> None:
    """Raises DrawingError where a file exists that a picture would be saved in, unless --force was given."""
    for file in file_names(args.out, count):
        if os.path.exists(file) and not args.force:
            raise DrawingError(f"{file} exists: name another file with --out, or overwrite it with --force")


def file_names(out: str, count: int) -> list[str]:
    """The files of `count` pictures: `out` itself, and then with numbers from 2 on before its ending."""
    path = Path(out)
    return [out, *(str(path.with_name(f"{path.stem}-{i}{path.suffix}")) for i in range(2, count + 1))]


def save(pictures: Sequence, args) -> list[str]:
    """Saves pictures in the files that the options name, and returns the names.

    A name that is taken gets the next free number, unless --force was given, so that no drawing is ever lost.
    """
    saved = []
    for picture, wanted in zip(pictures, file_names(args.out, len(pictures))):
        name, number, path = wanted, 2, Path(wanted)
        while os.path.exists(name) and not args.force:
            name, number = str(path.with_name(f"{path.stem}-{number}{path.suffix}")), number + 1
        write(picture, name)
        saved.append(name)
    return saved


def write(picture, file: str) -> None:
    """Writes a picture to a file; raises DrawingError where that is not possible."""
    try:
        picture.save(file)
    except OSError as error:
        raise DrawingError(f"{file} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def progress() -> Iterator:
    """Yields a callback for `Painter.draw(on_step=...)` that shows a progress bar on stderr."""
    from tqdm.auto import tqdm

    bar = None

    def on_step(step: int, total: int) -> None:
        nonlocal bar
        if bar is None or step <= bar.n:
            if bar is not None:
                bar.close()
            bar = tqdm(total=total, desc="drawing", unit="step", file=sys.stderr)
        bar.update(step - bar.n)

    try:
        yield on_step
    finally:
        if bar is not None:
            bar.close()


def _size(text: str) -> int | tuple[int, ...]:
    import argparse

    from ..errors import quoted

    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"expected SIDE or WIDTHxHEIGHT, got {quoted(text)}")
    return int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))
