"""The reference path agrees with its definition, written out with loops."""

import pytest
import torch
import torch.nn.functional as F

from mg_fast.modules import ConvNeXtPyramid, PatchInfoMining
from mg_fast.ops import reference

DIMS = (6, 10, 14, 18)


def make(batch=2, grid=1, side=3, window=8, dim=12, views=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n0 = grid * side * window
    views = views or grid * grid + (grid > 1)
    queries = torch.randn(batch, views, side * side, dim, generator=generator, dtype=torch.float64)
    pyramid = [
        torch.randn(batch, n0 >> s, n0 >> s, c, generator=generator, dtype=torch.float64) for s, c in enumerate(DIMS)
    ]
    torch.manual_seed(seed)
    mining = PatchInfoMining(dim, DIMS, dtype=torch.float64)
    for p in mining.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return mining, queries, pyramid


def by_hand(mining, queries, pyramid, grid):
    """Mines every query by itself: LayerNorm, projections, softmax over its window of the upsampled, joined map."""
    size = pyramid[0].shape[1]
    maps = []
    for level in pyramid:
        level = level.permute(0, 3, 1, 2)
        maps.append(
            level
            if level.shape[-1] == size
            else F.interpolate(level.float(), size=(size, size), mode="bilinear").double()
        )
    full = torch.cat(maps, 1)
    side = int(queries.shape[2] ** 0.5)
    out = torch.zeros_like(queries)
    lq, lk, lv = mining.vlm_uni_query_projector, mining.vlm_uni_aux_projector, mining.vlm_uni_val_projector
    for b in range(queries.shape[0]):
        for v in range(queries.shape[1]):
            if v < grid * grid:
                edge = size // grid
                row, column = divmod(v, grid)
                cell = full[b, :, row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
            else:
                # Bilinear without antialiasing takes the mean of 2x2 pixels, or the middle one of 3x3.
                cell = F.avg_pool2d(full[b : b + 1].float(), 2)[0].double() if grid == 2 else full[b, :, 1::3, 1::3]
            window = cell.shape[-1] // side
            for n in range(side * side):
                i, j = divmod(n, side)
                pixels = cell[:, i * window : (i + 1) * window, j * window : (j + 1) * window].flatten(1).T
                scores = lk(pixels) @ lq(queries[b, v, n]) / queries.shape[-1] ** 0.5
                out[b, v, n] = scores.softmax(0) @ lv(pixels)
    return out


@pytest.mark.parametrize("grid,side,window", [(1, 3, 8), (1, 1, 8), (2, 2, 8), (3, 1, 8), (2, 2, 4), (1, 2, 16)])
def test_patch_mining(grid, side, window):
    mining, queries, pyramid = make(grid=grid, side=side, window=window)
    with torch.no_grad():
        result = mining(queries, pyramid, grid=grid, backend="reference")
        # The merge runs in float32 even here, as the original's does.
        assert (result - by_hand(mining, queries, pyramid, grid)).abs().max() < 1e-5


def test_three_dimensional_queries_mean_one_view():
    mining, queries, pyramid = make()
    assert torch.equal(mining(queries[:, 0], pyramid), mining(queries, pyramid)[:, 0])


def test_half_precision_scores_do_not_turn_to_nan():
    """The original replaces infinite scores by the largest finite value, and so does the definition."""
    mining, queries, pyramid = make()
    mining = mining.half()
    for p in mining.parameters():
        p.data.mul_(40)
    result = mining(queries.half() * 100, [level.half() for level in pyramid], backend="reference")
    assert result.isfinite().all()


def test_gradients():
    mining, queries, pyramid = make(batch=1, side=1, dim=4)
    projections = [
        reference.Projection(p[0].weight, p[0].bias, p[1].weight, p[1].bias)
        for p in (mining.vlm_uni_query_projector, mining.vlm_uni_aux_projector, mining.vlm_uni_val_projector)
    ]
    window = pyramid[0].permute(0, 3, 1, 2)[:, :, :4, :4].clone().requires_grad_()
    key, value = (
        p._replace(**{f: getattr(p, f)[..., :6] for f in ("norm_weight", "norm_bias", "weight")})
        for p in projections[1:]
    )
    queries = queries[:, 0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, w: reference.mine(q, w, projections[0], key, value), (queries, window))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda q, p: (q[:, :, :8], p), "must be a square, got 8"),
        (lambda q, p: (q[:, [0, 0, 0]], p), "expected 1 views, or 2 with the global one, got 3"),
        (lambda q, p: (q[:, [0, 0]], p), "a global view needs grid >= 2"),
        (lambda q, p: (q[0, 0], p), r"must be \[B, N, D\] or \[B, V, N, D\], got \[9, 12\]"),
        (lambda q, p: (q, p[:3]), "the pyramid has 30 channels, the projections take 48"),
        (lambda q, p: (q, [p[0][:1], *p[1:]]), r"pyramid level 0 must be \[2, n, n, C\], got \[1, 24, 24, 6\]"),
        (
            lambda q, p: (q, [p[0][:, :23, :23], *p[1:]]),
            "the finest map of 23x23 must be a multiple of the 3x3 query grid",
        ),
    ],
)
def test_wrong_shapes_are_named(change, message):
    mining, queries, pyramid = make()
    queries, pyramid = change(queries, pyramid)
    with pytest.raises(ValueError, match=message):
        mining(queries, pyramid)


def test_parameter_names_are_the_originals():
    names = set(PatchInfoMining(8, DIMS).state_dict())
    assert names == {
        f"vlm_uni_{part}_projector.{layer}.{kind}"
        for part in ("query", "aux", "val")
        for layer in (0, 1)
        for kind in ("weight", "bias")
    }


def test_pyramid_is_timms_own():
    import timm

    torch.manual_seed(0)
    trunk = timm.create_model(
        "convnext_tiny", pretrained=False, dims=DIMS, depths=(1, 1, 2, 1), drop_path_rate=0.0
    ).eval()
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = trunk.forward_intermediates(pixels, intermediates_only=True)
        pyramid = ConvNeXtPyramid.from_timm(trunk)(pixels)
    for level, stage in zip(pyramid, expected):
        assert torch.equal(level.permute(0, 3, 1, 2), stage)


def test_pyramid_is_deterministic_in_training_mode():
    tower = ConvNeXtPyramid.from_dims(DIMS, (1, 1, 2, 1)).train()
    pixels = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(tower(pixels), tower(pixels)))


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("convnextv2_atto", {}, "GlobalResponseNorm"),
        ("resnet18", {}, "expected a timm ConvNeXt, got ResNet"),
        ("convnext_atto", {"drop_path_rate": 0.1}, "drop_path_rate=0"),
    ],
)
def test_other_trunks_are_refused(name, options, message):
    import timm

    with pytest.raises(ValueError, match=message):
        ConvNeXtPyramid.from_timm(timm.create_model(name, pretrained=False, **options))


def test_low_resolution_views():
    pixels = torch.randn(2, 3, 64, 64)
    canvas = F.interpolate(pixels, size=(28, 28), mode="bilinear", align_corners=False)
    views = reference.low_resolution_views(pixels, 14, grid=2, global_view=True)
    assert views.shape == (2, 5, 3, 14, 14)
    assert torch.equal(views[:, 1], canvas[..., :14, 14:])
    assert torch.equal(views[:, 2], canvas[..., 14:, :14])
    assert torch.allclose(views[:, 4], F.avg_pool2d(canvas, 2), atol=1e-6)


def test_token_order():
    features = torch.arange(5).reshape(1, 5, 1, 1).float()
    assert reference.order_tokens(features, grid=2).flatten().tolist() == [4, 0, 1, 2, 3]
    assert reference.order_tokens(features[:, :1], grid=1).flatten().tolist() == [0]
