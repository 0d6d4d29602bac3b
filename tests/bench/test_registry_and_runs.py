"""The benchmark's registry, its runs and documents; and that the programs run and their last line is one JSON document."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import __main__ as program
from bench import cases as registered
from bench import measure, records
from bench.cases import all_cases
from bench.compare import compare
from bench.errors import BadRecord, NoDevice, UnknownCase
from bench.registry import Case, Ceilings, Cost, NotHere, choose, choose_providers
from bench.run import check_device, empty_row, format_rows, run, run_case
from tests.paths import ROOT


def start(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def out_of(*words, **environment):
    done = start(*words, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def square(name="toy/square-float32", **providers):
    """A product of matrices, done rightly and wrongly."""

    def missing(inputs):
        raise NotHere("no such library")

    def hungry(inputs):
        return lambda: torch.ones(2**48)

    def broken(inputs):
        raise ValueError("unsupported shape\nand a long story")

    every = {
        "reference": lambda x: lambda: x @ x,
        "right": lambda x: lambda: torch.mm(x, x),
        "wrong": lambda x: lambda: x @ x + 0.01,
        # which would compare by repeating itself
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
        work={"reference": Cost(3 * 64**3, 64**2), "right": Cost(64**3, 64**2)},
    )


CEILINGS = Ceilings(10.0, {"float32": 0.1})


def rows_of(case, **options):
    options = {"seconds": 0.5, "memory": False} | options
    return {row["provider"]: row for row in run_case(case, "cpu", CEILINGS, **options)}


def test_right_and_wrong_opponents():
    rows = rows_of(square())
    for name in ("reference", "right"):
        row = rows[name]
        assert (
            row["ok"]
            and row["why"] is None
            and 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            and row["first_call_ms"] > 0
        )
        assert row["relative_error"] < 1e-6 and row["samples"] >= 3
        assert row["floor_ms"] == pytest.approx(1e3 * max(2 * 64**3 / 1e11, 12 * 64**2 / 1e10))
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"])
    reference = rows["reference"]
    assert reference["speedup"] == 1
    # of its own work, and nothing of the other's, which was accounted for GPUs
    assert reference["tflops"] == pytest.approx(3 * 64**3 / reference["median_ms"] / 1e9) and reference["gbps"] > 0
    assert "tflops" not in rows["right"]
    for name in ("another shape", "not a number"):
        assert (
            rows[name]["ok"] is False
            and rows[name]["why"].startswith("wrong result: ")
            and rows[name]["relative_error"] is None
        )
    assert "shapes [[1, 64]], expected [[64, 64]]" in rows["another shape"]["why"]
    assert (
        rows["wrong"]["ok"] is False
        and rows["wrong"]["why"].startswith("wrong result: ")
        and rows["wrong"]["median_ms"] is None
    )
    assert rows["missing"]["ok"] is None and rows["missing"]["why"] == "not here: no such library"
    assert rows["hungry"]["ok"] is False and rows["hungry"]["why"].startswith("out of memory: ")
    assert rows["broken"]["ok"] is False and rows["broken"]["why"] == "ValueError: unsupported shape"
    table = format_rows(list(rows.values()))
    assert "wrong result" in table and "FAIL" in table and "1.00x" in table


def test_without_its_baseline_nothing_is_called_faster():
    rows = rows_of(square(reference=lambda x: lambda: torch.ones(2**48)))
    assert rows["reference"]["why"].startswith("out of memory: ")
    assert (
        rows["right"]["ok"] is None and "accuracy unknown" in rows["right"]["why"] and rows["right"]["speedup"] is None
    )
    assert rows["right"]["median_ms"] > 0


def test_inputs_that_do_not_fit():
    def make(device):
        return torch.ones(2**48)

    rows = run_case(
        Case("toy/large", make, {"reference": lambda x: lambda: x}, None), "cpu", CEILINGS, seconds=1, memory=False
    )
    assert [row["ok"] for row in rows] == [False] and rows[0]["why"].startswith("inputs: out of memory")


def test_a_document_grows_as_cases_end(tmp_path):
    out = tmp_path / "run.json"

    def interrupted(x):
        kept = json.loads(out.read_text())
        assert [row["name"] for row in kept["cases"]] == ["toy/first"] * 8 and kept["complete"] is False
        raise KeyboardInterrupt

    cases = [square("toy/first"), square("toy/second", right=interrupted)]
    document = run(cases, "cpu", seconds=0.3, memory=False, out=out)
    assert document["complete"] is False and {row["name"] for row in document["cases"]} == {"toy/first"}
    assert records.read(out) == json.loads(json.dumps(document))
    assert {
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
    } <= document.keys()
    assert not list(tmp_path.glob(".*"))


def test_saved_by_device_and_case(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    document = run([square("toy/a-b1"), square("toy/b-b1")], "cpu", seconds=0.3, memory=False)
    assert records.save(document) == [tmp_path / "cpu" / "toy-a-b1.json", tmp_path / "cpu" / "toy-b-b1.json"]
    assert {row["name"] for row in records.read(tmp_path / "cpu" / "toy-b-b1.json")["cases"]} == {"toy/b-b1"}
    assert records.read(tmp_path)["cases"] == document["cases"]
    assert records.device_name(document | {"device": "cuda", "gpu": "NVIDIA H200"}) == "nvidia-h200"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is no JSON"),
        ("[]", "no document"),
        ('{"cases": [{"name": "a"}]}', "no document"),
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


def test_compare():
    document = run([square()], "cpu", seconds=0.5, memory=False)
    table, agree = compare(document, document, 0.1)
    assert agree and "ratios agree within 10%" in table and table.count("toy/square-float32") == 2
    other = json.loads(json.dumps(document))
    other["cases"][1]["speedup"] *= 1.3
    table, agree = compare(document, other, 0.1)
    assert not agree and "DO NOT agree" in table and "30.0% <<<" in table
    broken = json.loads(json.dumps(document))
    broken["cases"][1] |= {"ok": False, "median_ms": None, "why": "out of memory"}
    table, agree = compare(document, broken, 0.1)
    assert not agree and "before: measured; after: out of memory <<<" in table
    table, agree = compare(document, document | {"cases": document["cases"][:1]}, 0.1)
    assert agree and "measured before and not after: toy/square-float32, right" in table
    table, _ = compare(document, other, 0.1)
    assert compare(document, other | {"cases": []}, 0.1) == (
        table.split("case ")[0] + "nothing was measured in both",
        False,
    )


def test_choosing():
    cases = all_cases()
    assert [case.name for case in choose(cases, ["patch_mining/768-b1-float32"], "cpu")] == [
        "patch_mining/768-b1-float32"
    ]
    assert {case.group for case in choose(cases, ["patch_mining", "clip/*"], "cpu")} == {"patch_mining", "clip"}
    assert all("cpu" in case.devices for case in choose(cases, [], "cpu"))
    assert [case.name for case in choose(cases, [], "cpu", quick=True)] == ["patch_mining/768-b1-float32"]
    with pytest.raises(UnknownCase, match="'minning'.*groups are patch_mining, tower"):
        choose(cases, ["minning"], "cpu")


def test_registry_covers_the_published_sizes():
    names = set(all_cases())
    for group in ("patch_mining", "tower", "clip", "projector"):
        assert {
            f"{group}/{s}-b{b}-{d}"
            for s in ("768", "1536-hd")
            for b in (1, 8)
            for d in ("float32", "bfloat16", "float16")
        } <= names
    assert {
        f"{kernel}/{side}-stage{i}-b8-bfloat16"
        for kernel in ("dwconv_norm", "linear_gelu")
        for side in (768, 1536)
        for i in range(4)
    } <= names
    for case in all_cases().values():
        assert case.baseline in case.providers and case.least.bytes >= 0


def test_floor():
    assert CEILINGS.floor_ms(Cost(10**9, 10**6), "float32") == pytest.approx(10)
    assert CEILINGS.floor_ms(Cost(0, 10**9), "bfloat16") == pytest.approx(100)
    assert CEILINGS.floor_ms(Cost(), "float32") is None


def test_only_some_providers():
    assert list(square().only(["r*ht"]).providers) == ["reference", "right"]
    with pytest.raises(UnknownCase, match="no provider is called 'rigth': these cases have reference; right; wrong"):
        choose_providers([square()], ["rigth"])


def test_saved_beside_what_was_measured_before(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    document = run([square().only(["right"])], "cpu", seconds=0.3, memory=False)
    [path] = records.save(document)
    only = document | {"cases": document["cases"][:1]}
    records.save(only)
    assert [row["provider"] for row in records.read(path)["cases"]] == ["reference", "right"]
    # another commit: other conditions
    records.save(only | {"commit": "another"})
    assert [row["provider"] for row in records.read(path)["cases"]] == ["reference"]


def test_nowhere_to_write_is_said_first(tmp_path):
    called = []
    case = square(reference=lambda x: called.append(x))
    with pytest.raises(BadRecord, match="is a folder"):
        run([case], "cpu", out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BadRecord, match="cannot be written"):
        run([case], "cpu", out=tmp_path / "file" / "run.json")
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
    """A GPU that is none: what is timed on it takes one millisecond, a graph half of it."""
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(measure, "_event_times", lambda call, seconds, flush: [1.0, 1.0])
    monkeypatch.setattr(measure, "time_graph", lambda call, seconds: 0.5)
    monkeypatch.setattr(measure, "peak_mib", lambda call, device: 7.0)
    monkeypatch.setattr(measure, "keep_busy", lambda seconds: 0.0)
    return monkeypatch


def on_gpu(case, rows=None):
    return {row["provider"]: row for row in run_case(case, "cuda", CEILINGS, seconds=1, memory=True, rows=rows)}


def test_rows_of_a_gpu(gpu):
    case = dataclasses.replace(square(), capturable=True, own_graphs=frozenset({"right"}))
    rows = on_gpu(case)
    assert (
        rows["reference"]["graphed_ms"] == 0.5
        and rows["reference"]["speedup_graphed"] == 1
        and rows["reference"]["peak_mib"] == 7.0
    )
    assert rows["reference"]["warm_ms"] == 1.0 and rows["reference"]["halves_differ"] == 0
    # it replays a graph of its own, in which nothing is allocated
    assert (
        rows["right"]["median_ms"] == 1.0 and rows["right"]["graphed_ms"] is None and rows["right"]["peak_mib"] is None
    )
    assert rows["hungry"]["why"].startswith("out of memory") and rows["right"]["tflops"] > 0
    assert on_gpu(dataclasses.replace(case, memory={"right": lambda x: lambda: x}))["right"]["peak_mib"] == 7.0


def test_a_lost_gpu_ends_the_run_and_keeps_what_there_is(gpu, tmp_path):
    def lost(call, seconds):
        raise measure.GpuLost("it cannot be captured: operation not permitted")

    gpu.setattr(measure, "time_graph", lost)
    gpu.setattr(measure, "measure_ceilings", lambda device: CEILINGS)
    out = tmp_path / "run.json"
    document = run([dataclasses.replace(square(), capturable=True), square("toy/next")], "cuda", out=out)
    assert document["complete"] is False and document["ended"].startswith("the GPU is lost to this process")
    kept = {row["provider"]: row for row in records.read(out)["cases"]}
    assert (
        kept["right"]["median_ms"] == 1.0
        and kept["reference"]["why"] == "as a graph: it cannot be captured: operation not permitted"
    )
    assert {row["name"] for row in kept.values()} == {"toy/square-float32"}


def test_a_broken_context_is_not_blamed_on_those_after(gpu):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu.setattr(torch.cuda, "synchronize", broken)
    rows = {name: empty_row(square(), name) for name in ("reference", "right", "broken")}
    case = dataclasses.replace(
        square(), providers={"broken": square().providers["broken"], "right": square().providers["right"]}
    )
    gpu.setattr(measure, "first_call", lambda build, device: (build(), build()(), 1.0))
    with pytest.raises(measure.GpuLost, match="illegal memory access"):
        on_gpu(dataclasses.replace(case, baseline="broken"), rows)
    assert rows["broken"]["ok"] is False and rows["right"]["why"] is None


def test_no_gpu_here():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(NoDevice, match="torch sees none here"):
        check_device("cuda")
    with pytest.raises(NoDevice, match="expected cpu or cuda"):
        check_device("tpu")
    done = start("bench", "run", "--device", "cuda")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_program_says_what_is_wrong_in_one_line():
    done = start("bench", "run", "nothing/here")
    assert (
        done.returncode == 2 and done.stderr.startswith("bench: no case is called 'nothing/here'") and not done.stdout
    )
    done = start("bench", "compare", "nowhere.json", "nowhere.json")
    assert done.returncode == 2 and done.stderr == "bench: nowhere.json cannot be read: No such file or directory\n"


def test_program_prints_one_document_last(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(registered, "all_cases", lambda: {case.name: case for case in [square()]})
    assert program.main(["list"]) == 0
    assert capsys.readouterr().out.startswith("toy/square-float32 ")
    # an opponent failed
    out = tmp_path / "run.json"
    assert program.main(["run", "toy", "--device", "cpu", "--seconds", "0.3", "--no-memory", "--out", str(out)]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["provider"] for row in document["cases"]][:2] == ["reference", "right"] and document["complete"]
    assert (
        program.main(["run", "toy", "--device", "cpu", "--seconds", "0.3", "--no-memory", "--provider", "right"]) == 0
    )
    assert program.main(["compare", str(out), str(out)]) == 0


def test_memory_of_a_provider_in_a_process_of_its_own():
    mib = measure.peak_in_child("projector/768-b1-float32", "reference")
    if mib is None:
        pytest.skip("this system forbids resetting the peak of resident memory")
    # 576 tokens of 4096 numbers, four times: of both products, the GELU between, and a copy
    assert 9 <= mib <= 45
    assert measure.peak_in_child("projector/768-b1-float32", "no such provider") is None
