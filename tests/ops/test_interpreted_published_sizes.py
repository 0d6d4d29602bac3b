"""Every kernel at the shapes of the published models, in every dtype; on a GPU only, as interpreting would take hours.

The inputs are the benchmark's cases, and its check is the tests' accuracy rule. A kernel must also give the same bits
when it is called again; a kernel whose threads race seldom does.
"""

import gc

import pytest
import torch

from bench.cases import all_cases
from bench.check import check
from bench.registry import DTYPES
from bench.rows import empty_row
from mg_fast.ops.operation import OPERATIONS
from tests.interpreting import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="published sizes need a GPU: interpreted, they would take hours")


def published(every: list[str]) -> list[str]:
    """Names of the cases of operations with kernels, without cases of several pictures.

    The dtype that the models run in comes first.
    """
    order = ("bfloat16", "float16", "float32")
    assert set(order) == set(DTYPES)
    groups = [name for name, operation in OPERATIONS.items() if operation.operators]
    chosen = [name for name in every if name.split("/")[0] in groups and "-b8-" not in name]
    return sorted(chosen, key=lambda name: order.index(name.rsplit("-", 1)[1]))


@pytest.mark.parametrize("name", published(list(all_cases())))
def test_right_and_repeatable(name):
    case = all_cases()[name].only(["triton"])
    rows = {provider: empty_row(case, provider) for provider in case.providers}
    try:
        with torch.no_grad():
            check(case, case.make("cuda"), "cuda", rows)
        assert rows["triton"]["ok"], rows["triton"]["why"]
        assert rows["triton"]["equal_bits"]
    finally:
        # The next size needs the memory.
        gc.collect()
        torch.cuda.empty_cache()
