"""The parts that MM-Interleaved's vision tower has around CLIP's layers, after ViT-Adapter (arXiv 2205.08534)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...modules import DeformableAttention
from ...runtime.device_tables import cached_on_device

# The width of the values in the adapter's attention, and of the hidden layer of its convolutional networks, as a
# fraction of the tower's width.
ATTENTION_RATIO, CONVOLUTION_RATIO = 0.5, 0.25
NORM_EPS = 1e-5


@cached_on_device(limit=2**24)
def cell_centres(sides: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The centres of the cells of square grids as fractions of the picture, (x, y), float32 [1, cells, 1, 2]."""
    centres = []
    for side in sides:
        along = (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side
        y, x = torch.meshgrid(along, along, indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).view(-1, 2))
    return torch.cat(centres)[None, :, None]


def as_map(tokens: torch.Tensor, side: int) -> torch.Tensor:
    """Tokens [n, side * side, C] as a map [n, C, side, side] with the same memory."""
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def as_tokens(maps: torch.Tensor) -> torch.Tensor:
    """A map [n, C, h, w] as tokens [n, h * w, C]."""
    return maps.flatten(2).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of maps [n, C, h, w]."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _convolution(inputs: int, outputs: int, stride: int = 2) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), ChannelNorm(outputs), nn.ReLU()]


class SpatialPriorModule(nn.Module):
    """Convolutions that give maps of a picture at a quarter, an eighth, a 16th and a 32nd of its side.

    Args:
        inplane: channels of the first convolutions.
        width: channels of the maps.
    """

    def __init__(self, inplane: int, width: int):
        super().__init__()
        self.stem = nn.Sequential(
            *_convolution(3, inplane),
            *_convolution(inplane, inplane, 1),
            *_convolution(inplane, inplane, 1),
            nn.MaxPool2d(3, 2, 1),
        )
        self.conv2 = nn.Sequential(*_convolution(inplane, 2 * inplane))
        self.conv3 = nn.Sequential(*_convolution(2 * inplane, 4 * inplane))
        self.conv4 = nn.Sequential(*_convolution(4 * inplane, 4 * inplane))
        self.fc1 = nn.Conv2d(inplane, width, 1)
        self.fc2 = nn.Conv2d(2 * inplane, width, 1)
        self.fc3 = nn.Conv2d(4 * inplane, width, 1)
        self.fc4 = nn.Conv2d(4 * inplane, width, 1)

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Pixels [n, 3, s, s], s a multiple of 32, to maps [n, width, s / r, s / r], r = 4, 8, 16 and 32."""
        first = self.stem(pixels)
        second = self.conv2(first)
        third = self.conv3(second)
        return [self.fc1(first), self.fc2(second), self.fc3(third), self.fc4(self.conv4(third))]


class AdapterInjector(nn.Module):
    """Adds what the patches of the tower read from the prior's maps.

    Args:
        width: width of patches and maps.
        levels: number of maps.
        heads, points: as in `DeformableAttention`.
    """

    def __init__(self, width: int, levels: int, heads: int, points: int):
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS)
        inner = int(ATTENTION_RATIO * width)
        self.attn = DeformableAttention(width, levels=levels, heads=heads, points=points, inner_dim=inner)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        patches: torch.Tensor,
        prior: torch.Tensor,
        side: int,
        sides: Sequence[int],
        *,
        backend: str | None = None,
    ) -> torch.Tensor:
        """The patches with what they read.

        Args:
            patches: [n, side * side, width].
            prior: [n, S, width], the maps one after the other; S is the sum of the squared `sides`.
            side: side of the grid of patches.
            sides: side of every map.
            backend: overrides the choice in force.

        Returns:
            [n, side * side, width].
        """
        read = self.attn(
            self.query_norm(patches),
            cell_centres((side,), patches.device),
            self.feat_norm(prior),
            [(size, size) for size in sides],
            backend=backend,
        )
        return torch.addcmul(patches, self.gamma, read)


class LevelConvolution(nn.Module):
    """A depthwise convolution of 3 x 3 over each of several maps that are stored one after the other."""

    def __init__(self, width: int):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, 1, 1, groups=width)

    def forward(self, tokens: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
        """Tokens [n, S, width] to as many; S is the sum of the squared `sides`."""
        levels = tokens.split([side * side for side in sides], dim=1)
        return torch.cat([as_tokens(self.dwconv(as_map(level, side))) for level, side in zip(levels, sides)], dim=1)


class ConvolutionalFeedForward(nn.Module):
    """Two linear layers with a convolution within each map between them."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(CONVOLUTION_RATIO * width)
        self.fc1, self.dwconv, self.fc2 = nn.Linear(width, hidden), LevelConvolution(hidden), nn.Linear(hidden, width)

    def forward(self, tokens: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
        """Tokens [n, S, width] to as many; S is the sum of the squared `sides`."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), sides)))


class AdapterExtractor(nn.Module):
    """Adds what the prior's maps read from the patches of the tower, and what a network makes of the sum.

    Args:
        width: width of patches and maps.
        heads, points: as in `DeformableAttention`.
    """

    def __init__(self, width: int, heads: int, points: int):
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS)
        inner = int(ATTENTION_RATIO * width)
        self.attn = DeformableAttention(width, levels=1, heads=heads, points=points, inner_dim=inner)
        self.ffn, self.ffn_norm = ConvolutionalFeedForward(width), nn.LayerNorm(width, eps=NORM_EPS)

    def forward(
        self,
        prior: torch.Tensor,
        patches: torch.Tensor,
        side: int,
        sides: Sequence[int],
        *,
        backend: str | None = None,
    ) -> torch.Tensor:
        """The maps with what they read, [n, S, width]; the arguments are those of `AdapterInjector.forward`."""
        read = self.attn(
            self.query_norm(prior),
            cell_centres(tuple(sides), prior.device),
            self.feat_norm(patches),
            [(side, side)],
            backend=backend,
        )
        prior = prior + read
        return prior + self.ffn(self.ffn_norm(prior), sides)


class AdapterInteraction(nn.Module):
    """The injector before a part of the tower's layers, and the extractors after it.

    Args:
        width: width of patches and maps.
        levels: number of maps.
        heads, points: as in `DeformableAttention`.
        extra: extractors after the first one.
    """

    def __init__(self, width: int, levels: int, heads: int, points: int, extra: int = 0):
        super().__init__()
        self.injector = AdapterInjector(width, levels, heads, points)
        self.extractor = AdapterExtractor(width, heads, points)
        self.extra_extractors = nn.ModuleList(AdapterExtractor(width, heads, points) for _ in range(extra))

    @property
    def extractors(self) -> list[AdapterExtractor]:
        """All extractors, in the order in which they run."""
        return [self.extractor, *self.extra_extractors]
