"""The page's plots of memory against the size of the picture: by formula, with what was measured."""

from collections.abc import Mapping

import torch

from ..costs import peak_memory
from ..costs.answer import ModelledAnswer
from ..costs.gpus import CARDS_GB
from ..costs.mining import Sizes
from ..figures import NOT_YET, Records, device_title, gpus, is_baseline, is_measured, rows_of
from ..registry import dtype_name
from .svg import Axis, Plot, key, section

# The values of a line of a plot, by the side of the picture in pixels.
Curve = Mapping[int, float]

SIDE = Axis(300, 3100, logarithmic=False)


def memory(found: Records) -> str:
    """The plots of whole models, which show on which cards they fit, and of mining alone."""
    keys = [key("line", "l-plain", "the original's steps, by formula")]
    keys += [key("line", "l-ours", "mg_fast by its kernel, by formula")]
    keys += [key("dot", "b-plain", "measured, the original's steps"), key("dot", "b-ours", "measured, mg_fast")]
    mining = [("cpu", torch.float32), *((device, torch.bfloat16) for device in gpus(found))]
    lead = (
        "The horizontal axis is the side of the picture in pixels. Up to 768 there is one view; beyond it there are "
        "cells of at most 768 pixels and the global view, as in HD. Where a curve crosses the line of a card, it no "
        "longer fits there; the driver and the libraries need memory of their own on top."
    )
    return section(keys, lead, [*map(_model, (1, 8)), *(_mining(found, device, dtype) for device, dtype in mining)])


def _model(batch: int) -> str:
    """A whole 7B model that sees a batch of pictures, beside the memory of cards."""
    weights, packed = ModelledAnswer("7b").weight_bytes, peak_memory.packed_bytes(torch.bfloat16)
    sizes = {side: Sizes.of_picture(side, torch.bfloat16, batch) for side in peak_memory.SIDES}
    plain = {side: (weights + peak_memory.reference_picture_peak(of)) / 1e9 for side, of in sizes.items()}
    ours = {side: (weights + packed + peak_memory.kernel_picture_peak(of)) / 1e9 for side, of in sizes.items()}
    # The cards whose memory the curves exceed, and the next larger one.
    top = max(*plain.values(), *ours.values())
    cards = CARDS_GB[: sum(card < top for card in CARDS_GB) + 1]
    plot = Plot(SIDE, Axis(0, 1.12 * max(top, *cards), logarithmic=False))
    plot.tick_y(0, "0")
    for card in cards:
        plot.tick_y(card, f"{card} GB card", "fit")
    _draw_curves(plot, plain, ours)
    title = f"A 7B model in bfloat16 with {'one picture' if batch == 1 else f'{batch} pictures at once'}"
    note = "weights, packed copies, and the peak until all image tokens are made; without a KV cache"
    return plot.html(title, note)


def _mining(found: Records, device: str, dtype: torch.dtype) -> str:
    """Mining alone on a device."""
    sizes = {side: Sizes.of_picture(side, dtype) for side in peak_memory.SIDES}
    plot, name = Plot(SIDE, Axis(0.01, 60)), dtype_name(dtype)
    for tick in (0.01, 0.1, 1, 10):
        plot.tick_y(tick, f"{1e3 * tick:g} MB" if tick < 1 else f"{tick:g} GB")
    plain = {side: peak_memory.reference_peak(of) / 1e9 for side, of in sizes.items()}
    _draw_curves(plot, plain, {side: peak_memory.kernel_peak(of) / 1e9 for side, of in sizes.items()})
    note = f"{NOT_YET}: the lines are the formula"
    if _draw_peaks(plot, found, device, name):
        note = "points were measured" + "; those of mg_fast with its PyTorch form" * (device == "cpu")
    return plot.html(f"Mining alone, {device_title(device)}, {name}: above inputs and weights", note)


def _draw_curves(plot: Plot, plain: Curve, ours: Curve) -> None:
    plot.ticks_x((384, 768, 1536, 2304, 3072), "pixels along a side")
    for kind, curve in (("l-plain", plain), ("l-ours", ours)):
        plot.line(kind, *curve.items())
        for side, value in curve.items():
            plot.dot(f"open {kind}", side, value, f"{side} pixels: {value:.3g} GB, by formula", 3)


def _draw_peaks(plot: Plot, found: Records, device: str, dtype: str) -> bool:
    """Draws the peaks of mining that were measured; returns whether there were any."""
    rows = []
    for side, setting in ((768, "768"), (1536, "1536-hd")):
        rows += [(side, row) for row in rows_of(found, device, f"patch_mining/{setting}-b1-{dtype}")]
    drawn = [(side, row) for side, row in rows if is_measured(row) and row["peak_mib"]]
    drawn = [(side, row) for side, row in drawn if row["provider"] in ("reference", "torch", "triton")]
    for side, row in drawn:
        title = f"{row['name']} {row['provider']}: {row['peak_mib']:.0f} MiB"
        plot.dot("b-plain" if is_baseline(row) else "b-ours", side, row["peak_mib"] * 2**20 / 1e9, title, 5.5)
    return bool(drawn)
