"""mg-fast warmup: runs a model on this machine, so that the work of the first use is done."""

from . import loading
from .options import model_options
from .streams import first_use_lines


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
    parser.set_defaults(action=command)


def command(args) -> int:
    pipeline = loading.load(args)
    print(f"loaded {args.model} on {pipeline.device}: {pipeline.load_seconds:.1f} s")
    print(first_use_lines(pipeline.warm_up()), flush=True)
    return 0
