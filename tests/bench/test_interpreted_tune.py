"""A replaced tile, run by the interpreter: other programs give the same result."""

import torch

from bench import tune
from mg_fast import ops
from mg_fast.kernels import configs
from mg_fast.kernels import pointwise as kernels
from mg_fast.testing.tolerances import assert_accurate
from tests.interpreting import INTERPRETED


def test_a_replaced_tile():
    x, weight, bias = torch.randn(70, 48), torch.randn(40, 48), torch.randn(40)
    exact = ops.linear_gelu(x.double(), weight.double(), bias.double(), backend="reference")
    plain = ops.linear_gelu(x, weight, bias, backend="torch")
    architecture = None
    if not INTERPRETED:
        major, minor = torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    key = configs.pointwise_bucket(4, 70, 40, [48, 48, 40])
    programs = set()
    for tile in (tune.tile_of("pointwise", architecture, key), configs.ProductTile(16, 16, 16, 4, 4, 2)):
        with configs.replaced_tile(configs.POINTWISE, architecture, key, tile):
            programs.add(kernels._launch(x, weight)[0])
            assert_accurate(ops.linear_gelu(x, weight, bias, backend="triton"), plain, exact)
    # 70 x 40 is split into tiles of 64 x 64, and of 16 x 16.
    assert programs == {2, 15}
