"""The kernels in the benchmark's cases of deformable attention and of the synchronizer, at small sizes."""

import pytest
import torch

from bench.check import check
from bench.rows import empty_row
from tests.bench.test_sampling_cases import NAMES, small_case
from tests.interpreting import INTERPRETED


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_right(name):
    case = small_case(name, torch.float32).only(["triton*"])
    rows = {provider: empty_row(case, provider) for provider in case.providers}
    with torch.no_grad():
        check(case, case.make("cpu" if INTERPRETED else "cuda"), "cpu" if INTERPRETED else "cuda", rows)
    assert len(rows) > 1
    for provider, row in rows.items():
        assert row["ok"], f"{provider}: {row['why']}"
