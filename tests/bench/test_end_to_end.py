"""The benchmark's end-to-end cases, at toy size: what is measured, that it is checked, and that one model serves all
cases of a size.
"""

import math
import weakref

import pytest
import torch
from PIL import Image

from bench import measure, run
from bench.cases import all_cases, end_to_end
from bench.registry import Ceilings, NotHere
from mg_fast.models.mini_gemini import seeing
from tests.paths import OWN_GOLDEN

TINY = next(size for size in end_to_end.SIZES if size.size == "tiny")
CEILINGS = Ceilings(1.0, {})


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small picture, short answers, few of them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(end_to_end, "picture", lambda: Image.open(OWN_GOLDEN / "photo.png").convert("RGB"))
        patched.setattr(end_to_end, "ANSWER", 6)
        patched.setattr(end_to_end, "SERVED", 1)
        yield


@pytest.fixture(scope="module")
def shared(small):
    yield end_to_end.session(TINY, "cpu")
    end_to_end.release()


def rows(measure_name, seconds=0.0, patterns=("*",)):
    case = all_cases()[f"end-to-end/tiny-{measure_name}-float32"].only(patterns)
    return {row["provider"]: row for row in run.run_case(case, "cpu", CEILINGS, seconds=seconds, memory=False)}


def test_first_token(shared):
    found = rows("first-token-b1")
    for provider in ("reference", "auto"):
        row = found[provider]
        assert row["ok"] is True and row["median_ms"] > 0 and row["relative_error"] < 1e-5
        names = [stage["name"] for stage in row["stages"]]
        assert names == [
            "preprocess",
            "LR tower",
            "HR tower",
            "patch info mining",
            "projector",
            "prefill to first token",
        ]
    assert found["auto, static cache"]["why"] == "not here: a decode step is compiled on GPUs only"


def test_decode_counts_tokens_of_all_sequences(shared):
    row = rows("decode-b8", patterns=["auto"])["auto"]
    assert row["ok"] is True
    assert row["tokens_per_s"] == pytest.approx(8e3 / row["median_ms"])


@pytest.mark.parametrize("case", ["second-turn-b1", "arrivals80-b1"])
def test_other_measures(shared, case):
    for row in rows(case, patterns=["auto"]).values():
        assert row["ok"] is True and row["median_ms"] > 0
        if case == "arrivals80-b1":
            assert row["p99_ms"] >= row["p80_ms"] >= row["median_ms"]


def test_loading():
    for case in ("load-b1", "ready-b1"):
        [row] = rows(case).values()
        # there is nothing to hold it against, so that it is neither right nor wrong
        assert (row["provider"], row["ok"], row["why"]) == ("auto", None, None)
        assert row["median_ms"] > 0
    end_to_end.release()


def test_a_checkpoint_is_drawn_on_the_device_and_not_kept(monkeypatch):
    """Beside what is loaded from it there is no second model."""
    made, make_model = [], end_to_end.make_model

    def make(size, device):
        model = make_model(size, "cpu")
        made.append((device, weakref.ref(model)))
        return model

    monkeypatch.setattr(end_to_end, "make_model", make)
    folder, _ = end_to_end.checkpoint(TINY, "cuda")
    [(device, model)] = made
    assert device == "cuda" and model() is None and (folder / "config.json").exists()
    end_to_end.release()


def test_memory_is_that_without_graphs(shared):
    """A graph's memory is none that a call allocates: what replays one has a build without it, which computes the same."""
    for case in all_cases().values():
        if case.name.startswith("end-to-end/") and "load" not in case.name and "ready" not in case.name:
            assert case.own_graphs == {name for name in case.providers if not name.startswith("reference")}
            assert case.memory.keys() == case.own_graphs - {"auto, compiled"}
    case = all_cases()["end-to-end/tiny-first-token-b1-float32"]
    before = shared.pipeline("auto")
    encoder = before.vision.encoder
    logits, _ = case.memory["auto"](shared)()
    torch.testing.assert_close(logits, case.providers["auto"](shared)()[0], rtol=0, atol=0)
    assert shared.pipeline("auto") is before and (encoder is None or before.vision.encoder is encoder)


def test_the_encoder_of_the_memory_figure_has_no_graphs(shared, monkeypatch):
    shared.pipelines.clear()
    asked, make = [], seeing.PictureEncoder
    monkeypatch.setattr(
        seeing, "PictureEncoder", lambda model, **options: asked.append(options) or make(model, **options)
    )
    all_cases()["end-to-end/tiny-first-token-b1-float32"].memory["auto"](shared)()
    assert asked == [{"graphs": False}]


def test_wrong_logits_are_no_speedup(shared, monkeypatch):
    """A provider whose weights differ a little is told apart before anything is timed."""
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

    case = all_cases()["end-to-end/tiny-first-token-b1-float32"].only(["auto"])
    case.providers["auto"] = lambda session: perturbed(session, pipeline)
    found = {row["provider"]: row for row in run.run_case(case, "cpu", CEILINGS, seconds=0, memory=False)}
    assert (
        found["auto"]["ok"] is False and "wrong result" in found["auto"]["why"] and found["auto"]["median_ms"] is None
    )


def test_static_cache_gives_the_same_logits(shared):
    """Not compiled, as on a CPU."""
    inputs = shared, shared.pipeline("auto")
    plain, _ = end_to_end._decoding(2)(*inputs)()
    static, [ms] = end_to_end._decoding(2)(*inputs, cache_implementation="static")()
    torch.testing.assert_close(static, plain, rtol=0, atol=1e-4)
    assert ms > 0


def test_exact_logits_leave_the_weights_as_they_were(shared):
    before = {name: (p.data_ptr(), p.dtype) for name, p in shared.model.named_parameters()}
    exact = end_to_end.exact_logits(shared, 3)
    assert exact.shape == (3, 400) and exact.dtype == torch.float64 and exact.isfinite().all()
    assert {name: (p.data_ptr(), p.dtype) for name, p in shared.model.named_parameters()} == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in shared.model.modules())


def test_quantised_weights_are_held_against_their_own_values(small):
    """Rounding is no error of the loop's: the exact logits are those of the rounded weights."""
    size = end_to_end.Size("tiny", False, "bfloat16", (), "int8")
    assert size.name == "tiny-int8"
    quantised = end_to_end.make_session(size, "cpu")
    before = [(name, id(parameter)) for name, parameter in quantised.model.named_parameters()]
    exact = end_to_end.exact_logits(quantised, 2)
    assert [(name, id(parameter)) for name, parameter in quantised.model.named_parameters()] == before
    assert exact.dtype == torch.float32 and quantised.pipeline("auto").weights.formats == ("int8",)
    plain = end_to_end.exact_logits(end_to_end.make_session(end_to_end.Size("tiny", False, "bfloat16", ()), "cpu"), 2)
    case = next(case for case in end_to_end._of_size(size) if "decode-b1" in case.name)
    logits, _ = case.providers["auto"](quantised)()
    assert (logits[:2] - exact).norm() < 0.7 * (logits[:2] - plain).norm()


def test_one_model_for_a_size(shared):
    cases = [
        case for case in all_cases().values() if case.name.startswith("end-to-end/tiny-") and "load" not in case.name
    ]
    made = [case.make("cpu") for case in cases if "ready" not in case.name]
    assert len(made) == 8 and all(one is made[0] for one in made)


def test_release_follows_the_last_case_of_a_run(monkeypatch):
    freed = []
    monkeypatch.setattr(end_to_end, "release", lambda: freed.append(1))
    monkeypatch.setattr(measure, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(run, "run_case", lambda case, *args, **options: freed.append(case.name) or [])
    monkeypatch.setattr(run, "format_rows", lambda rows: "")
    cases = all_cases()
    run.run(
        [
            cases["end-to-end/tiny-decode-b1-float32"],
            cases["end-to-end/tiny-decode-b8-float32"],
            cases["patch_mining/768-b1-float32"],
        ],
        "cpu",
    )
    assert freed == [
        "end-to-end/tiny-decode-b1-float32",
        "end-to-end/tiny-decode-b8-float32",
        1,
        "patch_mining/768-b1-float32",
    ]


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


# the queue


def test_an_idle_queue_waits_for_nothing():
    assert end_to_end.first_tokens([(0.1, 0.5)], per_second=1e-6, count=50) == pytest.approx([0.1] * 50)


def test_a_queue_is_that_of_the_formula():
    """Constant service: the mean wait of an M/D/1 queue is rho s / (2 (1 - rho))."""
    s, rho = 0.5, 0.8
    waits = [t - 0.1 for t in end_to_end.first_tokens([(0.1, s)], rho / s, 200_000)]
    assert math.isclose(sum(waits) / len(waits), rho * s / (2 * (1 - rho)), rel_tol=0.1)


def test_arrivals_are_the_same_for_all():
    assert end_to_end.first_tokens([(0.1, 0.5)], 1.0, 20) == end_to_end.first_tokens([(0.1, 0.5)], 1.0, 20)
    assert min(end_to_end.first_tokens([(0.1, 2.0)], 1.0, 200)[-20:]) > 10, "more than can be served piles up"


def test_clocked_calls_give_their_own_times():
    """A turn's ratio is that of its medians, and every sample counts."""
    calls = {"reference": lambda: (None, [2.0, 9.0, 3.0]), "ours": lambda: (None, [1.0])}
    timings = measure.time_in_turns(
        calls, "reference", 0.0, least_turns=3, most_turns=3, clocked=True, others=lambda: 0.0
    )
    assert timings["ours"].ratios == [3.0] * 3 and timings["reference"].ratios == [1.0] * 3
    assert timings["reference"].samples == [2.0, 9.0, 3.0] * 3


def test_a_size_is_freed_before_the_next_one(small):
    """Beside a model of 34B there is no room for another."""
    end_to_end.release()
    model = weakref.ref(end_to_end.session(TINY, "cpu").model)
    all_cases()["end-to-end/tiny-first-token-b1-float32"].providers["auto"](end_to_end.session(TINY, "cpu"))()
    assert model() is not None
    end_to_end.release()
    assert model() is None
