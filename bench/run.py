"""Runs cases: accuracy first, then time, then memory. A document grows case by case, and is kept as it grows."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mg_fast.testing.environment import environment
from mg_fast.testing.tolerances import assert_accurate, errors, ieee_float32

from . import measure, records
from .clocks import ClockLog
from .errors import NoDevice
from .kernel_table import kernel_table
from .registry import Call, Case, Ceilings, NotHere, Outputs
from .watch import Watchdog

# samples from which on the slowest hundredth is told
TAIL = 200


# providers that are kernels of ours alone: they have no reason to return other bits when they are called again
REPEATABLE = ("triton",)


def check_device(device: str) -> str:
    """The device's type.

    Raises:
        NoDevice: a GPU where torch sees none.
    """
    if device not in ("cpu", "cuda"):
        raise NoDevice(f"unknown device {device!r}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise NoDevice(
            "a GPU was asked for (--device cuda) and torch sees none here; without one: --device cpu, or `python -m bench memory`"
        )
    return device


def run(
    cases: Sequence[Case],
    device: str,
    *,
    seconds: float = 20,
    memory: bool = True,
    kernels: bool = False,
    ceilings: Ceilings | None = None,
    watch: Watchdog | None = None,
    out: Path | None = None,
    command: str = "",
) -> dict:
    """Measures cases on a device.

    Args:
        seconds: for the turns of one case, of which at least four are taken; on a GPU a tenth of it for each provider.
        memory: also measure peak memory, on a CPU in a process per provider.
        kernels: also profile the providers that a case names for it, kernel by kernel.
        ceilings: of this device, where they were measured before.
        watch: told what is being done.
        out: where the document is kept as it grows.
        command: that it was asked for by.

    Returns:
        The document. `complete` is false where it was interrupted, or the GPU lost; `ended` says which.

    Raises:
        BadRecord: `out` cannot be written; before anything is measured.
    """
    if out is not None:
        records.check_writable(out)
    ieee_float32()
    watch = watch or Watchdog()
    with ClockLog(device) as clocks:
        document = {**environment(), "device": device}
        loaded = None
        if ceilings is None:
            ceilings = measure.measure_ceilings(device)
            loaded = clocks.since(measure.keep_busy(1.5)) if device == "cuda" else None
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
                options = {"seconds": seconds, "memory": memory, "kernels": kernels, "watch": watch, "clocks": clocks}
                try:
                    run_case(case, device, ceilings, rows=rows, **options)
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
        except measure.GpuLost as error:
            document["ended"] = f"the GPU is lost to this process, run the rest anew: {error}"
        finally:
            watch.end()
    if document["ended"]:
        print(f"{document['ended']}; what was measured so far is kept", file=sys.stderr)
    if out is not None:
        records.write(out, document)
    return document


def run_case(
    case: Case,
    device: str,
    ceilings: Ceilings,
    *,
    seconds: float,
    memory: bool,
    kernels: bool = False,
    rows: dict[str, dict] | None = None,
    watch: Watchdog | None = None,
    clocks: ClockLog | None = None,
) -> list[dict]:
    """Measures a case's providers; a row for each is returned.

    Args:
        rows: the same by provider, as of `empty_row`, filled as it goes on: what there is when it is interrupted.
        clocks: what reads the GPU's clocks meanwhile.
        seconds, memory, kernels, watch: as of `run`.

    Raises:
        GpuLost: the process can do no more on the GPU.
    """
    rows = {name: empty_row(case, name) for name in case.providers} if rows is None else rows
    watch = watch or Watchdog()
    if "torch._dynamo" in sys.modules:
        # cases share their code: after eight shapes torch.compile would give up and run it eagerly
        torch._dynamo.reset()
    with measure.memory_within_reach(device), torch.no_grad():
        try:
            watch.begin(case.name, list(rows), "making its inputs")
            inputs = case.make(device)
        except Exception as error:
            for row in rows.values():
                row["ok"], row["why"] = False, f"inputs: {_why(error)}"
            _check_gpu(device)
            return list(rows.values())
        calls = {name: _named(name, call) for name, call in check(case, inputs, device, rows, watch).items()}
        began = time.monotonic()
        for name, timing in _time(case, calls, device, rows, seconds, watch).items():
            _fill(rows[name], case, timing, ceilings, device)
            rows[name]["clocks"] = clocks.since(began) if clocks is not None else None
        _look_closer(case, calls, inputs, device, rows, kernels, watch)
        if device == "cuda":
            _on_the_gpu(case, calls, inputs, rows, seconds, memory, watch)
        del inputs
    if device == "cpu" and memory:
        for name in calls:
            rows[name]["peak_mib"] = measure.peak_in_child(case.name, name)
    return list(rows.values())


def _look_closer(
    case: Case,
    calls: dict[str, Call],
    inputs: object,
    device: str,
    rows: dict[str, dict],
    kernels: bool,
    watch: Watchdog,
) -> None:
    """The stages of a call, and the table of its kernels, of the providers that have them."""
    for name in calls:
        if name in (case.stages or {}):
            watch.begin(case.name, [name], "its stages")
            _try(rows[name], "stages", lambda name=name: case.stages[name](inputs), device)
        if kernels and name in (case.profiled or {}):
            watch.begin(case.name, [name], "the table of its kernels")
            _try(rows[name], "kernels", lambda name=name: kernel_table(case.profiled[name](inputs), device), device)


def _time(
    case: Case, calls: dict[str, Call], device: str, rows: dict[str, dict], seconds: float, watch: Watchdog
) -> dict[str, measure.Timing]:
    """The times of calls; one that fails meanwhile leaves `calls`, and the others are timed without it."""

    def begin(name: str) -> None:
        watch.begin(case.name, [name], "being timed")

    while calls:
        try:
            if case.clocked:
                spent = seconds / 10 * len(calls) if device == "cuda" else seconds
                return measure.time_in_turns(calls, case.baseline, spent, clocked=True, begin=begin)
            if device == "cuda":
                return measure.time_in_passes(calls, case.baseline, seconds / 10, begin)
            return measure.time_in_turns(calls, case.baseline, seconds, begin=begin)
        except _CallFailed as error:
            # it had come through once; the others are timed without it
            rows[error.name]["ok"], rows[error.name]["why"] = False, f"while it was timed: {_why(error.__cause__)}"
            del calls[error.name]
            _check_gpu(device)
    return {}


def _on_the_gpu(
    case: Case,
    calls: dict[str, Call],
    inputs: object,
    rows: dict[str, dict],
    seconds: float,
    memory: bool,
    watch: Watchdog,
) -> None:
    """Memory; and last, as a capture that fails ends it all, CUDA graphs."""
    for name, call in calls.items() if memory else ():
        watch.begin(case.name, [name], "its peak memory")
        if name in case.own_graphs:
            # a replay allocates nothing
            if name not in (case.memory or {}):
                continue
            call = case.memory[name](inputs)
        _try(rows[name], "peak_mib", lambda call=call: (call(), measure.peak_mib(call, "cuda"))[1], "cuda")
    baseline = rows.get(case.baseline)
    for name, call in calls.items() if case.capturable else ():
        if name in case.own_graphs:
            continue
        watch.begin(case.name, [name], "being captured in a CUDA graph")
        try:
            rows[name]["graphed_ms"] = measure.time_graph(call, seconds / 20)
        except measure.GpuLost as error:
            rows[name]["why"] = f"as a graph: {error}"
            raise
        if rows[name]["ok"] and baseline and baseline["ok"] and baseline["graphed_ms"]:
            rows[name]["speedup_graphed"] = baseline["graphed_ms"] / rows[name]["graphed_ms"]


class _CallFailed(Exception):
    """A call that had come through before did not; `name` is the provider's, the cause what happened."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _named(name: str, call: Call) -> Call:
    def named(*args, **kwargs):
        try:
            return call(*args, **kwargs)
        except Exception as error:
            raise _CallFailed(name) from error

    return named


def _try(row: dict, key: str, measured: Callable[[], object], device: str) -> None:
    """Fills a column, or says beside the row's figures why it cannot be."""
    try:
        row[key] = measured()
    except Exception as error:
        row["why"] = f"{key}: {_why(error.__cause__ or error)}"
        _check_gpu(device)


def _check_gpu(device: str) -> None:
    """After an error: frees what it held, and raises GpuLost where the GPU's context is broken, as all that follows
    would fail with it.
    """
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        raise measure.GpuLost(_why(error)) from error


def empty_row(case: Case, provider: str) -> dict:
    """A provider's row before anything was measured."""
    unmeasured = (
        "median_ms",
        "p20_ms",
        "p80_ms",
        "warm_ms",
        "graphed_ms",
        "first_call_ms",
        "peak_mib",
        "relative_error",
    )
    unmeasured += ("speedup", "speedup_graphed", "equal_bits", "clocks")
    return {
        "name": case.name,
        "provider": provider,
        "baseline": case.baseline,
        "ok": None,
        "why": None,
    } | dict.fromkeys(unmeasured)


def check(
    case: Case, inputs: object, device: str, rows: dict[str, dict], watch: Watchdog | None = None
) -> dict[str, Call]:
    """Calls each provider once and holds what it returns against the exact result; the calls that are right are
    returned, warm.

    Args:
        rows: by provider, as of `empty_row`; filled with what was found.
        watch: told what is being done.
    """
    watch = watch or Watchdog()
    watch.begin(case.name, list(case.providers), "the exact result")
    calls, plain = {}, None
    exact, unknown = None, None
    try:
        exact = case.exact(inputs) if case.exact else None
    except (RuntimeError, MemoryError) as error:
        unknown = f"accuracy unknown: the exact result: {_why(error)}"
    # the baseline's own error is what the others' is measured by
    for name in sorted(case.providers, key=lambda name: name != case.baseline):
        row = rows[name]
        watch.begin(case.name, [name], "its first call")
        try:
            call, outputs, row["first_call_ms"] = measure.first_call(
                lambda name=name: case.providers[name](inputs), device
            )
            outputs = _several(outputs[0] if case.clocked else outputs)
            if name == case.baseline:
                plain = outputs
            if exact is None:
                row["why"] = unknown
            elif plain is None:
                row["why"] = f"accuracy unknown: {case.baseline} gave no result to compare with"
            else:
                _compare(outputs, plain, _several(exact), row)
            if device == "cuda" and not case.clocked:
                row["equal_bits"] = measure.same_bits(call, outputs)
                assert row["equal_bits"] or name not in REPEATABLE, (
                    "other bits when it was called again with the same inputs"
                )
            calls[name] = call
        except NotHere as reason:
            row["why"] = f"not here: {reason}"
        except AssertionError as error:
            row["ok"], row["why"] = False, f"wrong result: {error}"
        except Exception as error:
            # an opponent that breaks is reported, and the run goes on
            row["ok"], row["why"] = False, _why(error)
        if row["ok"] is False:
            outputs = None
            _check_gpu(device)
    return calls


def _compare(outputs: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor], row: dict) -> None:
    """Holds outputs against the exact ones by the tests' rule; raises AssertionError where they break it."""
    shapes, expected = [list(out.shape) for out in outputs], [list(out.shape) for out in exact]
    assert shapes == expected, f"shapes {shapes}, expected {expected}"
    error = max(errors(ours, truth)[0] for ours, truth in zip(outputs, exact))
    assert math.isfinite(error), "not a number, or infinite"
    row["relative_error"] = error
    for ours, theirs, truth in zip(outputs, plain, exact):
        assert_accurate(ours, theirs, truth)
    row["ok"] = True


def _several(outputs: Outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _why(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"out of memory: {text}" if measure.out_of_memory(error) else f"{type(error).__name__}: {text}"


def _fill(row: dict, case: Case, timing: measure.Timing, ceilings: Ceilings, device: str) -> None:
    row["median_ms"] = median = statistics.median(timing.samples)
    row["p20_ms"], row["p80_ms"] = measure.quantile(timing.samples, 0.2), measure.quantile(timing.samples, 0.8)
    row["warm_ms"], row["samples"] = timing.warm_ms, len(timing.samples)
    if timing.ratios:
        row["speedup"] = statistics.median(timing.ratios)
        row["speedup_p20"], row["speedup_p80"] = (
            measure.quantile(timing.ratios, 0.2),
            measure.quantile(timing.ratios, 0.8),
        )
        row["halves_differ"] = measure.halves_differ(timing.ratios, least=2 if device == "cuda" else 4)
        row["left_out"], row["others"] = timing.left_out, timing.others
    if case.clocked and len(timing.samples) >= TAIL:
        row["p99_ms"] = measure.quantile(timing.samples, 0.99)
    if case.tokens:
        row["tokens_per_s"] = 1e3 * case.tokens / median
    # on a CPU our forms take other steps than those that were accounted
    cost = (case.work or {}).get(row["provider"])
    if cost and (device == "cuda" or row["provider"] == case.baseline):
        row["tflops"], row["gbps"] = cost.flop / median / 1e9, cost.bytes / median / 1e6
    floor = ceilings.floor_ms(case.least, case.dtype)
    if floor:
        row["floor_ms"], row["of_floor"] = floor, floor / median


def format_rows(rows: Sequence[dict]) -> str:
    """A table of one case."""
    titles = (
        ("median ms", 10),
        ("p20..p80", 18),
        ("speedup", 9),
        ("warm", 9),
        ("graph", 9),
        ("first", 9),
        ("MiB", 8),
        ("GB/s", 7),
    )
    titles += (("TFLOP/s", 9), ("floor", 7), ("error", 9))
    head = f"  {'provider':<26}" + "".join(f"{title:>{width}}" for title, width in titles)
    lines = [head]
    for row in rows:
        if row["median_ms"] is None:
            lines.append(f"  {row['provider']:<26}{'FAIL' if row['ok'] is False else '-':>10}  {row['why']}")
            continue
        spread = f"{_short(row['p20_ms'])}..{_short(row['p80_ms'])}"
        columns = [f"{_short(row['median_ms']):>10}{spread:>18}", f"{_ratio(row):>9}"]
        columns += [f"{_short(row.get(key)):>9}" for key in ("warm_ms", "graphed_ms", "first_call_ms")]
        columns += [f"{_short(row['peak_mib']):>8}{_short(row.get('gbps')):>7}{_short(row.get('tflops')):>9}"]
        columns += [f"{row['of_floor']:>7.0%}" if row.get("of_floor") else f"{'-':>7}"]
        columns += [f"{row['relative_error']:>9.0e}" if row["relative_error"] is not None else f"{'-':>9}"]
        lines.append(f"  {row['provider']:<26}" + "".join(columns))
        if row["why"]:
            lines.append(f"    {row['why']}")
    unsteady = [
        f"{row['provider']} {row['halves_differ']:.0%}"
        for row in rows
        if (row.get("halves_differ") or 0) > measure.STEADY
    ]
    if unsteady:
        lines.append(
            f"  UNSTEADY: the first and second half of the turns differ in the ratio to {rows[0]['baseline']}: {', '.join(unsteady)}"
        )
    busy = max((row.get("others") or 0 for row in rows), default=0)
    if busy > measure.BUSY:
        lines.append(
            f"  BUSY: other processes took {busy:.0%} of the machine in every turn: neither times nor ratios hold for a quiet one"
        )
    return "\n".join(lines)


def _ratio(row: dict) -> str:
    return f"{row['speedup']:.2f}x" if row["speedup"] and row["ok"] else "-"


def _short(value: float | None) -> str:
    """Three digits, of small numbers and of large ones."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
