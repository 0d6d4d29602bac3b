"""The losses of nano's training, each with the shares of right predictions that the log shows."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mg_fast import MiniGeminiForConditionalGeneration
from mg_fast.ops.reference import low_resolution_views
from mg_fast.ops.torch.dual_resize import CLIP_MEAN, CLIP_STD

from . import data
from .model import LR_SIDE
from .pairs import ORDINALS
from .scenes import WORDS
from .towers import Codes, TowerHeads, character_loss, high_loss, low_loss, token_loss

# Digits, places and counts weigh this many times as much as another token. Digits are few, places were learned last
# because every cell has one, and a count stands for all the shapes that are alike.
HEAVY = {"digit": 3.0, "place": 3.0, "count": 3.0}

# What the hints weigh beside the answers. Most shapes have none of their like before them, and say so.
HINTED = {"order": 1.0, "alike": 0.5}
# After this layer of the language model, image tokens are asked for the number of their picture, and how many shapes of
# their like come before them.
HINT_LAYER = 2


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Normalises uint8 pixels [B, H, W, 3] as the processor does, to float32 [B, 3, H, W]."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def see(
    model: MiniGeminiForConditionalGeneration, pixels: torch.Tensor, *, hr: bool, towers_learn: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor] | None, torch.Tensor]:
    """Normalised pictures [n, 3, 192, 192] to queries [n, 1, 36, D], stage maps, and image tokens [n, 36, hidden].

    Without `hr` there are no stage maps, and nothing is mined.
    """
    inner = model.model
    views = low_resolution_views(pixels, LR_SIDE)

    def tower(run: Callable) -> Callable:
        return run if towers_learn else torch.no_grad()(lambda pictures: run(pictures))

    if not hr:
        queries = tower(inner.low_resolution_queries)(views)
        return queries, None, inner.mm_projector(queries.flatten(1, 2))
    parts = {"see_low": tower(inner.low_resolution_queries), "see_high": tower(inner.vision_tower_aux)}
    features = inner.picture_features(views, pixels, **parts)
    return features.queries, features.pyramid, features.image_tokens


class Hints(NamedTuple):
    """Words whose embeddings the language model learns to write into image tokens; see `chat_loss`.

    Attributes:
        ordinals: "first" and "second", [2, hidden].
        counts: nothing (zero), "two", "three" and so on, [6, hidden].
    """

    ordinals: torch.Tensor
    counts: torch.Tensor


def word_hints(tokenizer, embeddings: nn.Embedding) -> Hints:
    """The embeddings of the words that image tokens are asked for. A word of several tokens is their mean."""

    def embedded(words: Sequence[str]) -> torch.Tensor:
        ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        return torch.stack([embeddings.weight[its].mean(0) for its in ids])

    counts = embedded(WORDS[2:])
    return Hints(embedded(ORDINALS), torch.cat([torch.zeros_like(counts[:1]), counts]))


def chat_loss(
    model: MiniGeminiForConditionalGeneration,
    batch: data.Batch,
    content: dict[str, torch.Tensor],
    seen: torch.Tensor,
    hints: Hints | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss on the tokens of answers alone, with pictures given by their image tokens `seen`.

    With `hints`, the loss also asks the language model at image tokens, after `HINT_LAYER`, for a word: of two
    pictures, whether it belongs to the first or the second one; and at a shape, whether it is the second or the third
    of its like. The right word should be the nearest one. So image tokens come to hold what questions look for.

    The shares say how often a token is right, how often one of each kind of `content`, and how often all tokens of an
    answer are. In conversations, greedy decoding would have given just these answers; of bare answers, only what has to
    be said is checked.
    """
    inner = model.model
    embeds = inner.splice(inner.get_input_embeddings()(batch["ids"]), seen, batch["marks"])
    said = batch["answers"][:, 1:] == 1
    asks = {} if hints is None else {"order": (picture_numbers(batch), hints.ordinals)}
    if hints is not None and "alike" in batch:
        asks["alike"] = (alike_numbers(batch), hints.counts)
    hidden, wanted, begins, nearest = [], [], [], {name: [] for name in asks}
    # Short and long rows go through the language model apart, because all rows would be padded to the longest one.
    for rows in batch["mask"].sum(1).argsort().chunk(2):
        long = int(batch["mask"][rows].sum(1).max())
        out = inner.language_model(
            inputs_embeds=embeds[rows, :long],
            attention_mask=batch["mask"][rows, :long],
            use_cache=False,
            output_hidden_states=bool(asks),
        )
        speaks = said[rows, : long - 1]
        hidden.append(out.last_hidden_state[:, :-1][speaks])
        wanted.append(batch["ids"][rows, 1:long][speaks])
        begins.append((speaks & ~F.pad(speaks, (1, 0))[:, :-1])[speaks])
        for name, (labels, words) in asks.items():
            at = labels[rows, :long] >= 0
            nearest[name].append((out.hidden_states[HINT_LAYER][at] @ words.T, labels[rows, :long][at]))
    scores, wanted = model.lm_head(torch.cat(hidden)).float(), torch.cat(wanted)
    right = scores.argmax(-1) == wanted
    shares = {name: _mean(right[torch.isin(wanted, ids)]) for name, ids in content.items()}
    weight = scores.new_ones(scores.shape[-1])
    for name, times in HEAVY.items():
        weight[content[name]] = times
    answer = torch.cat(begins).cumsum(0) - 1
    wrong = torch.zeros(int(answer[-1]) + 1, device=scores.device).index_add_(0, answer, (~right).float())
    loss = F.cross_entropy(scores, wanted, weight=weight)
    shares = {"token": _mean(right), "answer": _mean(wrong == 0), **shares}
    for name, pairs in nearest.items():
        told, labels = (torch.cat(parts) for parts in zip(*pairs))
        if len(labels):
            loss = loss + HINTED[name] * F.cross_entropy(told, labels)
            # Most shapes have none of their like before them.
            shares[name] = _mean((told.argmax(-1) == labels)[(labels > 0) | (name == "order")])
    return loss, shares


def picture_numbers(batch: data.Batch) -> torch.Tensor:
    """For each image token of rows with two pictures [B, L], the number of its picture, 0 or 1; -1 elsewhere."""
    marks = batch["marks"]
    cells = batch["cells"].shape[1] if "cells" in batch else data.CELLS
    two = marks.sum(1, keepdim=True) > cells
    return torch.where((marks == 1) & two, (marks.cumsum(1) - 1) // cells, -1)


def alike_numbers(batch: data.Batch) -> torch.Tensor:
    """For each image token of a shape [B, L], how many shapes like it come before it in its picture; -1 elsewhere."""
    shape = (batch["colour"] != data.IGNORED).flatten(1)
    alike = torch.where(shape, batch["alike"].flatten(1), -1).gather(1, batch["cells"])
    return torch.full_like(batch["marks"], -1).masked_scatter(batch["marks"] == 1, alike)


def code_loss(seen: torch.Tensor, wanted: torch.Tensor, things: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """The squared error of image tokens [B, T, hidden] against codes, and how much of the codes' spread they explain.

    The explained share is taken over the cells with `things` [B, T]. Such cells are few, so they weigh five times
    as much as the others.
    """
    off = (seen.float() - wanted).square().mean(-1)
    weight = 1.0 + 4.0 * things
    spread = (wanted[things] - wanted[things].mean(0)).square().mean()
    return (off * weight).sum() / weight.sum() / spread, {"explained": 1 - (off[things].mean() / spread).item()}


def blurred(codes: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Codes [B, N, width] as image tokens will be: most of them too weak, and each of them off by some noise."""
    strength = torch.empty(*codes.shape[:2], 1).uniform_(0.7, 1.1, generator=generator)
    off = noise * torch.randn(codes.shape, generator=generator)
    return codes * strength.to(codes.device) + off.to(codes.device)


def page_loss(
    model: MiniGeminiForConditionalGeneration, heads: TowerHeads, page: data.Batch
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of the high-resolution tower on pages of print. Lines of print have characters, but no cells."""
    compute = high_loss if bool((page["kind"] > 0).any()) else character_loss
    return compute(heads, model.model.vision_tower_aux(normalise(page["pixels"])), page)


def sight_loss(
    model: MiniGeminiForConditionalGeneration, heads: TowerHeads, codes: Codes, batch: data.Batch, *, hr: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of the whole picture side on scenes.

    It is the sum of the towers' losses under the heads that are discarded later, and of the image tokens' against
    codes.
    """
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        tables, wanted = codes.tables(embeddings), codes(batch, embeddings)
    queries, pyramid, seen = see(model, normalise(batch["pixels"]), hr=hr)
    # The squared error alone would teach what cells have in common, and no digit for a long time. The nearest code
    # alone would not teach how large a token has to be.
    far, near = code_loss(seen, wanted, batch["kind"].flatten(1) > 0), token_loss(tables, seen, batch)
    parts = {"low": low_loss(heads, queries[:, 0], batch), "token": near, "code": (6 * far[0], far[1])}
    if hr:
        parts["high"] = high_loss(heads, pyramid, batch)
    return sum(loss for loss, _ in parts.values()), {
        f"{part} {name}": share for part, (_, shares) in parts.items() for name, share in shares.items()
    }


def _mean(flags: torch.Tensor) -> float:
    return flags.float().mean().item() if len(flags) else float("nan")
