"""The accuracy checks themselves hold to their own conditions."""

import pytest
import torch

from mg_fast.testing.tolerances import ieee_float32


@pytest.mark.parametrize(
    "backend", [torch.backends.cudnn, torch.backends.cuda.matmul], ids=["convolutions", "products"]
)
def test_float32_is_not_rounded_to_tf32_in_tests(backend):
    """TF32 is off: cuDNN's default would make plain forms on a GPU a thousand times less accurate than ours may be."""
    assert backend.allow_tf32 is False
    backend.allow_tf32 = True
    ieee_float32()
    assert backend.allow_tf32 is False
