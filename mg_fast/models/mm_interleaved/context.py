"""From the language model's last states to the contexts of pictures, and the pictures that the U-Net looks back at."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...errors import PromptError, quoted
from ...runtime.arguments import whole_number
from .configuration import MMInterleavedConfig


class PlacedPicture(NamedTuple):
    """Where a picture stands in a batch of prompts.

    Attributes:
        row: of the batch.
        begins: the first position of the row that is not padding.
        soi: the position of the token that begins the picture.
        previous: the number of the picture before it, counted over the whole batch in reading order; None where it is
            the first picture of its document.
    """

    row: int
    begins: int
    soi: int
    previous: int | None


def place_pictures(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: MMInterleavedConfig
) -> list[PlacedPicture]:
    """Every picture of a batch in reading order. The host waits for the ids.

    A picture is where a token begins one, so the tokens of the last picture may still be missing.

    Args:
        input_ids: int64 [B, L].
        attention_mask: [B, L], 0 at padding on any side; None: there is none.
        config: names the special tokens.
    """
    found = []
    masks = [None] * len(input_ids) if attention_mask is None else attention_mask.tolist()
    for row, (ids, mask) in enumerate(zip(input_ids.tolist(), masks)):
        real = [mask is None or bool(mask[i]) for i in range(len(ids))]
        begins = real.index(True) if True in real else len(ids)
        document, last = -1, None
        for place, token in enumerate(ids):
            if not real[place]:
                continue
            if token == config.bos_token_id:
                document = place
            elif token == config.soi_token_id:
                previous = None if last is None or found[last].soi < document else last
                last = len(found)
                found.append(PlacedPicture(row, begins, place, previous))
    return found


def select_targets(
    placed: Sequence[PlacedPicture], rows: int, target_image_idxs: Sequence[int] | torch.Tensor | None
) -> list[PlacedPicture]:
    """The pictures to be drawn.

    Args:
        placed: all pictures of the batch.
        rows: of the batch.
        target_image_idxs: numbers of pictures, counted over the whole batch; None: the last picture of every row.

    Raises:
        PromptError: a row has no picture, or there is no picture of a number.
        ValueError: the numbers are no whole numbers.
    """
    if target_image_idxs is None:
        last = {picture.row: picture for picture in placed}
        if missing := [row for row in range(rows) if row not in last]:
            raise PromptError(
                f"expected a picture to be drawn in every row, or target_image_idxs: row {missing[0]} has no token "
                "that begins a picture"
            )
        return [last[row] for row in range(rows)]
    if isinstance(target_image_idxs, torch.Tensor):
        target_image_idxs = target_image_idxs.tolist()
    if not isinstance(target_image_idxs, Sequence) or None in (numbers := [*map(whole_number, target_image_idxs)]):
        raise ValueError(
            f"target_image_idxs must be a list of whole numbers or a tensor of them, got {quoted(target_image_idxs)}"
        )
    if not numbers:
        raise PromptError("expected at least one picture to be drawn, got an empty target_image_idxs")
    for number in numbers:
        if not 0 <= number < len(placed):
            raise PromptError(
                f"target_image_idxs counts the {len(placed)} picture(s) of the whole batch from 0 on, got {number}"
            )
    return [placed[number] for number in numbers]


def contexts(
    last_hidden_state: torch.Tensor, targets: Sequence[PlacedPicture], config: MMInterleavedConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that pictures are drawn from: from the token that begins the picture back to the row's first one.

    Args:
        last_hidden_state: [B, L, D], after the language model's last norm.
        targets: T pictures.
        config: seq_len is the most states of a context.

    Returns:
        [T, K, D] in this order, with zeros after the last state of a shorter context; and bool [T, K], which of them
        are states.

    Raises:
        PromptError: a context is longer than the model has positions for.
    """
    lengths = [picture.soi - picture.begins + 1 for picture in targets]
    if max(lengths) > config.seq_len:
        raise PromptError(
            f"a picture is drawn from at most {config.seq_len} tokens, but {max(lengths)} stand before the end of it"
        )
    device = last_hidden_state.device
    numbers = torch.tensor([[p.row, p.soi, n] for p, n in zip(targets, lengths)]).to(device)
    row, soi, length = numbers.unbind(1)
    back = torch.arange(max(lengths), device=device)
    mask = back < length[:, None]
    states = last_hidden_state[row[:, None], (soi[:, None] - back).clamp(min=0)]
    return states * mask[..., None], mask


def previous_maps(
    image_maps: torch.Tensor | None, targets: Sequence[PlacedPicture]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The maps of the picture before each target, which the U-Net's synchronizers read.

    Args:
        image_maps: [n_images, S, C], of all pictures of the batch in reading order; those after the last previous one
            may be missing.
        targets: T pictures.

    Returns:
        [T, 1, S, C], and bool [T, 1], whether there is such a picture; None for both where no target has one.

    Raises:
        PromptError: the maps of a picture are missing.
    """
    if all(picture.previous is None for picture in targets):
        return None, None
    numbers = [picture.previous for picture in targets]
    most, there = max(n for n in numbers if n is not None), 0 if image_maps is None else len(image_maps)
    if most >= there:
        raise PromptError(f"expected the pictures before those that are drawn, at least {most + 1}, got {there}")
    device = image_maps.device
    index = torch.tensor([n or 0 for n in numbers]).to(device)
    mask = torch.tensor([[n is not None] for n in numbers]).to(device)
    return image_maps[index][:, None], mask
