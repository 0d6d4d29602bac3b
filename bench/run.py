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
from .row_table import format_rows
from .rows import empty_row, fill_times, why
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
    one = _CaseRun(case, device, options, rows)
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
        for name, timing in one.time(calls).items():
            fill_times(rows[name], case, timing, ceilings, device)
            rows[name]["clocks"] = clocks.since(began) if clocks is not None else None
        one.look_closer(calls, inputs)
        if device == "cuda":
            if options.memory:
                one.measure_gpu_memory(calls, inputs)
            if case.capturable:
                # This comes last, because after a failed capture the process cannot use the GPU any more.
                one.time_graphs(calls)
        del inputs
    if device == "cpu" and options.memory:
        for name in calls:
            rows[name]["peak_mib"] = peaks.peak_in_child(case.name, name)
    return list(rows.values())


@dataclass
class _CaseRun:
    """The measurements of one case; each fills columns of the providers' rows."""

    case: Case
    device: str
    options: RunOptions
    rows: dict[str, dict]

    def time(self, calls: dict[str, Call]) -> dict[str, measure.Timing]:
        """The times of calls. A call that fails is removed from `calls`, and the others are timed without it."""
        current = ""

        def begin(name: str) -> None:
            nonlocal current
            current = name
            self._begin(name, "being timed")

        case, seconds = self.case, self.options.seconds
        while calls:
            try:
                if self.device == "cuda" and not case.clocked:
                    return gpu_timing.time_in_passes(calls, case.baseline, seconds / 10, begin)
                spent = seconds / 10 * len(calls) if self.device == "cuda" else seconds
                return measure.time_in_turns(calls, case.baseline, spent, clocked=case.clocked, begin=begin)
            except Exception as error:
                self.rows[current]["ok"], self.rows[current]["why"] = False, f"while it was timed: {why(error)}"
                del calls[current]
                gpu_timing.recover(self.device)
        return {}

    def look_closer(self, calls: dict[str, Call], inputs: object) -> None:
        """Measures the stages of a call, and the table of its kernels, for the providers that have them."""
        for name in calls:
            provider = self.case.providers[name]
            if provider.stages is not None:
                self._begin(name, "its stages")
                self._try(name, "stages", lambda p=provider: p.stages(inputs))
            if self.options.kernels and provider.profiled is not None:
                self._begin(name, "the table of its kernels")
                self._try(name, "kernels", lambda p=provider: kernel_table(p.profiled(inputs), self.device))

    def measure_gpu_memory(self, calls: dict[str, Call], inputs: object) -> None:
        for name, call in calls.items():
            provider = self.case.providers[name]
            self._begin(name, "its peak memory")
            if provider.own_graphs:
                if provider.without_graphs is None:
                    continue
                call = provider.without_graphs(inputs)
            # The first call warms up.
            self._try(name, "peak_mib", lambda call=call: (call(), peaks.peak_mib(call, "cuda"))[1])

    def time_graphs(self, calls: dict[str, Call]) -> None:
        baseline = self.rows.get(self.case.baseline)
        for name, call in calls.items():
            provider = self.case.providers[name]
            if provider.own_graphs or not provider.capturable:
                continue
            row = self.rows[name]
            self._begin(name, "being captured in a CUDA graph")
            try:
                row["graphed_ms"] = gpu_timing.time_graph(call, self.options.seconds / 20)
            except GpuLost as error:
                row["why"] = f"as a graph: {error}"
                raise
            if row["ok"] and baseline and baseline["ok"] and baseline["graphed_ms"]:
                row["speedup_graphed"] = baseline["graphed_ms"] / row["graphed_ms"]

    def _begin(self, provider: str, what: str) -> None:
        self.options.watch.begin(self.case.name, [provider], what)

    def _try(self, provider: str, column: str, measured: Callable[[], object]) -> None:
        """Fills a column, or says beside the row's figures why it cannot be filled."""
        row = self.rows[provider]
        try:
            row[column] = measured()
        except Exception as error:
            row["why"] = f"{column}: {why(error)}"
            gpu_timing.recover(self.device)
