"""The benchmark's end-to-end cases at toy size: what is measured and checked; one model serves all cases of a size."""

import copy
import math
import weakref

import pytest
import torch
from PIL import Image

from bench import ceilings as machine
from bench import measure, run
from bench.cases import all_cases, arrivals, end_to_end, exact_logits, random_models, sessions
from bench.registry import Ceilings, NotHere, Provider
from mg_fast import use_backend
from mg_fast.models.mini_gemini import seeing
from tests.paths import OWN_GOLDEN

# The model is so small that it is slower on two threads.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
TINY = next(size for size in random_models.SIZES if size.size == "tiny")
CEILINGS = Ceilings(1.0, {})
MINING = "patch_mining/768-b1-float32"
STAGES = ("preprocess", "LR tower", "HR tower", "patch info mining", "projector")


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small picture, and few short answers."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (sessions, end_to_end):
            patched.setattr(module, "picture", lambda: Image.open(OWN_GOLDEN / "photo.png").convert("RGB"))
        patched.setattr(sessions, "ANSWER", 6)
        patched.setattr(end_to_end, "SERVED", 1)
        yield


@pytest.fixture(scope="module")
def shared(small):
    yield sessions.session(TINY, "cpu")
    sessions.release()


def rows(case):
    options = run.RunOptions(seconds=0, memory=False)
    return {row["provider"]: row for row in run.run_case(case, "cpu", CEILINGS, options)}


def tiny(measure_name, patterns=("*",)):
    return all_cases()[f"end-to-end/tiny-{measure_name}-float32"].only(patterns)


def exact(shared, count):
    return exact_logits.exact_logits(shared, count, end_to_end._prompt(shared))


def test_first_token(shared):
    found = rows(tiny("first-token-b1"))
    for provider in ("reference", "auto"):
        row = found[provider]
        assert row["ok"] is True and row["median_ms"] > 0 and row["relative_error"] < 1e-5
        assert [stage["name"] for stage in row["stages"]] == [*STAGES, "prefill to first token"]
    assert found["auto, static cache"]["why"] == "not here: a decode step is compiled on GPUs only"


def test_decode_counts_tokens_of_all_sequences(shared):
    row = rows(tiny("decode-b8", ["auto"]))["auto"]
    assert row["ok"] is True
    assert row["tokens_per_s"] == pytest.approx(8e3 / row["median_ms"])


@pytest.mark.parametrize("case", ["second-turn-b1", "arrivals80-b1"])
def test_other_measures(shared, case):
    for row in rows(tiny(case, ["auto"])).values():
        assert row["ok"] is True and row["median_ms"] > 0
        if case == "arrivals80-b1":
            assert row["p99_ms"] >= row["p80_ms"] >= row["median_ms"]


def test_loading():
    for case in ("load-b1", "ready-b1"):
        [row] = rows(tiny(case)).values()
        # There is nothing to hold it against, so that it is neither right nor wrong.
        assert (row["provider"], row["ok"], row["why"]) == ("auto", None, None)
        assert row["median_ms"] > 0
    sessions.release()


def test_a_checkpoint_is_drawn_on_the_device_and_not_kept(monkeypatch):
    """Beside the model that is loaded from it there is no second one."""
    made, make_model = [], sessions.make_model

    def make(size, device):
        model = make_model(size, "cpu")
        made.append((device, weakref.ref(model)))
        return model

    monkeypatch.setattr(sessions, "make_model", make)
    folder, _ = sessions.checkpoint(TINY, "cuda")
    [(device, model)] = made
    assert device == "cuda" and model() is None and (folder / "config.json").exists()
    sessions.release()


def test_memory_is_that_without_graphs(shared):
    """A replay allocates nothing. A provider that replays a graph has a build without it, which computes the same."""
    for case in all_cases().values():
        if case.name.startswith("end-to-end/") and "load" not in case.name and "ready" not in case.name:
            for name, provider in case.providers.items():
                assert provider.own_graphs is not name.startswith("reference")
                assert (provider.without_graphs is not None) is (provider.own_graphs and name != "auto, compiled")
    auto = tiny("first-token-b1").providers["auto"]
    before = shared.pipeline("auto")
    encoder = before.vision.encoder
    logits, _ = auto.without_graphs(shared)()
    torch.testing.assert_close(logits, auto(shared)()[0], rtol=0, atol=0)
    assert shared.pipeline("auto") is before and (encoder is None or before.vision.encoder is encoder)


def test_the_encoder_of_the_memory_figure_has_no_graphs(shared, monkeypatch):
    shared.pipelines.clear()
    asked, make = [], seeing.PictureEncoder
    monkeypatch.setattr(
        seeing, "PictureEncoder", lambda model, **options: asked.append(options) or make(model, **options)
    )
    tiny("first-token-b1").providers["auto"].without_graphs(shared)()
    assert asked == [{"graphs": False}]


def test_wrong_logits_are_no_speedup(shared, monkeypatch):
    """A provider whose weights differ a little is refused before anything is timed."""
    pipeline = shared.pipeline("auto")
    head = shared.model.lm_head.weight

    def perturbed(session, pipeline):
        call = end_to_end._first_token(session, pipeline)

        def wrong():
            kept = head.data
            head.data = kept * (1 + 1e-3 * torch.randn(kept.shape[0], 1))
            try:
                return call()
            finally:
                head.data = kept

        return wrong

    case = tiny("first-token-b1", ["auto"])
    case.providers["auto"] = Provider(lambda session: perturbed(session, pipeline))
    row = rows(case)["auto"]
    assert row["ok"] is False and "wrong result" in row["why"] and row["median_ms"] is None


def test_static_cache_gives_the_same_logits(shared):
    """It is not compiled, as on a CPU."""
    inputs = shared, shared.pipeline("auto")
    plain, _ = end_to_end._decoding(2, *inputs)()
    static, [ms] = end_to_end._decoding(2, *inputs, cache_implementation="static")()
    torch.testing.assert_close(static, plain, rtol=0, atol=1e-4)
    assert ms > 0


def test_exact_logits_leave_the_weights_as_they_were(shared):
    before = {name: (p.data_ptr(), p.dtype) for name, p in shared.model.named_parameters()}
    logits = exact(shared, 3)
    assert logits.shape == (3, 400) and logits.dtype == torch.float64 and logits.isfinite().all()
    assert {name: (p.data_ptr(), p.dtype) for name, p in shared.model.named_parameters()} == before
    assert not any(isinstance(part, exact_logits.WidenedPart) for part in shared.model.modules())


def test_exact_logits_are_those_of_a_model_in_the_wider_dtype(shared):
    """Converting one part at a time changes nothing: the whole model in float64 has the same logits."""
    wide = copy.deepcopy(shared.model).double()
    ids, marks = shared.processor.encode(end_to_end._prompt(shared))
    pixels = {name: value.double() for name, value in shared.processor.image_processor(shared.photo).items()}
    inputs = {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([marks])}
    with use_backend("reference"), torch.no_grad():
        expected = wide(**inputs, **pixels, logits_to_keep=1).logits[0]
    torch.testing.assert_close(exact(shared, 1), expected, rtol=1e-9, atol=1e-9)


def test_quantized_weights_are_held_against_their_own_values(small):
    """Rounding is not an error of the decode loop: the exact logits are those of the rounded weights."""
    size = random_models.Size("tiny", False, "bfloat16", (), "int8")
    assert size.name == "tiny-int8"
    quantized = sessions.make_session(size, "cpu")
    before = [(name, id(parameter)) for name, parameter in quantized.model.named_parameters()]
    rounded = exact(quantized, 2)
    assert [(name, id(parameter)) for name, parameter in quantized.model.named_parameters()] == before
    assert rounded.dtype == torch.float32 and quantized.pipeline("auto").weights.formats == ("int8",)
    plain = exact(sessions.make_session(random_models.Size("tiny", False, "bfloat16", ()), "cpu"), 2)
    case = next(case for case in end_to_end.cases_of(size) if "decode-b1" in case.name)
    logits, _ = case.providers["auto"](quantized)()
    # How much nearer they are depends on the random weights, because the rounding of bfloat16 is about as large as that
    # of the weights. Other releases of transformers draw other weights.
    assert (logits[:2] - rounded).norm() < (logits[:2] - plain).norm()


def test_one_model_for_a_size(shared):
    cases = [
        case for case in all_cases().values() if case.name.startswith("end-to-end/tiny-") and "load" not in case.name
    ]
    made = [case.make("cpu") for case in cases if "ready" not in case.name]
    assert len(made) == 8 and all(one is made[0] for one in made)


def test_release_follows_the_last_case_of_a_run(monkeypatch):
    freed = []
    monkeypatch.setattr(end_to_end, "release", lambda: freed.append(1))
    monkeypatch.setattr(machine, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(run, "run_case", lambda case, *args, **options: freed.append(case.name) or [])
    monkeypatch.setattr(run, "format_rows", lambda rows: "")
    cases = all_cases()
    first, second, other = names = [f"end-to-end/tiny-decode-b{batch}-float32" for batch in (1, 8)] + [MINING]
    run.run([cases[name] for name in names], "cpu")
    assert freed == [first, second, 1, other]


def test_published_sizes_are_for_gpus():
    cases = all_cases()
    for size in ("2b", "7b", "13b", "34b"):
        for batch in (1, 8, 32):
            assert cases[f"end-to-end/{size}-decode-b{batch}-bfloat16"].devices == ("cuda",)
        assert cases[f"end-to-end/{size}-load-b1-bfloat16"].devices == ()
    assert cases["end-to-end/demo-first-token-b1-float32"].devices == ("cpu",)
    assert "end-to-end/7b-hd-first-token-b1-bfloat16" in cases


def test_a_static_cache_is_not_here_on_a_cpu(shared):
    with pytest.raises(NotHere):
        end_to_end._by(end_to_end._first_token, "auto", cache_implementation="static")(shared)


# The queue.


def test_an_idle_queue_waits_for_nothing():
    assert arrivals.first_tokens([(0.1, 0.5)], per_second=1e-6, count=50) == pytest.approx([0.1] * 50)


def test_a_queue_is_that_of_the_formula():
    """With a constant service time the mean wait of an M/D/1 queue is rho s / (2 (1 - rho))."""
    s, rho = 0.5, 0.8
    waits = [t - 0.1 for t in arrivals.first_tokens([(0.1, s)], rho / s, 200_000)]
    assert math.isclose(sum(waits) / len(waits), rho * s / (2 * (1 - rho)), rel_tol=0.1)


def test_arrivals_are_the_same_for_all():
    assert arrivals.first_tokens([(0.1, 0.5)], 1.0, 20) == arrivals.first_tokens([(0.1, 0.5)], 1.0, 20)
    assert min(arrivals.first_tokens([(0.1, 2.0)], 1.0, 200)[-20:]) > 10, (
        "requests pile up where more come than can be served"
    )


def test_clocked_calls_give_their_own_times():
    """The ratio of a turn is the ratio of its medians, and every sample counts."""
    calls = {"reference": lambda: (None, [2.0, 9.0, 3.0]), "ours": lambda: (None, [1.0])}
    options = {"least_turns": 3, "most_turns": 3, "clocked": True, "others": lambda: 0.0}
    timings = measure.time_in_turns(calls, "reference", 0.0, **options)
    assert timings["ours"].ratios == [3.0] * 3 and timings["reference"].ratios == [1.0] * 3
    assert timings["reference"].samples == [2.0, 9.0, 3.0] * 3


def test_a_size_is_freed_before_the_next_one(small):
    """Beside a model of 34B there is no room for another."""
    sessions.release()
    model = weakref.ref(sessions.session(TINY, "cpu").model)
    tiny("first-token-b1").providers["auto"](sessions.session(TINY, "cpu"))()
    assert model() is not None
    sessions.release()
    assert model() is None
