"""Runs cases: accuracy first, then time, then memory. The document grows case by case, and is written as it grows."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mg_fast.testing.environment import environment
from mg_fast.testing.tolerances import ieee_float32

from . import ceilings as machine
from . import gpu_timing, measure, peaks, records
from .check import check
from .clocks import ClockLog
from .gpu_timing import GpuLost
from .kernel_table import kernel_table
from .registry import Call, Case, Ceilings
from .rows import empty_row, fill_times, format_rows, why
from .watch import Watchdog


@dataclass
class RunOptions:
    """How cases are measured; the options of `python -m bench run` have the same names.

    Attributes:
        seconds: for the turns of one case, of which at least four are taken; on a GPU a tenth of it for each provider.
    """

    seconds: float = 20
    memory: bool = True
    kernels: bool = False
    watch: Watchdog = field(default_factory=Watchdog)


def run(
    cases: Sequence[Case],
    device: str,
    options: RunOptions | None = None,
    *,
    ceilings: Ceilings | None = None,
    out: Path | None = None,
    command: str = "",
) -> dict:
    """Measures cases on a device.

    Args:
        ceilings: of this device, where they were measured before.
        out: the file in which the document is kept as it grows.

    Returns:
        The document. `complete` is false where it was interrupted or the GPU was lost; `ended` says which.

    Raises:
        BadRecord: `out` cannot be written; nothing was measured then.
    """
    options = options or RunOptions()
    if out is not None:
        records.check_writable(out)
    ieee_float32()
    with ClockLog(device) as clocks:
        document, loaded = {**environment(), "device": device}, None
        if ceilings is None:
            ceilings = machine.measure_ceilings(device)
            loaded = clocks.since(machine.keep_busy(1.5)) if device == "cuda" else None
        document |= {
            "clocks_under_load": loaded,
            "ceilings": {"copy_gbps": ceilings.copy_gbps, "matmul_tflops": dict(ceilings.matmul_tflops)},
            "command": command,
            "complete": False,
            "ended": None,
            "cases": [],
        }
        if out is not None:
            records.write(out, document)
        try:
            for case, following in zip(cases, [*cases[1:], None]):
                print(f"{case.name} ...", file=sys.stderr, flush=True)
                rows = {name: empty_row(case, name) for name in case.providers}
                try:
                    run_case(case, device, ceilings, options, rows=rows, clocks=clocks)
                finally:
                    measured = [row for row in rows.values() if row["median_ms"] is not None or row["why"]]
                    document["cases"] += measured
                    print(format_rows(measured), file=sys.stderr, flush=True)
                    if out is not None:
                        records.write(out, document)
                if case.release is not None and (following is None or following.release is not case.release):
                    case.release()
            document["complete"] = True
        except KeyboardInterrupt:
            document["ended"] = "interrupted"
        except GpuLost as error:
            document["ended"] = f"the GPU is lost to this process, run the rest anew: {error}"
        finally:
            options.watch.end()
    if document["ended"]:
        print(f"{document['ended']}; what was measured so far is kept", file=sys.stderr)
    if out is not None:
        records.write(out, document)
    return document


def run_case(
    case: Case,
    device: str,
    ceilings: Ceilings,
    options: RunOptions,
    *,
    rows: dict[str, dict] | None = None,
    clocks: ClockLog | None = None,
) -> list[dict]:
    """Measures a case's providers, and returns a row for each.

    Args:
        rows: the same rows by provider (see `empty_row`), for a caller that needs them after an interrupt, too.

    Raises:
        GpuLost: the process can do no more on the GPU.
    """
    rows = {name: empty_row(case, name) for name in case.providers} if rows is None else rows
    if "torch._dynamo" in sys.modules:
        # Cases share their code: after eight shapes torch.compile would give up and run it eagerly.
        torch.compiler.reset()
    with peaks.memory_within_reach(device), torch.no_grad():
        try:
            options.watch.begin(case.name, list(rows), "making its inputs")
            inputs = case.make(device)
        except Exception as error:
            for row in rows.values():
                row["ok"], row["why"] = False, f"inputs: {why(error)}"
            gpu_timing.recover(device)
            return list(rows.values())
        calls = check(case, inputs, device, rows, options.watch)
        began = time.monotonic()
        for name, timing in _time(case, calls, device, rows, options).items():
            fill_times(rows[name], case, timing, ceilings, device)
            rows[name]["clocks"] = clocks.since(began) if clocks is not None else None
        _look_closer(case, calls, inputs, device, rows, options)
        if device == "cuda":
            if options.memory:
                _gpu_memory(case, calls, inputs, rows, options.watch)
            if case.capturable:
                # This comes last, because after a failed capture the process cannot use the GPU any more.
                _time_graphs(case, calls, rows, options)
        del inputs
    if device == "cpu" and options.memory:
        for name in calls:
            rows[name]["peak_mib"] = peaks.peak_in_child(case.name, name)
    return list(rows.values())


def _time(
    case: Case, calls: dict[str, Call], device: str, rows: dict[str, dict], options: RunOptions
) -> dict[str, measure.Timing]:
    """The times of calls. A call that fails is removed from `calls`, and the others are timed without it."""
    current = ""

    def begin(name: str) -> None:
        nonlocal current
        current = name
        options.watch.begin(case.name, [name], "being timed")

    while calls:
        try:
            if device == "cuda" and not case.clocked:
                return gpu_timing.time_in_passes(calls, case.baseline, options.seconds / 10, begin)
            seconds = options.seconds / 10 * len(calls) if device == "cuda" else options.seconds
            return measure.time_in_turns(calls, case.baseline, seconds, clocked=case.clocked, begin=begin)
        except Exception as error:
            rows[current]["ok"], rows[current]["why"] = False, f"while it was timed: {why(error)}"
            del calls[current]
            gpu_timing.recover(device)
    return {}


def _look_closer(
    case: Case, calls: dict[str, Call], inputs: object, device: str, rows: dict[str, dict], options: RunOptions
) -> None:
    """Measures the stages of a call, and the table of its kernels, for the providers that have them."""
    for name in calls:
        provider = case.providers[name]
        if provider.stages is not None:
            options.watch.begin(case.name, [name], "its stages")
            _try(rows[name], "stages", lambda p=provider: p.stages(inputs), device)
        if options.kernels and provider.profiled is not None:
            options.watch.begin(case.name, [name], "the table of its kernels")
            _try(rows[name], "kernels", lambda p=provider: kernel_table(p.profiled(inputs), device), device)


def _gpu_memory(case: Case, calls: dict[str, Call], inputs: object, rows: dict[str, dict], watch: Watchdog) -> None:
    for name, call in calls.items():
        provider = case.providers[name]
        watch.begin(case.name, [name], "its peak memory")
        if provider.own_graphs:
            if provider.without_graphs is None:
                continue
            call = provider.without_graphs(inputs)
        # The first call warms up.
        _try(rows[name], "peak_mib", lambda call=call: (call(), peaks.peak_mib(call, "cuda"))[1], "cuda")


def _time_graphs(case: Case, calls: dict[str, Call], rows: dict[str, dict], options: RunOptions) -> None:
    baseline = rows.get(case.baseline)
    for name, call in calls.items():
        if case.providers[name].own_graphs:
            continue
        options.watch.begin(case.name, [name], "being captured in a CUDA graph")
        try:
            rows[name]["graphed_ms"] = gpu_timing.time_graph(call, options.seconds / 20)
        except GpuLost as error:
            rows[name]["why"] = f"as a graph: {error}"
            raise
        if rows[name]["ok"] and baseline and baseline["ok"] and baseline["graphed_ms"]:
            rows[name]["speedup_graphed"] = baseline["graphed_ms"] / rows[name]["graphed_ms"]


def _try(row: dict, key: str, measured: Callable[[], object], device: str) -> None:
    """Fills a column, or says beside the row's figures why it cannot be filled."""
    try:
        row[key] = measured()
    except Exception as error:
        row["why"] = f"{key}: {why(error)}"
        gpu_timing.recover(device)
