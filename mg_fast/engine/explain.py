"""Explains what the model looked at: which high-resolution pixels each query mined, as numbers and drawn as a heat map.

With a question, it is estimated which of these pixels the answer depends on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

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

# matplotlib's colour map `inferno`, at even distances.
_COLOURS = np.array(
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float32
)
# Smaller pictures are enlarged by a whole factor, up to this many pixels a side, before they are drawn on.
_DRAWN_SIDE = 768
# Most positions a side that can still be told apart by eye.
_VISIBLE_SIDE = 96


@dataclass(frozen=True, eq=False)
class Explanation:
    """What the queries of one picture mined.

    The V views are in the order of pixel_values: grid * grid cells row by row, then in HD the global view. Each view
    has P x P queries, row by row. A query's window has w x w positions of the high-resolution map. A position stands
    for 4 x 4 pixels of `picture`, in the global view for (4 grid) x (4 grid). Its features come from these pixels and
    their surroundings, as far as the stages of the tower see.

    Attributes:
        picture: the RGB picture as the model saw it: padded or cropped to a square of HR x HR pixels.
        image: `picture`, enlarged if it is small, under its heat map; see `draw`.
        weights: [V, P, P, w, w] float32, the softmax of the mining: for every query (row, column) and every position
            (row, column) of its window.
        relevance: [V, P, P] float32, the shares of the queries, each 0 or more and 1 in total. Without a question all
            are equal. With one they say how much the answer depends on the query's image token, and are all 0 if it
            depends on none.
        map: [HR / 4, HR / 4] float32, the share of every position of the high-resolution map, 1 in total. It sums the
            weights of all views, where the weights of a query are multiplied by its relevance. A position of the global
            view is divided evenly among the grid x grid positions that it is made of.
        answer: the answer to the question; None without a question.
    """

    picture: Image.Image
    image: Image.Image
    weights: torch.Tensor = field(repr=False)
    relevance: torch.Tensor = field(repr=False)
    map: torch.Tensor = field(repr=False)
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
    """Does what `Pipeline.explain` does, for an RGB picture; the answer is decoded greedily.

    Args:
        vision: the stage whose towers see the picture; its caches are not used.
        answers: the stage that answers the question.
        template: name of the prompt template.
        picture: the RGB picture.
        question: the question; with None all queries have the same weight.
        sampling: how many tokens the answer may have, and whether a long prompt is accepted.
        windows: also draw the borders of the windows.
    """
    request, sampling = None, sampling or Sampling()
    if question is not None:
        request = answers.request(render(template, [(as_question(question, [picture])[0], None)]), sampling)
    model, images = vision.model.model, vision.image_processor
    grid = model.config.image_grid
    # Gradients are needed even if the caller is in inference mode.
    with use_backend(vision.backend), torch.inference_mode(False), torch.no_grad():
        pixels = images(picture).to(vision.device)
        # Without a question the mined image tokens are not needed, so mining is skipped.
        parts = {} if request is not None else {"mine": lambda queries, pyramid: (None, None)}
        features = model.picture_features(**pixels, **parts)
        mining = model.patch_mining
        query, key, _ = mining.projections(features.queries.device)
        # A projection that is called gets its own dtype; of the others, the tensors are read in float32.
        asked = at_seam(features.queries[0], mining.vlm_uni_query_projector)
        weights = mining_weights(asked, [level[0] for level in features.pyramid], query, key, grid=grid).cpu()
        relevance, given = torch.full(weights.shape[:3], 1 / weights[..., 0, 0].numel()), None
        if request is not None:
            tokens = features.image_tokens[0]
            given = answers.answer([(request, [SeenPicture(tokens, b"")])], sampling)[0]
            shares = answer_relevance(answers, request, tokens, given).cpu()
            # Among the tokens the global view comes first; among the views it comes last.
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

    As in `mg_fast.ops.torch.patch_mining`, the queries are projected to the channels of the pyramid, instead of the
    pixels to the width of the queries. The scores of the two forms differ by a number that is the same for a whole
    window, so it cancels in the softmax. Where a projection has to be called, the pixels are projected to keys.

    Args:
        queries: [V, N, D], grid * grid cells row by row, then the global view if there is one.
        pyramid: maps [n_s, n_s, C_s], the finest first.
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
    # The cells lie side by side on one map.
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
    """The softmax of queries over the windows of the map, whose levels are upsampled to the finest one and reduced.

    Args:
        projected: queries [G, G, D], already multiplied by the scale of the scores; G x G windows lie side by side.
        pyramid: maps [n_s, n_s, C_s], the finest first.
        reduction: 1, or the grid for the global view.
        keys: makes keys [..., D] of pixels [..., sum(C_s)] of the map, which are float32.

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
            # x holds the coarse pixels of every window of this row, column by column. The positions of the windows
            # [G, w, w, C] are made of them, column by column as well.
            x = level.flatten(0, 1)[index[row]].float().reshape(g, k, k * level.shape[-1])
            levels.append(resize[row] @ (resize @ x).unflatten(2, (k, -1)))
        x = keys(torch.cat(levels, -1))
        scores = (x.flatten(1, 2) @ of_row[..., None]).squeeze(-1)
        rows.append(scores.softmax(-1).unflatten(-1, x.shape[1:3]).mT)
    return torch.stack(rows)


def answer_relevance(answers: AnswerStage, request: Request, tokens: torch.Tensor, given: Answer) -> torch.Tensor:
    """Estimates how much an answer depends on each image token; `Pipeline.explain` describes how.

    Args:
        answers: the stage whose model gave the answer.
        request: the prompt, with one picture.
        tokens: image tokens [T, hidden] of the picture.
        given: the answer.

    Returns:
        Shares [T] float32, 1 in total; or all 0.

    Raises:
        BackendError: matrix products of the language model have no gradients.
        FloatingPointError: gradients are not finite.
    """
    # The token that ends the answer is left out, because it says little about the picture.
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
            # Unlike backward(), this leaves the gradients that the model's parameters hold unchanged.
            [gradient] = torch.autograd.grad(margin.sum(), tokens)
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        formats = ", ".join(weight_bytes(model).formats)
        raise BackendError(
            f"explain: a question needs gradients, which products with these weights ({formats}) do not have: "
            "load them unquantized, as int8 or as fp8, or explain the picture without a question"
        ) from error
    tokens = tokens.detach().float()
    relevance = gradient.float().norm(dim=-1) * (tokens - tokens.mean(0)).norm(dim=-1)
    if not relevance.isfinite().all():
        raise FloatingPointError(
            f"explain: the gradients of {int((~relevance.isfinite()).sum())} image tokens are not finite"
        )
    return relevance / relevance.sum().clamp(min=torch.finfo(torch.float32).tiny)


def compose(weights: torch.Tensor, relevance: torch.Tensor, grid: int) -> torch.Tensor:
    """Makes `Explanation.map` of the weights and the relevance."""
    shares = weights * relevance[..., None, None]
    # The shares become [V, row of windows, row of positions, window, position], then whole rows.
    views = shares.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    side = views.shape[1]
    cells = views[: grid * grid].unflatten(0, (grid, grid)).transpose(1, 2).reshape(grid * side, grid * side)
    for whole in views[grid * grid :]:
        cells = cells + whole.repeat_interleave(grid, 0).repeat_interleave(grid, 1) / grid**2
    return cells


def draw(picture: Image.Image, shares: torch.Tensor, *, windows: int = 0) -> Image.Image:
    """Draws a picture in grey under a heat map, from purple over orange to light yellow; hotter is also more opaque.

    Shares are smoothed over 5 x 5 positions, because features see further than one position. A place is therefore
    bright where a large part of the whole lies, not where single positions have much. Shares up to an even share get no
    colour. The highest share gets the last colour, if it is at least twice an even share. If there are more than 96
    positions along a side, neighbours are averaged first, because single positions could not be seen.

    Args:
        picture: the square picture.
        shares: [n, n], a map such as `Explanation.map`.
        windows: number of windows along a side whose borders are drawn; 0 draws none.

    Returns:
        An RGB picture of the same side; a small picture is enlarged by a whole factor.
    """
    factor = max(1, _DRAWN_SIDE // picture.width)
    size = (picture.width * factor, picture.height * factor)
    seen = F.adaptive_avg_pool2d(shares[None].float(), min(len(shares), _VISIBLE_SIDE))
    for _ in range(2):
        seen = F.avg_pool2d(seen, 3, 1, 1, count_include_pad=False)
    seen = seen[0]
    over = (seen / seen.mean().clamp(min=torch.finfo(torch.float32).tiny) - 1).clamp(min=0)
    heat = over / over.max().clamp(min=1)
    heat = np.asarray(Image.fromarray(heat.numpy()).resize(size, Image.Resampling.BILINEAR))[..., None]
    colours = [np.interp(heat, np.linspace(0, 1, len(_COLOURS)), channel) for channel in _COLOURS.T]
    # The contrast is lowered, because on black only the hottest places would show.
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
