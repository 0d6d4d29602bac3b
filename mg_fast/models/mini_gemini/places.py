"""The places of pictures in prompts: checks that pictures fit them, and finds the pictures that a cache has already."""

import torch

from ...errors import PromptError

# The inputs that only the first pass over a prompt takes.
PICTURE_INPUTS = ("pixel_values", "pixel_values_hr", "image_tokens", "mm_token_type_ids")


def check_places(mm_token_type_ids: torch.Tensor | None, image_tokens: torch.Tensor) -> None:
    """Checks the marked places [B, L] of a batch against its image tokens [n_images, T, hidden].

    `PromptError` gives the numbers. In a graph of torch.compile, the numbers are compared when the graph runs, and a
    RuntimeError says that they differ.
    """
    if mm_token_type_ids is None:
        raise PromptError(
            "pictures came without mm_token_type_ids, which mark their places in input_ids: the processor returns both"
        )
    pictures, tokens = image_tokens.shape[:2]
    places = (mm_token_type_ids == 1).sum()
    if torch.compiler.is_compiling():
        torch._assert_async(
            places == pictures * tokens, "the number of picture places in the prompt differs from that of image tokens"
        )
    elif places != pictures * tokens:
        raise PromptError(
            f"the prompt has room for {int(places)} image tokens, but {pictures} picture(s) of {tokens} came"
        )


def check_no_places(mm_token_type_ids: torch.Tensor) -> None:
    """Raises `PromptError` where a prompt without pictures marks places for some; in a graph as `check_places` does."""
    message = "the prompt marks places of pictures, but no pixel_values or image_tokens came"
    marked = (mm_token_type_ids == 1).any()
    if torch.compiler.is_compiling():
        torch._assert_async(~marked, message)
    elif marked:
        raise PromptError(message)


def of_new_positions(
    pictures: dict[str, torch.Tensor | None], length: int, cached: int, tokens_per_picture: int
) -> dict[str, torch.Tensor | None]:
    """The pictures and marks of a prompt's last positions, where the positions before them are in a cache.

    Args:
        pictures: tensors by the names in `PICTURE_INPUTS`. Marks may be those of the new positions or of the whole
            prompt. Pictures may be those of the whole prompt, in the order of their places in the batch, or only those
            of the new positions.
        length: the number of new positions.
        cached: the number of positions before them.
        tokens_per_picture: the number of places that each picture takes.

    Raises:
        PromptError: the pictures match neither choice, or the cache ends within a picture.
    """
    marks = pictures.get("mm_token_type_ids")
    given = {name: tensor for name, tensor in pictures.items() if name != "mm_token_type_ids" and tensor is not None}
    if marks is None or not given:
        return {**pictures, "mm_token_type_ids": None if marks is None else marks[:, -length:]}
    before, new = (marks[:, :-length] == 1).sum(dim=1), (marks[:, -length:] == 1).sum(dim=1)
    count = len(next(iter(given.values())))
    kept = dict(pictures, mm_token_type_ids=marks[:, -length:])
    if count * tokens_per_picture == new.sum():
        return kept
    if count * tokens_per_picture != (before + new).sum():
        raise PromptError(
            f"{cached} positions of the prompt are cached already, with {int(before.sum())} places of image tokens "
            f"among them, and the new positions have room for {int(new.sum())}, but {count} picture(s) of "
            f"{tokens_per_picture} image tokens came: give the pictures of the new positions, "
            "or all pictures with mm_token_type_ids for the whole prompt"
        )
    if (before % tokens_per_picture).any():
        raise PromptError(
            f"the cache ends within a picture, after {int(before.max())} image tokens: "
            f"a picture takes {tokens_per_picture}"
        )
    rows = [(row // tokens_per_picture).tolist() for row in (before, new)]
    wanted = torch.tensor([known for old, fresh in zip(*rows) for known in [False] * old + [True] * fresh])
    for name, tensor in given.items():
        kept[name] = tensor[wanted.to(tensor.device)] if wanted.any() else None
    return kept
