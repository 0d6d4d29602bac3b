"""Draws the losses of the painter's training, and how much of its samples is right while it learns, as a picture."""

import json
from pathlib import Path

LESSONS = ("autoencoder", "diffusion")
SHARES = ("shapes right", "background right", "number right")


def draw_curve(log: Path, picture: Path) -> None:
    """Draws the log of a run: a chart for each lesson, and one for the samples if there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, lesson in zip(axes, LESSONS):
        # A run that was killed wrote some rows twice.
        points = {row["step"]: row["loss"] for row in rows if row["lesson"] == lesson}
        axis.plot(*zip(*sorted(points.items())))
        axis.set(title=lesson, xlabel="step", ylabel="loss", yscale="log")
    samples = [row for row in rows if row["lesson"] == "samples"]
    for name in SHARES:
        axes[2].plot([row["step"] for row in samples], [row[name] for row in samples], marker=".", label=name)
    axes[2].set(title="samples", xlabel="step of the diffusion", ylabel="share of pictures", ylim=(0, 1.03))
    axes[2].legend()
    figure.savefig(picture, dpi=80)
    pyplot.close(figure)
