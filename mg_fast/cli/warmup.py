"""mg-fast warmup: runs a model on this machine, so that the work of the first use is done."""

import argparse

from . import loading
from .options import model_options
from .streams import first_use_lines


class _CompilesAheadOfTime(argparse.Action):
    """An option that belongs to `mg-fast compile`."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = f" {values}" if values else ""
        parser.error(f"compiling ahead of time is `mg-fast compile {option_string}{given}`")


class _NotNeeded(argparse.Action):
    """An option that asks for what the command does in any case."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"`mg-fast warmup` always runs the model on this machine: leave {option_string} out")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "warmup",
        parents=[model_options()],
        help="run the model on this machine, and show what is done at first use",
        description="Loads the model on this machine's GPU or CPU, answers two questions about a picture of noise, and "
        "shows what is done only at first use and how long it takes. Kernels that Triton and torch.compile compile "
        "stay in their caches (TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR). `mg-fast compile` fills Triton's cache for "
        "a GPU that this machine does not have.",
    )
    # `warmup` once compiled ahead of time, too: someone who still types those options is told what to type instead.
    parser.add_argument("--here", action=_NotNeeded, nargs=0, help=argparse.SUPPRESS)
    parser.add_argument("--arch", action=_CompilesAheadOfTime, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--training", action=_CompilesAheadOfTime, nargs=0, help=argparse.SUPPRESS)
    parser.set_defaults(action=command)


def command(args) -> int:
    pipeline = loading.load(args)
    print(f"loaded {args.model} on {pipeline.device}: {pipeline.load_seconds:.1f} s")
    print(first_use_lines(pipeline.warm_up()), flush=True)
    return 0
