"""Positions see the right pictures whatever the padding, and prompts whose pictures do not fit are refused."""

import pytest
import torch

from mg_fast.errors import PromptError
from mg_fast.models.mm_interleaved.configuration import MMInterleavedConfig
from mg_fast.models.mm_interleaved.visible_pictures import (
    check_pictures,
    count_pictures,
    in_rows,
    picture_index,
    repeated,
    splice,
    visible,
)

# Two image tokens a picture.
CONFIG = MMInterleavedConfig(num_img_token=2, pad_token_id=9, soi_token_id=10, image_token_id=11)
PICTURE, BOS, PAD = [10, 11, 11], 1, 9
TWO = [BOS, *PICTURE, 5, *PICTURE, 6]


def seen(ids: list[list[int]], numbers: list[int]) -> list:
    return visible(torch.tensor(ids), torch.tensor(numbers), CONFIG).int().tolist()


def test_a_picture_is_seen_from_its_first_token_on():
    assert seen([TWO], [2]) == [[[0, 0], [0, 0], [1, 0], [1, 0], [1, 0], [1, 0], [1, 1], [1, 1], [1, 1]]]


@pytest.mark.parametrize("pads", [([PAD] * 4, []), ([], [PAD] * 4)], ids=["left", "right"])
def test_padding_on_either_side_changes_nothing(pads):
    left, right = pads
    short = [BOS, *PICTURE, 7]
    alone = seen([short], [1])[0]
    rows = seen([TWO, [*left, *short, *right]], [2, 1])
    assert rows[0] == seen([TWO], [2])[0]
    kept = rows[1][len(left) : len(left) + 5]
    # The second picture is not there in this row.
    assert kept == [[*row, 0] for row in alone]
    assert all(row == [0, 0] for row in rows[1][: len(left)])


def test_a_new_document_hides_what_came_before():
    ids = [BOS, *PICTURE, 5, BOS, 6, *PICTURE, 7]
    assert [sum(row) for row in seen([ids], [2])[0]] == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert seen([ids], [2])[0][-1] == [0, 1]


def test_nothing_asks_the_host():
    """On the meta device a question to the host would fail."""
    ids, numbers = torch.tensor([TWO, TWO], device="meta"), torch.tensor([2, 2], device="meta")
    found = visible(ids, numbers, CONFIG, pictures=2)
    assert found.shape == (2, 9, 2) and picture_index(found).shape == (2, 9, 2)
    tokens, soi = torch.zeros(4, 2, 3, device="meta"), torch.zeros(1, 3, device="meta")
    assert splice(torch.zeros(2, 9, 3, device="meta"), ids, tokens, soi, CONFIG).shape == (2, 9, 3)
    assert in_rows(tokens[:3], numbers, 2).shape == (2, 2, 2, 3)


def test_the_most_recent_picture_has_index_one():
    assert picture_index(torch.tensor([[[1, 1, 0], [1, 0, 1], [0, 0, 0]]]).bool()).tolist() == [
        [[2, 1, 0], [2, 0, 1], [0, 0, 0]]
    ]
    with pytest.raises(PromptError, match="may see at most 49 pictures, .* a row of the mask sees 50"):
        picture_index(torch.ones(1, 2, 50, dtype=torch.bool))


def test_pictures_go_to_the_rows_and_places_they_belong_to():
    ids = torch.tensor([TWO, [BOS, *PICTURE, 5, PAD, PAD, PAD, PAD]])
    numbers = count_pictures(ids, CONFIG)
    assert numbers.tolist() == [2, 1]
    pictures = torch.arange(1.0, 7).view(3, 2, 1)
    rows = in_rows(pictures, numbers, 2)
    assert rows[0].flatten().tolist() == [1, 2, 3, 4] and rows[1, 0].flatten().tolist() == [5, 6]
    spliced = splice(torch.zeros(2, 9, 1), ids, pictures, torch.tensor([[0.5]]), CONFIG)[..., 0]
    assert spliced.tolist() == [[0, 0.5, 1, 2, 0, 0.5, 3, 4, 0], [0, 0.5, 5, 6, 0, 0, 0, 0, 0]]
    assert repeated(pictures, numbers, 2)[:, 0, 0].tolist() == [1, 3, 1, 3, 5, 5]
    assert in_rows(pictures[:0], torch.tensor([0, 0]), 0).shape == (2, 0, 2, 1)


@pytest.mark.parametrize(
    "ids, numbers, pictures, message",
    [
        ([TWO], [1], 1, r"row 0 .* has 4 image tokens, but num_image_per_seq says 1 picture\(s\) of 2 tokens each"),
        ([TWO], [2], 1, r"has room for 2 picture\(s\), but 1 came"),
        ([[BOS, 11, 11, 5]], [1], 1, r"must follow each other after the token that begins a picture \(id 10\)"),
        ([[BOS, 10, 11, 5, 11]], [1], 1, "must follow each other"),
        ([[BOS, 5]], [0], 1, r"has room for 0 picture\(s\), but 1 came"),
        ([TWO], [2, 2], 2, r"one number for each of 1 row\(s\), got \[2\]"),
    ],
)
def test_pictures_that_do_not_fit(ids, numbers, pictures, message):
    with pytest.raises(PromptError, match=message):
        check_pictures(torch.tensor(ids), torch.tensor(numbers), pictures, CONFIG)
