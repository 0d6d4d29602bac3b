"""Position embeddings are the original's, and resized tables are kept until the stored ones change."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from mg_fast.models.mm_interleaved.positions import grid_positions, resized_positions, sequence_positions
from tests.models.mm_interleaved import recorded

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", recorded.NAMES)
def test_tables_are_the_originals(name):
    stored = recorded.state(name, "visual_tokenizer.")["pos_embed"]
    assert not stored[0].any()
    assert torch.allclose(grid_positions(16, stored.shape[1]), stored[1:], atol=2e-7)
    # Padded rows of a context are the projection's bias and a position.
    answers, bias = recorded.answers(name), recorded.state(name, "context_feat_proj.")["bias"]
    features, padded = answers["story.context_features"], answers["story.context_attention_mask"] == 0
    table = sequence_positions(features.shape[1], features.shape[2], CPU)
    assert padded.any() and torch.allclose((bias + table).expand_as(features)[padded], features[padded], atol=3e-7)


def test_grids_are_resized_one_after_the_other_and_kept():
    stored = torch.nn.Parameter(torch.randn(1 + 16, 6), requires_grad=False)
    table = resized_positions(stored, (8, 4, 2), skip=1)
    larger = F.interpolate(stored[1:].t().reshape(1, 6, 4, 4), size=(8, 8), mode="bicubic", align_corners=False)
    assert table.shape == (64 + 16 + 4, 6)
    assert torch.equal(table[:64], larger[0].flatten(1).t()) and torch.equal(table[64:80], stored[1:])
    assert resized_positions(stored, (8, 4, 2), skip=1) is table
    assert resized_positions(stored, (8, 4, 2), skip=1, dtype=torch.bfloat16).dtype == torch.bfloat16
    with torch.no_grad():
        stored.mul_(2)
    assert torch.allclose(resized_positions(stored, (8, 4, 2), skip=1), 2 * table)
    stored.data = stored.data.double()
    assert resized_positions(stored, (4,), skip=1, dtype=torch.float64).equal(stored[1:])


def test_a_table_goes_with_the_stored_one():
    stored = torch.randn(16, 6)
    table = weakref.ref(resized_positions(stored, (8,)))
    assert table() is not None
    del stored
    assert table() is None


def test_tables_made_in_inference_mode_can_be_trained_with():
    stored = torch.randn(16, 6)
    with torch.inference_mode():
        resized_positions(stored, (8,))
        resized_positions(torch.randn(16, 6), (8,))
    weight = torch.ones(6, requires_grad=True)
    (resized_positions(stored, (8,)) * weight).sum().backward()
    stored.requires_grad_()
    resized_positions(stored, (8,)).sum().backward()
    assert weight.grad is not None and stored.grad is not None


def test_a_table_that_is_no_grid():
    with pytest.raises(ValueError, match="expected the embeddings of a square grid, got 15 rows"):
        resized_positions(torch.randn(16, 6), (8,), skip=1)
