"""Predictions for cases of the benchmark: of every kernel at its published shapes, computed here or recorded before."""

import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mg_fast.ops.operation import OPERATIONS
from mg_fast.testing.environment import environment

from .. import records
from ..cases import all_cases
from ..check import several
from ..errors import BadRecord
from ..registry import group_of
from .launches import recorded
from .multiprocessor import ERROR
from .predict import Device, TimePrediction, predict

# What is recorded of today's kernels; `python -m bench issue --save` writes it.
RECORD = records.RESULTS / "issue.json"
# The same of the first generation of kernels, which the pages compare it with.
FIRST_GENERATION = records.RESULTS / "issue-first-generation.json"


@dataclasses.dataclass(frozen=True)
class CasePrediction:
    """What the model says of a case: the numbers in its result, and a prediction for each launch."""

    outputs: int
    launches: Sequence[TimePrediction]

    @property
    def us(self) -> float:
        """Microseconds of all launches, one after the other."""
        return sum(launch.us for launch in self.launches)


def published() -> list[str]:
    """The cases of single operations with kernels, of one picture in bfloat16, by name."""
    kernels = {operation.name for operation in OPERATIONS.values() if operation.operators}
    return [
        name
        for name, case in all_cases().items()
        if group_of(name) in kernels and "triton" in case.providers and _is_predicted(name)
    ]


def _is_predicted(name: str) -> bool:
    # Gradients need autograd's engine, which does not run on CUDA tensors without a GPU.
    if "-b8" in name or "training" in name:
        return False
    return name.endswith("bfloat16") or group_of(name) == "dual_resize"


def predict_case(case: str, device: Device) -> CasePrediction:
    """A prediction for each launch of the kernels of a case, which are compiled for the device."""
    found = all_cases()[case]
    with recorded(device.architecture) as launches:
        result = found.providers["triton"](found.make("cuda"))()
        launches = list(launches)
    outputs = sum(tensor.numel() for tensor in several(result))
    return CasePrediction(outputs, [predict(launch, device) for launch in launches])


def predict_cases(cases: Sequence[str], device: Device) -> dict[str, CasePrediction]:
    """The predictions for cases by name, made in a process for each core."""
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return dict(zip(cases, pool.map(predict_case, cases, [device] * len(cases))))


def save(
    found: Mapping[str, CasePrediction], device: Device, further: Mapping[str, object], path: Path = RECORD
) -> None:
    """Writes predictions with what they were made with.

    Args:
        further: other predictions, to be kept under their names.
    """
    here = environment()
    document = {
        "predicted": "from machine code and bytes; nothing was measured",
        "date": datetime.date.today().isoformat(),
        "device": dataclasses.asdict(device),
        "error": ERROR,
        **{package: here[package] for package in ("torch", "triton", "transformers")},
        "commit": here["commit"],
        **further,
        "cases": {name: dataclasses.asdict(case) | {"us": round(case.us, 2)} for name, case in found.items()},
    }
    records.write(path, document)


def read(path: Path = RECORD) -> dict[str, CasePrediction]:
    """The predictions in a file.

    Raises:
        BadRecord: the file is missing or holds something else.
    """
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        return {
            name: CasePrediction(case["outputs"], [TimePrediction(**launch) for launch in case["launches"]])
            for name, case in cases.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRecord(f"{path} holds no predictions of `python -m bench issue --save`: {error}") from None
