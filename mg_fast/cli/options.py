"""The parser, the options that several commands share, and the types of option values."""

import argparse
import math
import os

from ..errors import BackendError, quoted, shortened
from ..runtime.dtypes import dtype_name


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are shortened when they repeat a long argument."""

    # The attribute of the result that takes the arguments which this parser does not know. None: they are an error.
    _unknown_name: str | None = None

    def keep_unknown(self, name: str) -> None:
        """Collects arguments that the parser does not know, in their order, as an attribute of the result."""
        self._unknown_name = name

    def parse_known_args(self, args=None, namespace=None):
        result, unknown = super().parse_known_args(args, namespace)
        if self._unknown_name is not None:
            setattr(result, self._unknown_name, unknown)
            unknown = []
        return result, unknown

    def error(self, message: str):
        super().error(shortened(message))


def model_options(default: str | None = None) -> Parser:
    """A parent parser with the options that say which model to load, and how.

    Args:
        default: the model where none is named; None: one has to be named.
    """
    parent = Parser(add_help=False)
    parent.add_argument(
        "--model",
        required=default is None,
        default=default,
        metavar="DIR",
        help="checkpoint folder, hub id, or `nano`, a small model in the package"
        + (f" (default: {default})" if default else ""),
    )
    parent.add_argument(
        "--model-base", metavar="DIR", help="base language model, for a stage-1 adapter (mm_projector.bin)"
    )
    for name, what in (("llm", "the language model"), ("clip", "CLIP"), ("diffusion", "Stable Diffusion")):
        parent.add_argument(
            f"--{name}",
            metavar="DIR",
            help=f"MM-Interleaved: folder or hub id of {what}, where it is not where config.yaml says",
        )
    parent.add_argument("--template", metavar="NAME", help="prompt template (default: the checkpoint's own)")
    parent.add_argument(
        "--dtype",
        default="auto",
        type=dtype_option,
        metavar="{auto,float32,bfloat16,float16}",
        help="dtype of the weights; auto (default) takes the checkpoint's, or, on a CPU that is slow in that dtype, a "
        "faster one if it fits in memory",
    )
    parent.add_argument("--device", help="cuda, cpu, ..., or auto to use all devices (default: a GPU if there is one)")
    parent.add_argument(
        "--backend",
        choices=("auto", "reference", "torch", "triton"),
        help="implementation of the operations (default: MG_FAST_BACKEND, else auto: the fastest one that can run)",
    )
    parent.add_argument(
        "--quantize",
        choices=("int8", "int4", "fp8"),
        help="quantize the language model's weights (needs the extra `quant`)",
    )
    parent.add_argument(
        "--compile", action="store_true", help="on a GPU, decode through torch.compile: slow at first, then faster"
    )
    add_debug(parent)
    return parent


def answer_options() -> Parser:
    """A parent parser with the options about the lengths of a prompt and its answer."""
    parent = Parser(add_help=False)
    parent.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="generate at most N tokens per answer (default: 512; MM-Interleaved: 90)",
    )
    parent.add_argument("--allow-long", action="store_true", help="accept prompts longer than the model was trained on")
    return parent


def sampling_options() -> Parser:
    """A parent parser with the options of sampling."""
    parent = Parser(add_help=False)
    parent.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0 (default) decodes greedily; above 0 samples",
    )
    parent.add_argument("--seed", type=int, help="a whole number that makes sampling repeatable")
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
        raise argparse.ArgumentTypeError(f"expected a .png, .jpg or .webp file, got {quoted(text)}")
    if os.path.isdir(text) or not os.path.isdir(os.path.dirname(text) or "."):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is a folder, or lies in a folder that does not exist")
    return text


def architecture(text: str) -> int:
    from ..kernels.configs import SHARED_MEMORY_LIMITS

    known = {f"sm_{number}": number for number in SHARED_MEMORY_LIMITS}
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {quoted(text)}")
    return known[text]
