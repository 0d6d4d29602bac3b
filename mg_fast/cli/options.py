"""The parser, the options that several commands share, and the types of options."""

import argparse
import math
import os

from ..errors import BackendError, quoted, shortened
from ..runtime.dtypes import dtype_name


class Parser(argparse.ArgumentParser):
    """A parser whose errors stay short where they repeat an argument."""

    def error(self, message: str):
        super().error(shortened(message))


def model_options() -> Parser:
    """The options that say which model to load, and how; a parent of the parsers of the commands that load one."""
    parent = Parser(add_help=False)
    parent.add_argument(
        "--model", required=True, metavar="DIR", help="checkpoint folder, hub id, or `nano`, which is in the package"
    )
    parent.add_argument(
        "--model-base", metavar="DIR", help="base language model of a stage-1 adapter (mm_projector.bin)"
    )
    parent.add_argument("--template", metavar="NAME", help="prompt template, where the checkpoint does not tell it")
    parent.add_argument(
        "--dtype",
        default="auto",
        type=dtype_option,
        metavar="{auto,float32,bfloat16,float16}",
        help="auto (default): the checkpoint's; on a CPU that is slow in it a faster one, as far as memory allows",
    )
    parent.add_argument("--device", help="cuda, cpu, ... or auto (default: a GPU if there is one)")
    parent.add_argument("--backend", choices=("auto", "reference", "torch", "triton"))
    parent.add_argument(
        "--quantize", choices=("int8", "int4", "fp8"), help="the language model's weights (extra `quant`)"
    )
    parent.add_argument(
        "--compile", action="store_true", help="on a GPU: decode through torch.compile, slow at first, then faster"
    )
    add_debug(parent)
    return parent


def answer_options() -> Parser:
    """The options about the lengths of a prompt and of its answer, as a parent."""
    parent = Parser(add_help=False)
    parent.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="at most N tokens per answer (default 512)"
    )
    parent.add_argument("--allow-long", action="store_true", help="accept prompts longer than the model was trained on")
    return parent


def sampling_options() -> Parser:
    """The options of sampling, as a parent."""
    parent = Parser(add_help=False)
    parent.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="0 (default) is greedy; above 0 samples"
    )
    parent.add_argument("--seed", type=int, help="makes sampling repeatable")
    return parent


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Adds --debug, which every command has."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {quoted(text)}")
    return int(text)


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {quoted(text)}")
    return value


def dtype_option(text: str) -> str:
    try:
        return dtype_name(text)
    except BackendError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("dtype: ")) from None


def picture_file(text: str) -> str:
    if not text.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        raise argparse.ArgumentTypeError(f"expected a file .png, .jpg or .webp, got {quoted(text)}")
    if os.path.isdir(text) or not os.path.isdir(os.path.dirname(text) or "."):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is a folder, or in a folder that does not exist")
    return text


def architecture(text: str) -> int:
    from ..kernels.configs import SHARED_MEMORY_LIMITS

    known = {f"sm_{number}": number for number in SHARED_MEMORY_LIMITS}
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {quoted(text)}")
    return known[text]
