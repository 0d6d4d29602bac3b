"""Pipelines over the recorded tiny checkpoints, and the pictures beside them."""

import functools

import pytest
from PIL import Image

import mg_fast
from tests.models.mm_interleaved.recorded import NAMES, answers, folder_of, requests


class Recorded:
    """A tiny checkpoint with what the original was asked and answered.

    Attributes:
        pipeline: the loaded pipeline, in float32.
        pictures: the pictures beside it.
        requests, answers: what was asked and answered.
    """

    def __init__(self, name: str):
        folder = folder_of(name)
        self.pipeline = mg_fast.load(folder, dtype="float32", device="cpu")
        self.pictures = [Image.open(folder / f"image{i}.png").convert("RGB") for i in range(3)]
        self.requests, self.answers = requests(name), answers(name)

    def fresh(self, **options):
        """Another pipeline over the same model, which remembers nothing yet."""
        return mg_fast.InterleavedPipeline(self.pipeline.model, self.pipeline.processor, **options)


@functools.cache
def load(name: str) -> Recorded:
    return Recorded(name)


@pytest.fixture(params=NAMES)
def recorded(request) -> Recorded:
    return load(request.param)


@pytest.fixture
def tiny() -> Recorded:
    return load(NAMES[0])


@pytest.fixture
def run_positions(monkeypatch):
    """A list that gets the number of new positions of every pass over a prompt or a part of one."""
    from mg_fast.decoding.model_runner import ModelRunner

    run, prefill = [], ModelRunner.prefill

    def counted(self, sequences, embeddings):
        run.append(embeddings.shape[1])
        return prefill(self, sequences, embeddings)

    monkeypatch.setattr(ModelRunner, "prefill", counted)
    return run
