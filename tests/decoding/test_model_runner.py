"""Passes as a GPU captures them, over fixed windows under a mask, give the ids of transformers' own loop on a CPU.

Nothing is captured here: what a graph would hold is run anew each time. Tracing a pass shows that it asks the host for
nothing and reads nothing but tensors.
"""

import contextlib
import copy
import dataclasses
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mg_fast.decoding import Decoder, model_runner
from mg_fast.runtime import graphs
from tests.families import family

CAPTURE = model_runner._Graph._capture


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_turns(each, by_graph):
    pipeline = each.pipeline()
    history, answers = [], []
    for question, pictures in (
        ("What is it?", [each.pictures[0]]),
        ("And what else do you see in it?", []),
        ("Now this.", [each.pictures[1]]),
    ):
        answer = pipeline.chat(question, pictures, max_new_tokens=7)
        history.append(("<image>\n" * len(pictures) + question, None))
        assert answer.token_ids == each.plain(history, each.pictures[: 1 + (len(history) == 3)], 7)
        history[-1] = (history[-1][0], answer.text)
        answers.append(answer)
    assert all(answer.cached_tokens for answer in answers[1:])
    # Prompts were filled up, windows grew, and passes began in the middle of windows.
    assert any(width < filled for width, filled, *_ in by_graph) and len({window for *_, window, _ in by_graph}) > 2
    assert all(start + filled <= window for _, filled, window, start in by_graph)


def test_ragged_batch(each, by_graph):
    questions = [
        ("What is it?", [each.pictures[0]]),
        ("Hi.", []),
        ("Compare these two, and be brief.", list(each.pictures)),
    ]
    answers = each.pipeline().chat_batch(questions, max_new_tokens=7, progress=False)
    for (text, pictures), answer in zip(questions, answers):
        assert answer.error is None
        assert answer.token_ids == each.plain([("<image>\n" * len(pictures) + text, None)], pictures, 7)
    assert by_graph


@pytest.mark.parametrize("length", [*range(1, 9), 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65])
def test_lengths_around_every_border(own, by_graph, length):
    ids = torch.randint(3, 400, (1, length), generator=torch.Generator().manual_seed(length))
    options = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    expected = own.model.generate(**options)
    decoder = Decoder(own.model)
    for _ in range(2):
        assert torch.equal(own.model.generate(**options, custom_generate=decoder.request()), expected)


def test_one_cache_for_prompts_with_and_without_filling(own, by_graph):
    """Filling and the remains of earlier requests are masked, in any order of requests on the same cache."""
    decoder = Decoder(own.model, kv_cache_bytes=0)
    generator = torch.Generator().manual_seed(3)
    for pads in ((0, 9), (0, 0), (14, 3), (2, 0), (0, 0)):
        ids, mask = torch.randint(3, 400, (2, 20), generator=generator), torch.ones(2, 20, dtype=torch.long)
        for row, pad in enumerate(pads):
            ids[row, :pad], mask[row, :pad] = 0, 0
        options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert torch.equal(
            own.model.generate(**options, custom_generate=decoder.request()), own.model.generate(**options)
        ), pads


def test_graphs_are_bounded(own, by_graph, monkeypatch):
    monkeypatch.setattr(model_runner, "MAX_GRAPHS", 5)
    pipeline = own.pipeline()
    for i in range(6):
        pipeline.chat("Word " * (7 * i + 1), max_new_tokens=30, min_new_tokens=30)
    sequences = pipeline.decoder._idle
    assert 0 < len(sequences.graphs) <= 5
    assert len({(filled, window) for _, filled, window, _ in by_graph}) > 5


def test_a_graph_is_captured_once_and_where_it_comes_again(own, by_graph, monkeypatch):
    captured = []
    monkeypatch.setattr(
        model_runner._Graph, "_capture", lambda self: captured.append((self.inputs.shape[1], self.window))
    )
    pipeline = own.pipeline()
    pipeline.chat("Hello?", max_new_tokens=40, min_new_tokens=40)
    assert captured and len(captured) == len(set(captured))
    assert {width for width, _ in captured} <= {1, 24}


def test_a_capture_that_failed_is_the_last(own, by_graph, monkeypatch, caplog):
    @contextlib.contextmanager
    def failing(*args):
        tried.append(args)
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    tried = []
    monkeypatch.setattr(model_runner._Graph, "_capture", CAPTURE)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(graphs, "CaptureStream", lambda device: types.SimpleNamespace(stream=None))
    monkeypatch.setattr(graphs, "capture", failing)
    pipeline = own.pipeline()
    answer = pipeline.chat("Hello?", max_new_tokens=40, min_new_tokens=40)
    assert (
        answer.token_ids
        == own.pipeline(backend="reference").chat("Hello?", max_new_tokens=40, min_new_tokens=40).token_ids
    )
    assert len(tried) == 1 and "no more graphs are captured" in caplog.text


def test_graphs_that_left_take_their_pool_along(own):
    sequences = Decoder(own.model).runner.sequences(2, 40)
    padded = torch.tensor([[0, 1], [1, 1]])
    for mask in (padded, torch.ones_like(padded), padded):
        sequences.graphs.pool = (0, 1)
        sequences.graphs.entry("one", object)
        sequences.fill(mask)
        assert not len(sequences.graphs) and sequences.graphs.pool is None
    sequences.graphs.pool = (0, 2)
    sequences.fill(padded)
    assert sequences.graphs.pool == (0, 2)


def test_every_row_of_a_pass_sees_something(own, by_graph, monkeypatch):
    """Every row attends to something, filling before a prompt included, because kernels may make NaN of others."""
    seen = []

    def watch(module, args, kwargs):
        seen.append(kwargs["attention_mask"])

    decoder = Decoder(own.model, kv_cache_bytes=0)
    hook = own.model.model.language_model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        ids, mask = torch.randint(3, 400, (2, 20)), torch.ones(2, 20, dtype=torch.long)
        mask[1, :9] = 0
        own.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            custom_generate=decoder.request(),
        )
    finally:
        hook.remove()
    assert seen[0].shape == (2, 1, 24, 32) and all(mask.any(dim=-1).all() for mask in seen)
    assert not seen[0][1, 0, 9:20, :9].any()


def test_quantized_experts_of_many_tokens_are_not_captured(by_graph, monkeypatch):
    """For more than a few tokens, quantized experts ask the host where they go, so such passes are not captured."""
    mixtral = family("mgm-mixtral")
    passes = Decoder(mixtral.model).runner
    monkeypatch.setattr(passes.config, "_experts_implementation_internal", model_runner.EXPERTS_FUNCTION)
    few = passes.config.num_local_experts // passes.config.num_experts_per_tok
    for rows in (few, few + 1):
        by_graph.clear()
        sequences = passes.sequences(rows, 40)
        with torch.inference_mode():
            monkeypatch.setattr(passes, "_run", lambda sequences, embeddings: None)
            sequences.fill(None)
            if rows > few:
                assert passes.step(sequences, torch.full((rows,), 5)) is None
            assert passes.prefill(sequences, torch.zeros(rows, 20, passes.config.hidden_size)) is None
            assert not by_graph


@pytest.mark.slow
def test_more_shapes_than_torch_compiles(own, by_graph, monkeypatch, caplog):
    torch._dynamo.reset()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend="eager", **options))
    decoder = Decoder(own.model, compiled=True, kv_cache_bytes=0)
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (1, 2, 3, 4):
            ids = torch.randint(3, 400, (rows, 20), generator=torch.Generator().manual_seed(rows))
            options = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
            assert torch.equal(
                own.model.generate(**options, custom_generate=decoder.request()), own.model.generate(**options)
            )
    assert len(decoder.runner.first_use) == 2
    assert "4 sequence(s) over 32 positions: runs without torch.compile" in caplog.text


def prepared(own, rows, padded):
    """A runner and sequences that hold a prompt, ready for the next token."""
    decoder = Decoder(own.model)
    sequences = decoder.runner.sequences(rows, 40)
    mask = torch.ones(rows, 20, dtype=torch.long)
    if padded:
        mask[0, :6] = 0
    sequences.fill(mask)
    with torch.inference_mode(False), torch.no_grad():
        embeddings = own.model.get_input_embeddings()(
            torch.randint(3, 400, (rows, 20), generator=torch.Generator().manual_seed(0))
        )
        decoder.runner.prefill(sequences, embeddings)
    return decoder.runner, sequences


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,padded", [("standard", True), ("mgm-gemma", False), ("mgm-llama3", False), ("mgm-mixtral", True)]
)
def test_a_pass_is_traced_whole(name, padded, by_graph):
    """A pass is traced as one full graph, which a question to the host or a dependence on a number would break."""
    own = family(name)
    with torch.no_grad():
        passes, sequences = prepared(own, 2, padded)
        start, last = torch.tensor([sequences.cache.length]), torch.tensor([0])
        inputs = torch.tensor([[5], [6]])
        places = torch.arange(64)
        expected = passes._pass(sequences, inputs, places, start, last)
        torch._dynamo.reset()
        traced = torch.compile(passes._pass, fullgraph=True, backend="eager", dynamic=False)
        assert torch.allclose(traced(sequences, inputs, places, start, last), expected, atol=1e-5)
        # The same graph serves the next position.
        start += 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            sequences.cache.positions = None
            traced(sequences, inputs, places, start, last)
    sequences.cache.positions = None


def test_a_pass_needs_no_values(own, by_graph):
    """A pass runs on fake tensors, which have no values: asking one for a number would be an error."""
    model, mode = copy.deepcopy(own.model), FakeTensorMode()
    for part in model.modules():
        part._parameters = {
            name: None if p is None else torch.nn.Parameter(mode.from_tensor(p.detach()))
            for name, p in part._parameters.items()
        }
        part._buffers = {name: None if b is None else mode.from_tensor(b) for name, b in part._buffers.items()}
    with mode, torch.no_grad():
        passes = model_runner.ModelRunner(model)
        sequences = passes.sequences(2, 64)
        ids, places, start, last = (torch.empty(shape, dtype=torch.long) for shape in ((2, 1), (64,), (1,), (1,)))
        out = passes._pass(sequences, ids, places, start, last)
    assert out.shape == (2, 400)


def test_what_graphs_are_refused_for(own):
    passes = Decoder(own.model).runner
    assert passes.graphs_refused(512) == "the language model is not on one GPU"


def test_compiling_that_is_not_done_is_said_once(own, caplog):
    pipeline = own.pipeline(compiled=True)
    for _ in range(2):
        pipeline.chat("Hello?", max_new_tokens=2)
        pipeline.clear_kv_cache()
    assert caplog.text.count("compiled=True (--compile) has no effect: the language model is not on one GPU") == 1


def test_a_stale_number_in_the_filling_stays_out(own, by_graph):
    """NaN of an earlier request does not reach later ones, though the cache and a graph's input keep old numbers.

    A graph's input keeps numbers after the end of a shorter prompt, and the cache keeps those of a failed request.
    """
    pipeline = own.pipeline()
    good = pipeline.chat("What is it?", [own.pictures[0]], max_new_tokens=4)
    bad = pipeline.conversation()
    broken = dataclasses.replace(pipeline.vision.see(own.pictures[1]), tokens=torch.full((25, 64), torch.nan))
    bad.pictures, bad.turns = [broken], [("<image>\nWhat?", "Nothing.")]
    with pytest.raises(FloatingPointError, match="image tokens are not finite"):
        bad.chat("And now?", max_new_tokens=4)
    again = pipeline.conversation().chat("What is it?", [own.pictures[0]], max_new_tokens=4)
    assert again.token_ids == good.token_ids
    short = pipeline.conversation().chat("Hm?", max_new_tokens=4)
    assert short.token_ids == own.plain([("Hm?", None)], [], 4)
