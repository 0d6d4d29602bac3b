"""`mg-fast serve`: what it passes on, what it prints, and that vLLM takes the place of the process."""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys

import pytest

from mg_fast import cli
from mg_fast.integrations import vllm_command
from mg_fast.integrations.vllm_command import SERVER
from tests.paths import ROOT
from tests.stand_in_vllm import NANO, make_vllm

WORDS = ["--port", "8000", "-tp", "2", "--max-model-len=512", "--dtype", "bfloat16", "-O3", "--flag", "--dry"]


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setattr(vllm_command, "_DISTRIBUTIONS", ("vllm-of-nobody",))


def test_without_vllm_one_line_says_what_to_install(capsys, without_vllm):
    code = cli.main(["serve", "--model", "nano", "--port", "8000"])
    out, err = capsys.readouterr()
    assert (code, out) == (6, "") and err.count("\n") == 1
    assert err.startswith("mg-fast: error: serving needs vLLM >=0.32,<0.33, which ")
    # What is wrong with the environment is said first.
    assert cli.main(["serve", "--model", "nowhere"]) == 6


def test_a_dry_run_prints_the_command(capsys, without_vllm):
    assert cli.main(["serve", *WORDS[:4], "--model", "nano", "--dry-run", *WORDS[4:]]) == 0
    out, err = capsys.readouterr()
    words = shlex.split(out)
    assert out.count("\n") == 1 and words[:5] == [sys.executable, "-m", SERVER, "--model", str(NANO)]
    # An option that is not ours is passed on whole, even where it begins as one of ours.
    assert words[-len(WORDS) :] == WORDS and "--dtype=float32" not in words
    assert err.startswith("mg-fast: this command cannot run here: serving needs vLLM") and err.count("\n") == 1
    assert cli.main(["serve", "--model", "nowhere", "--dry-run"]) == 3
    assert cli.main(["serve", "--model", "nano", "--headless", "--dry-run"]) == 6


def test_wrong_usage(capsys):
    for words in (["serve"], ["serve", "nano"], ["serve", "--model"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(words)
        assert exit.value.code == 2 and "--model" in capsys.readouterr().err
    # Other commands know all of their options.
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--port", "8000"])
    assert "unrecognized arguments: --port 8000" in capsys.readouterr().err


SERVES = """\
import json, os, sys
print(json.dumps([os.getpid(), sys.argv[1:]]))
sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="vLLM needs Python 3.11")
def test_vllm_takes_the_place_of_the_process(tmp_path):
    torch = importlib.metadata.version("torch").split("+")[0]
    make_vllm(tmp_path, "vllm", "0.32.0", f"torch=={torch}").write_text(SERVES)
    command = [sys.executable, "-m", "mg_fast", "serve", "--model", "nano", "--port", "8000"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 7, err
    pid, words = json.loads(out)
    # Signals to the command reach vLLM, as it has the same process.
    assert pid == process.pid
    assert words[:2] == ["--model", str(NANO)] and words[-2:] == ["--port", "8000"]
    assert "--served-model-name=nano" in words
