"""mg-fast doctor: shows what is installed, and which backends can run on this machine."""

import argparse
import importlib.metadata
import os
import platform

from .. import __version__


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show what is installed, and which backends can run on this machine",
        description="Shows the installed packages, the hardware, and, for every operation, which backends can run on "
        "this machine, or why they cannot.",
    )
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(action=command)


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
        ("open_clip_torch", ""),
        ("safetensors", ""),
        ("sentencepiece", "tokenizers"),
        ("protobuf", "tokenizers"),
        ("pillow", "pictures"),
        ("triton", "kernels; Linux only"),
        ("flash-attn", "extra `flash`"),
        ("torchao", "extra `quant`"),
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
