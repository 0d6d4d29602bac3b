"""The command `python -m bench`: its parser, and a function for each of its subcommands."""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import BenchError, NoDevice

# Each command imports what it needs when it runs: torch and the models take seconds.


def main(words: list[str] | None = None) -> int:
    args = _parser().parse_args(words)
    # A job that a shell script starts in the background would ignore interrupts; here they must end it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measures latency and memory of mg_fast against the plain PyTorch path."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], **options) -> Callable[..., argparse.Action]:
        """Adds a command, and returns what adds its arguments."""
        told = options.get("help")
        command = commands.add_parser(name, description=told and f"{told[0].upper()}{told[1:]}.", **options)
        command.set_defaults(run=run, parser=command)
        return command.add_argument

    cases = {"nargs": "*", "help": "names, shell patterns or groups (default: the cases made for the device)"}
    device = {"help": "cpu or cuda (default: a GPU if there is one)"}

    option = add("list", _list, help="print the cases and their providers")
    option("cases", **cases)
    option("--device", **device)

    option = add("run", _run, help="measure cases; the last line on stdout is one JSON document")
    option("cases", **cases)
    option("--device", **device)
    option("--quick", action="store_true", help="patch info mining at its real size, in two minutes on two cores")
    one = "measure only this provider and the baseline; may be given several times"
    option("--provider", action="append", default=[], metavar="NAME", help=one)
    seconds = "time for the turns of one case; on a GPU each provider gets a tenth of it (default: 20)"
    option("--seconds", type=float, default=20, help=seconds)
    kernels = "also record a table of kernels, for the providers that offer one"
    option("--kernels", action="store_true", help=kernels)
    option(
        "--no-memory",
        action="store_true",
        help="do not measure peak memory, which on a CPU takes a process for each provider",
    )
    option("--out", type=Path, help="write the document to this file, case by case")
    option("--save", action="store_true", help="write a record of every case under bench/results, by device")
    trace = "measure nothing: run every provider once under torch.profiler, and write a trace for Perfetto here"
    option("--trace", type=Path, help=trace)

    option = add(
        "compare", _compare, help="say whether the ratios of two documents, or of two folders of documents, agree"
    )
    option("before", type=Path, help="a document that `run --out` wrote, or a folder such as bench/results/cpu")
    option("after", type=Path, help="the document or folder to compare with it")
    within = "share by which ratios may differ; if one differs by more, the exit status is 1 (default: 0.10)"
    option("--within", type=float, default=0.10, help=within)

    option = add("tune", _tune, help="time tiles of the kernels on this GPU, and print entries of configs.py to review")
    named = "a file under kernels/, such as patch_mining (default: all of them)"
    option("kernels", nargs="*", metavar="KERNEL", help=named)
    option("--seconds", type=float, default=60, help="time for the whole command (default: 60)")
    option("--best", type=int, default=3, help="how many tiles of each entry to print (default: 3)")

    option = add("gpu", _gpu, help="measure everything on a borrowed GPU, in minutes, and write at most 7 files")
    option("--out", type=Path, help="the folder for the results")
    steps = "run only these steps, by name or shell pattern; --dry-run lists them"
    option("--steps", nargs="+", default=[], metavar="NAME", help=steps)
    resume = "continue an earlier run that was cut off; without --out, in its own folder"
    option("--resume", type=Path, metavar="DIR", help=resume)
    option("--minutes", type=float, default=6, help="time for the whole command (default: 6)")
    option("--device", default="cuda", help="cpu or cuda (default: cuda)")
    option(
        "--plan",
        choices=("full", "tiny"),
        default="full",
        help="tiny: one to two minutes on a CPU, to try the command out",
    )
    dry_run = "print the steps, their budgets and what they measure, and run none"
    option("--dry-run", action="store_true", help=dry_run)

    option = add("keep", _keep, help="copy the records of a `gpu` run to bench/results, by device")
    option("folder", type=Path, help="the folder that was the --out of `gpu`")

    option = add(
        "smoke", _smoke, help="launch every kernel once on a small input, on a GPU also under compute-sanitizer"
    )
    option("--device", **device)
    option("--once", action="store_true", help="launch in this process alone, and check nothing")
    option("--seconds", type=float, default=50, help="time for the whole command (default: 50)")

    option = add(
        "ceilings", _ceilings, help="print the machine, and the rates of a copy and of large matrix products on it"
    )
    option("--device", **device)
    option("--out", type=Path, help="write the document to this file")

    option = add(
        "memory", _memory, help="predict memory, bytes, launches and FLOP of the published models, without a GPU"
    )
    option("cases", nargs="*", help="names, shell patterns or groups (default: all)")
    option("--hd", action="store_true", help="only the cases of the HD models")
    check = "compare the predictions with the recorded ones; if they differ, the exit status is 1"
    option("--check", action="store_true", help=check)
    option("--save", action="store_true", help="record all predictions in bench/results/predicted.json")

    option = add(
        "roofline", _roofline, help="compute FLOP, bytes and least time of an answer's stages on a GPU, from shapes"
    )
    option("--gpu", default="h200", help="a100-40, a100-80, h100, h200 (default), b200, l40s or 4090")
    option("--model", default="7b", help="2b, 7b (default), 8b, 13b, 8x7b or 34b; with -hd for HD, as in 7b-hd")
    option("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    option(
        "--text-tokens",
        type=int,
        default=64,
        help="number of text tokens in the prompt, besides the image tokens (default: 64)",
    )
    option("--new-tokens", type=int, default=128, help="number of tokens in the answer (default: 128)")
    option("--batch", type=int, default=1, help="number of answers at once, each about one picture (default: 1)")
    measured = "also show the rates and times of this document (or folder of documents) from a GPU"
    option("--measured", type=Path, help=measured)

    option = add(
        "report", _report, help="make tables and a page from bench/results; without an option, print the tables"
    )
    readme = "write the tables between the markers of README.md and docs/benchmarks.md"
    option("--readme", action="store_true", help=readme)
    option("--html", type=Path, metavar="FILE", help="write one self-contained page of pictures")
    check = "write nothing; if a table of these pages is not what the records give, the exit status is 1"
    option("--check", action="store_true", help=check)

    # `gpu` runs this, since each of its steps is a process of its own.
    option = add("step", _step)
    option("name")
    option("--plan", default="full")
    option("--device", default="cuda")
    for name in ("--out", "--done", "--ceilings", "--watch"):
        option(name, type=Path)
    option("--hangs-after", type=float)
    option("--compiling-hangs-after", type=float)

    # `run` runs this, since each provider's memory is measured in a process of its own.
    option = add("peak", _peak)
    option("case")
    option("provider")
    return parser


def _list(args: argparse.Namespace) -> int:
    from .cases import all_cases
    from .registry import choose

    if args.device not in (None, "cpu", "cuda"):
        # `list` needs no GPU to tell what there is for one.
        raise NoDevice(f"unknown device {args.device!r}: expected cpu or cuda")
    # Without --device, the cases of both devices are listed.
    patterns = args.cases or ([] if args.device else ["*"])
    for case in choose(all_cases(), patterns, args.device or "cpu"):
        quick, devices = "quick" if case.quick else "", "/".join(case.devices)
        print(f"{case.name:<44} {quick:<6} {devices:<9} {'; '.join(case.providers)}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from . import records
    from .cases import all_cases
    from .devices import check_device
    from .registry import QUICK_PROVIDERS, choose, choose_providers
    from .run import RunOptions, run

    device = check_device(args.device)
    cases = choose(all_cases(), args.cases, device, quick=args.quick)
    cases = choose_providers(cases, args.provider or (QUICK_PROVIDERS if args.quick else ()))
    if args.trace:
        from mg_fast.testing.environment import environment

        from .trace import trace

        traced = {"device": device, "trace": str(args.trace), "cases": trace(cases, device, args.trace)}
        print(json.dumps({**environment(), **traced}))
        return 0
    # The recorded command leaves --out out, because the place of a document does not change what was measured.
    words = [word for i, word in enumerate(sys.argv[1:]) if word != "--out" and sys.argv[i] != "--out"]
    options = RunOptions(args.seconds, memory=not args.no_memory, kernels=args.kernels)
    document = run(cases, device, options, out=args.out, command=shlex.join(["python", "-m", "bench", *words]))
    if args.save:
        for path in records.save(document):
            print(f"kept {path}", file=sys.stderr)
    print(json.dumps(document))
    return _status(document)


def _status(document: dict) -> int:
    """The exit status of a command that measured a document."""
    if document["ended"] == "interrupted":
        return 130
    return int(not document["complete"] or any(row["ok"] is False for row in document["cases"]))


def _compare(args: argparse.Namespace) -> int:
    from . import records
    from .compare import compare

    table, agree = compare(records.read(args.before), records.read(args.after), args.within)
    print(table)
    return 0 if agree else 1


def _tune(args: argparse.Namespace) -> int:
    from .tune import tune

    print(tune(args.kernels, args.seconds, best=args.best))
    return 0


def _gpu(args: argparse.Namespace) -> int:
    from .gpu.command import gpu

    if args.out is None and args.resume is None and not args.dry_run:
        args.parser.error("expected --out DIR, --resume DIR, or --dry-run")
    options = {"names": args.steps, "resume": args.resume, "device": args.device, "plan": args.plan}
    return gpu(args.out, minutes=args.minutes, dry=args.dry_run, **options)


def _step(args: argparse.Namespace) -> int:
    from .gpu.command import step
    from .watch import Watchdog

    watch = Watchdog(args.watch, args.hangs_after, args.compiling_hangs_after)
    options = {"plan": args.plan, "device": args.device, "out": args.out, "done": args.done, "ceilings": args.ceilings}
    return _status(step(args.name, watch=watch, **options))


def _keep(args: argparse.Namespace) -> int:
    from .gpu.command import keep

    for path in keep(args.folder):
        print(f"kept {path}")
    return 0


def _smoke(args: argparse.Namespace) -> int:
    from .devices import check_device
    from .gpu.smoke import smoke

    return smoke(check_device(args.device), once=args.once, seconds=args.seconds)


def _ceilings(args: argparse.Namespace) -> int:
    from .devices import check_device
    from .run import run

    print(json.dumps(run([], check_device(args.device), out=args.out)))
    return 0


def _memory(args: argparse.Namespace) -> int:
    from . import memory

    return memory.main(args.cases, hd=args.hd, check=args.check, save=args.save)


def _roofline(args: argparse.Namespace) -> int:
    from .costs.answer import ModelledAnswer
    from .roofline import table

    answer = ModelledAnswer(args.model, args.dtype, args.batch, args.text_tokens, args.new_tokens)
    print(table(args.gpu, answer, args.measured))
    return 0


def _report(args: argparse.Namespace) -> int:
    from .report import report

    told = report(readme=args.readme, check=args.check, html=args.html)
    print("\n".join(told), file=sys.stderr if args.check else sys.stdout, end="\n" if told else "")
    return int(args.check and bool(told))


def _peak(args: argparse.Namespace) -> int:
    import torch

    from . import peaks
    from .cases import all_cases

    case = all_cases()[args.case]
    with peaks.memory_within_reach("cpu"), torch.no_grad():
        call = case.providers[args.provider](case.make("cpu"))
        # The first call warms up: what is made once does not belong to a call.
        call()
        peak = peaks.peak_mib(call, "cpu")
    print("unknown" if peak is None else peak)
    return 0


if __name__ == "__main__":
    sys.exit(main())
