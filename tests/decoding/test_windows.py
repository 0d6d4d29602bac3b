"""The windows that passes of one token attend to, and how often torch.compile runs for them.

Nothing is captured here, and torch.compile traces passes without making code of them.
"""

import pytest
import torch

from mg_fast.decoding import Decoder, model_runner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def compiled_forms(monkeypatch):
    """The forms that torch.compile makes in a test, in order."""
    torch._dynamo.reset()
    made, compiler = [], torch.compile

    def backend(traced, inputs):
        made.append(traced)
        return traced.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=backend, **options))
    yield made
    torch._dynamo.reset()


def options(rows, length, new, filling=0):
    ids = torch.randint(3, 400, (rows, length), generator=torch.Generator().manual_seed(rows + length))
    mask = torch.ones_like(ids)
    ids[0, :filling], mask[0, :filling] = 0, 0
    return dict(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize(
    "compiled, length, window",
    [
        (True, 0, 256),
        (True, 255, 256),
        (True, 256, 512),
        (True, 700, 768),
        (True, 2047, 2048),
        (False, 255, 512),
        (False, 512, 1024),
    ],
)
def test_a_window_is_the_smallest_that_holds_the_longest_row(own, compiled, length, window, monkeypatch):
    monkeypatch.setattr(model_runner.ModelRunner, "graphs_refused", lambda self, capacity: None)
    windows = []
    monkeypatch.setattr(model_runner._Graph, "__call__", lambda self, *given: windows.append(self.places.tolist()))
    runner = Decoder(own.model, compiled=compiled).runner
    sequences = runner.sequences(1, 2000)
    assert sequences.cache.capacity == 2048
    sequences.cache.length = length
    runner.step(sequences, torch.tensor([5]))
    assert windows == [list(range(window))]


@pytest.mark.slow
@pytest.mark.parametrize("rows, filling, new, windows", [(1, 0, 60, [32, 48, 64, 80]), (3, 6, 44, [32, 48, 64])])
def test_at_most_two_forms_serve_all_windows(own, by_graph, compiled_forms, rows, filling, new, windows):
    """Ids are those of plain `generate`. A second form is made for the whole cache alone, and none at a second time."""
    given = options(rows, 20, new, filling)
    expected = own.model.generate(**given)
    decoder = Decoder(own.model, compiled=True, kv_cache_bytes=0)
    for _ in range(2):
        by_graph.clear()
        assert torch.equal(own.model.generate(**given, custom_generate=decoder.request()), expected)
        steps = [(start, window) for _, filled, window, start in by_graph if filled == 1]
        assert steps == [(start, (start // 16 + 1) * 16) for start in range(20, 19 + new)]
        assert sorted({window for _, window in steps}) == windows
        assert len(compiled_forms) == (2 if decoder._idle.cache.capacity in windows else 1)


@pytest.mark.slow
def test_a_window_is_captured_at_its_second_pass_alone(own, by_graph, compiled_forms, monkeypatch):
    captured = []
    monkeypatch.setattr(model_runner._Graph, "_capture", lambda self: captured.append((self.window, self.compiled)))
    decoder = Decoder(own.model, compiled=True, kv_cache_bytes=0)
    for _ in range(3):
        own.model.generate(**options(1, 20, 60), custom_generate=decoder.request())
    assert sorted(window for window, compiled in captured if compiled) == [32, 48, 64, 80]
    assert [what.split(" over ")[1] for what in decoder.runner.first_use] == [
        f"{window} positions, compiled" for window in (32, 48, 64, 80)
    ]
