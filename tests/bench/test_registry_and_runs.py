"""The benchmark's registry, runs and documents; the last line that the program prints is one JSON document."""

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import __main__ as program
from bench import cases as registered
from bench import ceilings as machine
from bench import check as checking
from bench import gpu_timing, measure, peaks, records
from bench.cases import all_cases
from bench.compare import compare
from bench.devices import check_device
from bench.errors import BadRecord, NoDevice, UnknownCase
from bench.registry import Case, Ceilings, Cost, NotHere, Provider, choose, choose_providers
from bench.row_table import format_rows
from bench.rows import empty_row
from bench.run import RunOptions, run, run_case
from tests.paths import ROOT

CEILINGS = Ceilings(10.0, {"float32": 0.1})
QUICK = RunOptions(seconds=0.02, memory=False)


@pytest.fixture(autouse=True, scope="module")
def short_turns():
    """Calls are repeated for 10 ms a turn; what follows from their times does not depend on it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measure, "SHORTEST_TURN_S", 0.01)
        yield


def square(name="toy/square-float32", **providers):
    """A product of matrices, done rightly and wrongly."""

    def missing(inputs):
        raise NotHere("no such library")

    def hungry(inputs):
        return lambda: torch.ones(2**48)

    def broken(inputs):
        raise ValueError("unsupported shape\nand a long story")

    every = {
        "reference": Provider(lambda x: lambda: x @ x, work=Cost(3 * 64**3, 64**2)),
        "right": Provider(lambda x: lambda: torch.mm(x, x), work=Cost(64**3, 64**2)),
        "wrong": lambda x: lambda: x @ x + 0.01,
        # By repeating itself it could be compared with the others.
        "another shape": lambda x: lambda: (x @ x)[:1],
        "not a number": lambda x: lambda: x @ x * float("nan"),
        "missing": missing,
        "hungry": hungry,
        "broken": broken,
    }
    return Case(
        name,
        lambda device: torch.randn(64, 64, generator=torch.Generator().manual_seed(0)),
        every | providers,
        lambda x: x.double() @ x.double(),
        least=Cost(2 * 64**3, 8 * 64**2, 4 * 64**2),
    )


def rows_of(case):
    return {row["provider"]: row for row in run_case(case, "cpu", CEILINGS, QUICK)}


def run_here(*cases, **options):
    return run(cases, "cpu", QUICK, ceilings=CEILINGS, **options)


@pytest.fixture(scope="module")
def document():
    """The document of one case, all of whose providers are tried."""
    return run_here(square())


def test_right_and_wrong_opponents(document):
    rows = {row["provider"]: row for row in document["cases"]}
    for name in ("reference", "right"):
        row = rows[name]
        assert row["ok"] and row["why"] is None and 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["first_call_ms"] > 0 and row["relative_error"] < 1e-6 and row["samples"] >= 2
        assert row["floor_ms"] == pytest.approx(1e3 * max(2 * 64**3 / 1e11, 12 * 64**2 / 1e10))
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"])
    reference = rows["reference"]
    assert reference["speedup"] == 1
    # The rates are those of its own work. The other's work was counted for GPUs.
    assert reference["tflops"] == pytest.approx(3 * 64**3 / reference["median_ms"] / 1e9) and reference["gbps"] > 0
    assert "tflops" not in rows["right"]
    for name in ("another shape", "not a number"):
        assert rows[name]["ok"] is False and rows[name]["relative_error"] is None
    for name in ("another shape", "not a number", "wrong"):
        assert rows[name]["why"].startswith("wrong result: ")
    assert "shapes [[1, 64]], expected [[64, 64]]" in rows["another shape"]["why"]
    assert rows["wrong"]["ok"] is False and rows["wrong"]["median_ms"] is None
    assert rows["missing"]["ok"] is None and rows["missing"]["why"] == "not here: no such library"
    assert rows["hungry"]["ok"] is False and rows["hungry"]["why"].startswith("out of memory: ")
    assert rows["broken"]["ok"] is False and rows["broken"]["why"] == "ValueError: unsupported shape"
    table = format_rows(list(rows.values()))
    assert "wrong result" in table and "FAIL" in table and "1.00x" in table


def test_without_its_baseline_nothing_is_called_faster():
    rows = rows_of(square(reference=lambda x: lambda: torch.ones(2**48)))
    assert rows["reference"]["why"].startswith("out of memory: ")
    assert rows["right"]["ok"] is None and "accuracy unknown" in rows["right"]["why"]
    assert rows["right"]["speedup"] is None and rows["right"]["median_ms"] > 0


def test_inputs_that_do_not_fit():
    case = Case("toy/large", lambda device: torch.ones(2**48), {"reference": lambda x: lambda: x}, None)
    [row] = run_case(case, "cpu", CEILINGS, QUICK)
    assert row["ok"] is False and row["why"].startswith("inputs: out of memory")


def test_a_document_grows_as_cases_end(tmp_path):
    out = tmp_path / "run.json"

    def interrupted(x):
        kept = json.loads(out.read_text())
        assert [row["name"] for row in kept["cases"]] == ["toy/first"] * 8 and kept["complete"] is False
        raise KeyboardInterrupt

    document = run_here(square("toy/first"), square("toy/second", right=interrupted), out=out)
    assert document["complete"] is False and {row["name"] for row in document["cases"]} == {"toy/first"}
    assert records.read(out) == json.loads(json.dumps(document))
    conditions = {
        "gpu",
        "driver",
        "clocks",
        "cpu",
        "threads",
        "torch",
        "triton",
        "commit",
        "device",
        "ceilings",
        "load",
    }
    assert conditions <= document.keys()
    assert not list(tmp_path.glob(".*"))


def test_saved_by_device_and_case(tmp_path, monkeypatch, document):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    document = {**document, "cases": [row | {"name": name} for name in ("toy/a", "toy/b") for row in document["cases"]]}
    assert records.save(document) == [tmp_path / "cpu" / "toy-a.json", tmp_path / "cpu" / "toy-b.json"]
    assert {row["name"] for row in records.read(tmp_path / "cpu" / "toy-b.json")["cases"]} == {"toy/b"}
    assert records.read(tmp_path)["cases"] == document["cases"]
    assert records.device_name(document | {"device": "cuda", "gpu": "NVIDIA H200"}) == "nvidia-h200"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not valid JSON"),
        ("[]", "not a document"),
        ('{"cases": [{"name": "a"}]}', "not a document"),
        ('{"cases": [], "gpu": null}', "does not say what it was measured on: date, device, cpu"),
        (None, "cannot be read"),
    ],
)
def test_bad_records(tmp_path, text, message):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadRecord, match=message):
        records.read(path)
    with pytest.raises(BadRecord, match="holds no document"):
        records.read(tmp_path)


def test_compare(document):
    table, agree = compare(document, document, 0.1)
    assert agree and "ratios agree within 10%" in table and table.count("toy/square-float32") == 2
    other = copy.deepcopy(document)
    other["cases"][1]["speedup"] *= 1.3
    table, agree = compare(document, other, 0.1)
    assert not agree and "DO NOT agree" in table and "30.0% <<<" in table
    broken = copy.deepcopy(document)
    broken["cases"][1] |= {"ok": False, "median_ms": None, "why": "out of memory"}
    table, agree = compare(document, broken, 0.1)
    assert not agree and "before: measured; after: out of memory <<<" in table
    table, agree = compare(document, document | {"cases": document["cases"][:1]}, 0.1)
    assert agree and "measured before and not after: toy/square-float32, right" in table
    table, agree = compare(document, other | {"cases": []}, 0.1)
    assert not agree and table.splitlines()[2:] == ["nothing was measured in both"]


def test_choosing():
    cases = all_cases()
    [only] = choose(cases, ["patch_mining/768-b1-float32"], "cpu")
    assert only.name == "patch_mining/768-b1-float32"
    assert {case.group for case in choose(cases, ["patch_mining", "clip/*"], "cpu")} == {"patch_mining", "clip"}
    assert all("cpu" in case.devices for case in choose(cases, [], "cpu"))
    assert [case.name for case in choose(cases, [], "cpu", quick=True)] == ["patch_mining/768-b1-float32"]
    with pytest.raises(UnknownCase, match="'minning'.*groups are patch_mining, tower"):
        choose(cases, ["minning"], "cpu")


def test_registry_covers_the_published_sizes():
    cases = all_cases()
    dtypes = ("float32", "bfloat16", "float16")
    for group in ("patch_mining", "tower", "clip", "projector"):
        assert {f"{group}/{s}-b{b}-{d}" for s in ("768", "1536-hd") for b in (1, 8) for d in dtypes} <= cases.keys()
    for kernel in ("dwconv_norm", "linear_gelu"):
        assert {f"{kernel}/{side}-stage{i}-b8-bfloat16" for side in (768, 1536) for i in range(4)} <= cases.keys()
    for case in cases.values():
        assert case.baseline in case.providers and case.least.bytes >= 0


def test_floor():
    assert CEILINGS.floor_ms(Cost(10**9, 10**6), "float32") == pytest.approx(10)
    assert CEILINGS.floor_ms(Cost(0, 10**9), "bfloat16") == pytest.approx(100)
    assert CEILINGS.floor_ms(Cost(), "float32") is None


def test_only_some_providers():
    assert list(square().only(["r*ht"]).providers) == ["reference", "right"]
    with pytest.raises(UnknownCase, match="no provider is called 'rigth': these cases have reference; right; wrong"):
        choose_providers([square()], ["rigth"])


def test_saved_beside_what_was_measured_before(tmp_path, monkeypatch, document):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    [path] = records.save({**document, "cases": document["cases"][:2]})
    only = {**document, "cases": document["cases"][:1]}
    records.save(only)
    assert [row["provider"] for row in records.read(path)["cases"]] == ["reference", "right"]
    # Another commit means other conditions.
    records.save(only | {"commit": "another"})
    assert [row["provider"] for row in records.read(path)["cases"]] == ["reference"]


def test_nowhere_to_write_is_said_first(tmp_path):
    called = []
    case = square(reference=lambda x: called.append(x))
    with pytest.raises(BadRecord, match="is a folder"):
        run_here(case, out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BadRecord, match="cannot be written"):
        run_here(case, out=tmp_path / "file" / "run.json")
    assert not called


def test_a_call_that_fails_while_it_is_timed():
    calls = iter(range(3))

    def once(x):
        def call():
            if next(calls):
                raise torch.OutOfMemoryError("no room")
            return x @ x

        return call

    rows = rows_of(square(right=once).only(["right"]))
    assert rows["right"]["ok"] is False and rows["right"]["why"] == "while it was timed: out of memory: no room"
    assert rows["reference"]["ok"] and rows["reference"]["median_ms"] > 0


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU: what is timed on it takes one millisecond, a graph half of it."""
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(gpu_timing, "event_times", lambda call, seconds, flush: [1.0, 1.0])
    monkeypatch.setattr(gpu_timing, "time_graph", lambda call, seconds: 0.5)
    monkeypatch.setattr(peaks, "peak_mib", lambda call, device: 7.0)
    monkeypatch.setattr(machine, "keep_busy", lambda seconds: 0.0)
    return monkeypatch


def on_gpu(case, rows=None):
    return {row["provider"]: row for row in run_case(case, "cuda", CEILINGS, RunOptions(seconds=1), rows=rows)}


def with_own_graphs(**options):
    right = dataclasses.replace(square().providers["right"], own_graphs=True, **options)
    return dataclasses.replace(square(right=right), capturable=True)


def test_rows_of_a_gpu(gpu):
    rows = on_gpu(with_own_graphs())
    reference, right = rows["reference"], rows["right"]
    assert reference["graphed_ms"] == 0.5 and reference["speedup_graphed"] == 1 and reference["peak_mib"] == 7.0
    assert reference["warm_ms"] == 1.0 and reference["halves_differ"] == 0
    # It replays a graph of its own, in which nothing is allocated.
    assert right["median_ms"] == 1.0 and right["graphed_ms"] is None and right["peak_mib"] is None
    assert rows["hungry"]["why"].startswith("out of memory") and right["tflops"] > 0
    assert on_gpu(with_own_graphs(without_graphs=lambda x: lambda: x))["right"]["peak_mib"] == 7.0


def test_a_provider_that_cannot_be_captured_is_timed_without_a_graph(gpu):
    waiting = dataclasses.replace(square().providers["right"], capturable=False)
    rows = on_gpu(dataclasses.replace(square(right=waiting), capturable=True))
    assert rows["right"]["median_ms"] == 1.0 and rows["right"]["graphed_ms"] is None
    assert rows["reference"]["graphed_ms"] == 0.5


def test_a_lost_gpu_ends_the_run_and_keeps_what_there_is(gpu, tmp_path):
    def lost(call, seconds):
        raise gpu_timing.GpuLost("it cannot be captured: operation not permitted")

    gpu.setattr(gpu_timing, "time_graph", lost)
    gpu.setattr(machine, "measure_ceilings", lambda device: CEILINGS)
    out = tmp_path / "run.json"
    document = run([dataclasses.replace(square(), capturable=True), square("toy/next")], "cuda", out=out)
    assert document["complete"] is False and document["ended"].startswith("the GPU is lost to this process")
    kept = {row["provider"]: row for row in records.read(out)["cases"]}
    assert kept["right"]["median_ms"] == 1.0
    assert kept["reference"]["why"] == "as a graph: it cannot be captured: operation not permitted"
    assert {row["name"] for row in kept.values()} == {"toy/square-float32"}


def test_a_broken_context_is_not_blamed_on_those_after(gpu):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu.setattr(torch.cuda, "synchronize", broken)
    gpu.setattr(checking, "first_call", lambda build, device: (build(), build()(), 1.0))
    rows = {name: empty_row(square(), name) for name in ("reference", "right", "broken")}
    case = dataclasses.replace(square().restricted(["broken", "right"]), baseline="broken")
    with pytest.raises(gpu_timing.GpuLost, match="illegal memory access"):
        on_gpu(case, rows)
    assert rows["broken"]["ok"] is False and rows["right"]["why"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_here(capsys):
    with pytest.raises(NoDevice, match="torch sees none here"):
        check_device("cuda")
    with pytest.raises(NoDevice, match="expected cpu or cuda"):
        check_device("tpu")
    assert check_device(None) == "cpu"
    assert program.main(["run", "--device", "cuda"]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("bench: a GPU was asked for") and out.err.count("\n") == 1 and not out.out


def test_program_says_what_is_wrong_in_one_line(capsys):
    assert program.main(["run", "nothing/here", "--device", "cpu"]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("bench: no case is called 'nothing/here'") and not out.out
    words = [sys.executable, "-m", "bench", "compare", "nowhere.json", "nowhere.json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "bench: nowhere.json cannot be read: No such file or directory\n"


def test_program_prints_one_document_last(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(registered, "all_cases", lambda: {case.name: case for case in [square()]})
    assert program.main(["list"]) == 0
    assert capsys.readouterr().out.startswith("toy/square-float32 ")
    # The exit status is 1, since an opponent failed.
    out, words = tmp_path / "run.json", ["run", "toy", "--device", "cpu", "--seconds", "0.02", "--no-memory"]
    assert program.main([*words, "--out", str(out)]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["provider"] for row in document["cases"]][:2] == ["reference", "right"] and document["complete"]
    assert program.main([*words, "--provider", "right"]) == 0
    assert program.main(["compare", str(out), str(out)]) == 0


@pytest.mark.slow
def test_memory_of_a_provider_in_a_process_of_its_own(monkeypatch):
    mib = peaks.peak_in_child("projector/768-b1-float32", "reference")
    if mib is None:
        pytest.skip("this system forbids resetting the peak of resident memory")
    # 576 tokens of 4096 numbers, four times: of both products, the GELU between, and a copy.
    assert 9 <= mib <= 45
    # A process that fails tells nothing.
    monkeypatch.setattr(sys, "executable", "false")
    assert peaks.peak_in_child("projector/768-b1-float32", "reference") is None
