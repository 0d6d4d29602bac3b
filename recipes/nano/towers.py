"""Pretrains the towers, as the published ones are: heads, discarded later, tell them directly what lies where."""

import torch
import torch.nn.functional as F
from torch import nn

from mg_fast.models.mini_gemini.configuration import MiniGeminiConfig

from .data import CELL_KINDS, IGNORED, Batch
from .scenes import BACKGROUNDS, COLOURS, MAX_DIGITS, THIRDS

# The number of classes for every question about a cell: which thing, which colour, on which background, and for each
# digit which one or none.
CELL_CLASSES = (len(CELL_KINDS), len(COLOURS), len(BACKGROUNDS), *[11] * MAX_DIGITS)
# The total for a cell seen with the whole picture: also in which third it lies, down and across.
SCENE_CLASSES = (sum(CELL_CLASSES), *map(len, THIRDS))


class TowerHeads(nn.Module):
    """Linear heads on the towers' features.

    There is one per cell on both towers, and one per character on the high-resolution tower's finest maps.
    """

    def __init__(self, config: MiniGeminiConfig):
        super().__init__()
        dims = config.vision_config_aux["dims"]
        self.low = _head(config.mm_hidden_size, sum(SCENE_CLASSES))
        self.high = _head(dims[-1], sum(CELL_CLASSES))
        self.characters = _head(dims[0] + dims[1], 11 + 1 + MAX_DIGITS)


class Codes(nn.Module):
    """Tells a scene to the language model before there are image tokens. A cell's code is the sum of its words.

    The codes are discarded after training, like the heads. The words are the language model's own embeddings, so that
    questions and contents look alike. They name what is in a cell, and the third of the picture, across and down, in
    which the cell lies. Every digit has an embedding for every place in a number; otherwise the order of digits would
    be lost.

    Args:
        tokenizer: every word of `CELL_KINDS`, `COLOURS`, `BACKGROUNDS` and `THIRDS` becomes the mean of its tokens.
        width: width of the embeddings.
        spread: spread of the embeddings. The parameters that are learned here start with the same spread.
    """

    def __init__(self, tokenizer, width: int, spread: float):
        super().__init__()
        words = [[word or "" for word in CELL_KINDS], list(COLOURS), list(BACKGROUNDS), *THIRDS]
        self.ids = [
            [tokenizer(" " + w, add_special_tokens=False).input_ids if w else [] for w in group] for group in words
        ]
        self.digits = nn.Parameter(spread * torch.randn(MAX_DIGITS, 10, width))

    def forward(self, batch: Batch, embeddings: nn.Embedding) -> torch.Tensor:
        """Turns labels [B, n, n] of scenes into codes [B, n * n, width].

        Where the batch names `cells` [B, k], only their codes [B, k, width] are returned.
        """
        kind = batch["kind"]
        ground = batch["background"][:, None, None].expand_as(kind)
        third = thirds(kind.shape[1], kind.device)
        labels = (
            kind,
            batch["colour"],
            ground,
            *batch["digits"].unbind(-1),
            third[:, None].expand_as(kind),
            third.expand_as(kind),
        )
        told = 0.0
        for table, at in zip(self.tables(embeddings), labels):
            nothing = table.new_zeros(1, table.shape[1])
            told = told + torch.cat([table, nothing])[torch.where(at == IGNORED, len(table), at)]
        told = told.flatten(1, 2)
        if "cells" in batch:
            told = told.gather(1, batch["cells"][..., None].expand(-1, -1, told.shape[-1]))
        return told

    def tables(self, embeddings: nn.Embedding) -> list[torch.Tensor]:
        """[classes, width] for every question of `CELL_CLASSES`, then for the thirds down and across.

        The row for no thing, and the row for no digit, are zero.
        """
        weight = embeddings.weight
        nothing = weight.new_zeros(1, weight.shape[1])
        kind, colour, ground, *thirds = [
            torch.cat([weight[ids].mean(0, keepdim=True) if ids else nothing for ids in group]) for group in self.ids
        ]
        return [kind, colour, ground, *(torch.cat([nothing, digits]) for digits in self.digits), *thirds]


def low_loss(heads: TowerHeads, queries: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of the low-resolution tower's features [B, N, D]."""
    # The tower should also try to read, but the part that it cannot learn must not dominate.
    return _scene_loss(heads.low(queries).unflatten(1, batch["kind"].shape[1:]).float(), batch, reading=0.25)


def token_loss(tables: list[torch.Tensor], seen: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The classification loss of image tokens [B, N, width]: which code in each of the `tables` is nearest."""
    seen = seen.float().unflatten(1, batch["kind"].shape[1:])
    return _scene_loss(torch.cat([seen @ table.T - table.square().sum(-1) / 2 for table in tables], -1), batch)


def thirds(side: int, device: torch.device) -> torch.Tensor:
    """The third of the picture in which each of `side` rows or columns of cells lies."""
    return torch.arange(side, device=device) * 3 // side


def high_loss(heads: TowerHeads, pyramid: list[torch.Tensor], batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of the high-resolution tower's stage maps [B, n_s, n_s, C_s]."""
    loss, said = character_loss(heads, pyramid, batch)
    coarse, seen = _cell_loss(heads.high(pyramid[-1]).float(), batch)
    return loss + coarse, said | seen


def character_loss(
    heads: TowerHeads, pyramid: list[torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of the two finest stage maps alone: which digit lies where, and which place it has in its number."""
    wider = pyramid[1].repeat_interleave(2, 1).repeat_interleave(2, 2)
    scores = heads.characters(torch.cat([pyramid[0], wider], -1)).float()
    character, rank = scores.split((11, 1 + MAX_DIGITS), -1)
    loss, said = 0.0, {}
    for name, s in (("character", character), ("rank", rank)):
        # Many positions hold no digit.
        weight = s.new_tensor([0.05] + [1.0] * (s.shape[-1] - 1))
        loss = loss + F.cross_entropy(s.flatten(0, 2), batch[name].flatten(), weight=weight, ignore_index=IGNORED)
        at = batch[name] > 0
        said[name] = (s.argmax(-1) == batch[name])[at].float().mean().item()
    return loss, said


def _head(width: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))


def _scene_loss(scores: torch.Tensor, batch: Batch, reading: float = 1.0) -> tuple[torch.Tensor, dict[str, float]]:
    """`_cell_loss`, and the loss of where in the picture cells lie, for features that see the whole picture."""
    things, down, across = scores.split(SCENE_CLASSES, -1)
    loss, said = _cell_loss(things, batch, reading)
    third = thirds(scores.shape[1], scores.device)
    right = []
    for where, labels in ((down, third[:, None]), (across, third)):
        labels = labels.expand(where.shape[:3])
        loss = loss + F.cross_entropy(where.flatten(0, 2), labels.flatten())
        right.append((where.argmax(-1) == labels).float().mean())
    return loss, said | {"place": torch.stack(right).mean().item()}


def _cell_loss(scores: torch.Tensor, batch: Batch, reading: float = 1.0) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of scores [B, n, n, classes] against the labels, and how often things and numbers are right.

    `reading` is the weight of numbers.
    """
    kind, colour, background, *digits = scores.split(CELL_CLASSES, -1)
    loss = F.cross_entropy(
        kind.flatten(0, 2), batch["kind"].flatten(), weight=kind.new_tensor([0.1] + [1.0] * (len(CELL_KINDS) - 1))
    )
    if (batch["colour"] != IGNORED).any():
        loss = loss + F.cross_entropy(colour.flatten(0, 2), batch["colour"].flatten(), ignore_index=IGNORED)
        everywhere = batch["background"][:, None, None].expand(background.shape[:-1])
        loss = loss + 0.3 * F.cross_entropy(background.flatten(0, 2), everywhere.flatten())
    at = batch["digits"][..., 0] != IGNORED
    slots, wanted = torch.stack(digits, -2)[at], batch["digits"][at]
    # A batch without a number on any page is next to impossible. Its loss would be a mean over nothing.
    loss = loss + reading * MAX_DIGITS * F.cross_entropy(slots.flatten(0, 1), wanted.flatten())
    exact = (slots.argmax(-1) == wanted).all(-1).float().mean().item()
    things = batch["kind"] > 0
    return loss, {"number": exact, "kind": (kind.argmax(-1)[things] == batch["kind"][things]).float().mean().item()}
