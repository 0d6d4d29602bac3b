"""One training step, forward and backward, from pixels to gradients: the original's form and this project's.

The original runs its towers module by module, without gradients, and then projects every pixel to keys and values with
gradients. Here the towers are packed, and mining takes its absorbed form. The language model is the same. Optimizer
and communication are left out. These cases run by name only.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mg_fast import MiniGeminiForConditionalGeneration, use_backend
from mg_fast.models.mini_gemini.frozen_towers import FrozenTowers, TowerFeatures

from ..registry import Call, Case, Provider
from ..training import choose_learned
from .random_models import Size, make_model
from .settings import require

# Tokens of a row beside those of its picture.
TEXT = 128


@dataclass
class TrainingInputs:
    """A model whose weights of a stage learn, with pixels of a picture for each row."""

    device: str
    model: MiniGeminiForConditionalGeneration
    low: torch.Tensor
    high: torch.Tensor
    ids: torch.Tensor
    marks: torch.Tensor


# By name: the size, the stage, the rows, and whether a wider dtype of it can be computed.
CASES = {
    "tiny-stage1": (Size("tiny", False, "float32", ()), 1, 2, True),
    "tiny-stage2": (Size("tiny", False, "float32", ()), 2, 2, True),
    "demo-stage2": (Size("demo", False, "float32", ()), 2, 2, True),
    "7b-stage1": (Size("7b", False, "bfloat16", ()), 1, 4, False),
    "7b-hd-stage1": (Size("7b", True, "bfloat16", ()), 1, 1, False),
}


def cases() -> list[Case]:
    return [_case(name, *of) for name, of in CASES.items()]


def _case(name: str, size: Size, stage: int, rows: int, exact: bool) -> Case:
    providers = {"reference": Provider(_original)}
    providers |= {backend: Provider(partial(_ours, backend)) for backend in ("torch", "auto", "triton")}
    return Case(
        f"training/{name}-b{rows}-{size.dtype}",
        partial(make, size, stage, rows),
        providers,
        _exact if exact else None,
        devices=(),
    )


def make(size: Size, stage: int, rows: int, device: str) -> TrainingInputs:
    """A model of this size with random weights and pixels."""
    model = make_model(size, device).train()
    choose_learned(model, stage)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    side, large, dtype = config.vision_config.image_size, config.image_size_aux, getattr(torch, size.dtype)
    shapes = (config.views, 3, side, side), (3, large, large)
    low, high = (torch.randn(rows, *shape, generator=generator).to(device, dtype) for shape in shapes)
    length = config.tokens_per_picture + TEXT
    ids = torch.randint(10, config.text_config.vocab_size, (rows, length), generator=generator)
    marks = torch.zeros_like(ids)
    marks[:, 1 : config.tokens_per_picture + 1] = 1
    return TrainingInputs(device, model, low, high, ids.to(device), marks.to(device))


def _original(inputs: TrainingInputs) -> Call:
    inner = inputs.model.model

    def see() -> TowerFeatures:
        return TowerFeatures(inner.low_resolution_queries(inputs.low), inner.vision_tower_aux(inputs.high))

    return _step("reference", see, inputs)


def _ours(backend: str, inputs: TrainingInputs) -> Call:
    if backend != "auto":
        require("patch_mining", backend, inputs.device)
    with use_backend(backend):
        towers = FrozenTowers(inputs.model.model)
    # The other providers need them in the model.
    towers.put_back(inputs.model.model)
    return _step(backend, lambda: towers(inputs.low, inputs.high), inputs)


def _step(backend: str, see: Callable[[], TowerFeatures], inputs: TrainingInputs) -> Call:
    model = inputs.model

    def call() -> list[torch.Tensor]:
        with use_backend(backend):
            with torch.no_grad():
                features = see()
            with torch.enable_grad():
                loss = model(
                    input_ids=inputs.ids,
                    tower_features=features,
                    mm_token_type_ids=inputs.marks,
                    labels=inputs.ids.masked_fill(inputs.marks == 1, -100),
                    use_cache=False,
                    allow_long=True,
                ).loss
                loss.backward()
        # The gradients that went through mining, and one that went through the language model.
        learned = dict(model.model.patch_mining.named_parameters())
        results = [loss.detach()[None]] + [learned[name].grad for name in COMPARED]
        results.append(model.model.mm_projector[0].weight.grad)
        model.zero_grad(set_to_none=True)
        return results

    return call


# The weights of mining whose gradients are compared.
COMPARED = (
    "vlm_uni_query_projector.1.weight",
    "vlm_uni_aux_projector.1.weight",
    "vlm_uni_val_projector.1.weight",
    "vlm_uni_val_projector.0.weight",
)


def _exact(inputs: TrainingInputs) -> list[torch.Tensor]:
    """The same results by the same weights in float64."""
    tensors = {"low": inputs.low.double(), "high": inputs.high.double(), "ids": inputs.ids, "marks": inputs.marks}
    return _original(TrainingInputs(inputs.device, copy.deepcopy(inputs.model).double(), **tensors))()
