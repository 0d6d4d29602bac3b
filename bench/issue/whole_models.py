"""Predicted times of whole models and their towers: our kernels by their machine code, the rest by `library`.

The published models run on fake tensors of a GPU, and every launch is counted. Kernels of ours take what was predicted
of them alone, at the same shapes.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mg_fast import use_backend
from mg_fast.decoding.kv_cache import KVCache
from mg_fast.decoding.model_runner import COMPILED_WINDOW, WINDOW, ModelRunner
from mg_fast.decoding.sequences import Sequences
from mg_fast.models.causal_lm import CausalLM
from mg_fast.runtime.device_tables import caching_fake_tensors
from mg_fast.runtime.graphs import GraphCache
from mg_fast.testing.random_checkpoints import make_config

from ..cases.settings import DIMS, SETTINGS, Setting
from ..costs.floors import head_width
from ..counting import OURS, Count, CountedCall
from ..errors import BadRecord
from ..fake_models import DTYPE, TABLES, FakePicture, cases, on_gpu
from ..registry import Cost
from .library import ATTENTION, GAP_US, assumptions, compiled, launch_time
from .predict import Device
from .published import RECORD, CasePrediction

# The provider of the benchmark that a row is about, where it is not `auto`.
PACKED, COMPILED = "packed", "auto, compiled"
# Tokens of the prompt and the answer before the step that is predicted: one picture, a question, half an answer.
CONTEXT = 576 + 64 + 64
# The first generation's compiled passes attended to the whole cache.
CAPACITY = 2048
SIZES = ("7b", "8b")

Predicted = Mapping[str, CasePrediction]


@dataclass(frozen=True)
class WholePrediction:
    """What the model says of one call of a whole model or tower.

    Attributes:
        us: microseconds of all launches, one after the other; both towers of a picture run at the same time, which
            can hide gaps and the last programs of a launch.
        launches: their number.
        parts: microseconds by what takes them, the largest first: "our kernels", "gaps", or what binds launches of
            the library (see `library.LaunchTime`).
    """

    us: float
    launches: int
    parts: Mapping[str, float]

    @property
    def binds(self) -> str:
        """What takes at least a tenth of the time, and its share."""
        return ", ".join(f"{name} {us / self.us:.0%}" for name, us in self.parts.items() if us >= self.us / 10)


class Row(NamedTuple):
    """A row of the table: a case of the benchmark, and the provider that runs what is predicted."""

    case: str
    provider: str


class Generations(NamedTuple):
    """The predictions of a row: with the first generation of kernels and decoding, and today's."""

    first: WholePrediction
    today: WholePrediction


def record(found: Mapping[Row, Generations]) -> dict[str, object]:
    """What is kept of predictions, and of the numbers that they depend on."""
    rows = [
        row._asdict() | {name: dataclasses.asdict(one) for name, one in both._asdict().items()}
        for row, both in found.items()
    ]
    return {"library": assumptions(), "whole_models": rows}


def read_whole(path: Path = RECORD) -> dict[Row, Generations]:
    """The predictions of whole models in a file.

    Raises:
        BadRecord: the file is missing or holds something else.
    """
    try:
        return {
            Row(row["case"], row["provider"]): Generations(
                *(WholePrediction(**row[name]) for name in Generations._fields)
            )
            for row in json.loads(path.read_text(encoding="utf-8"))["whole_models"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRecord(f"{path} holds no whole models of `python -m bench issue --save`: {error}") from None


def predict_all(first: Predicted, today: Predicted, device: Device) -> dict[Row, Generations]:
    """The rows with their predictions.

    Args:
        first, today: what was predicted of the kernels alone, of either generation.
    """
    found = {}
    for setting in SETTINGS:
        by_first, by_today = (functools.partial(_kernels, kernels, setting) for kernels in (first, today))
        before = {row: predict(calls, device, by_first) for row, calls in _pictures(setting, wide=False)}
        now = {row: predict(calls, device, by_today) for row, calls in _pictures(setting, wide=True)}
        found |= {row: Generations(before[row], now[row]) for row in now}
    for size in SIZES:
        for provider in ("auto", COMPILED):
            row = Row(f"end-to-end/{size}-decode-b1-bfloat16", provider)
            both = (predict(calls, device) for calls in _decoding(size, provider == COMPILED))
            found[row] = Generations(*both)
    return found


def predict(
    calls: Sequence[CountedCall],
    device: Device,
    kernels: Callable[[CountedCall], CasePrediction] | None = None,
) -> WholePrediction:
    """The time of launches that follow one another in a CUDA graph.

    Args:
        kernels: what was predicted of a call of one of our operators.
    """
    parts: collections.Counter = collections.Counter()
    launches = 0
    for call in calls:
        if call.name.startswith(OURS):
            case = kernels(call)
            parts["our kernels"] += case.us
            launches += len(case.launches)
        else:
            time = launch_time(call, device)
            parts[time.binds] += time.us
            launches += call.launches
    parts["gaps"] += GAP_US * (launches - 1)
    rounded = {name: round(us, 1) for name, us in parts.most_common() if us}
    return WholePrediction(round(parts.total(), 1), launches, rounded)


def _kernels(predicted: Predicted, setting: Setting, call: CountedCall) -> CasePrediction:
    """What was predicted of a call of one of our operators: that of the case with its shapes."""
    group = call.name.removeprefix(OURS)
    if group == "dual_resize":
        return predicted[f"{group}/{setting.name}-float32"]
    if group == "dwconv_norm":
        # A stage's map is a fourth of the picture's side, and half of the stage's before.
        return predicted[f"{group}/{setting.side}-stage{DIMS.index(call.inputs[0][-1])}-b1-bfloat16"]
    return predicted[f"{group}/{setting.name}-b1-bfloat16"]


def _pictures(setting: Setting, *, wide: bool) -> Iterator[tuple[Row, list[CountedCall]]]:
    """The launches of the towers, and of a picture to its image tokens.

    Args:
        wide: with the library's wide products, which the first generation did not have.
    """
    made = cases()
    with FakeTensorMode(), caching_fake_tensors(*TABLES):
        picture = FakePicture("7b", setting)
        # A tower that is packed for our kernels has no wide products.
        with use_backend("auto" if wide else "triton"):
            picture.tower  # noqa: B018

        def counted(group: str) -> list[CountedCall]:
            with torch.inference_mode():
                call = made[f"{group}/{setting.name}-b1-bfloat16"][1](picture)["auto"].call
                # The first call also makes tables.
                call()
                with Count("cuda") as count:
                    call()
            return count.calls

        yield Row(f"tower/{setting.name}-b1-bfloat16", "auto"), counted("tower")
        if setting.views == 1:
            yield Row(f"clip/{setting.name}-b1-bfloat16", PACKED), counted("clip")
        whole = counted("picture")
    pixels = [call for call in whole if call.name != f"{OURS}dual_resize"]
    yield Row(f"pixels/{setting.name}-b1-bfloat16", "auto"), pixels
    if setting.views == 1:
        yield Row(f"decoded/{setting.name}-b1-bfloat16", "auto"), whole


def _decoding(size: str, by_compiler: bool) -> tuple[list[CountedCall], list[CountedCall]]:
    """The launches of one more token: as the first generation decoded, and as it is decoded today.

    Before, keys and values were repeated for every head of a group, and a compiled pass attended to the whole cache.
    """
    text = make_config(size).text_config
    before = _one_token(text, CAPACITY if by_compiler else _window(WINDOW))
    before = [part for call in before for part in (_repeated(call, text) if call.name == ATTENTION else [call])]
    today = _one_token(text, _window(COMPILED_WINDOW if by_compiler else WINDOW))
    return (compiled(before), compiled(today)) if by_compiler else (before, today)


def _window(unit: int) -> int:
    """The positions that a pass attends to after CONTEXT tokens, where windows are multiples of `unit`."""
    return -(-(CONTEXT + 1) // unit) * unit


def _repeated(attention: CountedCall, text: PreTrainedConfig) -> list[CountedCall]:
    """One token's attention of grouped heads, after copies of the keys and values for every head of a group."""
    groups = text.num_attention_heads // text.num_key_value_heads
    if groups == 1:
        return [attention]
    batch, heads, positions, width = attention.inputs[1]
    read = batch * heads * positions * width * DTYPE.itemsize
    copy = CountedCall("aten::clone", 1, Cost(0, read, groups * read), (), ())
    again = Cost(0, 2 * (groups - 1) * read)
    return [copy, copy, attention._replace(cost=attention.cost + again)]


def _one_token(text: PreTrainedConfig, window: int) -> list[CountedCall]:
    """The launches of one more token, which attends to a whole window."""
    with FakeTensorMode(), torch.inference_mode():
        with unset_fake_temporarily(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text).eval().to(DTYPE)
        runner = ModelRunner(CausalLM(on_gpu(model)))
        # A pass attends to no more than the cache has room for.
        cache = KVCache(text.num_hidden_layers, 1, window, masked=True)
        one = torch.empty(1, text.num_key_value_heads, 1, head_width(text), dtype=DTYPE, device="cuda")
        for layer in cache.layers:
            layer.lazy_initialization(one, one)
        cache.length = window - 1
        sequences = Sequences(cache, True, GraphCache(1, runner.captures))
        token = torch.empty(1, dtype=torch.int64, device="cuda")
        with Count("cuda") as count:
            runner.step(sequences, token)
    return count.calls
