"""The recipe of stories with pictures."""

import sys

import pytest
from PIL import Image

from mg_fast.testing.random_pipelines import random_sdxl
from recipes import story


def test_a_story(standard, tmp_path, monkeypatch, capsys):
    from mg_fast.engine import drawing

    prompts = iter([["a mouse"], [], ["a mouse in a storm", "a mouse asleep"]] * 2)
    monkeypatch.setattr(drawing, "find_prompts", lambda text: next(prompts))
    random_sdxl().save_pretrained(tmp_path / "painter")
    asked = ["story", "--model", str(standard), "--template", "vicuna_v1", "--painter", str(tmp_path / "painter")]
    asked += ["--steps", "2", "--max-new-tokens", "2", "--like"]
    asked += [part for turn in ("begin <b>", "go on", "end") for part in ("--turn", turn)]
    for name in ("story.html", "story.md"):
        monkeypatch.setattr(sys, "argv", [*asked, "--out", str(tmp_path / name)])
        story.main()
        assert str(tmp_path / name) in capsys.readouterr().out
        with pytest.raises(SystemExit):
            story.main()
        assert "exists: name another file" in capsys.readouterr().err
    page = (tmp_path / "story.html").read_text()
    assert page.count("data:image/png") == 3 and "begin &lt;b&gt;" in page and "No picture: the model wrote" in page
    text = (tmp_path / "story.md").read_text()
    assert text.count("](story-") == 3 and Image.open(tmp_path / "story-3.png").size == (32, 32)
