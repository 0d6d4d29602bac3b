"""mg-fast doctor: shows what is installed, and which backends can run on this machine."""

import argparse
import importlib.metadata
import os
import platform

from .. import __version__

# The oldest and the newest release of a package that tests were run with (constraints.txt, constraints-newest.txt).
TESTED = {
    "torch": ("2.11.0", "2.14.1"),
    "torchvision": ("0.26.0", "0.29.1"),
    "transformers": ("5.17.0", "5.24.0"),
    "accelerate": ("1.15.0", "1.15.0"),
    "timm": ("1.0.31", "1.0.31"),
    "triton": ("3.6.0", "3.8.0"),
    "torchao": ("0.18.0", "0.18.0"),
}


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show what is installed, and which backends can run on this machine",
        description="Shows the installed packages, the hardware, and, for every operation, which backends can run on "
        "this machine, or why they cannot.",
    )
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(action=command)


def beside_tested(name: str, version: str) -> str | None:
    """Says with which releases of a package mg_fast was tested, and whether `version` lies outside them.

    It returns None for a package that is not in `TESTED`.
    """
    if name not in TESTED:
        return None
    from packaging.version import Version

    oldest, newest = TESTED[name]
    tested = f"tested: {oldest}" if oldest == newest else f"tested: {oldest} to {newest}"
    release, first, last = (Version(text).release for text in (version, oldest, newest))
    return f"{tested}{', this is newer' if release > last else ', this is older' if release < first else ''}"


def command(args) -> int:
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
        ("diffusers", "extra `draw`: MM-Interleaved's pictures"),
        ("open_clip_torch", ""),
        ("safetensors", ""),
        ("sentencepiece", "tokenizers"),
        ("protobuf", "tokenizers"),
        ("pillow", "pictures"),
        ("triton", "kernels; Linux only"),
        ("gradio", "extra `ui`: the web page"),
        ("flash-attn", "extra `flash`"),
        ("torchao", "extra `quant`"),
    ):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        else:
            why = "; ".join(filter(None, (why, beside_tested(name, version))))
        print(f"  {name:<16} {version}{f'  ({why})' if why else ''}")

    print("\nhardware")
    print(f"  CPU: {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads")
    print(f"  CPU: {cpu_dtype.describe()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            print(
                f"  GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"sm_{properties.major}{properties.minor}"
            )
    else:
        built = (
            f"this torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "this torch is built without CUDA"
        )
        print(f"  GPU: none that torch can use ({built})")

    print("\nbackends (auto takes the fastest one that can run, as far as speeds have been measured)")
    try:
        # The modules that own the two towers register their records when they are imported.
        from ..models.mini_gemini import modeling  # noqa: F401
    except Exception as error:
        # A broken library may raise anything, and this command is there to show what is broken.
        print(f"  the towers cannot be imported: {type(error).__name__}: {error}")
    for operation in backends.OPERATIONS:
        for device in devices:
            chosen = backends.choose(operation, "auto", device)
            print(f"  {operation} on {device}: auto runs {chosen}")
            for name in backends.BACKENDS:
                reason = backends.why_not(operation, name, device)
                print(f"    {name:<10} {'can run' if reason is None else 'cannot: ' + reason}")
    return 0
