"""Tiny trainings for the tests of recipes.finetune: their samples, their configurations, and what they logged."""

import json
from pathlib import Path

import torch

from recipes.finetune.config import FineTuneConfig, parse_config
from tests.paths import OWN_GOLDEN

PICTURES = (OWN_GOLDEN / "photo.png", OWN_GOLDEN / "drawing.png")


def sample(*texts: str, image: str | list[str] | None = None, **more) -> dict:
    """A sample whose turns say these texts, the user's first."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **({} if image is None else {"image": image}), **more}


# Questions about pictures of different lengths, one without a picture, and one with two.
SAMPLES = [
    sample("<image>\nWhat is it?", "A cat.", image="photo.png"),
    sample("What is this?\n<image>", "A house and a tree.", "And the colour?", "Red.", image="drawing.png"),
    sample("Who are you?", "I answer questions."),
    sample("<image>\nIs it small?", "No, it is large and it is far away.", image="drawing.png"),
    sample("<image>\nHow many?", "Three.", image="photo.png"),
    sample("<image>\n<image>\nAre they the same?", "They are not.", image=["photo.png", "drawing.png"]),
]
# Two of them, so that every step sees the same batch.
BATCH = [SAMPLES[0], SAMPLES[2]]
CAPTIONS = [
    sample("<image>\nDescribe it.", f"A picture of {what}.", image=image)
    for what, image in zip(("a cat", "a house", "many things", "a tree"), ("photo.png", "drawing.png") * 2)
]
# Arguments of Trainer for a run that writes checkpoints.
SAVES = {"disable_tqdm": True, "save_strategy": "steps"}


def write_samples(folder: Path, samples: list) -> Path:
    """Writes samples as a list in JSON, and returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "samples.json"
    file.write_text(json.dumps(samples), encoding="utf-8")
    return file


def settings(folder: Path, model: Path, samples: list, stage: int = 2, **changes) -> dict:
    """The settings of a short training on a CPU, as a YAML file would have them."""
    return {
        "stage": stage,
        "model": str(model),
        "output": str(folder / "out"),
        "data": [{"file": str(write_samples(folder, samples)), "pictures": str(OWN_GOLDEN)}],
        "template": "plain" if stage == 1 else "vicuna_v1",
        "global_batch": 2,
        "per_device_batch": 2,
        "max_steps": 2,
        "dtype": "float32",
        "device": "cpu",
        "workers": 0,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "trainer": {"disable_tqdm": True, "save_strategy": "no"},
        **changes,
    }


def make_config(folder: Path, model: Path, samples: list, stage: int = 2, **changes) -> FineTuneConfig:
    """The configuration of `settings`."""
    return parse_config(settings(folder, model, samples, stage, **changes))


def losses(config: FineTuneConfig) -> list[float]:
    """The loss of every step that a training logged, in order."""
    rows = map(json.loads, (config.output / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def skipped(config: FineTuneConfig, report: str = "skipped.jsonl") -> dict[int, str]:
    """The reasons of the samples that a training left out, by index; each has one line."""
    file = config.output / report
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    assert all(row["file"] == str(config.data[0].file) for row in rows)
    found = {row["index"]: row["reason"] for row in rows}
    assert len(found) == len(rows)
    return found


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The names of tensors that differ in a bit; both must have the same names."""
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
