"""python -m bench list | run | compare | ...: what can be measured, measured, and held against what was measured
before.
"""

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path


def main(words: list[str] | None = None) -> int:
    args = _parser().parse_args(words)
    # a job that a script started in the background inherits that it is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # what a user can mend is one line; all else is ours, and shows where it happened
        if type(error).__name__ not in ("UnknownCase", "UnknownName", "NoDevice", "BadRecord"):
            raise
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Latency and memory of mg_fast against the plain PyTorch path."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="the cases and their providers")
    _choose(command)
    command.set_defaults(run=_list)

    command = commands.add_parser("run", help="measure cases; the last line of stdout is one JSON document")
    _choose(command)
    command.add_argument(
        "--quick", action="store_true", help="patch info mining at its real size, in two minutes on two cores"
    )
    command.add_argument(
        "--provider",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one and the baseline; may be repeated",
    )
    command.add_argument(
        "--seconds", type=float, default=20, help="for one case, on a GPU a tenth of it for each provider; default 20"
    )
    command.add_argument(
        "--kernels", action="store_true", help="also a table of the kernels of those providers that have one"
    )
    command.add_argument(
        "--no-memory", action="store_true", help="leave out peak memory (on a CPU a process per provider)"
    )
    command.add_argument("--out", type=Path, help="keep the document here, as it grows")
    command.add_argument("--save", action="store_true", help="keep every case under bench/results, by device")
    command.add_argument(
        "--trace",
        type=Path,
        help="measure nothing: run every provider once under torch.profiler, and write a trace for Perfetto here",
    )
    command.set_defaults(run=_run)

    command = commands.add_parser("compare", help="two documents, or folders of them: do their ratios agree?")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.add_argument(
        "--within", type=float, default=0.10, help="how far ratios may differ; exit status 1 beyond; default 0.10"
    )
    command.set_defaults(run=_compare)

    command = commands.add_parser(
        "tune", help="times tiles of the kernels on the GPU at hand; prints entries of configs.py to review"
    )
    command.add_argument(
        "kernels", nargs="*", metavar="KERNEL", help="patch_mining, dwconv_norm, pointwise, dual_resize; default: all"
    )
    command.add_argument("--seconds", type=float, default=60, help="for all of it; default 60")
    command.add_argument("--best", type=int, default=3, help="how many tiles of each entry to print; default 3")
    command.set_defaults(run=_tune)

    command = commands.add_parser(
        "gpu", help="everything that a borrowed GPU should tell, within minutes, into at most 7 files"
    )
    command.add_argument("--out", type=Path, help="the folder")
    command.add_argument(
        "--steps", nargs="+", default=[], metavar="NAME", help="only these, by name or shell pattern; see --dry-run"
    )
    command.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on where an earlier run was cut; without --out in its own folder"
    )
    command.add_argument("--minutes", type=float, default=6, help="for all of it; default 6")
    command.add_argument("--device", default="cuda", help="cpu or cuda; default cuda")
    command.add_argument(
        "--plan", choices=("full", "tiny"), default="full", help="tiny: a minute on a CPU, to try it out"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print the steps, their budgets and what they measure, and run none"
    )
    command.set_defaults(run=_gpu, parser=command)

    command = commands.add_parser("keep", help="keep what `gpu` found under bench/results, by device")
    command.add_argument("folder", type=Path, help="the --out of `gpu`")
    command.set_defaults(run=_keep)

    command = commands.add_parser(
        "smoke", help="launch every kernel once on a small input, on a GPU under compute-sanitizer, too"
    )
    command.add_argument("--device", help="cpu or cuda; default: a GPU where there is one")
    command.add_argument("--once", action="store_true", help="launch in this process alone, and check nothing")
    command.add_argument("--seconds", type=float, default=50, help="for all of it; default 50")
    command.set_defaults(run=_smoke)

    command = commands.add_parser("ceilings", help="the machine, and what a copy and large matrix products reach on it")
    command.add_argument("--device", help="cpu or cuda; default: a GPU where there is one")
    command.add_argument("--out", type=Path, help="keep the document here")
    command.set_defaults(run=_ceilings)

    command = commands.add_parser(
        "memory", help="memory, bytes, launches and FLOP of the published models, predicted without a GPU"
    )
    command.add_argument("cases", nargs="*", help="names, shell patterns or groups; default: all")
    command.add_argument("--hd", action="store_true", help="only those of the HD models")
    command.add_argument(
        "--check", action="store_true", help="hold them against what is recorded; exit status 1 where they differ"
    )
    command.add_argument("--save", action="store_true", help="record them, all, in bench/results/predicted.json")
    command.set_defaults(run=_memory)

    command = commands.add_parser(
        "roofline", help="from shapes alone: FLOP, bytes and the least time of an answer's stages on a GPU"
    )
    command.add_argument("--gpu", default="h200", help="a100-40, a100-80, h100, h200, b200, l40s or 4090; default h200")
    command.add_argument("--model", default="7b", help="2b, 7b, 8b, 13b, 8x7b or 34b, each also as 7b-hd; default 7b")
    command.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32; default bfloat16")
    command.add_argument("--text-tokens", type=int, default=64, help="of the prompt, beside the picture's; default 64")
    command.add_argument("--new-tokens", type=int, default=128, help="of the answer; default 128")
    command.add_argument("--batch", type=int, default=1, help="answers at once, a picture each; default 1")
    command.add_argument(
        "--measured", type=Path, help="a document measured on a GPU, or a folder of such: its rates and times beside"
    )
    command.set_defaults(run=_roofline)

    command = commands.add_parser(
        "report", help="tables and a page from bench/results; without an option the tables are printed"
    )
    command.add_argument("--readme", action="store_true", help="put the tables between the markers of README.md")
    command.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page of pictures")
    command.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where README.md is not what the records give"
    )
    command.set_defaults(run=_report)

    # for `gpu`, whose steps are processes of their own
    command = commands.add_parser("step")
    command.add_argument("name")
    command.add_argument("--plan", default="full")
    command.add_argument("--device", default="cuda")
    for option in ("--out", "--done", "--ceilings", "--watch"):
        command.add_argument(option, type=Path)
    command.add_argument("--hangs-after", type=float)
    command.add_argument("--compiling-hangs-after", type=float)
    command.set_defaults(run=_step)

    # for `run`, whose providers' memory is measured in processes of their own
    command = commands.add_parser("peak")
    command.add_argument("case")
    command.add_argument("provider")
    command.set_defaults(run=_peak)
    return parser


def _choose(command: argparse.ArgumentParser) -> None:
    command.add_argument("cases", nargs="*", help="names, shell patterns or groups; default: those made for the device")
    command.add_argument("--device", help="cpu or cuda; default: a GPU where there is one")


def _device(args: argparse.Namespace) -> str:
    import torch

    from .run import check_device

    return check_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _list(args: argparse.Namespace) -> int:
    from .cases import all_cases
    from .errors import NoDevice
    from .registry import choose

    if args.device not in (None, "cpu", "cuda"):
        # `list` needs no GPU to tell what there is for one
        raise NoDevice(f"unknown device {args.device!r}: expected cpu or cuda")
    # what is there on either device, unless one is asked for
    cases = choose(all_cases(), args.cases or ([] if args.device else ["*"]), args.device or "cpu")
    for case in cases:
        print(
            f"{case.name:<44} {'quick' if case.quick else '':<6} {'/'.join(case.devices):<9} {'; '.join(case.providers)}"
        )
    return 0


def _run(args: argparse.Namespace) -> int:
    from . import records
    from .cases import all_cases
    from .registry import QUICK_PROVIDERS, choose, choose_providers
    from .run import run

    device = _device(args)
    cases = choose(all_cases(), args.cases, device, quick=args.quick)
    cases = choose_providers(cases, args.provider or (QUICK_PROVIDERS if args.quick else ()))
    if args.trace:
        from mg_fast.testing.environment import environment

        from .trace import trace

        print(
            json.dumps(
                {**environment(), "device": device, "trace": str(args.trace), "cases": trace(cases, device, args.trace)}
            )
        )
        return 0
    # where it is kept says nothing of how it was measured
    words = [word for i, word in enumerate(sys.argv[1:]) if word != "--out" and sys.argv[i] != "--out"]
    command = shlex.join(["python", "-m", "bench", *words])
    document = run(
        cases,
        device,
        seconds=args.seconds,
        memory=not args.no_memory,
        kernels=args.kernels,
        out=args.out,
        command=command,
    )
    if args.save:
        for path in records.save(document):
            print(f"kept {path}", file=sys.stderr)
    print(json.dumps(document))
    return _status(document)


def _status(document: dict) -> int:
    """The exit status of what measured a document."""
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
    options = {
        "names": args.steps,
        "resume": args.resume,
        "device": args.device,
        "plan": args.plan,
        "dry": args.dry_run,
    }
    return gpu(args.out, minutes=args.minutes, **options)


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
    from .gpu.smoke import smoke

    return smoke(_device(args), once=args.once, seconds=args.seconds)


def _ceilings(args: argparse.Namespace) -> int:
    from .run import run

    print(json.dumps(run([], _device(args), out=args.out)))
    return 0


def _memory(args: argparse.Namespace) -> int:
    from . import memory

    return memory.main(args.cases, hd=args.hd, check=args.check, save=args.save)


def _roofline(args: argparse.Namespace) -> int:
    from .roofline import ModelledAnswer, table

    print(
        table(
            args.gpu,
            ModelledAnswer(args.model, args.dtype, args.batch, args.text_tokens, args.new_tokens),
            args.measured,
        )
    )
    return 0


def _report(args: argparse.Namespace) -> int:
    from .report import report

    told = report(readme=args.readme, check=args.check, html=args.html)
    print("\n".join(told), file=sys.stderr if args.check else sys.stdout, end="\n" if told else "")
    return int(args.check and bool(told))


def _peak(args: argparse.Namespace) -> int:
    import torch

    from . import measure
    from .cases import all_cases

    case = all_cases()[args.case]
    with measure.memory_within_reach("cpu"), torch.no_grad():
        call = case.providers[args.provider](case.make("cpu"))
        # warm: what is made once is not a call's
        call()
        peak = measure.peak_mib(call, "cpu")
    print("unknown" if peak is None else peak)
    return 0


if __name__ == "__main__":
    sys.exit(main())
