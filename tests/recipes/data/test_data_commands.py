"""Command lines that cannot be meant are refused before anything is asked, and help needs no optional package."""

import os
import subprocess
import sys

import pytest

from recipes.data.__main__ import main
from tests.paths import ROOT


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--captions FILE or --dialogues FILE"),
        (["--captions", "a.txt", "--endpoint", "http://x"], "--model NAME"),
        (["--captions", "a.txt", "--endpoint", "http://x", "--local", "y"], "not allowed with"),
        (["--captions", "a.txt", "--parameter", "a=1"], "--parameter is for --endpoint"),
        (["--captions", "a.txt", "--endpoint", "", "--model", "m"], "--endpoint: expected an address or a path"),
        (["--captions", "a.txt", "--local", " "], "--local: expected an address or a path, got nothing"),
        (["--captions", "a.txt", "--local", "m", "--model", "n"], "--model is for --endpoint"),
        (["--captions", "a.txt", "--local", "m", "--per-minute", "5"], "--per-minute is for --endpoint"),
        (["--captions", "a.txt", "--local", "m", "--refused-again"], "--refused-again is for --endpoint"),
        (
            ["--captions", "a.txt", "--endpoint", "x", "--model", "m", "--key-variable", "NO_SUCH_KEY"],
            "the environment has no NO_SUCH_KEY",
        ),
        (["--captions", "a.txt", "--tries", "0"], "whole number of 1 or more"),
        (["--captions", "a.txt", "--per-minute", "nan"], "expected a number"),
        (["--captions", "a.txt", "--parameter", "a=b"], "a: expected JSON"),
    ],
)
def test_wrong_command_lines(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "out"), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_help_needs_nothing_that_is_optional():
    """Neither torch nor what asks is imported for it."""
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'httpx', 'open_clip', 'tqdm'): sys.modules[name] = None\n"
        "import runpy\nsys.argv = ['recipes.data', '--help']\nrunpy.run_module('recipes.data', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0 and "--captions" in done.stdout, done.stderr
