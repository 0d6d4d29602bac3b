"""Draws the losses of a training run, and how much it reads, as a picture."""

import itertools
import json
from pathlib import Path

import torch

# The shares of the log that the curve shows for reading, with their colours.
READ = {
    "whole numbers, HR tower on pages": ("page number", "C0"),
    "whole numbers, image tokens by nearest code": ("token number", "C1"),
    "single digits, language model": ("digit", "C2"),
}


def draw_curve(log: Path, picture: Path) -> None:
    """Draws the losses of a run, stage by stage, and the shares of `READ`, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, (axes, reads) = pyplot.subplots(2, figsize=(9, 8), sharex=True)
    # There are more stages than matplotlib's own cycle has colours.
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    first = 0
    for name, group in itertools.groupby(rows, lambda row: row["stage"]):
        group = list(group)
        smooth = _smooth([row["loss"] for row in group])
        axes.plot(range(first, first + len(smooth)), smooth, label=name)
        for key, colour in READ.values():
            shares = [(first + i, row[key]) for i, row in enumerate(group) if key in row]
            if len(shares) > 1:
                smooth = _smooth([share for _, share in shares])
                reads.plot([at for at, _ in shares][: len(smooth)], smooth, colour)
        first += len(group)
    axes.set(ylabel="loss (each stage has its own)", yscale="log")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
    reads.set(xlabel="step", ylabel="share that is right, in training")
    for what, (_, colour) in READ.items():
        reads.plot([], [], colour, label=what)
    # This is the aim for whole numbers.
    reads.axhline(0.95, color="gray", linestyle=":", label="0.95")
    reads.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(picture, dpi=80, bbox_inches="tight")
    pyplot.close(figure)


def _smooth(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).unfold(0, min(20, len(values)), 1).mean(-1)
