"""The ahead-of-time gate fails for spills, for too much shared memory, for narrow loads and for missing products."""

import pytest

from mg_fast.kernels.configs import ProductTile, Tile
from tests.ops.ahead_of_time_gate import faults
from tests.ops.patch_mining.ahead_of_time import Mining
from tests.ops.pointwise.ahead_of_time import Pointwise


@pytest.mark.parametrize(
    "case, tile, fault",
    [
        # A tile of twice the default's channels, and one with stages that only an H100 has shared memory for.
        pytest.param(Mining("pool_windows_fwd", 120, "bf16", "768"), Tile(128, 4, 2), "spills", id="spills"),
        pytest.param(
            Mining("pool_windows_fwd", 86, "bf16", "768"),
            Tile(64, 8, 14),
            "bytes of shared memory, sm_86 has 101376",
            id="shared",
        ),
        # This is why products on an H100 have no wider tiles (see configs.py).
        pytest.param(
            Pointwise("linear_gelu_fwd", 90, "bf16", "stage2"),
            ProductTile(128, 256, 64, 8, 8, 3),
            "spills",
            id="wide products",
        ),
    ],
)
def test_the_gate_can_fail(put_off, case, tile, fault):
    [[name, found]] = put_off(case, tile).result().items()
    assert any(fault in found for found in faults(case, name, found)), found


def test_the_gate_sees_narrow_loads_and_missing_products(put_off):
    """The gate sees widths that allow no wide loads, and products without tensor cores.

    For the latter, the exact products of a float32 kernel are checked as if they were bfloat16's.
    """
    real = Mining("pool_windows_fwd", 90, "bf16", "768")
    [odd] = put_off(real._replace(shape="odd8")).result().values()
    assert any("narrow loads" in fault for fault in faults(real, "", odd))
    single = real._replace(dtype="fp32")
    [exact] = put_off(single).result().values()
    assert faults(single, "", exact) == []
    assert any("0 instructions on tensor cores" in fault for fault in faults(real, "", exact))
