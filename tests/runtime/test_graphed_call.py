"""Calls are replayed from one graph for each shape and key. Stand-ins replace what only a GPU has."""

import contextlib
import types

import pytest
import torch

from mg_fast.runtime import graphed_call, graphs
from mg_fast.runtime.graphed_call import GraphedCall

DEVICE = torch.device("cuda", 0)


class Replayed:
    """A captured graph that does its work again, and writes over the result of the time before."""

    def __init__(self, work):
        self.work, self.output = work, work()

    def replay(self):
        for kept, new in zip(self.output, self.work()):
            kept.copy_(new)


@pytest.fixture
def captured(monkeypatch):
    """The names of the graphs that were captured, as far as captures work without a GPU."""
    names = []
    stream = types.SimpleNamespace(wait_event=lambda event: None, wait_stream=lambda other: None)

    def capture(cache, work, device, what, began):
        names.append(what)
        graph = Replayed(work)
        return graphs.CapturedGraph(graph, graph.output)

    monkeypatch.setattr(torch.cuda, "Event", lambda: types.SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(graphs.GraphCache, "stream", lambda *_: stream)
    monkeypatch.setattr(graphs.GraphCache, "capture", capture)
    monkeypatch.setattr(graphed_call, "numerics", lambda device: None)
    return names


def work(x, y):
    return x + y, x * y


def test_results_are_copies_of_what_a_replay_gives(captured):
    call = GraphedCall(DEVICE, 2, graphs.Captures())
    first = call(work, (torch.tensor([2.0]), torch.tensor([3.0])), "key", "one")
    second = call(work, (torch.tensor([4.0]), torch.tensor([5.0])), "key", "again")
    assert [r.item() for r in (*first, *second)] == [5.0, 6.0, 9.0, 20.0] and captured == ["one"]


def test_other_shapes_dtypes_and_keys_have_other_graphs(captured):
    call, one = GraphedCall(DEVICE, 4, graphs.Captures()), torch.ones(1)
    call(work, (one, one), "key", "first")
    call(work, (torch.ones(2), one), "key", "shape")
    call(work, (one, one.double()), "key", "dtype")
    call(work, (one, one), "other", "key")
    call(work, (one, one), "key", "first again")
    assert captured == ["first", "shape", "dtype", "key"]


def test_without_graphs_the_work_runs_as_it_is(captured, monkeypatch, caplog):
    captures = graphs.Captures()

    def none_left(cache, device):
        raise graphs.NoStreamLeft("no stream is left")

    monkeypatch.setattr(graphs.GraphCache, "stream", none_left)
    one = torch.ones(1)
    assert GraphedCall(DEVICE, 2, captures)(work, (one, one), 0, "pictures")[0].item() == 2.0
    assert "pictures: runs without a CUDA graph: no stream is left" in caplog.text
    captures.allowed = False
    assert GraphedCall(DEVICE, 2, captures)(work, (one, one), 0, "pictures")[1].item() == 1.0
    assert captured == []
