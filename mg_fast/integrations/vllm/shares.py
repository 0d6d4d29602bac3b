"""Divides the encoding of pictures over ranks: each encodes its share, and every rank gets the tokens of all."""

from collections.abc import Callable

import torch


def encode_shares(
    encode: Callable[[torch.Tensor], torch.Tensor],
    pictures: torch.Tensor,
    *,
    rank: int,
    ranks: int,
    gather: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Encodes pictures together with the other ranks, which call this at the same time with the same pictures.

    A rank takes every `ranks`-th picture, so the shares differ by one picture at most. With fewer pictures than ranks,
    the last ranks encode none.

    Args:
        encode: makes the image tokens [m, T, hidden] of m pictures. It is not called for no picture.
        pictures: [n, ...], equal on all ranks.
        rank: this rank, from 0 on.
        ranks: their number.
        gather: puts the tensors [k, T, hidden] of all ranks, which have one shape, into [ranks * k, T, hidden], in the
            order of the ranks.
        shape: T and hidden.
        dtype, device: those of the tokens. `encode` returns them so.

    Returns:
        [n, T, hidden], in the order of the pictures.
    """
    share = pictures[rank::ranks]
    each = -(-len(pictures) // ranks)
    # All ranks send equally many. What fills up a smaller share is cut off below.
    tokens = torch.zeros(each, *shape, dtype=dtype, device=device)
    if len(share):
        tokens[: len(share)] = encode(share)
    # Number `i` of rank `r` is the tokens of picture `i * ranks + r`.
    gathered = gather(tokens).unflatten(0, (ranks, each))
    return gathered.transpose(0, 1).flatten(0, 1)[: len(pictures)]
