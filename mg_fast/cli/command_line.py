"""mg-fast run | chat | explain | doctor | warmup.

Exit codes: 0 done; 1 unexpected; 2 wrong usage; 3 checkpoint; 4 picture; 5 prompt; 6 backend; 130 interrupted.
Errors are one line on stderr; --debug shows the traceback.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sys
import time

from .. import __version__
from ..errors import BackendError, CheckpointError, MgFastError, PictureError, PromptError, shortened
from ..runtime.arguments import check_text
from .options import Parser, architecture, dtype_option, picture_file, positive, temperature, tolerate_other_encodings

EXIT_CODES = ((CheckpointError, 3), (PictureError, 4), (PromptError, 5), (BackendError, 6))

CHAT_HELP = """\
/image FILE   show a picture with the next question (again for another one)
/reset        forget the conversation
/help         this list
/quit         leave (also Ctrl-D)"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mg-fast", description="Mini-Gemini: questions about pictures, answered fast.")
    parser.add_argument("--version", action="version", version=f"mg-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | chat | explain | doctor | warmup")

    model = Parser(add_help=False)
    model.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder, hub id, or `nano`, which is in the package")
    model.add_argument("--model-base", metavar="DIR", help="base language model of a stage-1 adapter (mm_projector.bin)")
    model.add_argument("--template", metavar="NAME", help="prompt template, where the checkpoint does not tell it")
    model.add_argument(
        "--dtype",
        default="auto",
        type=dtype_option,
        metavar="{auto,float32,bfloat16,float16}",
        help="auto (default): the checkpoint's; on a CPU that is slow in it a faster one, as far as memory allows",
    )
    model.add_argument("--device", help="cuda, cpu, ... or auto (default: a GPU if there is one)")
    model.add_argument("--backend", choices=("auto", "reference", "torch", "triton"))
    model.add_argument("--quantize", choices=("int8", "int4", "fp8"), help="the language model's weights (extra `quant`)")
    model.add_argument("--max-new-tokens", type=positive, metavar="N", help="at most N tokens per answer (default 512)")
    model.add_argument("--compile", action="store_true", help="on a GPU: decode through torch.compile, slow at first, then faster")
    model.add_argument("--allow-long", action="store_true", help="accept prompts longer than the model was trained on")
    model.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")

    sampled = Parser(add_help=False)
    sampled.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="0 (default) is greedy; above 0 samples")
    sampled.add_argument("--seed", type=int, help="makes sampling repeatable")

    run = commands.add_parser("run", parents=[model, sampled], help="answer one question")
    run.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    run.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    run.add_argument("--allow-urls", action="store_true", help="fetch pictures given as URLs")
    run.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    run.add_argument("--profile", action="store_true", help="show time and memory of every stage")
    run.set_defaults(action=command_run)

    chat = commands.add_parser("chat", parents=[model, sampled], help="talk about pictures in the terminal", epilog=CHAT_HELP)
    chat.formatter_class = argparse.RawDescriptionHelpFormatter
    chat.set_defaults(action=command_chat)

    explain = commands.add_parser("explain", parents=[model], help="draw which pixels were mined over the picture")
    explain.add_argument("--prompt", metavar="TEXT", help="a question: show what its answer came from; without it all queries count alike")
    explain.add_argument("--image", required=True, metavar="FILE", help="the picture")
    explain.add_argument("--out", required=True, type=picture_file, metavar="FILE", help="where to write: .png, .jpg or .webp")
    explain.add_argument("--allow-urls", action="store_true", help="fetch a picture given as URL")
    explain.add_argument("--windows", action="store_true", help="draw the borders of the queries' windows")
    explain.set_defaults(action=command_explain)

    doctor = commands.add_parser("doctor", help="what is installed, and which backends can run here")
    doctor.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    doctor.set_defaults(action=command_doctor)

    warmup = commands.add_parser(
        "warmup",
        help="compile the kernels ahead of time, for a GPU that need not be here",
        description="Fills Triton's cache (TRITON_CACHE_DIR, or ~/.triton/cache) with the models' kernels, as when an image is built. "
        "With --here it loads the model on this machine's GPU or CPU and answers, and shows what is done at first use and how long it "
        "takes; torch.compile's results stay in its cache too (TORCHINDUCTOR_CACHE_DIR).",
    )
    where = warmup.add_mutually_exclusive_group(required=True)
    where.add_argument("--here", action="store_true", help="run the model of --model on this machine")
    where.add_argument(
        "--arch",
        action="append",
        type=architecture,
        metavar="sm_XX",
        help="the GPU's, as sm_90; may be given several times",
    )
    warmup.add_argument(
        "--model", metavar="DIR", help="checkpoint folder (its config.json will do), hub id or nano; default: the published sizes"
    )
    warmup.add_argument(
        "--dtype",
        action="append",
        type=dtype_option,
        metavar="{float32,bfloat16,float16}",
        help="may be given twice (default float16 and bfloat16; with --here auto)",
    )
    warmup.add_argument(
        "--backend",
        choices=("auto", "triton"),
        default="auto",
        help="triton: those kernels too in whose place auto takes a library's (default auto)",
    )
    warmup.add_argument("--training", action="store_true", help="the backward pass too")
    warmup.add_argument("--compile", action="store_true", help="with --here: torch.compile's part too")
    warmup.add_argument("--device", help="with --here: cuda, cpu, ... or auto (default: a GPU if there is one)")
    warmup.add_argument("--quantize", choices=("int8", "int4", "fp8"), help="with --here: as of run")
    warmup.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    warmup.set_defaults(action=command_warmup)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    tolerate_other_encodings()
    logging.basicConfig(format="mg-fast: %(levelname)s: %(message)s", level=logging.DEBUG if args.debug else logging.WARNING)
    try:
        code = args.action(args)
        # here, where a reader that went away can be met, and not in the interpreter's own flush at its end
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("mg-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output went away; nothing is left to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        kind = "" if isinstance(error, MgFastError) else f"{type(error).__name__}: "
        print(f"mg-fast: error: {shortened(kind + message)}", file=sys.stderr)
        return next((code for cls, code in EXIT_CODES if isinstance(error, cls)), 1)


def _load(args):
    # the imports take seconds, and usage errors should not wait for them
    from ..models.templates import get_template

    if args.template is not None:
        get_template(args.template)
    from transformers.utils import logging as transformers_logging

    from ..pipeline import load

    if not args.debug:
        transformers_logging.set_verbosity_error()
    pipeline = load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        backend=args.backend,
        quantize=args.quantize,
        template=args.template,
        base_model=args.model_base,
        allow_long=args.allow_long,
        compiled=args.compile,
    )
    print(f"loaded {args.model} on {pipeline.device} in {pipeline.load_seconds:.1f} s (template {pipeline.template})", file=sys.stderr)
    print(f"weights: {pipeline.weights}", file=sys.stderr)
    return pipeline


def _options(args) -> dict:
    return {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}


def _open_pictures(args, files: list[str]) -> list:
    """The pictures of a command, as far as they can be wrong read and tried before the model's gigabytes are read."""
    from ..models.base64_text import looks_like_base64, refusal
    from ..models.urls import expanded, is_url

    for file in files:
        # the commonest slip, told before anything is imported
        if not (is_url(file) or os.path.exists(expanded(file))):
            raise PictureError(refusal(len(file)) if looks_like_base64(file) else f"{file}: no such file")
    from ..models import builtin as boxed
    from ..models.pictures import open_picture

    model = boxed.resolve(args.model)
    pictures = [open_picture(file, allow_urls=args.allow_urls) for file in files]
    if pictures:
        from ..models.mini_gemini.processing import MiniGeminiProcessor

        # and what this model can make of them, which its configuration tells
        MiniGeminiProcessor.from_pretrained(model, template=args.template, base_model=args.model_base).image_processor(pictures)
    return pictures


def command_run(args) -> int:
    if not args.prompt.strip():
        raise PromptError("--prompt is empty")
    check_text(args.prompt, "--prompt")
    pictures = _open_pictures(args, args.image)
    pipeline = _load(args)
    began = time.perf_counter()
    if args.json or args.profile:
        answer = pipeline.chat(args.prompt, pictures, profile=args.profile, **_options(args))
        seconds = time.perf_counter() - began
    if args.json:
        document = {
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "image_tokens": answer.image_tokens,
            "cached_tokens": answer.cached_tokens,
            "new_tokens": len(answer.token_ids),
            "weight_bytes": {"language_model": pipeline.weights.language_model, "vision": pipeline.weights.vision},
            "load_s": round(pipeline.load_seconds, 3),
            "answer_s": round(seconds, 3),
        }
        if args.profile:
            document["stages"] = [stage._asdict() for stage in answer.stages]
            document["first_use_s"] = {what: round(s, 3) for what, s in pipeline.first_use.items()}
        print(json.dumps(document))
        return 0
    if args.profile:
        from ..runtime.meter import format_stages

        print(answer.text)
        print(_first_use(pipeline.first_use), file=sys.stderr)
        print(format_stages(answer.stages), file=sys.stderr)
        return 0
    _print_stream(pipeline.chat(args.prompt, pictures, stream=True, **_options(args)))
    return 0


def command_explain(args) -> int:
    if args.prompt is not None and not args.prompt.strip():
        raise PromptError("--prompt is empty: leave it out, and all queries count alike")
    check_text(args.prompt or "", "--prompt")
    [picture] = _open_pictures(args, [args.image])
    explanation = _load(args).explain(picture, args.prompt, max_new_tokens=args.max_new_tokens, windows=args.windows)
    explanation.image.save(args.out)
    if explanation.answer is not None:
        print(explanation.answer.text)
    print(f"drawn to {args.out}", file=sys.stderr)
    return 0


def _first_use(seconds: dict[str, float]) -> str:
    """What is done once, and what it took."""
    return "\n".join(f"at first use: {what}: {s:.2f} s" for what, s in seconds.items())


def command_chat(args) -> int:
    pipeline = _load(args)
    import torch

    if sys.stdin.isatty():
        # line editing and history at the prompt, where Python has it
        if importlib.util.find_spec("readline"):
            import readline  # noqa: F401
        print(CHAT_HELP)
    images: list = []
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return 0
        command, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            if command in ("/quit", "/exit"):
                return 0
            if command == "/help":
                print(CHAT_HELP)
            elif command == "/reset":
                pipeline.reset()
                images = []
                print("(conversation forgotten)")
            elif command == "/image":
                images.append(_checked_picture(pipeline, rest.strip().strip("'\"")))
                print(f"({len(images)} picture{'s' if len(images) > 1 else ''} with the next question)")
            elif command.startswith("/"):
                print(f"unknown command {shortened(command, 80)}\n{CHAT_HELP}")
            else:
                print("model> ", end="", flush=True)
                _print_stream(pipeline.chat(line, images, stream=True, **_options(args)))
                images = []
        except KeyboardInterrupt:
            # stops the answer, not the conversation
            print("\n(interrupted; this turn is not kept)")
        except (PictureError, PromptError, FloatingPointError, torch.OutOfMemoryError) as error:
            # They are this question's own, and the next one may well be answered.
            print(f"{error}")


def _checked_picture(pipeline, file: str):
    from ..models.pictures import open_picture

    if not file:
        raise PictureError("/image needs a file: /image FILE")
    # kept decoded, and all of its errors now: one that failed only with its question would fail with every later one
    image = open_picture(file)
    pipeline.processor.image_processor(image)
    return image


def _print_stream(pieces) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def command_doctor(args) -> int:
    import torch

    from ..ops import backend as backends
    from ..runtime import cpu_dtype

    print(f"mg_fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\npackages")
    for name, why in (
        ("torch", ""),
        ("torchvision", ""),
        ("transformers", ""),
        ("accelerate", ""),
        ("timm", "high-resolution tower"),
        ("open_clip_torch", ""),
        ("safetensors", ""),
        ("sentencepiece", "tokenizers"),
        ("protobuf", "tokenizers"),
        ("pillow", "pictures"),
        ("triton", "kernels; Linux only"),
        ("flash-attn", "extra `flash`"),
        ("torchao", "extra `quant`"),
        ("diffusers", "extra `gen`"),
    ):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"  {name:<16} {version}{f'  ({why})' if why else ''}")

    print("\nhardware")
    print(f"  CPU: {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads")
    print(f"  CPU: {cpu_dtype.describe()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            print(f"  GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}")
    else:
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is built without CUDA"
        print(f"  GPU: none that torch can use ({built})")

    print("\nbackends (auto takes the fastest that can run, as far as it has been measured)")
    try:
        # The modules that own the two towers register their records when they are imported.
        from ..models.mini_gemini import modeling  # noqa: F401
    except ImportError as error:
        print(f"  the towers cannot be imported: {error}")
    for operation in backends.OPERATIONS:
        for device in devices:
            chosen = backends.choose(operation, "auto", device)
            print(f"  {operation} on {device}: auto runs {chosen}")
            for name in backends.BACKENDS:
                reason = backends.why_not(operation, name, device)
                print(f"    {name:<10} {'can run' if reason is None else 'cannot: ' + reason}")
    return 0


def command_warmup(args) -> int:
    if args.here:
        return _warm_up_here(args)
    for option in ("compile", "device", "quantize"):
        if getattr(args, option):
            raise BackendError(f"--{option} needs --here: ahead of time only our own kernels are compiled")
    from ..models.mini_gemini import ahead_of_time as warmup

    warmup.check()
    from ..runtime.dtypes import wanted_dtype

    if "auto" in (args.dtype or ()):
        raise BackendError("--dtype auto needs --here: ahead of time it is not known what a checkpoint holds")
    dtypes = [wanted_dtype(name) for name in dict.fromkeys(args.dtype or ("float16", "bfloat16"))]
    configs = [warmup.model_config(args.model)] if args.model is not None else warmup.published_configs()
    done = []
    for kernel in warmup.warm_up(list(dict.fromkeys(args.arch)), dtypes, configs, training=args.training, backend=args.backend):
        state = "cached" if kernel.seconds is None else f"{kernel.seconds:.1f} s"
        dtype = str(kernel.dtype).removeprefix("torch.")
        print(f"{kernel.name:<26} sm_{kernel.architecture:<4} {dtype:<9} {kernel.image_size:>5} pixels  {state}", flush=True)
        done.append(kernel)
    fresh = sum(kernel.seconds is not None for kernel in done)
    print(f"{len(done)} kernels in {warmup.cache_folder()}: {fresh} compiled now, {len(done) - fresh} were there")
    print("Triton's launchers in C are still built at the first launch on the machine with the GPU, by its C compiler, in about a second.")
    return 0


def _warm_up_here(args) -> int:
    if args.model is None:
        raise CheckpointError("--here needs --model: what is compiled depends on the weights' shapes")
    if args.training:
        raise BackendError("--training compiles kernels ahead of time: with --arch")
    from ..pipeline import load

    for dtype in dict.fromkeys(args.dtype or ("auto",)):
        pipeline = load(args.model, dtype=dtype, device=args.device, backend=args.backend, quantize=args.quantize, compiled=args.compile)
        print(f"loaded {args.model} on {pipeline.device}: {pipeline.load_seconds:.1f} s")
        print(_first_use(pipeline.warm_up()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
