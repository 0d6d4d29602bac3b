"""Which states a picture is drawn from, and which picture the U-Net looks back at."""

from types import SimpleNamespace

import pytest
import torch

from mg_fast.errors import PromptError
from mg_fast.models.mm_interleaved.context import PlacedPicture, contexts, place_pictures, previous_maps, select_targets

BOS, PAD, SOI, IMAGE, WORD = 1, 9, 10, 11, 5
CONFIG = SimpleNamespace(bos_token_id=BOS, soi_token_id=SOI, image_token_id=IMAGE, seq_len=6)
# Two documents in the first row, and a picture at the end whose tokens are still missing; padding in the second row.
IDS = torch.tensor(
    [
        [BOS, SOI, IMAGE, BOS, WORD, SOI, IMAGE, SOI],
        [PAD, PAD, BOS, WORD, SOI, IMAGE, PAD, PAD],
    ]
)
PLACED = [
    PlacedPicture(0, 0, 1, None),
    PlacedPicture(0, 0, 5, None),
    PlacedPicture(0, 0, 7, 1),
    PlacedPicture(1, 2, 4, None),
]


def test_pictures_are_placed_in_documents():
    assert place_pictures(IDS, (IDS != PAD).long(), CONFIG) == PLACED
    assert select_targets(PLACED, 2, None) == [PLACED[2], PLACED[3]]
    assert select_targets(PLACED, 2, torch.tensor([3, 0])) == [PLACED[3], PLACED[0]]


def test_a_context_goes_back_to_the_first_token_that_is_not_padding():
    states = torch.arange(16.0).view(2, 8, 1) + 1
    found, mask = contexts(states, [PLACED[0], PLACED[3]], CONFIG)
    assert found[..., 0].tolist() == [[2, 1, 0], [13, 12, 11]] and mask.tolist() == [[True, True, False], [True] * 3]
    with pytest.raises(PromptError, match="at most 6 tokens, but 8"):
        contexts(states, [PLACED[2]], CONFIG)


def test_the_maps_of_the_picture_before():
    maps = torch.arange(4.0).view(4, 1, 1)
    found, mask = previous_maps(maps, [PLACED[3], PLACED[2]])
    assert mask.tolist() == [[False], [True]] and found[1].tolist() == [[[1.0]]]
    assert previous_maps(None, [PLACED[0]]) == (None, None)
    with pytest.raises(PromptError, match="at least 2, got 1"):
        previous_maps(maps[:1], [PLACED[2]])
