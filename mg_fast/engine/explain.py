"""Which high-resolution pixels every query mined, and which of them an answer came from: as numbers and drawn over the
picture.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ..errors import BackendError
from ..models.templates import render
from ..ops.backend import use_backend
from ..ops.reference import LAYER_NORM_EPS, CalledProjection, Projection
from ..ops.torch.bilinear_tables import window_tables
from ..ops.torch.dual_resize import square
from ..quantization import weight_bytes
from ..runtime.layer_dtypes import at_seam, call
from .answers import Answer, AnswerStage, Request
from .conversation import as_question
from .options import Sampling
from .vision import SeenPicture, VisionStage

# inferno, matplotlib's, at even distances
_COLOURS = np.array(
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float32
)
# pixels a side, to which smaller pictures are enlarged by a whole factor before they are drawn on
_DRAWN = 768
# positions a side that can still be told apart by eye
_SEEN = 96


@dataclass(frozen=True, eq=False)
class Explanation:
    """What the queries of one picture mined.

    Views are in the order of pixel_values: V = grid * grid cells row by row, in HD the global view last; each has P x P
    queries, row by row. A query's window has w x w positions of the high-resolution map, one for every 4 x 4 pixels of
    `picture`; for the global view one for every 4 grid x 4 grid. A position's features are of those pixels and their
    surroundings, as wide as the tower's stages see.

    Attributes:
        picture: the RGB picture as the model saw it: padded or cropped to a square, HR x HR pixels.
        image: `picture`, enlarged if it is small, under its heat map; see `draw`.
        weights: [V, P, P, w, w] float32, the softmax of the mining: for every query (row, column) and position (row,
            column) of its window.
        relevance: [V, P, P] float32, the share of every query, 0 or more, together 1: alike without a question; with
            one, how much the answer depends on the query's image token. All 0 where it depends on none.
        map: [HR / 4, HR / 4] float32, the share of every position of the high-resolution map: the weights of all views,
            each query's times its relevance; a position of the global view is shared out evenly to the grid x grid ones
            that it is made of. Adds up to 1.
        answer: to the question; None without one.
    """

    picture: Image.Image
    image: Image.Image
    weights: torch.Tensor
    relevance: torch.Tensor
    map: torch.Tensor
    answer: Answer | None


def explain(
    vision: VisionStage,
    answers: AnswerStage,
    template: str,
    picture: Image.Image,
    question: str | None = None,
    sampling: Sampling | None = None,
    *,
    windows: bool = False,
) -> Explanation:
    """What `Pipeline.explain` does, for an RGB picture; the answer is the greedy one.

    Args:
        vision: whose towers see the picture; nothing that it keeps is used.
        answers: answers the question.
        template: name of the prompt template.
        picture: RGB.
        question: None weighs every query alike.
        sampling: how many tokens the answer may have, and whether a long prompt is accepted.
        windows: draw the borders of the windows, too.
    """
    request, sampling = None, sampling or Sampling()
    if question is not None:
        request = answers.request(render(template, [(as_question(question, [picture])[0], None)]), sampling)
    model, images = vision.model.model, vision.image_processor
    grid = model.config.image_grid
    # A caller within inference mode would get no gradients.
    with use_backend(vision.backend), torch.inference_mode(False), torch.no_grad():
        pixels = images(picture).to(vision.device)
        # Without a question nobody reads what would be mined.
        parts = {} if request is not None else {"mine": lambda queries, pyramid: (None, None)}
        features = model.picture_features(**pixels, **parts)
        mining = model.patch_mining
        query, key, _ = mining.projections(features.queries.device)
        # called projections take their own dtype, and those whose tensors are read are read in float32
        asked = at_seam(features.queries[0], mining.vlm_uni_query_projector)
        weights = mining_weights(asked, [level[0] for level in features.pyramid], query, key, grid=grid).cpu()
        relevance, given = torch.full(weights.shape[:3], 1 / weights[..., 0, 0].numel()), None
        if request is not None:
            tokens = features.image_tokens[0]
            given = answers.answer([(request, [SeenPicture(tokens, b"")])], sampling)[0]
            shares = answer_relevance(answers, request, tokens, given).cpu()
            # of tokens, the global view first, to views, the global one last
            views = shares.unflatten(0, weights.shape[:3])
            relevance = views.roll(-1, 0) if len(views) > grid * grid else views
    shares = compose(weights, relevance, grid)
    squared = square(picture, images.hr_size, images.pad)
    image = draw(squared, shares, windows=grid * weights.shape[1] if windows else 0)
    return Explanation(squared, image, weights, relevance, shares, given)


def mining_weights(
    queries: torch.Tensor,
    pyramid: list[torch.Tensor],
    query: Projection | CalledProjection,
    key: Projection | CalledProjection,
    *,
    grid: int,
) -> torch.Tensor:
    """The softmax of patch info mining, computed in float32, one row of windows of the high-resolution map at a time.

    As in `mg_fast.ops.torch.patch_mining`, the queries are projected to the pyramid's channels, not the pixels to the
    queries' width: what the two differ by is the same for a whole window, and cancels in its softmax. Where a
    projection has to be called, the pixels are projected to keys.

    Args:
        queries: [V, N, D], grid * grid cells row by row, then possibly the global view.
        pyramid: [n_s, n_s, C_s], finest first.
        query, key: the projections of queries and keys.
        grid: cells per side.

    Returns:
        [V, P, P, w, w] float32; P = sqrt(N), w positions along a window's side.
    """
    if isinstance(query, CalledProjection) or isinstance(key, CalledProjection):
        projected = query(queries).float() * key.gives**-0.5

        def keys(pixels: torch.Tensor) -> torch.Tensor:
            return key(pixels.to(queries.dtype)).float()
    else:
        query, key = (
            Projection(*(t.to(queries.device, torch.float32) for t in projection)) for projection in (query, key)
        )
        projected = query(queries.float()) @ key.weight * (key.norm_weight * key.gives**-0.5)

        def keys(pixels: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(pixels, pixels.shape[-1:], eps=LAYER_NORM_EPS)

    views, n, width = projected.shape
    cells, side = grid * grid, int(n**0.5)
    # the cells lie side by side over one map
    raster = (
        projected[:cells]
        .reshape(grid, grid, side, side, width)
        .transpose(1, 2)
        .reshape(grid * side, grid * side, width)
    )
    weights = _raster_weights(raster, pyramid, 1, keys)
    weights = weights.unflatten(1, (grid, side)).unflatten(0, (grid, side)).transpose(1, 2).flatten(0, 1)
    if views > cells:
        whole = _raster_weights(projected[cells].reshape(side, side, width), pyramid, grid, keys)
        weights = torch.cat([weights, whole[None]])
    return weights


def _raster_weights(
    projected: torch.Tensor, pyramid: list[torch.Tensor], reduction: int, keys: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The softmax of queries over the windows of the map, which is upsampled to the finest level and reduced.

    Args:
        projected: queries [G, G, D], the scale of the scores included; G x G windows lie side by side.
        pyramid: [n_s, n_s, C_s], finest first.
        reduction: 1, or the grid for the global view.
        keys: makes keys [..., D] of the map's pixels [..., sum(C_s)] in float32.

    Returns:
        [G, G, w, w].
    """
    g, fine = len(projected), len(pyramid[0])
    tables = [window_tables(fine, len(level), reduction, g, projected.device, torch.float32) for level in pyramid]
    rows = []
    for row, of_row in enumerate(projected):
        levels = []
        for level, (index, resize) in zip(pyramid, tables):
            k = resize.shape[-1]
            # the coarse pixels of every window, column by column, and the window's positions made of them: [G, w, w,
            # C], likewise
            x = level.flatten(0, 1)[index[row]].float().reshape(g, k, k * level.shape[-1])
            levels.append(resize[row] @ (resize @ x).unflatten(2, (k, -1)))
        x = keys(torch.cat(levels, -1))
        scores = (x.flatten(1, 2) @ of_row[..., None]).squeeze(-1)
        rows.append(scores.softmax(-1).unflatten(-1, x.shape[1:3]).mT)
    return torch.stack(rows)


def answer_relevance(answers: AnswerStage, request: Request, tokens: torch.Tensor, given: Answer) -> torch.Tensor:
    """How much an answer may depend on every image token, as shares of the sum; `Pipeline.explain` says how it is
    estimated.

    Args:
        answers: whose model gave the answer.
        request: the prompt, with one picture.
        tokens: its image tokens [T, hidden].
        given: the answer.

    Returns:
        [T] float32, together 1; or all 0.

    Raises:
        BackendError: products of the language model have no gradients.
        FloatingPointError: gradients are not finite.
    """
    # that the answer ends says little of the picture
    ids = given.token_ids[:-1] if given.finish_reason == "stop" and len(given.token_ids) > 1 else given.token_ids
    model, device = answers.model, answers.device
    chosen, text = torch.tensor(ids)[:, None], [*request.ids, *ids[:-1]]
    marks = torch.tensor([request.marks + [0] * (len(ids) - 1)], device=device)
    try:
        with torch.enable_grad():
            tokens = tokens.detach().clone().requires_grad_()
            output, _ = model.model(
                input_ids=torch.tensor([text], device=device),
                image_tokens=tokens[None],
                mm_token_type_ids=marks,
                use_cache=False,
            )
            logits = call(model.head, output.last_hidden_state[0, -len(ids) :]).float()
            chosen = chosen.to(logits.device)
            margin = logits.gather(1, chosen) - logits.scatter(1, chosen, -torch.inf).amax(1, keepdim=True)
            # the model's own gradients stay as they are
            [gradient] = torch.autograd.grad(margin.sum(), tokens)
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        formats = ", ".join(weight_bytes(model).formats)
        raise BackendError(
            f"explain: a question needs gradients, which products with these weights ({formats}) do not have: "
            "load them unquantised, as int8 or as fp8, or explain the picture without a question"
        ) from error
    tokens = tokens.detach().float()
    relevance = gradient.float().norm(dim=-1) * (tokens - tokens.mean(0)).norm(dim=-1)
    if not relevance.isfinite().all():
        raise FloatingPointError(
            f"explain: the gradients of {int((~relevance.isfinite()).sum())} image tokens are not finite"
        )
    return relevance / relevance.sum().clamp(min=torch.finfo(torch.float32).tiny)


def compose(weights: torch.Tensor, relevance: torch.Tensor, grid: int) -> torch.Tensor:
    """`Explanation.map` of its weights and relevance."""
    shares = weights * relevance[..., None, None]
    # [V, row of windows, row of positions, window, position]
    views = shares.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    side = views.shape[1]
    cells = views[: grid * grid].unflatten(0, (grid, grid)).transpose(1, 2).reshape(grid * side, grid * side)
    for whole in views[grid * grid :]:
        cells = cells + whole.repeat_interleave(grid, 0).repeat_interleave(grid, 1) / grid**2
    return cells


def draw(picture: Image.Image, shares: torch.Tensor, *, windows: int = 0) -> Image.Image:
    """A picture in grey under a heat map, from purple over orange to light yellow, the more opaque the hotter.

    Shares are smoothed over 5 x 5 positions, since features see wider than a position, so that what is bright is where
    much of the whole lies, not where single positions do. No colour is up to an even share; the last one is the
    highest, if that is twice an even share or more. Of more than 96 positions along a side neighbours are averaged
    first, or single ones could not be seen.

    Args:
        picture: square.
        shares: [n, n], a map as of `Explanation.map`.
        windows: draw the borders of so many windows along a side; 0 draws none.

    Returns:
        An RGB picture of the same side, small ones enlarged by a whole factor.
    """
    factor = max(1, _DRAWN // picture.width)
    size = (picture.width * factor, picture.height * factor)
    seen = F.adaptive_avg_pool2d(shares[None].float(), min(len(shares), _SEEN))
    for _ in range(2):
        seen = F.avg_pool2d(seen, 3, 1, 1, count_include_pad=False)
    seen = seen[0]
    over = (seen / seen.mean().clamp(min=torch.finfo(torch.float32).tiny) - 1).clamp(min=0)
    heat = over / over.max().clamp(min=1)
    heat = np.asarray(Image.fromarray(heat.numpy()).resize(size, Image.Resampling.BILINEAR))[..., None]
    colours = [np.interp(heat, np.linspace(0, 1, len(_COLOURS)), channel) for channel in _COLOURS.T]
    # with less contrast: on black nothing but the hottest would show
    grey = 40 + 0.75 * np.asarray(picture.resize(size, Image.Resampling.BICUBIC).convert("L"), np.float32)[..., None]
    drawn = Image.fromarray(
        ((1 - 0.8 * heat) * grey + 0.8 * heat * np.concatenate(colours, -1)).round().astype(np.uint8)
    )
    if windows:
        lines = ImageDraw.Draw(drawn, "RGBA")
        for at in (round(i * size[0] / windows) for i in range(1, windows)):
            lines.line((at, 0, at, size[1]), fill=(255, 255, 255, 70))
            lines.line((0, at, size[0], at), fill=(255, 255, 255, 70))
    return drawn
