"""mg-fast compile: compiles the kernels ahead of time, for a GPU that this machine need not have."""

from ..errors import BackendError
from . import loading
from .options import add_debug, architecture, dtype_option


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "compile",
        help="compile the kernels ahead of time, for a GPU that this machine need not have",
        description="Compiles the models' kernels into Triton's cache (TRITON_CACHE_DIR, or ~/.triton/cache), for "
        "instance while a container image is built.",
    )
    parser.add_argument(
        "--arch",
        action="append",
        required=True,
        type=architecture,
        metavar="sm_XX",
        help="architecture of the GPU, such as sm_90; may be given several times",
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint folder (its configuration is enough), hub id or nano (default: the published sizes of "
        "Mini-Gemini)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        type=dtype_option,
        metavar="{float32,bfloat16,float16}",
        help="dtype of the weights; may be given several times (default: float16 and bfloat16)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "triton"),
        default="auto",
        help="auto (default) leaves out the kernels in whose place auto runs a library; triton compiles those, too",
    )
    parser.add_argument("--training", action="store_true", help="also compile the kernels of the backward pass")
    add_debug(parser)
    parser.set_defaults(action=command)


def command(args) -> int:
    from ..ops.ahead_of_time import cache_folder, check_can_compile

    check_can_compile()
    from ..runtime.dtypes import wanted_dtype

    if "auto" in (args.dtype or ()):
        raise BackendError(
            "--dtype auto is for `mg-fast warmup`: ahead of time, the dtype that a checkpoint holds is not known"
        )
    dtypes = [wanted_dtype(name) for name in dict.fromkeys(args.dtype or ("float16", "bfloat16"))]
    done = []
    for kernel in _compiled(args, list(dict.fromkeys(args.arch)), dtypes):
        state = "cached" if kernel.seconds is None else f"{kernel.seconds:.1f} s"
        dtype = str(kernel.dtype).removeprefix("torch.")
        print(
            f"{kernel.name:<26} sm_{kernel.architecture:<4} {dtype:<9} {kernel.image_size:>5} pixels  {state}",
            flush=True,
        )
        done.append(kernel)
    fresh = sum(kernel.seconds is not None for kernel in done)
    print(f"{len(done)} kernels in {cache_folder()}: {fresh} compiled now, {len(done) - fresh} were there")
    print(
        "Triton's launchers in C are still built at the first launch on the machine with the GPU: "
        "its C compiler takes about a second for them."
    )
    return 0


def _compiled(args, architectures: list[int], dtypes: list):
    """The kernels of the model that is named, or of the published Mini-Gemini sizes, as they are compiled."""
    if args.model is not None and loading.is_interleaved(args.model):
        from ..models.mm_interleaved import launches as interleaved

        if args.training:
            raise BackendError(
                "--training: the kernels of MM-Interleaved's backward pass cannot be compiled ahead of time; its first "
                "step of training compiles them"
            )
        config = interleaved.model_config(args.model)
        return interleaved.compile_kernels(architectures, dtypes, config, backend=args.backend)
    from ..models.mini_gemini import launches

    configs = [launches.model_config(args.model)] if args.model is not None else launches.published_configs()
    return launches.compile_kernels(architectures, dtypes, configs, training=args.training, backend=args.backend)
