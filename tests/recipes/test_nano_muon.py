"""Nano's optimizer in float32 against torch's own, and the arithmetic that its training chooses."""

import pytest
import torch

from mg_fast.runtime import cpu_dtype
from recipes.nano import arithmetic
from recipes.nano.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_muon_steps_as_that_of_torch(shape):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for _ in range(3)]
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in matrices] for _ in range(2))
    one = Muon(ours, lr=1e-2, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(shape, generator=generator)
            q.grad = p.grad.clone()
        one.step(), other.step()
    for start, p, q in zip(matrices, ours, theirs, strict=True):
        # torch's rounds to bfloat16 inside.
        assert (p - q).norm() < 0.04 * (q - start).norm()


def test_matrices_of_many_shapes_in_groups_with_rates_of_their_own():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (16, 16), (8, 24), (24, 8), (16, 16)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in matrices] for _ in range(2))
    one = Muon([{"params": ours[:3]}, {"params": ours[3:], "lr": 3e-2}], lr=1e-2, weight_decay=0.1)
    groups = [{"params": theirs[:3]}, {"params": theirs[3:], "lr": 3e-2}]
    other = torch.optim.Muon(groups, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            # One of two matrices of the same shape has no gradient for a while.
            p.grad = None if i == 2 and step < 2 else torch.randn(shapes[i], generator=generator)
            q.grad = None if p.grad is None else p.grad.clone()
        for group, its in zip(one.param_groups, other.param_groups, strict=True):
            group["lr"] = its["lr"] = group["lr"] * 0.7
        one.step(), other.step()
        # A run that continues has the same running means.
        state = one.state_dict()
        one = Muon([{"params": ours[:3]}, {"params": ours[3:]}], lr=1.0, weight_decay=0.1)
        one.load_state_dict(state)
    for start, p, q in zip(matrices, ours, theirs, strict=True):
        assert (p - q).norm() < 0.04 * (q - start).norm()


def test_orthogonal_matrices_have_singular_values_near_one():
    made = orthogonal(torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.5 and values.max() < 1.3


def test_muon_changes_only_what_has_a_gradient():
    learning, resting = (torch.nn.Parameter(torch.ones(4, 8)) for _ in range(2))
    learning.grad = torch.ones(4, 8)
    Muon([learning, resting], lr=1e-2, weight_decay=0.1).step()
    assert not torch.equal(learning, torch.ones(4, 8)) and torch.equal(resting, torch.ones(4, 8))


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"expected matrices, got a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize(
    "capabilities, rounds",
    [({"avx2": True}, False), ({"avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({"bf16": True}, True)],
)
def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch, capabilities, rounds):
    monkeypatch.setattr(cpu_dtype, "features", lambda: frozenset(name for name, there in capabilities.items() if there))
    arithmetic.has_bfloat16.cache_clear()
    with arithmetic.autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    arithmetic.has_bfloat16.cache_clear()
    assert product.dtype == (torch.bfloat16 if rounds else torch.float32)
    assert arithmetic.has_bfloat16("cuda")
