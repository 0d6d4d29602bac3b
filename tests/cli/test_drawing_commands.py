"""The commands that draw: draw, run --draw, and the commands within chat."""

import io
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from mg_fast.cli.program import main
from mg_fast.testing.random_pipelines import random_sdxl

# The models are so small that they are slower on two threads.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    path = tmp_path_factory.mktemp("painter")
    random_sdxl().save_pretrained(path)
    return str(path)


@pytest.fixture
def speaking(monkeypatch):
    """Every answer holds a prompt, whatever the small random model says."""
    from mg_fast.engine import drawing

    monkeypatch.setattr(drawing, "find_prompts", lambda text: ["a red cat"])


def test_draw(painter, tmp_path, capsys):
    out = tmp_path / "cat.png"
    asked = ["draw", "--painter", painter, "--prompt", "a cat", "--steps", "2", "--seed", "3", "--out", str(out)]
    assert main([*asked, "--count", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"{out} (seed 3)", f"{tmp_path / 'cat-2.png'} (seed 4)"]
    assert Image.open(out).size == (32, 32) and "drawing" in printed.err
    assert main(asked) == 7 and "exists" in capsys.readouterr().err
    before = out.read_bytes()
    assert main([*asked, "--force", "--size", "48x32"]) == 0
    assert Image.open(out).size == (48, 32) and out.read_bytes() != before


@pytest.mark.parametrize(
    "further, code, message",
    [
        (["--size", "30"], 7, "multiples of 8"),
        (["--strength", "0.5"], 7, "--like"),
        (["--scheduler", "fast"], 7, "scheduler"),
        (["--painter", "nowhere/at/all"], 3, "not a folder"),
    ],
)
def test_draw_refuses(painter, tmp_path, capsys, further, code, message):
    out = tmp_path / "cat.png"
    assert main(["draw", "--painter", painter, "--prompt", "a cat", "--out", str(out), *further]) == code
    assert message in capsys.readouterr().err and not out.exists()


def test_run_draws(standard, painter, tmp_path, capsys, speaking):
    asked = ["run", "--model", str(standard), "--template", "vicuna_v1", "--prompt", "a cat", "--max-new-tokens", "2"]
    out = str(tmp_path / "cat.png")
    assert main([*asked, "--draw", "--painter", painter, "--steps", "2", "--seed", "3", "--out", out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == out and Image.open(out).size == (32, 32)
    out = str(tmp_path / "other.png")
    assert main([*asked, "--draw", "--painter", painter, "--steps", "2", "--json", "--out", out]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["image_files"] == [out] and document["image_prompts"] == ["a red cat"]
    assert main([*asked, "--draw"]) == 5 and "--painter" in capsys.readouterr().err
    assert main([*asked, "--painter", painter]) == 5 and "add --draw" in capsys.readouterr().err


def test_run_says_why_nothing_was_drawn(standard, painter, tmp_path, capsys):
    asked = ["run", "--model", str(standard), "--template", "vicuna_v1", "--prompt", "a cat", "--max-new-tokens", "2"]
    assert main([*asked, "--draw", "--painter", painter, "--out", str(tmp_path / "cat.png")]) == 0
    assert "no picture: the model wrote no prompt" in capsys.readouterr().err


def test_chat_draws(standard, painter, tmp_path, capsys, monkeypatch, speaking):
    monkeypatch.chdir(tmp_path)
    lines = [
        "/save a.png",
        "/draw a cat",
        f"/painter {painter}",
        "/painter",
        "/draw",
        "/draw a cat",
        "/save a.png",
        "/save a.png",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "/draw more", "/quit"]) + "\n"))
    asked = ["chat", "--model", str(standard), "--template", "vicuna_v1", "--max-new-tokens", "2", "--steps", "2"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    for part in (
        "no picture has been drawn yet",
        "(no picture: no painter is loaded",
        f"(draws with {painter})",
        "/painter needs a folder, a hub id or nano",
        "/draw needs a text",
        "(drawn.png)",
        "(a.png)",
        "/save: a.png exists",
        "(drawn-2.png)",
    ):
        assert part in printed, part
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "drawn.png", "drawn-2.png"}


def test_what_was_interrupted_or_cannot_be_saved_is_said(standard, tmp_path, capsys, monkeypatch, speaking):
    from mg_fast.cli import drawing

    def interrupted(prompt, **options):
        raise KeyboardInterrupt

    def drawn(prompt, **options):
        return [Image.new("RGB", (8, 8))]

    def full(self, file):
        raise OSError(28, "No space left on device")

    painter = SimpleNamespace(draw=interrupted, name="P")
    monkeypatch.setattr(drawing, "load_painter", lambda args, path=None: painter)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image.Image, "save", full)

    def lines():
        yield "/draw a cat"
        painter.draw = drawn
        yield "/draw a cat"
        yield "/quit"

    typed = lines()
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", "--model", str(standard), "--template", "vicuna_v1", "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr().out
    assert "(interrupted; the text is kept, without a picture)" in printed
    assert "drawn.png cannot be written: No space left on device" in printed
