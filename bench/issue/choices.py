"""What `auto` should take by the model, until a GPU has measured: a kernel of ours, or torch's library and a pass."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..cases import all_cases
from ..counting import Count
from ..errors import BadRecord
from ..registry import group_of
from .library import GAP_US
from .multiprocessor import ERROR
from .predict import Device
from .published import RECORD, CasePrediction
from .whole_models import WholePrediction, predict

# The operations whose plain form is an operator of the library and a pass over its result.
OPERATIONS = ("dwconv_norm", "linear_gelu", "linear_residual")


@dataclass(frozen=True)
class Choice:
    """A case of one operation by both forms, in a CUDA graph.

    Attributes:
        kernel_us: microseconds of our kernels, with the gaps between their launches.
        library: the plain form.
    """

    kernel_us: float
    library: WholePrediction

    @property
    def takes(self) -> str:
        """The backend that `auto` should take.

        It is `triton` only where the kernel would still be faster if it took longer by the model's error. The library's
        time is a lower bound, too, but its operators have run on GPUs, and our kernels have not.
        """
        return "triton" if self.kernel_us * (1 + ERROR) < self.library.us else "torch"


def predict_choices(kernels: Mapping[str, CasePrediction], device: Device) -> dict[str, Choice]:
    """The choices at all published shapes, by case.

    Args:
        kernels: what was predicted of the kernels.
    """
    cases, found = all_cases(), {}
    for name, kernel in kernels.items():
        if group_of(name) not in OPERATIONS:
            continue
        with FakeTensorMode(), torch.inference_mode():
            call = cases[name].providers["torch"](cases[name].make("cuda"))
            with Count("cuda") as count:
                call()
        gaps = GAP_US * (len(kernel.launches) - 1)
        found[name] = Choice(round(kernel.us + gaps, 1), predict(count.calls, device))
    return found


def record(found: Mapping[str, Choice]) -> dict[str, object]:
    """What is kept of choices."""
    return {"choices": {name: asdict(choice) | {"takes": choice.takes} for name, choice in found.items()}}


def read_choices(path: Path = RECORD) -> dict[str, Choice]:
    """The choices in a file.

    Raises:
        BadRecord: the file is missing or holds something else.
    """
    try:
        return {
            name: Choice(one["kernel_us"], WholePrediction(**one["library"]))
            for name, one in json.loads(path.read_text(encoding="utf-8"))["choices"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRecord(f"{path} holds no choices of `python -m bench issue --save`: {error}") from None
