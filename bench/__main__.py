"""python -m bench list | run | compare | ...: measures cases, and compares figures with what was measured before."""

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
    # A job that a script started in the background inherits that interrupts are ignored.
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
        prog="python -m bench", description="Latency and memory of mg_fast against the plain PyTorch path."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], **options) -> Callable[..., argparse.Action]:
        """Adds a command, and returns what adds its arguments."""
        command = commands.add_parser(name, **options)
        command.set_defaults(run=run, parser=command)
        return command.add_argument

    cases = {"nargs": "*", "help": "names, shell patterns or groups; default: the cases made for the device"}
    device = {"help": "cpu or cuda; default: a GPU where there is one"}

    option = add("list", _list, help="the cases and their providers")
    option("cases", **cases)
    option("--device", **device)

    option = add("run", _run, help="measure cases; the last line of stdout is one JSON document")
    option("cases", **cases)
    option("--device", **device)
    option("--quick", action="store_true", help="patch info mining at its real size, in two minutes on two cores")
    one = "only this provider and the baseline; may be repeated"
    option("--provider", action="append", default=[], metavar="NAME", help=one)
    seconds = "for one case, on a GPU a tenth of it for each provider; default 20"
    option("--seconds", type=float, default=20, help=seconds)
    kernels = "also a table of the kernels of the providers that have one"
    option("--kernels", action="store_true", help=kernels)
    option("--no-memory", action="store_true", help="leave out peak memory (on a CPU a process for each provider)")
    option("--out", type=Path, help="keep the document here, as it grows")
    option("--save", action="store_true", help="keep every case under bench/results, by device")
    trace = "measure nothing: run every provider once under torch.profiler, and write a trace for Perfetto here"
    option("--trace", type=Path, help=trace)

    option = add("compare", _compare, help="two documents, or folders of them: do their ratios agree?")
    option("before", type=Path)
    option("after", type=Path)
    within = "how far ratios may differ; exit status 1 where they differ by more; default 0.10"
    option("--within", type=float, default=0.10, help=within)

    option = add(
        "tune", _tune, help="times tiles of the kernels on the GPU at hand; prints entries of configs.py to review"
    )
    named = "a file under kernels/, such as patch_mining; default: all of them"
    option("kernels", nargs="*", metavar="KERNEL", help=named)
    option("--seconds", type=float, default=60, help="for all of it; default 60")
    option("--best", type=int, default=3, help="how many tiles of each entry to print; default 3")

    option = add("gpu", _gpu, help="everything that a borrowed GPU should tell, within minutes, into at most 7 files")
    option("--out", type=Path, help="the folder")
    steps = "only these steps, by name or shell pattern; see --dry-run"
    option("--steps", nargs="+", default=[], metavar="NAME", help=steps)
    resume = "go on where an earlier run was cut; without --out in its own folder"
    option("--resume", type=Path, metavar="DIR", help=resume)
    option("--minutes", type=float, default=6, help="for all of it; default 6")
    option("--device", default="cuda", help="cpu or cuda; default cuda")
    option("--plan", choices=("full", "tiny"), default="full", help="tiny: a minute on a CPU, to try it out")
    dry_run = "print the steps, their budgets and what they measure, and run none"
    option("--dry-run", action="store_true", help=dry_run)

    option = add("keep", _keep, help="keep what `gpu` found under bench/results, by device")
    option("folder", type=Path, help="the --out of `gpu`")

    option = add(
        "smoke", _smoke, help="launch every kernel once on a small input, on a GPU also under compute-sanitizer"
    )
    option("--device", **device)
    option("--once", action="store_true", help="launch in this process alone, and check nothing")
    option("--seconds", type=float, default=50, help="for all of it; default 50")

    option = add("ceilings", _ceilings, help="the machine, and what a copy and large matrix products reach on it")
    option("--device", **device)
    option("--out", type=Path, help="keep the document here")

    option = add(
        "memory", _memory, help="memory, bytes, launches and FLOP of the published models, predicted without a GPU"
    )
    option("cases", nargs="*", help="names, shell patterns or groups; default: all")
    option("--hd", action="store_true", help="only the cases of the HD models")
    check = "compare them with what is recorded; exit status 1 where they differ"
    option("--check", action="store_true", help=check)
    option("--save", action="store_true", help="record all of them in bench/results/predicted.json")

    option = add(
        "roofline", _roofline, help="from shapes alone: FLOP, bytes and the least time of an answer's stages on a GPU"
    )
    option("--gpu", default="h200", help="a100-40, a100-80, h100, h200, b200, l40s or 4090; default h200")
    option("--model", default="7b", help="2b, 7b, 8b, 13b, 8x7b or 34b, each also as 7b-hd; default 7b")
    option("--dtype", default="bfloat16", help="bfloat16, float16 or float32; default bfloat16")
    option("--text-tokens", type=int, default=64, help="of the prompt, beside the picture's; default 64")
    option("--new-tokens", type=int, default=128, help="of the answer; default 128")
    option("--batch", type=int, default=1, help="answers at once, a picture each; default 1")
    measured = "a document measured on a GPU, or a folder of documents: also shows its rates and times"
    option("--measured", type=Path, help=measured)

    option = add("report", _report, help="tables and a page from bench/results; without an option prints the tables")
    readme = "write the tables between the markers of README.md and docs/benchmarks.md"
    option("--readme", action="store_true", help=readme)
    option("--html", type=Path, metavar="FILE", help="write one self-contained page of pictures")
    check = "write nothing; exit status 1 where one of the two is not what the records give"
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
    # Unless a device is asked for, this is what there is on either.
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
    # Where the document is kept says nothing of how it was measured.
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
