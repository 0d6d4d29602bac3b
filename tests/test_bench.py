"""The measuring programs and the demo run, and their last line is one JSON document."""

import json
import os
import subprocess
import sys

from tests.paths import ROOT


def run(*words, **environment):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_end_to_end_at_toy_size():
    document = json.loads(
        run("bench.end_to_end", "--size", "tiny", "--runs", "1", "--new-tokens", "4", "--backend", "reference").splitlines()[-1]
    )
    assert document["name"] == "tiny-float32-reference"
    assert {"cpu", "threads", "torch", "triton", "commit", "load_s", "first_answer_s", "answer_s", "stages"} <= document.keys()
    assert [stage["name"] for stage in document["stages"]][:5] == [
        "preprocess",
        "LR tower",
        "HR tower",
        "patch info mining",
        "projector",
    ]
    assert all(stage["seconds"] > 0 for stage in document["stages"])


def test_demo(tmp_path):
    for first in (True, False):
        out = run("examples.demo", XDG_CACHE_HOME=str(tmp_path))
        assert ("building" in out) is first
        assert "576 image tokens" in out and "the weights are RANDOM" in out and "patch info mining" in out
