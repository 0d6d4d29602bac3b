"""What the passes of deformable attention share: a program's queries, where its samples lie, and how it is launched.

No kernel of its own is here.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .configs import SamplingTile, deformable_attention_tile
from .sampling import place


@triton.jit
def program(Q, H, BQ: tl.constexpr):
    """This program's picture, head, queries' rows of [B * Q * H] and which queries there are [BQ].

    Heads vary fastest, because they lie side by side in memory.
    """
    i = tl.program_id(0)
    tiles = tl.cdiv(Q, BQ)
    i_b = i // (H * tiles)
    o_q = (i // H % tiles) * BQ + tl.arange(0, BQ)
    i_b, i_h = i_b.to(tl.int64), (i % H).to(tl.int64)
    return i_b, i_h, (i_b * Q + o_q) * H + i_h, o_q < Q


@triton.jit
def sample(p_location, p_weight, m_q, start, h, w):
    """One sample of every query [BQ] in the level of h x w pixels that begins with pixel `start`.

    Returns its weight, its upper left pixel, how far it lies to the right of that and below it, and masks, as
    `sampling.place` has them.
    """
    b_x = tl.load(p_location, mask=m_q, other=0.0).to(tl.float32)
    b_y = tl.load(p_location + 1, mask=m_q, other=0.0).to(tl.float32)
    b_a = tl.load(p_weight, mask=m_q, other=0.0).to(tl.float32)
    o_x, o_y, b_right, b_low, m_left, m_right, m_top, m_low = place(b_x, b_y, h, w)
    return b_a, start + o_y * w + o_x, b_right, b_low, m_left, m_right, m_top & m_q, m_low & m_q


def floats(sides: Sequence[int]) -> tuple[float, ...]:
    """The sides as arguments of a kernel.

    Triton compiles a kernel again for ints of a tuple that are 1 or multiples of 16, and never for a float. The kernels
    convert each float back to the int that it was, which is exact up to 2^24.
    """
    return tuple(float(side) for side in sides)


def launch_tile(value: torch.Tensor, stage: str) -> tuple[SamplingTile, int, int]:
    """The tile of a launch, the queries of a program, and the channels rounded up to a power of two."""
    architecture = triton.runtime.driver.active.get_current_target().arch if value.is_cuda else None
    tile = deformable_attention_tile(architecture, stage, value.element_size(), value.shape[-1], value.stride()[:3])
    channels = max(16, triton.next_power_of_2(value.shape[-1]))
    return tile, max(1, tile.elements // channels), channels
