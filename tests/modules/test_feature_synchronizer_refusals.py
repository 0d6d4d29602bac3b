"""The feature synchronizer refuses inputs and sizes that do not fit, and says what was expected and what came."""

import pytest

from mg_fast import BackendError
from mg_fast.modules import FeatureSynchronizer
from tests.synchronizers import SMALL, build, draw


def bad(**changes):
    """A call with one input changed; a change is a function of the input."""

    def call(module, inputs):
        module(*(inputs._replace(**{name: change(getattr(inputs, name)) for name, change in changes.items()})))

    return call


REFUSED = {
    "query of another width": (bad(query=lambda x: x[..., 1:]), r"query must be \[B, Q, 20\], got \[2, 5, 19\]"),
    "query without batch": (bad(query=lambda x: x[0]), r"query must be \[B, Q, 20\], got \[5, 20\]"),
    "integer query": (bad(query=lambda x: x.long()), "query must be floating point, got torch.int64"),
    "query in another dtype": (bad(query=lambda x: x.half()), "query must be torch.float32 .* got torch.float16"),
    "features of another width": (bad(features=lambda x: x[..., 1:]), r"must be \[B, n, 33, 12\], got .* 33, 11\]"),
    "levels of another size": (bad(features=lambda x: x[:, :, 1:]), r"have 33 pixels, but .* have 32: \[2, 3, 32, 12"),
    "features without pictures": (bad(features=lambda x: x[:, 0]), r"features must be .* got \[2, 33, 12\]"),
    "integer features": (bad(features=lambda x: x.long()), "features must be floating point, got torch.int64"),
    "features in another dtype": (bad(features=lambda x: x.double()), "features must be torch.float32 .*float64"),
    "features elsewhere": (bad(features=lambda x: x.to("meta")), "features must be on cpu, got meta"),
    "features of another batch": (bad(features=lambda x: x[:1]), r"features must be of batch 2 .* got \[1, 3, 33"),
    "boxes": (bad(reference_points=lambda x: x.repeat(1, 1, 1, 2)), "four numbers: .* boxes are not supported"),
    "points of other queries": (bad(reference_points=lambda x: x[:, 1:]), r"must be \[2 or 1, 5 or 1, 1, 2\], .* got"),
    "points for each level": (bad(reference_points=lambda x: x.repeat(1, 1, 2, 1)), r"one point for all levels, got"),
    "integer points": (bad(reference_points=lambda x: x.long()), "reference_points must be floating point, got"),
    "points elsewhere": (bad(reference_points=lambda x: x.to("meta")), "reference_points must be on cpu, got meta"),
    "a longer mask": (bad(mask=lambda x: x.repeat(1, 2, 1)), r"mask must be \[2, 5, 3\] or \[2, 3\], got \[2, 10, 3"),
    "a mask of other pictures": (bad(mask=lambda x: x[..., 1:]), r"mask must be \[2, 5, 3\] .* got \[2, 5, 2\]"),
    "a mask of another batch": (bad(mask=lambda x: x[:1]), r"mask must be \[2, 5, 3\] .* got \[1, 5, 3\]"),
    "a mask of four dimensions": (bad(mask=lambda x: x[None]), r"mask must be .* got \[1, 2, 5, 3\]"),
    "a mask elsewhere": (bad(mask=lambda x: x.to("meta")), "mask must be on cpu as the pictures are, got meta"),
    "one query and no row": (
        bad(query=lambda x: x[:, :1], reference_points=lambda x: x[:, :1], mask=lambda x: x[:, :0]),
        r"mask must be \[2, 1 or more, 3\] or \[2, 3\], got \[2, 0, 3\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_that_do_not_fit(name):
    module = build()
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"FeatureSynchronizer: .*{message}"):
        call(module, draw(module))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(heads=3), "inner_dim must be a multiple of heads, got inner_dim=16 and heads=3"),
        (dict(points=0), "points must be a positive whole number, got 0"),
        (dict(base=-1), "base must be a positive whole number, got -1"),
        (dict(base=1.5), "base must be a positive whole number, got 1.5"),
        (dict(max_images=None), "max_images must be a positive whole number, got None"),
        (dict(spatial_shapes=[]), r"at least one side or pair .* got \[\]"),
        (dict(spatial_shapes=[(4, 0)]), r"at least one side or pair .* got \[\(4, 0\)\]"),
        (dict(spatial_shapes=[(4, 4, 4)]), "at least one side or pair"),
        (dict(spatial_shapes=16), "at least one side or pair .* got 16"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=f"FeatureSynchronizer: .*{message}"):
        FeatureSynchronizer(20, 12, 24, **SMALL | change)


def test_an_unknown_backend_is_refused():
    module = build()
    with pytest.raises(BackendError, match="unknown backend"):
        module(*draw(module), backend="cuda")


def test_features_beside_values_are_refused():
    module = build()
    query, features, points, mask = draw(module)
    with pytest.raises(ValueError, match="expected features or values, got neither"):
        module(query, None, points, mask)
    with pytest.raises(ValueError, match="expected features or values, got both"):
        module(query, features, points, mask, values=module.values(features))
    with pytest.raises(ValueError, match=r"values must be \[B, n, 33, 4, 4\], .* got \[2, 3, 33, 16\]"):
        module(query, None, points, mask, values=module.values(features).flatten(3))
    with pytest.raises(ValueError, match="expected a mask or an index, got both"):
        module(query, features, points, mask, index=module.index(mask))
