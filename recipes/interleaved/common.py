"""What the programs of this folder share: the options of the model, its loading, and one line for an error."""

import argparse
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast.models import builtin
from mg_fast.models.families import MM_INTERLEAVED, checkpoint_family
from mg_fast.models.pictures import open_picture


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options of the model."""
    parser = argparse.ArgumentParser(
        f"python -m recipes.interleaved.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: auto)")
    return parser


def load(args: argparse.Namespace) -> mg_fast.InterleavedPipeline:
    """Loads the pipeline that the options ask for.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or is of another family.
    """
    if checkpoint_family(builtin.resolve(args.model)) not in (None, MM_INTERLEAVED):
        raise mg_fast.CheckpointError(f"{args.model} is no MM-Interleaved checkpoint, which these programs need")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return mg_fast.load(args.model, dtype=args.dtype, device=args.device)


def pictures(files: list[Path]) -> list[Image.Image]:
    """Opens pictures, so that their faults are found before the model is loaded."""
    return [open_picture(file) for file in files]


def run(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None]) -> None:
    """Parses the command line and calls the program; an error that a caller can act on becomes one line on stderr."""
    args = parser.parse_args()
    try:
        action(args)
    except mg_fast.MgFastError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
