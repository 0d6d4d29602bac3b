"""Streams on which graphs are captured, and caches that pass from one stream to another.

Stand-ins replace what only a GPU has.
"""

import contextlib
import gc
import threading
import types

import pytest
import torch

from mg_fast.decoding import Decoder, model_runner
from mg_fast.models.mini_gemini.encoder import PictureEncoder
from mg_fast.runtime import graphs

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def torch_streams(monkeypatch):
    """Streams as torch has them: 32 for a device, handed out in turn."""
    given = []

    def stream(device):
        given.append(1000 + len(given) % 32)
        return types.SimpleNamespace(cuda_stream=given[-1], device=device)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(graphs, "_leases", {})
    return given


def test_no_two_living_owners_capture_on_one_stream(torch_streams):
    """cuBLAS has one workspace for each stream of a thread, and graphs captured on one stream write to the same."""
    owners = [graphs.CaptureStream(DEVICE) for _ in range(20)]
    # Other code takes streams as well, and torch returns to those in use.
    for _ in range(25):
        torch.cuda.Stream(DEVICE)
    owners += [graphs.CaptureStream(DEVICE) for _ in range(12)]
    assert len({owner.stream.cuda_stream for owner in owners}) == 32
    with pytest.raises(RuntimeError, match="no stream is left on cuda:0 to capture CUDA graphs on: 32 owners"):
        graphs.CaptureStream(DEVICE)


def test_a_stream_is_free_again_when_its_owner_is_gone(torch_streams):
    owners = [graphs.CaptureStream(DEVICE) for _ in range(32)]
    freed = owners.pop(7).stream.cuda_stream
    gc.collect()
    assert graphs.CaptureStream(DEVICE).stream.cuda_stream == freed


@pytest.fixture
def capturing(monkeypatch, torch_streams):
    """The streams on which passes were captured, as far as captures work without a GPU."""
    streams = []

    class Capture:
        def __init__(self, graph, stream, pool=None):
            streams.append(stream.cuda_stream)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(model_runner.ModelRunner, "graphs_refused", lambda self, capacity: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(graphs, "capture", Capture)
    return streams


def test_caches_of_one_thread_capture_on_streams_of_their_own(own, capturing):
    """Two threads may replay the graphs of two caches at the same time, but never those of one cache.

    The graphs of one cache therefore share its stream.
    """
    passes = Decoder(own.model).runner
    caches = [passes.sequences(1, 64) for _ in range(2)]
    with torch.no_grad():
        for sequences in caches:
            for width in (64, 128):
                for _ in range(2):
                    sequences.cache.length = 0
                    passes.prefill(sequences, torch.zeros(1, width, own.model.config.text_config.hidden_size))
    assert len(capturing) == 4
    assert capturing[0] == capturing[1] != capturing[2] == capturing[3]


class Stream:
    """A stream that records the events that are recorded on it and that it waits for."""

    def __init__(self):
        self.device, self.recorded, self.waited = DEVICE, [], []

    def record_event(self):
        self.recorded.append(object())
        return self.recorded[-1]

    def wait_event(self, event):
        self.waited.append(event)


def test_a_cache_is_taken_over_after_the_pass_that_ran_ahead(own, monkeypatch):
    """The loop starts a pass before it knows that an answer has ended; the next request may be on another stream."""
    of_thread = threading.local()
    decoder = Decoder(own.model, kv_cache_bytes=0)
    used = []
    # Let the cache appear to be on a GPU.
    monkeypatch.setattr(model_runner.KVCache, "devices", property(lambda self: [DEVICE]))
    monkeypatch.setattr(model_runner.KVCache, "record_stream", lambda self, stream: used.append(stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: of_thread.stream)
    options = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    ids = torch.randint(3, 400, (1, 9), generator=torch.Generator().manual_seed(0))
    order = []
    step, fill = model_runner.ModelRunner.step, model_runner.Sequences.fill
    monkeypatch.setattr(model_runner.ModelRunner, "step", lambda *args: (order.append("pass"), step(*args))[1])
    monkeypatch.setattr(
        model_runner.Sequences,
        "fill",
        lambda *args: (order.append(f"begins after {len(of_thread.stream.waited)} waits"), fill(*args))[1],
    )
    streams = [Stream(), Stream()]
    for stream in streams:
        of_thread.stream = stream
        own.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **options, custom_generate=decoder.request()
        )
    first, second = streams
    assert first.waited == [] and len(first.recorded) == 1
    assert second.waited == first.recorded and used == [second]
    assert order == ["begins after 0 waits", "pass", "pass", "begins after 1 waits", "pass", "pass"]


def test_graphs_used_longest_ago_are_dropped():
    cache = graphs.GraphCache(2, graphs.Captures())
    made = []
    for key in ("one", "two", "one", "three", "one", "two"):
        cache.entry(key, lambda key=key: made.append(key) or key)
    assert made == ["one", "two", "three", "two"] and cache.entries() == ["one", "two"]


def test_work_is_captured_replayed_and_noted(capturing):
    captures, result = graphs.Captures(), torch.ones(2)
    captured = graphs.GraphCache(2, captures).capture(lambda: result, DEVICE, "a graph")
    first = captured.replay()
    result.fill_(5)
    assert (
        torch.equal(first, torch.ones(2))
        and torch.equal(captured.replay(), result)
        and list(captures.first_use) == ["a graph"]
    )


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("none left"), RuntimeError("not permitted")], ids=["memory", "other"]
)
def test_only_a_shortage_lets_others_be_captured(capturing, monkeypatch, caplog, error):
    def fail():
        raise error

    captures = graphs.Captures()
    cache, of_the_same_owner = (graphs.GraphCache(2, captures) for _ in range(2))
    # The stand-in for a capture would hide the error that is raised inside.
    monkeypatch.setattr(graphs, "capture", lambda *_: contextlib.nullcontext())
    assert cache.capture(fail, DEVICE, "large") is None and "large: runs without a CUDA graph" in caplog.text
    shortage = isinstance(error, torch.OutOfMemoryError)
    assert (
        (of_the_same_owner.capture(lambda: torch.ones(1), DEVICE, "small") is not None) == shortage == captures.allowed
    )


def test_pictures_are_encoded_without_graphs_where_no_stream_is_left(own, torch_streams, monkeypatch, caplog):
    """The encoder needs one stream for a tower and one for its graphs, but only one is left here."""
    others = [graphs.CaptureStream(DEVICE) for _ in range(31)]
    encoder = PictureEncoder(own.model.model)
    encoder.device, encoder._graphs = DEVICE, graphs.GraphCache(2, encoder._captures)
    side = encoder._take_streams()
    assert encoder._graphs is None and "pictures are encoded without CUDA graphs: no stream is left" in caplog.text
    assert side.cuda_stream in range(1000, 1032) and len(graphs._leases[DEVICE]) == len(others)
