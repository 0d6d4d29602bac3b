"""The command `python -m bench`: its parser, and a function for each of its subcommands."""

import argparse
import importlib
import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import BenchError, NoDevice

# Each command imports what it needs when it runs: torch and the models take seconds.


def main(words: list[str] | None = None) -> int:
    """Runs a command; returns its exit status, and prints the text of a command that returns one."""
    options = vars(_parser().parse_args(words))
    run = options.pop("run")
    # A job that a shell script starts in the background would ignore interrupts; here they must end it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if isinstance(run, str):
            module, function = run.split(":")
            run = getattr(importlib.import_module(f".{module}", __package__), function)
        result = run(**options)
        if isinstance(result, str):
            print(result)
        return result if isinstance(result, int) else 0
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

    def add(name: str, run: Callable | str, told: str | None = None) -> Callable[..., argparse.Action]:
        """Adds a command that calls `run`, or "module:function", with its options; returns what adds an option."""
        words = {"help": told, "description": f"{told[0].upper()}{told[1:]}."} if told else {}
        command = commands.add_parser(name, **words)
        command.set_defaults(run=run)
        return command.add_argument

    cases = {"nargs": "*", "help": "names, shell patterns or groups (default: the cases made for the device)"}
    device = {"help": "cpu or cuda (default: a GPU if there is one)"}

    option = add("list", _list, "print the cases and their providers")
    option("cases", **cases)
    option("--device", **device)

    option = add("run", _run, "measure cases; the last line on stdout is one JSON document")
    option("cases", **cases)
    option("--device", **device)
    option("--quick", action="store_true", help="patch info mining at its real size, in two minutes on two cores")
    one = "measure only this provider and the baseline; may be given several times"
    option("--provider", dest="providers", action="append", default=[], metavar="NAME", help=one)
    seconds = "time for the turns of one case; on a GPU each provider gets a tenth of it (default: 20)"
    option("--seconds", type=float, default=20, help=seconds)
    kernels = "also record a table of kernels, for the providers that offer one"
    option("--kernels", action="store_true", help=kernels)
    memory = "do not measure peak memory, which on a CPU takes a process for each provider"
    option("--no-memory", action="store_true", help=memory)
    option("--out", type=Path, help="write the document to this file, case by case")
    option("--save", action="store_true", help="write a record of every case under bench/results, by device")
    trace = "measure nothing: run every provider once under torch.profiler, and write a trace for Perfetto here"
    option("--trace", type=Path, help=trace)

    option = add("compare", _compare, "say whether the ratios of two documents, or of two folders of documents, agree")
    option("before", type=Path, help="a document that `run --out` wrote, or a folder such as bench/results/cpu")
    option("after", type=Path, help="the document or folder to compare with it")
    within = "share by which ratios may differ; if one differs by more, the exit status is 1 (default: 0.10)"
    option("--within", type=float, default=0.10, help=within)

    option = add("dtypes", "dtypes:measure", "time a CPU's products in 16 bits against float32, in models' shapes")
    results = Path(__file__).parent / "results"
    written = "write the document to this file (default: bench/results/cpu-dtypes.json)"
    option("--out", type=Path, default=results / "cpu-dtypes.json", help=written)

    option = add("tune", "tune:tune", "time tiles of the kernels on this GPU, and print entries of configs.py")
    named = "a file under kernels/, such as patch_mining (default: all of them)"
    option("kernels", nargs="*", metavar="KERNEL", help=named)
    option("--seconds", type=float, default=60, help="time for the whole command (default: 60)")
    option("--best", type=int, default=3, help="how many tiles of each entry to print (default: 3)")

    option = add("gpu", "gpu.command:gpu", "measure everything on a borrowed GPU in minutes, and write at most 7 files")
    option("--out", type=Path, help="the folder for the results")
    steps = "run only these steps, by name or shell pattern; --dry-run lists them"
    option("--steps", dest="names", nargs="+", default=[], metavar="NAME", help=steps)
    resume = "continue an earlier run that was cut off; without --out, in its own folder"
    option("--resume", type=Path, metavar="DIR", help=resume)
    option("--minutes", type=float, default=6, help="time for the whole command (default: 6)")
    option("--device", default="cuda", help="cpu or cuda (default: cuda)")
    tiny = "tiny: one to two minutes on a CPU, to try the command out"
    option("--plan", choices=("full", "tiny"), default="full", help=tiny)
    dry_run = "print the steps, their budgets and what they measure, and run none"
    option("--dry-run", dest="dry", action="store_true", help=dry_run)

    option = add("keep", "gpu.command:keep", "copy the records of a `gpu` run to bench/results, by device")
    option("folder", type=Path, help="the folder that was the --out of `gpu`")

    option = add("smoke", _smoke, "launch every kernel once on a small input, on a GPU also under compute-sanitizer")
    option("--device", **device)
    option("--once", action="store_true", help="launch in this process alone, and check nothing")
    option("--seconds", type=float, default=50, help="time for the whole command (default: 50)")

    option = add("ceilings", _ceilings, "print the machine, and the rates of a copy and of large matrix products on it")
    option("--device", **device)
    option("--out", type=Path, help="write the document to this file")

    option = add("memory", "memory:main", "predict memory, bytes, launches and FLOP of published models, without a GPU")
    option("patterns", nargs="*", metavar="cases", help="names, shell patterns or groups (default: all)")
    check = "compare the predictions with the recorded ones; if they differ, the exit status is 1"
    option("--check", action="store_true", help=check)
    option("--save", action="store_true", help="record all predictions in bench/results/predicted.json")
    train = (
        "predict a step of fine-tuning this model instead (7b, 34b-hd, ...): memory of each GPU under FSDP, and FLOP"
    )
    option("--train", metavar="MODEL", help=train)
    option("--stage", type=int, default=2, help="with --train: 1 or 2 (default: 2)")
    option("--devices", type=int, default=8, help="with --train: number of GPUs (default: 8)")
    option("--batch", type=int, default=8, help="with --train: samples of a GPU in one pass (default: 8)")
    tokens = "with --train: tokens of a sample, with those of its picture (default: 2048, in HD 4096)"
    option("--length", type=int, help=tokens)
    again = "with --train: keep all activations of the language model's layers"
    option("--no-checkpointing", dest="checkpointing", action="store_false", help=again)

    option = add("painters", "painters:main", "predict what SDXL takes beside the language models, from shapes")
    option("--save", dest="keep", action="store_true", help="record the predictions in bench/results/painters.json")

    option = add("serving", "serving_plan:main", "plan serving on 1, 8 and 64 GPUs, from shapes")
    option("--save", dest="keep", action="store_true", help="record the predictions in bench/results/serving.json")

    option = add("load", "load_table:main", "measure vLLM's server under load, against one answer after another")
    option("models", nargs="*", help="nano, 0.5b (default: both)")
    option("--requests", type=int, help="number of requests of each load (default: 200; 0.5b: 12)")
    option("--threads", type=int, help="threads of the server's engine, and of the pipeline (default: 1; 0.5b: 2)")
    option("--save", dest="keep", action="store_true", help="record the results in bench/results/serving-load.json")

    option = add("web", "web_load:main", "let many sessions of the web page ask at once, each about its own number")
    option("--sessions", type=int, default=50, help="sessions at once (default: 50)")
    option("--seconds", type=float, default=120, help="for how long they ask (default: 120)")
    option("--threads", type=int, default=1, help="threads of the page's process (default: 1)")
    option("--save", dest="keep", action="store_true", help="record the results in bench/results/web-load.json")

    add(
        "formulas",
        "formulas:table",
        "print FLOP and bytes of mining, the ConvNeXt tower and the synchronizer, by formula",
    )

    option = add("roofline", "roofline:table", "compute FLOP, bytes and least times of an answer on a GPU, from shapes")
    option("--gpu", default="h200", help="a100-40, a100-80, h100, h200 (default), b200, l40s or 4090")
    option("--model", default="7b", help="2b, 7b (default), 8b, 13b, 8x7b or 34b; with -hd for HD, as in 7b-hd")
    option("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    text = "number of text tokens in the prompt, besides the image tokens (default: 64)"
    option("--text-tokens", type=int, default=64, help=text)
    option("--new-tokens", type=int, default=128, help="number of tokens in the answer (default: 128)")
    option("--batch", type=int, default=1, help="number of answers at once, each about one picture (default: 1)")
    measured = "also show the rates and times of this document (or folder of documents) from a GPU"
    option("--measured", type=Path, help=measured)

    option = add("issue", "issue.command:issue", "predict times of kernels from the instructions they are compiled to")
    named = "names, shell patterns or groups (default: every kernel at its published shapes, in bfloat16)"
    option("cases", nargs="*", help=named)
    option("--device", default="h200", help="the GPU to predict for: h200 (default)")
    keep = "record all predictions in bench/results/issue.json"
    option("--save", dest="keep", action="store_true", help=keep)
    measured = "compare the recorded predictions with documents that a GPU measured, in this file or folder"
    option("--calibrate", type=Path, metavar="DIR", help=measured)

    option = add("report", _report, "make tables and a page from bench/results; without an option, print the tables")
    readme = "write the tables between the markers of README.md, docs/benchmarks.md and docs/kernels.md"
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


def _list(cases: list[str], device: str | None) -> None:
    from .cases import all_cases
    from .registry import choose

    if device not in (None, "cpu", "cuda"):
        # `list` needs no GPU to tell what there is for one.
        raise NoDevice(f"unknown device {device!r}: expected cpu or cuda")
    # Without --device, the cases of both devices are listed.
    for case in choose(all_cases(), cases or ([] if device else ["*"]), device or "cpu"):
        quick, devices = "quick" if case.quick else "", "/".join(case.devices)
        print(f"{case.name:<44} {quick:<6} {devices:<9} {'; '.join(case.providers)}")


def _run(
    cases: list[str], device: str | None, quick: bool, providers: list[str], out: Path, save: bool, trace: Path, **how
) -> int:
    from . import records, run
    from .cases import all_cases
    from .devices import check_device
    from .registry import QUICK_PROVIDERS, choose, choose_providers

    device = check_device(device)
    chosen = choose(all_cases(), cases, device, quick=quick)
    chosen = choose_providers(chosen, providers or (QUICK_PROVIDERS if quick else ()))
    if trace:
        from mg_fast.testing.environment import environment

        from .trace import trace as write_trace

        traced = {"device": device, "trace": str(trace), "cases": write_trace(chosen, device, trace)}
        print(json.dumps({**environment(), **traced}))
        return 0
    # The recorded command leaves --out out, because the place of a document does not change what was measured.
    words = [word for i, word in enumerate(sys.argv[1:]) if word != "--out" and sys.argv[i] != "--out"]
    options = run.RunOptions(how["seconds"], memory=not how["no_memory"], kernels=how["kernels"])
    document = run.run(chosen, device, options, out=out, command=shlex.join(["python", "-m", "bench", *words]))
    if save:
        for path in records.save(document):
            print(f"kept {path}", file=sys.stderr)
    print(json.dumps(document))
    return _status(document)


def _status(document: dict) -> int:
    """The exit status of a command that measured a document."""
    if document["ended"] == "interrupted":
        return 130
    return int(not document["complete"] or any(row["ok"] is False for row in document["cases"]))


def _compare(before: Path, after: Path, within: float) -> int:
    from . import records
    from .compare import compare

    table, agree = compare(records.read(before), records.read(after), within)
    print(table)
    return int(not agree)


def _step(name: str, watch: Path | None, hangs_after: float, compiling_hangs_after: float, **options) -> int:
    from .gpu.command import step
    from .watch import Watchdog

    return _status(step(name, watch=Watchdog(watch, hangs_after, compiling_hangs_after), **options))


def _smoke(device: str | None, **options) -> int:
    from .devices import check_device
    from .gpu.smoke import smoke

    return smoke(check_device(device), **options)


def _ceilings(device: str | None, out: Path | None) -> None:
    from .devices import check_device
    from .run import run

    print(json.dumps(run([], check_device(device), out=out)))


def _report(check: bool, **options) -> int:
    from .report import report

    told = report(check=check, **options)
    print("\n".join(told), file=sys.stderr if check else sys.stdout, end="\n" if told else "")
    return int(check and bool(told))


def _peak(case: str, provider: str) -> None:
    import torch

    from . import peaks
    from .cases import all_cases

    chosen = all_cases()[case]
    with peaks.memory_within_reach("cpu"), torch.no_grad():
        call = chosen.providers[provider](chosen.make("cpu"))
        # The first call warms up: what is made once does not belong to a call.
        call()
        peak = peaks.peak_mib(call, "cpu")
    print("unknown" if peak is None else peak)


if __name__ == "__main__":
    sys.exit(main())
