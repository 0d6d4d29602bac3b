"""Calls of patch info mining: what is refused and how, unusual widths, dtypes, and compiling for all kinds of sizes."""

import pytest
import torch

from mg_fast import ops
from mg_fast.modules import PatchInfoMining
from mg_fast.ops import reference
from mg_fast.testing.tolerances import assert_accurate
from tests.ops.patch_mining.test_torch_patch_mining import make, oracle


def changed(**changes):
    """A call with valid arguments for two pictures, some of them changed."""
    queries, pyramid, (query, key, value), grid = make(2, batch=2, dims=(6, 10), dim=8)
    arguments = {"queries": queries, "pyramid": pyramid, "query": query, "key": key, "value": value, "grid": grid}
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    return lambda: ops.patch_mining(**arguments)


def narrower(projection):
    return reference.Projection(
        projection.norm_weight[1:], projection.norm_bias[1:], projection.weight[:, 1:], projection.bias
    )


REFUSED = {
    "no cell": (changed(grid=lambda _: 0), "grid must be at least 1 cell a side, got 0"),
    "no level": (changed(pyramid=lambda _: []), "at least one level, got none"),
    "empty level": (
        changed(pyramid=lambda p: [p[0][:, :0, :0], p[1]]),
        r"level 0 must be \[2, n, n, C\], got \[2, 0, 0, 6\]",
    ),
    "other batch": (
        changed(pyramid=lambda p: [level[:1] for level in p]),
        r"level 0 must be \[2, n, n, C\], got \[1, 16, 16, 6\]",
    ),
    "other device": (
        changed(pyramid=lambda p: [level.to("meta") for level in p]),
        "level 0 is on meta, the queries are on cpu",
    ),
    "integers": (changed(pyramid=lambda p: [level.int() for level in p]), "must be floating point, got torch.int32"),
    "wide queries": (
        changed(queries=lambda q: torch.cat([q, q], -1)),
        "the queries are 16 wide, the query projection takes 8",
    ),
    "narrow keys": (changed(key=narrower), "the pyramid has 16 channels, the projections take 15"),
    "narrow values": (changed(value=narrower), "the pyramid has 16 channels, the projections take 15"),
    "other value width": (
        changed(value=lambda v: v._replace(weight=v.weight[1:], bias=v.bias[1:])),
        "values to the queries' 8, got 8, 8 and 7",
    ),
    "maps that do not divide": (
        changed(pyramid=lambda p: [p[0][:, :15, :15], p[1]]),
        "finest map of 15x15 must be a multiple of the 2x2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_was_expected_and_what_came(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_scores_scale_with_the_width_that_queries_and_keys_are_projected_to():
    queries, pyramid, (query, key, value), grid = make(2, dims=(6, 10), dim=8)
    query, key = (p._replace(weight=p.weight[:5], bias=p.bias[:5]) for p in (query, key))
    with torch.no_grad():
        plain = reference.patch_mining(queries, pyramid, query, key, value)
        ours = ops.patch_mining(queries, pyramid, query, key, value, backend="torch")
        assert_accurate(ours, plain, oracle(queries, pyramid, (query, key, value), grid))


def test_large_biases_of_the_keys_leave_no_trace_in_float16():
    queries, pyramid, (query, key, value), _ = make(2, dims=(6, 10), dim=1024, dtype=torch.float16)
    key = key._replace(bias=torch.full_like(key.bias, 100))
    with torch.no_grad():
        expected = ops.patch_mining(queries, pyramid, query, key, value, backend="torch")
    assert torch.equal(ops.patch_mining(queries, pyramid, query, key, value, backend="torch"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic, backend", [(None, "aot_eager"), (True, "eager")])
def test_one_graph_for_every_size_under_compile(dynamic, backend):
    """With `dynamic=None` torch turns sizes into symbols when they change."""
    torch._dynamo.reset()
    mining = PatchInfoMining(12, (6, 10))
    compiled = torch.compile(mining, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for case in ({"side": 2}, {"side": 3, "window": 4}, {"side": 2, "batch": 3}):
            queries, pyramid, _, grid = make(**case, dims=(6, 10))
            assert torch.allclose(compiled(queries, pyramid, grid=grid), mining(queries, pyramid, grid=grid), atol=1e-6)
