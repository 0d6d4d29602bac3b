"""mg-fast story: lets an MM-Interleaved model go on with a story in words and pictures, as one web page."""

import argparse
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CheckpointError, PictureError, PromptError, quoted
from ..runtime.arguments import check_text
from . import loading
from .drawing import OWN_STEPS
from .options import model_options, positive

# What stands for a picture in a prompt. The modules that name it take seconds to import.
_PICTURE_MARKS = ("<image>", "<|beginofimage|>", "<|image|>")
# The most characters of the page's heading.
_LONGEST_TITLE = 70


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "story",
        parents=[model_options()],
        help="go on with a story in words and pictures, as a web page",
        description="Lets an MM-Interleaved model go on with a story in words and pictures. The story is written as "
        "one HTML file, anew after every picture.",
    )
    parser.add_argument("--start", required=True, metavar="TEXT", help="how the story begins")
    parser.add_argument(
        "--image",
        action="append",
        required=True,
        metavar="FILE",
        help="a picture that comes before the text; may be given several times",
    )
    parser.add_argument(
        "--rounds", type=positive, default=4, metavar="N", help="rounds, each a text or a picture (default: 4)"
    )
    parser.add_argument(
        "--ask-for-pictures",
        action="store_true",
        help="draw only where the model asks for a picture (default: after every text)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="write at most N tokens per text (default: 90)"
    )
    parser.add_argument(
        "--steps", type=positive, default=OWN_STEPS, metavar="N", help=f"steps of a drawing (default: {OWN_STEPS})"
    )
    parser.add_argument("--seed", type=int, help="a whole number that makes the story repeatable")
    parser.add_argument("--out", required=True, type=_page_file, metavar="FILE", help="where to write the .html file")
    parser.set_defaults(action=command)


def command(args) -> int:
    if not args.start.strip():
        raise PromptError("--start is empty: expected how the story begins")
    check_text(args.start, "--start")
    if mark := next((mark for mark in _PICTURE_MARKS if mark in args.start), None):
        raise PromptError(f"--start holds {mark}: pictures are given by --image, and come before the text")
    pictures = _open(args.image)
    if not loading.is_interleaved(args.model):
        raise CheckpointError(f"{args.model} is no MM-Interleaved checkpoint, which mg-fast story needs")
    from .story_page import StoryPart, shown_size, story_page, write_page

    # A seed that the caller did not choose is told on the page, so that the story can be made again.
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    pipeline = loading.load(args)
    print(f"loaded {args.model} on {pipeline.device} in {pipeline.load_seconds:.1f} s", file=sys.stderr)
    parts = [StoryPart(shown_size(picture), True) for picture in pictures] + [StoryPart(args.start, True)]
    named = os.path.basename(os.path.normpath(args.model)) or args.model
    note = f"Made by mg-fast story with {named}, {args.rounds} rounds, seed {seed}. Grey parts were given."
    settings = {"rounds": args.rounds, "force_pictures": not args.ask_for_pictures, "seed": seed}
    settings |= {"num_inference_steps": args.steps, "max_new_tokens": args.max_new_tokens, "stream": True}

    def write() -> None:
        write_page(args.out, story_page(parts, title=_title(args.start), note=note))

    write()
    try:
        for part in _told(pipeline.interleave([*pictures, args.start], **settings), parts):
            if not isinstance(part, str):
                write()
    finally:
        # After an interruption, too, the page holds what there is.
        write()
    print(f"written to {args.out}", file=sys.stderr)
    return 0


def _told(stream: Iterable, parts: list) -> Iterator:
    """Puts the words and pictures of a stream behind the parts of the story, and shows on stderr how it goes on.

    Yields what came, after it was added.
    """
    from .story_page import StoryPart

    began, in_text = time.perf_counter(), False
    for piece in stream:
        if isinstance(piece, str):
            before = parts.pop().content if in_text else ""
            parts.append(StoryPart(before + piece, False))
            print(piece, end="", file=sys.stderr, flush=True)
        else:
            parts.append(StoryPart(piece, False))
            ending = "\n" if in_text else ""
            print(f"{ending}[picture, {time.perf_counter() - began:.1f} s]", file=sys.stderr, flush=True)
        in_text = isinstance(piece, str)
        yield piece
    if in_text:
        print(file=sys.stderr)


def _open(files: list[str]) -> list:
    """The pictures, whose faults are found before the gigabytes of the model are read."""
    from ..models.urls import expanded

    for file in files:
        if not os.path.exists(expanded(file)):
            raise PictureError(f"{file}: no such file")
    from ..models.mm_interleaved.image_processing import MMInterleavedImageProcessor
    from ..models.pictures import open_picture

    pictures = [open_picture(file) for file in files]
    MMInterleavedImageProcessor()(pictures)
    return pictures


def _title(start: str) -> str:
    """The first words of the story."""
    words = " ".join(start.split())
    return words if len(words) <= _LONGEST_TITLE else words[: _LONGEST_TITLE - 1].rsplit(" ", 1)[0] + "…"


def _page_file(text: str) -> Path:
    if not text.lower().endswith((".html", ".htm")):
        raise argparse.ArgumentTypeError(f"expected a .html file, got {quoted(text)}")
    folder = os.path.dirname(text) or "."
    if os.path.isdir(text) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is a folder, or its folder does not exist or is read-only")
    return Path(text)
