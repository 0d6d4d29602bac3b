"""Every kernel that a published model launches, in any dtype, is among those that are compiled ahead of time.

This holds on every architecture for Mini-Gemini, and on 9.0 for detectors and MM-Interleaved, whose kernels differ
little from one architecture to the next. The models run on fake tensors, and nothing is compiled: kernels are compared
by the digests of what goes into the compiler.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bench.cases import all_cases
from bench.cases.deformable_attention import make_inputs
from bench.costs.sampling import SAMPLERS
from mg_fast import ops
from mg_fast.models.mini_gemini.launches import BATCHES, launch_resize, launch_vision, published_configs
from mg_fast.ops.backend import use_backend
from mg_fast.ops.deformable_attention import deformable_attention_backward, deformable_attention_sum
from tests.ops.ahead_of_time_checks import FAMILIES
from tests.ops.ahead_of_time_gate import DISTINCT, DTYPES, digest_case, digested


@pytest.mark.parametrize("architecture", DISTINCT)
def test_what_published_models_launch_is_compiled(architecture):
    cases = [case for family in FAMILIES.values() for case in family.cases() if case.architecture == architecture]
    known = {digest for case in cases for digest in digest_case(case).values()}
    launched = {}
    for dtype in DTYPES.values():
        with digested(architecture, training=True) as found, use_backend("triton"):
            for launch in (mini_gemini, *([deformable_attention, synchronizer] if architecture == 90 else [])):
                for what in launch(dtype):
                    launched |= {digest: f"{kernel} of {what} in {dtype}" for kernel, digest in found}
                    found.clear()
    assert len(launched) > 50
    assert [what for digest, what in launched.items() if digest not in known] == []


def mini_gemini(dtype: torch.dtype) -> Iterator[str]:
    """Launches what a picture takes, and the gradients that have kernels."""
    for config in published_configs():
        launch_resize(config)
        for batch in BATCHES:
            for training in (False, True):
                launch_vision(config, dtype, batch=batch, training=training)
            yield f"{batch} pictures of {config.image_size_aux} pixels"


def deformable_attention(dtype: torch.dtype) -> Iterator[str]:
    """Launches detectors' and the vision adapter's attention, and its gradients by atomics and by sorting."""
    for name, sizes in SAMPLERS.items():
        inputs = make_inputs(replace(sizes, dtype=dtype), "cuda")
        value, locations, weights = inputs.tensors
        ops.deformable_attention(value, inputs.levels, locations, weights)
        sides = [side for size in inputs.levels for side in size]
        for wanted in ([True, True, True], [False, True, True]):
            deformable_attention_backward(inputs.gradient, value, sides, locations, weights, wanted)
        order = torch.empty(4 * weights.numel(), dtype=torch.int64, device="cuda")
        ends = torch.empty(value[..., 0].numel() + 1, dtype=torch.int64, device="cuda")
        deformable_attention_sum(inputs.gradient, sides, locations, weights, order, ends, dtype)
        yield name


def synchronizer(dtype: torch.dtype) -> Iterator[str]:
    """Launches MM-Interleaved's synchronizers, for one row of the language model and for each block of the UNet."""
    for name, case in all_cases().items():
        if name.startswith("feature_sync/") and name.endswith(f"-b1-{str(dtype).split('.')[1]}") and "-all" not in name:
            case.providers["triton"](case.make("cuda"))()
            yield name
