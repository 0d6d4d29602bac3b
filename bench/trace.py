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

from . import measure
from .registry import Call, Case, NotHere

# the stage that a case of one operation is of; what has several stages names them itself
STAGES = {
    "dual_resize": "preprocess",
    "clip": "LR tower",
    "tower": "HR tower",
    "patch_mining": "patch info mining",
    "projector": "projector",
}


def trace(cases: Sequence[Case], device: str, path: Path) -> list[dict]:
    """Writes the trace of a warm call of each provider.

    A provider that takes several stages runs them one after the other, without a CUDA graph, so that each has a range.

    Returns:
        Per provider its case's name, its own, and `why` it is not in the trace (None: it is).
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    rows, profiler = [], profile(activities=activities, acc_events=True)
    with measure.memory_within_reach(device), torch.no_grad():
        # calls are warmed up outside of it: the profiler is paused between them
        profiler.start()
        for case in cases:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            profiler.toggle_collection_dynamic(False, activities)
            inputs = case.make(device)
            for name, build in case.providers.items():
                why = None
                try:
                    call = build(inputs)
                    _run(call, case, device, contextlib.nullcontext)
                    profiler.toggle_collection_dynamic(True, activities)
                    with named_range(f"{case.name} {name}", device):
                        _run(call, case, device, lambda stage: named_range(stage, device))
                except NotHere as reason:
                    why = f"not here: {reason}"
                except Exception as error:
                    # an opponent that breaks is reported, and the others are still traced
                    why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                profiler.toggle_collection_dynamic(False, activities)
                rows.append({"name": case.name, "provider": name, "why": why})
            del inputs
        profiler.stop()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return rows


def _run(call: Call, case: Case, device: str, stage) -> None:
    if "stage" in inspect.signature(call).parameters:
        call(stage=stage)
    else:
        with stage(STAGES.get(case.group, case.group)):
            call()
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def named_range(name: str, device: str) -> Iterator[None]:
    """A range of the profiler, and on a GPU of NVTX."""
    with record_function(name), torch.cuda.nvtx.range(name) if device == "cuda" else contextlib.nullcontext():
        yield
