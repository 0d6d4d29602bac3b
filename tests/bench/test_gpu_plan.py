"""What `python -m bench gpu` will do on a GPU; the folder of an earlier run is not lost or mixed with another."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from bench import records
from bench.__main__ import main
from bench.cases import all_cases
from bench.gpu import command, pytest_plugin
from bench.gpu import plan as plans
from bench.gpu.plan import ROOT, Part, Step
from bench.gpu.summary import Outcome, conclude, earlier_outcomes
from bench.issue.command import predicted_us
from bench.issue.published import published, read
from bench.issue.whole_models import read_whole
from bench.registry import OURS
from mg_fast.testing import environment
from tests.bench.documents import document, row

CASES = all_cases()


@pytest.mark.parametrize("plan", plans.PLANS.values(), ids=plans.PLANS)
def test_steps_name_cases_and_providers_that_there_are(plan):
    for step in plan("cuda"):
        assert step.into in plans.FILES and bool(step.parts) != bool(step.words)
        for part in step.parts:
            # Each pattern names some cases, and each provider is one of theirs.
            chosen = plans.cases_of(Step("one", "", 1, plans.CASES, parts=(part,)), CASES, "cuda")
            assert chosen, part
            assert all(any(provider in case.providers for case in chosen) for provider in part.providers), part
    assert len(plans.FILES) <= 8


def test_the_order_and_the_budgets():
    """The first six minutes hold everything up to and including both models, and all of it fits eight."""
    steps = plans.full_plan()
    budgets = {step.name: step.seconds for step in steps}
    expected = {"environment": 25, "smoke": 60, "patch_mining": 40, "sampling": 40, "towers": 45, "pixels": 30}
    expected |= {"kernels": 30, "decode": 60, "interleaved": 30, "tests": 120, "tuning": None}
    assert list(budgets.items()) == list(expected.items())
    through_decoding = steps[: list(budgets).index("interleaved") + 1]
    assert plans.budget(steps) <= 480 and plans.budget(through_decoding) <= 60 * plans.MINUTES == 360


def test_the_first_ten_cases_hold_both_operations_that_sample():
    ordered = [case for step in plans.full_plan() for case in plans.cases_of(step, CASES, "cuda")]
    first = {case.name: list(case.providers) for case in ordered[:10]}
    for name in ("deformable_attention/detr-encoder", "feature_sync/unet-64", "feature_sync/llm-decode-n4"):
        assert {"reference", "torch", "triton"} <= set(first[f"{name}-b1-bfloat16"])


def test_tests_of_kernels_come_by_name_and_the_published_sizes_first():
    [tests] = plans.choose_steps(plans.full_plan(), ["tests"])
    files = [word for word in tests.words if word.endswith(".py")]
    assert files[0] == "tests/ops/test_interpreted_published_sizes.py" and len(files) == len(set(files)) >= 8
    assert all((ROOT / file).exists() for file in files) and "-vv" in tests.words


def test_what_the_short_plan_holds_and_what_it_leaves_out():
    measured = {
        (case.name, provider)
        for step in plans.full_plan()
        for case in plans.cases_of(step, CASES, "cuda")
        for provider in case.providers
    }
    names = {name for name, _ in measured}
    assert {f"pixels/{setting}-b1-bfloat16" for setting in ("768", "1536-hd")} <= names
    # The strongest opponents are measured.
    compiled = "reference, channels last, compiled"
    assert ("tower/768-b1-bfloat16", compiled) in measured and ("pixels/768-b1-bfloat16", compiled) in measured
    assert ("end-to-end/7b-decode-b1-bfloat16", "auto, static cache") in measured
    assert ("clip/768-b1-bfloat16", "reference, flash attention") in measured
    assert ("end-to-end/7b-first-token-b1-bfloat16", "reference, flash attention") in measured
    # They are captured and replayed as CUDA graphs.
    for name in ("tower/768-b1-bfloat16", "pixels/768-b1-bfloat16"):
        assert CASES[name].capturable and not CASES[name].providers[compiled].own_graphs
    # These have tables of kernels.
    for name in ("pixels/768-b1-bfloat16", "end-to-end/7b-decode-b1-bfloat16"):
        assert [p for p, provider in CASES[name].providers.items() if provider.profiled is not None] == ["auto"]
    assert not [name for name in names if any(word in name for word in ("stress", "2b-", "34b", "-load-", "-ready-"))]


def test_all_that_is_predicted_is_measured():
    """One run of the plan compares every prediction of `bench issue`; no case is measured twice by one provider."""
    measured = Counter(
        (case.name, provider)
        for step in plans.full_plan()
        for part in step.parts
        for case in plans.cases_of(replace(step, parts=(part,)), CASES, "cuda")
        for provider in case.providers
        if provider != case.baseline or part.baseline is not None
    )
    predicted = [tuple(row) for row in predicted_us(read(), read_whole())]
    assert len(predicted) > 50 and set(published()) <= {name for name, _ in predicted}
    assert [row for row in predicted if row not in measured] == []
    assert [row for row in predicted if measured[row] > 1] == []


def test_our_own_providers_are_told_from_opponents():
    """Every provider is a plain form of ours, or named after what it is a variant of."""
    plain = {name for case in CASES.values() for name in case.providers if ", " not in name}
    assert plain == {"reference", *OURS}


def test_dry_run(capsys):
    assert main(["gpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for step in plans.full_plan():
        assert f"{step.name:<12} {'the rest' if step.seconds is None else f'{step.seconds:>4.0f} s'}" in out
    assert "480 s of work in all; this call takes 360 s" in out and "At most 7 files" in out
    assert "in a later call" in out.split("tests")[1]
    assert main(["gpu", "--dry-run", "--steps", "patch_mining", "t*", "--minutes", "2"]) == 0
    out = capsys.readouterr().out
    assert "bench step patch_mining" in out and "bench step towers" in out and "pixels" not in out
    assert "this call takes 120 s" in out


def test_a_step_that_there_is_not(capsys):
    assert main(["gpu", "--dry-run", "--steps", "patch_mining", "minning"]) == 2
    assert capsys.readouterr().err == (
        "bench: no step is called 'minning': "
        "expected one or more of environment, smoke, patch_mining, sampling, towers, pixels, kernels, decode, "
        "interleaved, tests, tuning\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_input_is_one_line(capsys, tmp_path):
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    out = capsys.readouterr()
    assert "a GPU was asked for" in out.err and out.err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert main(["gpu"]) == 2
    assert "expected --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize("name", [plans.SUMMARY, plans.CASES, plans.TUNING])
def test_what_an_earlier_run_left_is_not_replaced(name, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("somebody's")
    (tmp_path / name).write_text("measured for minutes")
    assert main(["gpu", "--out", str(tmp_path), "--device", "cpu", "--plan", "tiny"]) == 2
    out = capsys.readouterr()
    assert f"holds {name} of an earlier run: expected a new folder, or --resume" in out.err
    assert out.err.count("\n") == 1 and not out.out
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "notes.txt": "somebody's",
        name: "measured for minutes",
    }


def test_a_file_is_no_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["gpu", "--out", str(tmp_path / "file"), "--device", "cpu", "--plan", "tiny"]) == 2
    out = capsys.readouterr()
    assert "expected a folder to write to" in out.err and out.err.count("\n") == 1


@pytest.mark.parametrize(
    "content", [None, "# One run on a GPU\n", "<!-- steps\n{\n-->", '<!-- steps\n[{"speed": 1}]\n-->']
)
def test_nothing_to_resume(content, capsys, tmp_path):
    if content is not None:
        (tmp_path / plans.SUMMARY).write_text(content)
    assert main(["gpu", "--resume", str(tmp_path), "--device", "cpu", "--plan", "tiny"]) == 2
    out = capsys.readouterr()
    assert "earlier `bench gpu`" in out.err and out.err.count("\n") == 1


def test_figures_of_another_commit_are_not_added_to(capsys, tmp_path):
    conclude(tmp_path, [Outcome("environment", "done", 0)])
    records.write(
        tmp_path / plans.ENVIRONMENT,
        {**environment.environment(), "device": "cpu", "cases": [], "ceilings": {}} | {"commit": "before"},
    )
    assert main(["gpu", "--resume", str(tmp_path), "--device", "cpu", "--plan", "tiny"]) == 2
    assert (
        "cannot be resumed, since its figures would not belong together with new ones: commit before there"
        in capsys.readouterr().err
    )


def test_the_summary_holds_the_steps(tmp_path):
    outcomes = [
        Outcome("patch_mining", "stopped", -9, 50.1),
        Outcome("tests", "skipped"),
    ]
    conclude(tmp_path, outcomes)
    assert earlier_outcomes(tmp_path) == outcomes
    # A run that reaches one of them leaves the other as it was.
    conclude(tmp_path, [Outcome("tests", "done", 0)], earlier_outcomes(tmp_path))
    assert [(outcome.name, outcome.state) for outcome in earlier_outcomes(tmp_path)] == [
        ("patch_mining", "stopped"),
        ("tests", "done"),
    ]


def test_what_a_summary_shows(tmp_path):
    kernels = {
        "wall_us": 3000.0,
        "busy_us": 2500.0,
        "launches": 2.0,
        "kernels": [{"name": "dwconv_norm_fwd_kernel", "launches": 2.0, "us": 2500.0}],
    }
    clocks = {
        "sm_mhz": [1700.0, 1755.0, 1980.0],
        "memory_mhz": 3201.0,
        "power_w": 690.0,
        "temperature_c": 55.0,
        "readings": 9,
    }
    rows = [
        row("pixels/768-b1-bfloat16", "reference", equal_bits=True, clocks=clocks),
        row("pixels/768-b1-bfloat16", "auto", median_ms=3.1, speedup=3.2, equal_bits=False, kernels=kernels),
        row("pixels/768-b1-bfloat16", "triton", False, "wrong result: 1 > 0", None, None, None),
    ]
    records.write(tmp_path / plans.CASES, document(rows, "cuda", clocks_under_load=clocks))
    (tmp_path / plans.CORRECTNESS).write_text("dwconv_norm, bfloat16: right (0.1 s)\n")
    conclude(tmp_path, [Outcome("pixels", "failed", 1, 30.0)])
    text = (tmp_path / plans.SUMMARY).read_text()
    for shown in (
        "- gpu: NVIDIA H200",
        "run at 1700 to 1980 MHz (median 1755), at up to 690 W",
        "| pixels | failed, exit status 1 (30 s) |",
        "dwconv_norm, bfloat16: right",
        "| pixels/768-b1-bfloat16 | triton | FAIL |",
        "- pixels/768-b1-bfloat16, triton: wrong result: 1 > 0",
        "### Kernels of pixels/768-b1-bfloat16, auto",
        "One call takes 3000 us on the device, and has 2 launches, which take 2500 us together.",
        "| dwconv_norm_fwd_kernel | 2 | 2500.0 | 100.0% |",
    ):
        assert shown in text, shown
    assert "| 1755 | yes |" in text and "| NO |" in text


def test_what_is_left_of_cases_that_were_begun():
    case = CASES["patch_mining/768-b1-bfloat16"].only(["torch", "triton"])

    def left(*rows):
        return [list(case.providers) for case in plans.remaining([case], rows)]

    done, wrong = row(case.name, "reference"), row(case.name, "reference", False, "it did not come back", None)
    assert left() == [["reference", "torch", "triton"]]
    # The baseline is measured again, for the ratio.
    assert left(done, row(case.name, "torch")) == [["reference", "triton"]]
    # One that failed is not tried again.
    assert left(wrong) == [["torch", "triton"]]
    assert left(wrong, row(case.name, "torch"), row(case.name, "triton", None, "not here", None)) == []


def test_the_exit_status():
    steps = [
        Step("patch_mining", "", 1, plans.CASES, parts=(Part(("patch_mining",), ("triton",)),)),
        Step("tests", "", 1, plans.CORRECTNESS, ("pytest",)),
    ]

    def status(*states):
        return command.verdict(steps, [Outcome(step.name, state) for step, state in zip(steps, states)])

    assert status("done", "done") == status("stopped", "done") == status("done, with failures", "done") == 0
    # What is wrong is a failure, and so are kernels that were not found right.
    assert status("failed", "done") == status("done", "failed") == 1
    assert status("done", "stopped") == status("done", "skipped") == 1


def test_results_are_kept_by_device_and_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    folder = tmp_path / "run"
    records.write(
        folder / plans.CASES,
        document([row("patch_mining/768-b1-bfloat16", "reference"), row("dwconv_norm/x", "triton")], "cuda"),
    )
    records.write(folder / plans.END_TO_END, document([row("end-to-end/7b-decode-b1-bfloat16", "auto")], "cuda"))
    (folder / plans.SUMMARY).write_text("# One run on a GPU")
    assert main(["keep", str(folder)]) == 0
    kept = sorted(path.name for path in (tmp_path / "results" / "nvidia-h200").iterdir())
    assert kept == [
        "2026-11-22-summary.md",
        "dwconv_norm-x.json",
        "end-to-end-7b-decode-b1-bfloat16.json",
        "patch_mining-768-b1-bfloat16.json",
    ]
    assert main(["keep", str(tmp_path / "results")]) == 2
    assert "holds no cases" in capsys.readouterr().err


def test_the_commit_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("MG_FAST_COMMIT", "0123456789ab-dirty")
    monkeypatch.setattr(environment, "_command", lambda *words: None)
    assert environment.environment()["commit"] == "0123456789ab-dirty"


def test_no_step_times_what_the_host_does():
    """Pillow on a camera's picture takes longer than all kernels together."""
    cases = [case for step in plans.full_plan() for case in plans.cases_of(step, CASES, "cuda")]
    assert {name for case in cases if case.group == "dual_resize" for name in case.providers} == {"torch", "triton"}
    assert not [case.name for case in cases if case.group == "picture"]
    # Plain PyTorch copies the tables of a resize from the host, which cannot be captured.
    assert not [case.name for case in cases if case.group == "decoded" and case.capturable]


VERBOSE = """
tests/a.py::test_one PASSED                                              [ 33%]
tests/a.py::test_two[x y-1] PASSED [ 66%]
tests/a.py::test_three FAILED                                            [100%]
[gw0] [ 12%] PASSED tests/b.py::test_one[a - b]
[gw13] [100%] FAILED tests/b.py::test_two
[gw1] [ 50%] SKIPPED tests/b.py::test_three
"""


def test_tests_that_passed_are_told_from_verbose_output():
    assert pytest_plugin.passed(VERBOSE) == {
        "tests/a.py::test_one",
        "tests/a.py::test_two[x y-1]",
        "tests/b.py::test_one[a - b]",
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "a worker"])
def test_tests_that_passed_are_not_run_again(workers, tmp_path, monkeypatch):
    code = "import pytest\n@pytest.mark.parametrize('i', [1, 2, 3])\ndef test_it(i): assert i != 2\n"
    (tmp_path / "test_it.py").write_text(code)
    output = tmp_path / "correctness.txt"
    monkeypatch.setenv("MG_FAST_PASSED_BEFORE", str(output))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["-v", "-p", "bench.gpu.pytest_plugin", "-p", "no:cacheprovider", *workers, "test_it.py"]

    def run():
        done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True)
        output.write_text((output.read_text() if output.exists() else "") + done.stdout)
        return done

    assert run().returncode == 1
    (tmp_path / "test_it.py").write_text(code.replace("assert i != 2", "pass"))
    again = run()
    assert again.returncode == 0 and "2 tests passed in an earlier run and are left out" in again.stdout
    assert "1 passed" in again.stdout
    assert run().returncode == 0, "where none is left, all have passed"
    assert pytest_plugin.passed(output.read_text()) == {f"test_it.py::test_it[{i}]" for i in (1, 2, 3)}


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_the_others_tests_run(tmp_path, monkeypatch):
    """A worker dies where a test hangs or breaks the GPU's context. Some tests have passed before."""
    code = "import os, pytest\n@pytest.mark.parametrize('i', range(12))\ndef test_it(i):\n    if i == 5: os._exit(1)\n"
    (tmp_path / "test_it.py").write_text(code)
    before = tmp_path / "before.txt"
    before.write_text("[gw0] [ 10%] PASSED test_it.py::test_it[1]\n[gw0] [ 20%] PASSED test_it.py::test_it[2]\n")
    monkeypatch.setenv("MG_FAST_PASSED_BEFORE", str(before))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["-v", "-p", "bench.gpu.pytest_plugin", "-p", "no:cacheprovider", "-n", "2", "--dist", "load", "test_it.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True)
    expected = {f"test_it.py::test_it[{i}]" for i in range(12)} - {f"test_it.py::test_it[{i}]" for i in (1, 2, 5)}
    assert pytest_plugin.passed(done.stdout) == expected and "1 failed, 9 passed" in done.stdout


def test_a_worker_ends_after_a_test_that_broke_the_context(monkeypatch):
    ended = []
    monkeypatch.setattr(pytest_plugin.os, "_exit", ended.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    pytest_plugin.pytest_runtest_logfinish("a test", None)
    assert ended == []

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    pytest_plugin.pytest_runtest_logfinish("a test", None)
    assert ended == [70]
