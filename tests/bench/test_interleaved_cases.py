"""The benchmark's cases of MM-Interleaved at a tiny size: each provider gives the right numbers."""

import pytest

from bench.cases import all_cases, interleaved_sessions
from bench.check import check
from bench.registry import NotHere
from bench.rows import empty_row

pytest.importorskip("diffusers")
# The model is so small that it is slower on two threads.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module", autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interleaved_sessions, "ANSWER", 6)
        yield
    interleaved_sessions.release()


@pytest.mark.parametrize("name", ["decode-n4-b1", "prefill-n8-b1", "picture-b1", "round-b1"])
def test_every_provider_is_right(name):
    case = all_cases()[f"interleaved/tiny-{name}-float32"].only(["reference", "auto"])
    rows = {provider: empty_row(case, provider) for provider in case.providers}
    calls = check(case, case.make("cpu"), "cpu", rows)
    for provider in ("reference", "auto"):
        assert rows[provider]["ok"] is True, rows[provider]["why"]
        assert calls[provider] and rows[provider]["first_call_ms"] > 0


def test_what_runs_where():
    cases = {name: case for name, case in all_cases().items() if name.startswith("interleaved/")}
    for n in (1, 4, 8):
        assert cases[f"interleaved/13b-decode-n{n}-b1-bfloat16"].devices == ("cuda",)
        assert "auto, compiled" in cases[f"interleaved/13b-decode-n{n}-b1-bfloat16"].providers
        assert f"interleaved/13b-prefill-n{n}-b1-bfloat16" in cases
    with pytest.raises(NotHere, match="diffusers"):
        cases["interleaved/tiny-picture-b1-float32"].providers["auto"](None)
