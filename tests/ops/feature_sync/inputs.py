"""Arguments of feature_sync for its tests, and the formula by hand."""

import math
from typing import NamedTuple

import torch

from mg_fast import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = ((4, 6), (3, 2))


class Inputs(NamedTuple):
    """The arguments of `ops.feature_sync`."""

    values: torch.Tensor
    queries: torch.Tensor
    table: torch.Tensor
    index: torch.Tensor
    reference_points: torch.Tensor
    spatial_shapes: tuple
    base: int
    ignore: torch.Tensor | None

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The tensors that have gradients."""
        return [self.values, self.queries, self.table, self.reference_points, self.ignore]

    def with_leaves(self, values, queries, table, reference_points, ignore) -> "Inputs":
        return Inputs(values, queries, table, self.index, reference_points, self.spatial_shapes, self.base, ignore)


def make(
    batch=2,
    queries=5,
    pictures=3,
    heads=2,
    channels=8,
    points=2,
    sizes=SIZES,
    dtype=torch.float32,
    query_dtype=None,
    logits=1.0,
    offsets=2.0,
    seed=0,
) -> Inputs:
    """Random arguments, with about a third of all pictures masked, and offsets of about half a map."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    width, pixels = heads * points * (2 + len(sizes)), sum(h * w for h, w in sizes)
    scales = torch.cat([torch.full((heads * points * 2,), offsets), torch.full((width - heads * points * 2,), logits)])
    index = torch.randint(1, pictures + 2, (batch, queries, pictures), generator=generator)
    index = index * (torch.rand(index.shape, generator=generator) < 0.67)
    return Inputs(
        normal(batch, pictures, pixels, heads, channels).to(dtype),
        (normal(batch, queries, width) * scales).to(query_dtype or dtype),
        (normal(pictures + 2, width) * scales / 2).to(query_dtype or dtype),
        index,
        torch.rand(batch, queries, 2, generator=generator),
        sizes,
        4,
        normal(heads * channels).to(dtype),
    )


def run(inputs: Inputs, backend: str) -> torch.Tensor:
    return ops.feature_sync(*inputs[:6], base=inputs.base, ignore=inputs.ignore, backend=backend)


def plain(inputs: Inputs) -> torch.Tensor:
    return run(inputs, "reference")


def double(inputs: Inputs) -> Inputs:
    return inputs.with_leaves(*(None if leaf is None else leaf.double() for leaf in inputs.leaves))


def exact(inputs: Inputs) -> torch.Tensor:
    return plain(double(inputs))


def by_hand(inputs: Inputs) -> torch.Tensor:
    """The sum of the formula, sample by sample and pixel by pixel, in float64."""
    values, queries, table, index, reference_points, sizes, base, ignore = double(inputs)
    batch, pictures, _, heads, channels = values.shape
    count, levels = queries.shape[1], len(sizes)
    points = queries.shape[2] // (heads * (2 + levels))
    out = values.new_zeros(batch, count, heads, channels)
    for b in range(batch):
        for q in range(count):
            for head in range(heads):
                found = []
                for j in range(pictures):
                    r = index[b, q if index.shape[1] > 1 else 0, j].item()
                    if r == 0:
                        continue
                    z = queries[b, q] + table[r]
                    for level in range(levels):
                        start, (h, w) = sum(h * w for h, w in sizes[:level]), sizes[level]
                        for p in range(points):
                            at = (head * points + p) * 2
                            logit = z[heads * points * 2 + (head * levels + level) * points + p].item()
                            reference = reference_points[b % len(reference_points), q % reference_points.shape[1]]
                            x = (reference[0] + z[at] / base).item() * w - 0.5
                            y = (reference[1] + z[at + 1] / base).item() * h - 0.5
                            sample = torch.zeros(channels, dtype=torch.float64)
                            for row in range(h):
                                for column in range(w):
                                    weight = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                                    if weight:
                                        sample += weight * values[b, j, start + row * w + column, head]
                            found.append((logit, sample))
                most = max([0.0, *(logit for logit, _ in found)])
                total = math.exp(-most) + sum(math.exp(logit - most) for logit, _ in found)
                if ignore is not None:
                    out[b, q, head] += math.exp(-most) / total * ignore.view(heads, channels)[head]
                for logit, sample in found:
                    out[b, q, head] += math.exp(logit - most) / total * sample
    return out.flatten(2)


def layouts(inputs: Inputs) -> dict[str, Inputs]:
    """The same arguments in other layouts."""
    values, queries, index = inputs.values, inputs.queries, inputs.index
    noise = torch.full_like(values, math.nan)
    return {
        "head by head": inputs._replace(values=values.transpose(2, 3).contiguous().transpose(2, 3)),
        "channels first": inputs._replace(values=values.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)),
        "pictures of a longer list": inputs._replace(
            values=torch.cat([noise, values, noise], 1).narrow(1, values.shape[1], values.shape[1])
        ),
        "heads of a wider map": inputs._replace(
            values=torch.cat([noise, values], 3).narrow(3, values.shape[3], values.shape[3])
        ),
        "every other channel": inputs._replace(values=values.repeat_interleave(2, dim=4)[..., ::2]),
        "part of a wider product": inputs._replace(
            queries=torch.cat([queries, queries * math.nan], 2)[..., : queries.shape[2]]
        ),
        "queries first": inputs._replace(queries=queries.transpose(0, 1).contiguous().transpose(0, 1)),
        "columns of queries": inputs._replace(queries=queries.mT.contiguous().mT),
        "index by picture": inputs._replace(index=index.mT.contiguous().int().mT),
        "table by column": inputs._replace(table=inputs.table.t().contiguous().t()),
    }


def padded(inputs: Inputs, more: int) -> Inputs:
    """With pictures that nobody sees, whose values are NaN: one in front, the others behind."""
    shape = list(inputs.values.shape)
    shape[1] = more
    nan = torch.full(shape, math.nan, dtype=inputs.values.dtype)
    zero = torch.zeros(*inputs.index.shape[:2], more, dtype=inputs.index.dtype)
    return inputs._replace(
        values=torch.cat([nan[:, :1], inputs.values, nan[:, 1:]], 1),
        index=torch.cat([zero[..., :1], inputs.index, zero[..., 1:]], 2),
    )


def gradients(inputs: Inputs, backend: str, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in inputs.leaves]
    return torch.autograd.grad(run(inputs.with_leaves(*leaves), backend), leaves, upstream.to(leaves[0].dtype))


TINY = dict(batch=2, queries=3, pictures=2, heads=2, channels=3, points=2)


# (B, Q, n, H, D, P, sizes of the levels).
SHAPES = {
    "one query": (2, 1, 5, 2, 16, 8, ((4, 4), (2, 2), (1, 1))),
    "grid": (1, 7, 1, 2, 8, 4, ((4, 3), (2, 2), (2, 1), (1, 1))),
    "one level": (1, 3, 2, 2, 5, 1, ((3, 5),)),
    "many pictures": (1, 4, 16, 1, 12, 3, SIZES),
    "many points": (2, 5, 2, 2, 6, 7, SIZES),
}


def shaped(shape: tuple, **rest) -> Inputs:
    names = ("batch", "queries", "pictures", "heads", "channels", "points", "sizes")
    return make(**dict(zip(names, shape)), **rest)
