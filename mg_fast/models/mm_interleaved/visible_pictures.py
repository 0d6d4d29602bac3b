"""Pictures within token sequences: where their tokens go, and which pictures every position sees."""

import torch

from ...errors import PromptError
from ...modules.synchronizer_inputs import relative_index
from .configuration import LLM_MAX_IMAGES, MMInterleavedConfig


def begun_pictures(input_ids: torch.Tensor, config: MMInterleavedConfig) -> torch.Tensor:
    """The number of pictures of a row whose first token stands at a position or before it: int64 [B, L]."""
    tokens = (input_ids == config.image_token_id).cumsum(dim=1)
    return (tokens + config.num_img_token - 1).div(config.num_img_token, rounding_mode="floor")


def count_pictures(input_ids: torch.Tensor, config: MMInterleavedConfig) -> torch.Tensor:
    """The number of pictures in every row of ids [B, L]: int64 [B]."""
    if input_ids.shape[1] == 0:
        return input_ids.new_zeros(len(input_ids))
    return begun_pictures(input_ids, config)[:, -1]


def visible(
    input_ids: torch.Tensor,
    num_image_per_seq: torch.Tensor,
    config: MMInterleavedConfig,
    pictures: int | None = None,
) -> torch.Tensor:
    """The pictures that every position sees: bool [B, L, n].

    A position sees a picture from the first of its image tokens on, until a token that begins a document. So the token
    that begins a picture does not see it, and the picture's own tokens do.

    Args:
        input_ids: [B, L], with padding on any side.
        num_image_per_seq: int64 [B], the number of pictures of each row.
        config: names the special tokens.
        pictures: n, the largest number of pictures of a row. With None the host waits for `num_image_per_seq`;
            otherwise it waits for nothing.

    Source: MM-Interleaved, MMInterleaved._prepare_mmfs_features_for_mm_decoder.
    """
    if pictures is None:
        pictures = int(num_image_per_seq.max()) if len(num_image_per_seq) else 0
    begun = begun_pictures(input_ids, config)
    # The number of pictures that had begun where the document of a position begins: none of these is seen.
    hidden = torch.where(input_ids == config.bos_token_id, begun, 0).cummax(dim=1).values
    number = torch.arange(pictures, device=input_ids.device)
    real = number < num_image_per_seq.to(input_ids.device)[:, None]
    return (number < begun[..., None]) & (number >= hidden[..., None]) & real[:, None]


def picture_index(seen: torch.Tensor) -> torch.Tensor:
    """The relative index of the pictures that positions see: int64 of the mask's shape, [B, L, n].

    The most recent picture that a position sees has 1, the one before it 2, and a picture that it does not see has 0.

    Raises:
        PromptError: a position sees more pictures than the model has positions for.
    """
    try:
        return relative_index("MM-Interleaved", seen, LLM_MAX_IMAGES)
    except ValueError as error:
        raise PromptError(str(error)) from error


def check_pictures(
    input_ids: torch.Tensor, num_image_per_seq: torch.Tensor, pictures: int, config: MMInterleavedConfig
) -> None:
    """Checks the places of pictures in ids [B, L]; the host waits for the ids.

    Args:
        input_ids: [B, L].
        num_image_per_seq: int64 [B], the number of pictures of each row.
        pictures: the number of pictures that came for all rows together.
        config: names the special tokens.

    Raises:
        PromptError: a row has room for another number of pictures than it is said to have, other pictures came, the
            tokens of a picture do not follow each other after the token that begins a picture, or a position sees more
            pictures than the model has positions for.
    """
    if num_image_per_seq.dim() != 1 or len(num_image_per_seq) != len(input_ids):
        raise PromptError(
            f"num_image_per_seq must have one number for each of {len(input_ids)} row(s), got "
            f"{list(num_image_per_seq.shape)}"
        )
    size, ids = config.num_img_token, input_ids.cpu()
    places = ids == config.image_token_id
    room, said = places.sum(dim=1).tolist(), num_image_per_seq.tolist()
    for row, (tokens, number) in enumerate(zip(room, said)):
        if tokens != number * size:
            raise PromptError(
                f"row {row} of input_ids has {tokens} image tokens, but num_image_per_seq says {number} picture(s) of "
                f"{size} tokens each"
            )
    if sum(said) != pictures:
        raise PromptError(f"the prompt has room for {sum(said)} picture(s), but {pictures} came")
    first = places & ((places.cumsum(dim=1) - 1) % size == 0)
    # The token before every token, where there is one.
    before = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=-1)
    expected = torch.where(first, config.soi_token_id, config.image_token_id)
    if bool((places & (before != expected)).any()):
        raise PromptError(
            f"the {size} tokens of a picture (id {config.image_token_id}) must follow each other after the token that "
            f"begins a picture (id {config.soi_token_id})"
        )
    if max(said, default=0) >= LLM_MAX_IMAGES:
        picture_index(visible(ids, num_image_per_seq.cpu(), config))


def splice(
    embeddings: torch.Tensor,
    input_ids: torch.Tensor,
    image_tokens: torch.Tensor | None,
    soi_token: torch.Tensor,
    config: MMInterleavedConfig,
) -> torch.Tensor:
    """The embeddings [B, L, D] of a prompt with the tokens of its pictures in their places.

    Args:
        embeddings: [B, L, D], of the ids alone.
        input_ids: [B, L].
        image_tokens: [n_images, T, D], the pictures of all rows in reading order; None for a prompt without any.
        soi_token: [1, D], added where a picture begins.
        config: names the special tokens.
    """
    begins = (input_ids == config.soi_token_id)[..., None]
    embeddings = embeddings + begins * soi_token.to(embeddings)
    if image_tokens is None or len(image_tokens) == 0:
        return embeddings
    places = (input_ids == config.image_token_id)[..., None]
    return embeddings.masked_scatter(places, image_tokens.to(embeddings))


def in_rows(per_picture: torch.Tensor, num_image_per_seq: torch.Tensor, pictures: int) -> torch.Tensor:
    """Arranges tensors [n_images, ...] of all pictures by the rows that they belong to: [B, n, ...].

    Rows with fewer pictures are filled up with other pictures, which their positions do not see.

    Args:
        per_picture: [n_images, ...], in reading order.
        num_image_per_seq: int64 [B].
        pictures: n, the largest number of pictures of a row.
    """
    rows = len(num_image_per_seq)
    if rows * pictures == len(per_picture):
        return (
            per_picture.unflatten(0, (rows, pictures))
            if pictures
            else per_picture.new_zeros(rows, 0, *per_picture.shape[1:])
        )
    counts = num_image_per_seq.to(per_picture.device)
    places = (counts.cumsum(0) - counts)[:, None] + torch.arange(pictures, device=per_picture.device)
    return per_picture[places.clamp(max=len(per_picture) - 1)]


def repeated(per_picture: torch.Tensor, num_image_per_seq: torch.Tensor, times: int) -> torch.Tensor:
    """Tensors [n_images, ...] of all pictures for rows that are repeated: those of a row are repeated as a block."""
    blocks = per_picture.split(num_image_per_seq.tolist())
    return torch.cat([block for block in blocks for _ in range(times)])
