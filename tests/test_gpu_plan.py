"""`python -m bench gpu` without a GPU: the plan names what there is, and a step that hangs or crashes loses nothing of the others."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, records
from bench.__main__ import _parser, main
from bench.cases import all_cases
from bench.gpu import Step
from bench.registry import choose, choose_providers

ROW = {"provider": "reference", "ok": True, "why": None, "p20_ms": 1, "p80_ms": 1, "peak_mib": 0, "first_call_ms": 2, "speedup": 1.0}
DOCUMENT = dict.fromkeys(("gpu", "date", "cpu", "threads", "torch", "commit")) | {"device": "cpu", "complete": True}

MODULES = {
    # writes a case at once, then hangs, and will not be interrupted; so does what it has started
    "hang": """
import json, os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"])
if "--out" in sys.argv:
    document = json.loads(os.environ["DOCUMENT"])
    open(sys.argv[-1], "w").write(json.dumps(document))
print("hangs", child.pid, flush=True)
time.sleep(600)
""",
    "crash": "import os, sys; print('crashes', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)",
    "write": "import os, sys; open(sys.argv[-1], 'w').write(os.environ['DOCUMENT'])",
    # as `bench run` where a provider failed
    "fail": "import os, sys; open(sys.argv[-1], 'w').write(os.environ['DOCUMENT']); sys.exit(1)",
    "say": "print('x' * 100)",
}


@pytest.fixture
def modules(tmp_path):
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, code in MODULES.items():
        (folder / f"{name}_step.py").write_text(code)
    return folder


@pytest.fixture
def step(modules):
    def make(name, module, seconds, into, *cases):
        rows = [case if isinstance(case, dict) else ROW | {"name": case[0], "median_ms": case[1]} for case in cases]
        document = json.dumps(DOCUMENT | {"cases": rows})
        return Step(name, (f"{module}_step",), seconds, into, {"PYTHONPATH": str(modules), "DOCUMENT": document})

    return make


@pytest.fixture
def ended_by_a_signal():
    """The command takes over what ends a process; the tests have it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def commands(steps, program):
    parser = _parser()
    return [(step, parser.parse_args(step.words[1:])) for step in steps if step.words[:2] == ("bench", program)]


@pytest.mark.parametrize("plan", [gpu.full_plan(), gpu.tiny_plan()], ids=["full", "tiny"])
def test_steps_name_cases_and_providers_that_there_are(plan):
    cases = all_cases()
    found = commands(plan, "run")
    assert found
    for step, args in found:
        chosen = choose(cases, args.cases, args.device)
        assert args.provider, step.name
        # each pattern names some
        kept = choose_providers(chosen, args.provider)
        # more than the baselines, which are there in any case
        assert any(len(case.providers) > 1 for case in kept) or all([*case.providers] == ["auto"] for case in kept), step.name
    assert {step.into for step in plan} <= set(gpu.FILES)


def test_a_slow_case_is_a_process_of_its_own():
    """Where a provider takes minutes to compile, a step that is stopped loses no other case."""
    steps = [(step, args) for step, args in commands(gpu.full_plan(), "run") if any("max-autotune" in name for name in args.provider)]
    assert len(steps) == 2
    assert all(len(choose(all_cases(), args.cases, "cuda")) == 1 for _, args in steps)


def test_our_own_providers_are_told_from_opponents():
    """Every provider is a plain form of ours, or named after what it is a variant of."""
    plain = {name for case in all_cases().values() for name in case.providers if ", " not in name}
    assert plain == {"reference", *gpu.OURS}


def test_a_checkpoint_is_written_last():
    """Cases that write gigabytes come after everything else, and by name only."""
    loading = [step.name for step, args in commands(gpu.full_plan(), "run") for p in args.cases if "load" in p or "ready" in p]
    assert set(loading) == {gpu.full_plan()[-1].name}
    for step, args in commands(gpu.full_plan()[:-1], "run"):
        assert all(case.devices for case in choose(all_cases(), args.cases, "cuda")), step.name


def test_most_important_first_within_nine_minutes():
    names = [step.name for step in gpu.full_plan()]
    assert names[:3] == ["environment and ceilings", "kernels are right", "mining, one picture"]
    # where every step takes all its time, there is still some for the end to end
    before = gpu.full_plan()[: names.index("end to end, 7B") + 1]
    assert sum(step.seconds for step in before) <= 9 * 60 - gpu.RESERVE


def test_dry_run(capsys):
    assert main(["gpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(step.name in out for step in gpu.full_plan()) and "540 s in all, in at most 8 files" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_input_is_one_line(capsys, tmp_path):
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    out = capsys.readouterr()
    assert "a GPU was asked for" in out.err and out.err.count("\n") == 1 and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["gpu"])
    assert "expected --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize("name", [gpu.STEPS, gpu.CASES, gpu.TUNING])
def test_what_an_earlier_run_left_is_not_replaced(name, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("somebody's")
    (tmp_path / name).write_text("measured for minutes")
    assert main(["gpu", "--out", str(tmp_path), "--device", "cpu", "--plan", "tiny"]) == 2
    out = capsys.readouterr()
    assert f"holds {name} of an earlier run" in out.err and out.err.count("\n") == 1 and not out.out
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"notes.txt": "somebody's", name: "measured for minutes"}


def test_a_file_is_no_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["gpu", "--out", str(tmp_path / "file"), "--device", "cpu", "--plan", "tiny"]) == 2
    out = capsys.readouterr()
    assert "expected a folder to write to" in out.err and out.err.count("\n") == 1


def failed(provider, **other):
    return ROW | {"name": "a/x", "provider": provider, "median_ms": None, "ok": False, "why": "out of memory"} | other


@pytest.mark.parametrize(
    ("module", "rows", "state", "status"),
    [
        ("fail", [("a/x", 1.0), failed("reference, compiled")], "done, with failures", 0),
        ("fail", [failed("reference"), failed("torch, compiled max-autotune")], "done, with failures", 0),
        ("fail", [("a/x", 1.0), failed("triton")], "failed", 1),
        # nothing of what is kept explains the status
        ("fail", [("a/x", 1.0)], "failed", 1),
        ("crash", [failed("reference, compiled")], "failed", 1),
        ("write", [("a/x", 1.0)], "done", 0),
        # what is slow is no fault of ours
        ("hang", [("a/x", 1.0)], "stopped", 0),
    ],
)
def test_what_fails_the_whole(module, rows, state, status, step, tmp_path, monkeypatch, ended_by_a_signal):
    monkeypatch.setitem(gpu.PLANS, "tiny", lambda device: [step("the step", module, 1 if module == "hang" else 60, gpu.CASES, *rows)])
    assert gpu.gpu(tmp_path / "out", 2, device="cpu", plan="tiny") == status
    assert [entry["state"] for entry in json.loads((tmp_path / "out" / gpu.STEPS).read_text())] == [state]
    assert f"| the step | {state}" in (tmp_path / "out" / gpu.SUMMARY).read_text()


@pytest.mark.parametrize(("module", "seconds"), [("crash", 60), ("hang", 1)])
def test_kernels_that_were_not_found_right_fail_the_whole(module, seconds, step, tmp_path, monkeypatch, ended_by_a_signal):
    monkeypatch.setitem(gpu.PLANS, "tiny", lambda device: [step("the kernels", module, seconds, gpu.CORRECTNESS)])
    assert gpu.gpu(tmp_path / "out", 2, device="cpu", plan="tiny") == 1


def assert_kept_within_limits(out: Path):
    files = list(out.iterdir())
    assert len(files) <= 8 and all(path.is_file() for path in files)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) and path.stat().st_size < 2**24 for path in files)


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            # what was killed and not waited for is still listed
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_step_that_hangs_or_crashes_loses_nothing(step, tmp_path):
    out = tmp_path / "out"
    steps = [
        step("first", "write", 60, gpu.CASES, ("a/x", 1.0)),
        step("hangs", "hang", 3, gpu.CASES, ("b/x", 2.0)),
        step("hangs in a text", "hang", 3, gpu.TUNING),
        step("crashes", "crash", 60, gpu.CASES),
        step("last", "write", 60, gpu.CASES, ("a/x", 9.0), ("c/x", 3.0)),
    ]
    outcomes = gpu.run_plan(steps, out, 120, poll=0.1, grace=0.3)
    assert [(o.state, o.status) for o in outcomes] == [("done", 0), ("stopped", -9), ("stopped", -9), ("failed", -11), ("done", 0)]
    # the first time that a provider of a case was given stands
    rows = records.read(out / gpu.CASES)["cases"]
    assert {row["name"]: row["median_ms"] for row in rows} == {"a/x": 1.0, "b/x": 2.0, "c/x": 3.0}
    text = (out / gpu.TUNING).read_text()
    assert "hangs" in text and gone(int(text.split()[-1])), "what a step has started goes with it"
    assert "crashes" in (out / gpu.LOG).read_text()
    summary = (out / gpu.SUMMARY).read_text()
    assert "| hangs | stopped by its limit" in summary and "| crashes | failed, exit status -11" in summary and "| b/x |" in summary
    assert [entry["state"] for entry in json.loads((out / gpu.STEPS).read_text())] == [o.state for o in outcomes]
    assert_kept_within_limits(out)


def test_no_time_left(step, tmp_path):
    steps = [step("hangs", "hang", 60, gpu.TUNING), step("later", "write", 60, gpu.CASES, ("a/x", 1.0))]
    # a limit of two seconds after the reserve would be below a fifth of the first
    outcomes = gpu.run_plan([Step(**vars(steps[0]) | {"seconds": 2}), steps[1]], tmp_path / "out", gpu.RESERVE + 4, poll=0.1, grace=0.1)
    assert [o.state for o in outcomes] == ["stopped", "skipped"]
    assert "skipped, no time was left" in (tmp_path / "out" / gpu.SUMMARY).read_text()


def test_an_interrupt_keeps_what_there_is(step, tmp_path, monkeypatch):
    out, wait, count = tmp_path / "out", gpu._wait, []

    def interrupted(process, seconds):
        count.append(1)
        if (out / gpu.CASES).exists():
            raise KeyboardInterrupt
        return wait(process, seconds)

    monkeypatch.setattr(gpu, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_plan([step("hangs", "hang", 60, gpu.CASES, ("b/x", 2.0)), step("later", "say", 60, gpu.TUNING)], out, 120, poll=0.1)
    assert [row["name"] for row in records.read(out / gpu.CASES)["cases"]] == ["b/x"]
    assert [entry["state"] for entry in json.loads((out / gpu.STEPS).read_text())] == ["interrupted"]


def test_a_text_is_kept_by_its_end(step, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "MOST_CHARACTERS", 150)
    gpu.run_plan([step(str(i), "say", 60, gpu.TUNING) for i in range(3)], tmp_path / "out", 300, poll=0.1)
    text = (tmp_path / "out" / gpu.TUNING).read_text()
    assert text.startswith("[...]\n") and text.endswith("x" * 100 + "\n") and len(text) == 156


def test_the_whole_on_a_cpu(step, tmp_path):
    """Every kind of step really runs, and one that crashes and one that hangs lie between them."""
    tiny = gpu.tiny_plan()
    steps = [*tiny[:2], step("crashes", "crash", 60, gpu.CASES), step("hangs", "hang", 2, gpu.TUNING), *tiny[2:]]
    # of the limits, which are for a machine that does nothing else
    steps = [Step(**vars(one) | {"seconds": 4 * one.seconds if one.name != "hangs" else 2}) for one in steps]
    out = tmp_path / "out"
    outcomes = gpu.run_plan(steps, out, 1200, poll=0.2, grace=0.2)
    assert [o.state for o in outcomes] == ["done", "done", "failed", "stopped", "done", "done"], (out / gpu.LOG).read_text()[-3000:]
    assert records.read(out / gpu.ENVIRONMENT)["ceilings"]["copy_gbps"] > 0
    assert "1 passed" in (out / gpu.CORRECTNESS).read_text()
    for name, case in ((gpu.CASES, "dwconv_norm/768-stage3-b1-float32"), (gpu.END_TO_END, "end-to-end/tiny-first-token-b1-float32")):
        assert all(row["ok"] and row["name"] == case and row["median_ms"] > 0 for row in records.read(out / name)["cases"])
        assert case in (out / gpu.SUMMARY).read_text()
    assert_kept_within_limits(out)
