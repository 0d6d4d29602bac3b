"""The program `mg-fast`: its parser, its exit codes, and how it prints errors.

Exit codes: 0 success, 1 an unexpected error, 2 wrong usage, 3 a fault of the checkpoint, 4 of a picture, 5 of the
prompt, 6 of the backend, 7 of a drawing, 130 interrupted. An error is one line on stderr; --debug shows its traceback.
"""

import argparse
import logging
import os
import sys

from .. import __version__
from ..errors import (
    BackendError,
    CheckpointError,
    DrawingError,
    MgFastError,
    PictureError,
    PromptError,
    shortened,
)
from . import chat, doctor, draw, explain, run, serve, story, warmup, web
from . import compile as compile_command
from .options import Parser
from .streams import tolerate_other_encodings

EXIT_CODES = ((CheckpointError, 3), (PictureError, 4), (PromptError, 5), (BackendError, 6), (DrawingError, 7))
COMMANDS = (run, chat, draw, explain, story, serve, web, doctor, compile_command, warmup)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mg-fast", description="Mini-Gemini: questions about pictures, answered fast.")
    parser.add_argument("--version", action="version", version=f"mg-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.register(subparsers)
    subparsers.metavar = " | ".join(subparsers.choices)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    tolerate_other_encodings()
    logging.basicConfig(
        format="mg-fast: %(levelname)s: %(message)s", level=logging.DEBUG if args.debug else logging.WARNING
    )
    try:
        code = args.action(args)
        # If the reader of stdout has closed it, this raises an error that is handled below. The interpreter's own flush
        # at exit would be too late for that.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("mg-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has closed it, so nothing more can be printed there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        kind = "" if isinstance(error, MgFastError) else f"{type(error).__name__}: "
        print(f"mg-fast: error: {shortened(kind + message)}", file=sys.stderr)
        return next((code for cls, code in EXIT_CODES if isinstance(error, cls)), 1)
