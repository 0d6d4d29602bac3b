"""One call of each provider under torch.profiler, as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Ranges are named after the case and the provider, and within them after the stages; on a GPU they are NVTX ranges too,
for Nsight Systems.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .peaks import memory_within_reach
from .registry import Call, Case, NotHere
from .rows import why


def trace(cases: Sequence[Case], device: str, path: Path) -> list[dict]:
    """Writes the trace of a warm call of each provider.

    A provider that takes several stages runs them one after the other, without a CUDA graph, so that each has a range.

    Returns:
        For each provider its case's name, its own, and `why` it is not in the trace (None: it is).
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    rows, profiler = [], profile(activities=activities, acc_events=True)
    with memory_within_reach(device), torch.no_grad():
        # The profiler is paused while calls are warmed up.
        profiler.start()
        for case in cases:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            profiler.toggle_collection_dynamic(False, activities)
            inputs = case.make(device)
            for name, provider in case.providers.items():
                reason = None
                try:
                    call = provider(inputs)
                    _run(call, case, device, contextlib.nullcontext)
                    profiler.toggle_collection_dynamic(True, activities)
                    with named_range(f"{case.name} {name}", device):
                        _run(call, case, device, lambda stage: named_range(stage, device))
                except NotHere as not_here:
                    reason = f"not here: {not_here}"
                except Exception as error:
                    # An opponent that breaks is reported, and the others are still traced.
                    reason = why(error)
                profiler.toggle_collection_dynamic(False, activities)
                rows.append({"name": case.name, "provider": name, "why": reason})
            del inputs
        profiler.stop()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return rows


def _run(call: Call, case: Case, device: str, stage) -> None:
    if "stage" in inspect.signature(call).parameters:
        call(stage=stage)
    else:
        with stage(case.stage or case.group):
            call()
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def named_range(name: str, device: str) -> Iterator[None]:
    """A range of the profiler, and on a GPU of NVTX."""
    with record_function(name), torch.cuda.nvtx.range(name) if device == "cuda" else contextlib.nullcontext():
        yield
