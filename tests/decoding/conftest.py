"""Fixtures for tests of the decode loop."""

import pytest

from mg_fast.decoding import model_runner


@pytest.fixture
def by_graph(monkeypatch):
    """Passes run as on a GPU, but are never captured; the test gets the list of these passes.

    Chunks and windows are small, so that prompts cross their borders at odd places.
    """
    monkeypatch.setattr(model_runner.ModelRunner, "graphs_refused", lambda self, capacity: None)
    monkeypatch.setattr(model_runner._Graph, "_capture", lambda self: None)
    monkeypatch.setattr(model_runner, "PREFILL_CHUNK", 24)
    monkeypatch.setattr(model_runner, "WINDOW", 32)
    monkeypatch.setattr(model_runner, "COMPILED_WINDOW", 16)
    monkeypatch.setattr(model_runner, "ONE_SEQUENCE", 64)
    monkeypatch.setattr(model_runner, "WIDTHS", (7, 16, 24))
    run = []
    whole = model_runner._Graph.__call__

    def counted(self, inputs, start, width):
        run.append((inputs.shape[1], self.inputs.shape[1], self.window, start))
        return whole(self, inputs, start, width)

    monkeypatch.setattr(model_runner._Graph, "__call__", counted)
    return run
