"""That the ahead-of-time gate can fail: for what spills, for what takes too much shared memory, for narrow loads and
missing products.
"""

import pytest

from mg_fast.kernels.configs import ProductTile, Tile
from tests.ops.ahead_of_time_gate import faults
from tests.ops.patch_mining.ahead_of_time import Mining
from tests.ops.pointwise.ahead_of_time import Pointwise


@pytest.mark.parametrize(
    "case, tile, fault",
    [
        # a tile of twice the default's channels, and stages that an H100 has room for and this card has not
        pytest.param(Mining("pool_windows_fwd", 120, "bf16", "768"), Tile(128, 4, 2), "spills", id="spills"),
        pytest.param(
            Mining("pool_windows_fwd", 86, "bf16", "768"),
            Tile(64, 8, 14),
            "bytes of shared memory, sm_86 has 101376",
            id="shared",
        ),
        # why products on an H100 are no wider: configs.py says so
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
    """Of widths that no wide load fits; and of float32, whose products would not be exact in TF32, taken for
    bfloat16's.
    """
    real = Mining("pool_windows_fwd", 90, "bf16", "768")
    [odd] = put_off(real._replace(shape="odd8")).result().values()
    assert any("narrow loads" in fault for fault in faults(real, "", odd))
    single = real._replace(dtype="fp32")
    [exact] = put_off(single).result().values()
    assert faults(single, "", exact) == []
    assert any("0 instructions on tensor cores" in fault for fault in faults(real, "", exact))
