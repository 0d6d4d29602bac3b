"""`python -m bench issue`: what the instructions of every kernel say about its time on a GPU that is not here."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Sequence

from mg_fast.ops.ahead_of_time import check_can_compile
from mg_fast.ops.operation import OPERATIONS

from ..cases import all_cases
from ..check import several
from ..errors import UnknownName
from ..registry import choose_names, group_of
from .launches import recorded
from .multiprocessor import ERROR
from .predict import DEVICES, Device, Prediction, predict


def published() -> list[str]:
    """The cases of single operations with kernels, of one picture in bfloat16, by name."""
    kernels = {operation.name for operation in OPERATIONS.values() if operation.operators}
    return [
        name
        for name, case in all_cases().items()
        if group_of(name) in kernels and "triton" in case.providers and _is_one_picture(name)
    ]


def _is_one_picture(name: str) -> bool:
    return "-b8" not in name and (name.endswith("bfloat16") or group_of(name) == "dual_resize")


def predictions_of(case: str, device: Device) -> tuple[int, list[Prediction]]:
    """The numbers in the result of a case, and a prediction for each launch of its kernels."""
    found = all_cases()[case]
    with recorded(device.architecture) as launches:
        result = found.providers["triton"](found.make("cuda"))()
        launches = list(launches)
    outputs = sum(tensor.numel() for tensor in several(result))
    return outputs, [predict(launch, device) for launch in launches]


def issue(cases: Sequence[str], device: str) -> str:
    """A table of predictions for cases; without names, for those of every kernel at its published shapes.

    Raises:
        UnknownName: the device is not in DEVICES.
        BackendError: kernels cannot be compiled here.
    """
    if device not in DEVICES:
        raise UnknownName(f"the model knows no GPU called {device!r}: expected one of {', '.join(DEVICES)}")
    check_can_compile()
    names = published()
    chosen = choose_names(names, cases, "issue") if cases else names
    gpu = DEVICES[device]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(predictions_of, chosen, [gpu] * len(chosen)))
    lines = [
        f"PREDICTED for {gpu.name} at {gpu.gigahertz} GHz from instructions and bytes, nothing of it was measured; "
        f"expect an error of up to {ERROR:.0%}.",
        "",
        f"{'case, kernel':<46}{'blocks':>7} {'limited by':<14}{'waves':>6}{'instr.':>9}{'/number':>8}{'slots':>6}"
        f"{'issue':>8}{'L2':>8}{'memory':>8}{'us':>8}  binds",
    ]
    for name, (outputs, predictions) in zip(chosen, found):
        total = sum(prediction.us for prediction in predictions)
        lines.append(f"{name:<46}{'':>74}{total:>8.1f}")
        lines += [_line(prediction, outputs) for prediction in predictions]
    lines += [
        "",
        "blocks: programs on one multiprocessor at once. waves: rounds of programs over all multiprocessors. instr.:",
        "what one warp issues. /number: instructions of all threads for each number of the result. slots: the share of",
        "the issue slots that is used. issue, L2, memory: microseconds to issue all instructions, to deliver what the",
        "first-level cache is assumed not to hold, and to move every tensor once. The largest one is predicted.",
    ]
    return "\n".join(lines)


def _line(found: Prediction, outputs: int) -> str:
    of_a_number = 32 * found.instructions * found.launch.warps * found.launch.programs / outputs
    return (
        f"  {found.launch.kernel:<44}{found.resident:>7} {found.limit:<14}{found.waves:>6.2f}{found.instructions:>9,}"
        f"{of_a_number:>8.1f}{found.slots_used:>6.0%}{found.issue_us:>8.1f}{found.l2_us:>8.1f}{found.memory_us:>8.1f}"
        f"{found.us:>8.1f}  {found.binds}"
    )
