"""A trace holds the stages, in order and nested in their providers, in the format that Perfetto reads."""

import json

import pytest
import torch

from bench import cases as bench_cases
from bench import trace
from bench.__main__ import main
from bench.cases import patch_mining as mining
from bench.cases import picture, settings
from bench.registry import Case, NotHere
from mg_fast.testing.random_checkpoints import NARROW_TOWERS

pytestmark = pytest.mark.slow

STAGES = ["preprocess", "LR tower", "HR tower", "patch info mining", "projector"]


def ranges(path):
    """The name, start and end of a trace's ranges, in order."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [
        (e["name"], e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("ph") == "X" and e.get("cat") == "user_annotation"
    ]
    return sorted(found, key=lambda r: (r[1], -r[2]))


@pytest.fixture
def small_picture(monkeypatch):
    """The case at its real geometry, with narrow towers and a small photograph."""
    monkeypatch.setattr(settings, "PICTURE", (400, 300))
    towers = {"vision_config": NARROW_TOWERS["clip"], "vision_config_aux": NARROW_TOWERS["convnext"]}
    changed = towers | {"mm_hidden_size": 128, "mm_hidden_size_aux": 360, "hidden_size": 128}
    monkeypatch.setattr(picture, "SMALL_LANGUAGE_MODEL", picture.SMALL_LANGUAGE_MODEL | changed)
    name = "picture/768-b1-float32"
    case = picture.picture_case("picture", settings.SETTINGS[0], "float32")
    monkeypatch.setattr(bench_cases, "all_cases", lambda: {name: case.only(["auto"])})
    return name


def test_stages_of_a_picture(small_picture, tmp_path, capsys):
    path = tmp_path / "folder" / "trace.json"
    assert main(["run", small_picture, "--device", "cpu", "--trace", str(path)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["provider"], row["why"]) for row in document["cases"]] == [("reference", None), ("auto", None)]
    assert {"cpu", "threads", "torch", "commit"} <= document.keys()
    found = ranges(path)
    assert [name for name, _, _ in found] == [f"{small_picture} reference", *STAGES, f"{small_picture} auto", *STAGES]
    for provider, stages in ((found[0], found[1:6]), (found[6], found[7:])):
        assert all(provider[1] <= start <= end <= provider[2] for _, start, end in stages)
        assert all(before[2] <= after[1] for before, after in zip(stages, stages[1:]))


def test_operators_are_in_their_stage_and_warm_up_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "compiled", lambda build, name: {})
    sizes = mining.Sizes(torch.float32, side=3, dim=12, levels=((24, 6), (12, 10)))
    case = mining.mining_case("patch_mining/small", sizes).only(["torch"])
    trace.trace([case], "cpu", tmp_path / "trace.json")
    names = [name for name, _, _ in ranges(tmp_path / "trace.json")]
    assert names == [
        "patch_mining/small reference",
        "patch info mining",
        "patch_mining/small torch",
        "patch info mining",
    ]
    (_, start, end), *_ = ranges(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    norms = [e["ts"] for e in events if e.get("name") == "aten::layer_norm" and start <= e["ts"] <= end]
    assert len(norms) == 3


def test_providers_that_cannot_run_are_named(tmp_path):
    def absent(inputs):
        raise NotHere("for GPUs")

    def broken(inputs):
        return lambda: torch.ones(2) @ torch.ones(3)

    case = Case(
        "group/case",
        lambda device: None,
        {"reference": lambda _: lambda: torch.ones(1) + 1, "a": absent, "b": broken},
        None,
    )
    rows = trace.trace([case], "cpu", tmp_path / "trace.json")
    assert (
        rows[0]["why"] is None
        and rows[1]["why"] == "not here: for GPUs"
        and rows[2]["why"].startswith("RuntimeError: inconsistent")
    )
    assert [name for name, _, _ in ranges(tmp_path / "trace.json")] == ["group/case reference", "group"]
