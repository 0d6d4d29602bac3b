"""The report's tables about single operations: what was measured of them, and what their instructions predict."""

from .figures import (
    NOT_YET,
    Records,
    conditions,
    device_title,
    duration,
    figure,
    gpu_note,
    gpus,
    markdown,
    row_of,
    rows_of,
    shown,
    wrapped,
)
from .issue.command import measured_us
from .issue.multiprocessor import ERROR
from .issue.published import FIRST_GENERATION, RECORD, CasePrediction, read
from .registry import group_of


def deformable_table(found: Records) -> str:
    """Deformable attention by every provider that was measured."""
    notes = (
        "One call without gradients, batch 1. `encoder` and `decoder` are those of Deformable DETR (12,502 and 300 "
        "queries, 8 heads of 32, 4 levels, 4 points), `rt-detr` is RT-DETR at 640 pixels, `adapter` the vision adapter "
        "of MM-Interleaved. The original's steps are grid_sample for each level, as in transformers. Times are "
        "medians; memory is the peak above the inputs."
    )
    return _table(found, "deformable_attention", "deformable attention", notes)


def synchronizer_table(found: Records) -> str:
    """The feature synchronizer by every provider that was measured."""
    notes = (
        "One layer with its products, at the published sizes: `llm-decode` is one token and `llm-prefill512` a prompt "
        "of 512 tokens with n pictures of 1,344 pixels, `unet-64` the block of the diffusion decoder with 64x64 "
        "queries. "
        "The original's steps project the pictures in every call. `torch` is the packed form, whose projected pictures "
        "are kept from before the call; with `values each call` it makes them, too. Times are medians; memory is the "
        "peak above inputs, weights and kept values."
    )
    return _table(found, "feature_sync", "the feature synchronizer", notes)


def _table(found: Records, group: str, title: str, notes: str) -> str:
    """Every measured case of a group, a row for each and a column for each provider."""
    columns = [(device, case) for device in found for case in found[device] if group_of(case) == group]
    measured = [row["provider"] for column in columns for row in rows_of(found, *column) if shown(row)]
    names = {"reference": "`reference`: the original's steps", "torch": "`torch`", "triton": "`triton`"}
    providers = list(dict.fromkeys(["reference", "torch", *measured]))
    rows = [
        [
            f"{device_title(device)}, {case.removeprefix(f'{group}/')}",
            *(figure(row_of(found, device, case, provider)) for provider in providers),
        ]
        for device, case in columns
    ]
    table = markdown([title, *(names.get(provider, provider) for provider in providers)], rows)
    return "\n".join([table, "", wrapped(notes + gpu_note(found)), *conditions(found, columns)])


def issue_table(found: Records) -> str:
    """Times that the instructions of kernels predict, of the first generation and today, and what a GPU measured."""
    before, today = read(FIRST_GENERATION), read(RECORD)
    devices = gpus(found)
    measured = [f"measured on {device}" for device in devices] or ["measured"]
    rows = []
    for name, case in today.items():
        times = [
            measured_us(row_of(found, device, name, "triton") or {"ok": False, "median_ms": None}) for device in devices
        ]
        told = [duration(us / 1e3) if us else NOT_YET for us in times] or [NOT_YET]
        rows.append([name, _us(before.get(name)), _us(case), _binds(case), *told])
    notes = (
        "One picture or one call on an H200, assumed to run at 1.755 GHz, predicted from machine code (`python -m "
        "bench issue`): the kernels alone, without the library's products around them. No GPU has calibrated the "
        f"model, so an error of {ERROR:.0%} is an estimate and no bound. `issue` means "
        "that the instructions take longest, `L2` what the second-level cache has to deliver, and `memory` that every "
        "tensor has to be moved once. The resize has not changed: of the first generation one program of a launch was "
        "followed, today it is five, some of which load more."
    )
    head = ["kernels of", "first generation, predicted", "today, predicted", "what binds today", *measured]
    return "\n".join([markdown(head, rows), "", wrapped(notes)])


def _us(case: CasePrediction | None) -> str:
    return "-" if case is None else f"{case.us:.1f} us"


def _binds(case: CasePrediction) -> str:
    return ", ".join(dict.fromkeys(launch.binds for launch in case.launches))
