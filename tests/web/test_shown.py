"""What is shown of conversations and figures: texts letter by letter, and nothing that a user wrote as HTML."""

import re

import pytest
from PIL import Image

from mg_fast.web import shown
from mg_fast.web.looking import LookedAt, bordered, glow
from mg_fast.web.sessions import AnsweredTurn, AnswerFigures, AskedQuestion

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> & $$x$$ \"'"
NAME = "/tmp/mg_fast_web_test/00/picture.png"
FIGURES = AnswerFigures(0.0, 0.123, 2.5, 34.56, 17, 180, 120, "stop")


def texts(messages):
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


@pytest.mark.parametrize("where", ["question", "answer", "prompt", "reason", "so far", "note", "look", "stage"])
def test_html_is_shown_as_text(where):
    turn = AnsweredTurn(
        AskedQuestion(EVIL if where == "question" else "hi"),
        EVIL if where == "answer" else "ho",
        FIGURES,
        ((NAME, EVIL if where == "prompt" else "a cat"),),
        EVIL if where == "reason" else None,
    )
    found = "".join(texts(shown.messages([turn])))
    found += "".join(texts([shown.answer_so_far(EVIL if where == "so far" else "", EVIL if where == "note" else "")]))
    found += shown.look_panel(LookedAt(EVIL, EVIL, *(NAME,) * 5) if where == "look" else None, 0.5, False)
    found += shown.stage_bars([(EVIL, 1.0)] if where == "stage" else ())
    assert "<script" not in found and "<img src=x" not in found and "&lt;script&gt;alert(1)&lt;/script&gt;" in found


def test_a_conversation():
    question = AskedQuestion("What\nis it?", (NAME, NAME.replace("png", "jpg")))
    turn = AnsweredTurn(question, "A  cat", FIGURES, (), "the model wrote no prompt")
    asked, answered = shown.messages([turn])
    assert asked["role"] == "user" and answered["role"] == "assistant"
    first, second, text = asked["content"]
    assert first["file"]["path"] == NAME and second["file"]["mime_type"] == "image/jpeg"
    assert first["file"]["meta"] == {"_type": "gradio.FileData"} and text["text"] == "What<br>is it?"
    answer, reason, line = (part["text"] for part in answered["content"])
    assert answer == "A  cat" and reason == "<em>No picture: the model wrote no prompt</em>"
    assert line == (
        "<small>123 ms to the first token &middot; 34.6 tokens/s &middot; 17 new tokens &middot; 120 of 180 prompt "
        "tokens from the cache</small>"
    )
    assert texts(shown.messages([AnsweredTurn(question, "", FIGURES)]))[1] == "(an empty answer)"


def test_a_prompt_that_was_drawn_is_shown_once():
    def lines(text, *drawn):
        return texts(shown.messages([AnsweredTurn(AskedQuestion("Draw"), text, FIGURES, drawn)]))[1:-1]

    link = f'<a href="gradio_api/file={NAME}" download="drawn.png">Download</a>'
    assert lines("<h>a cat</h>", (NAME, "a cat")) == [f"<small>Drawn: a cat {link}</small>"]
    assert lines("Here: <h>a cat</h>", (NAME, "a cat"))[0] == "Here:"
    # Where none was drawn, the answer stays as it is.
    assert lines("<h>a cat</h>") == ["&lt;h&gt;a cat&lt;/h&gt;"]


def test_figures_of_other_answers():
    line = shown.figures_line(AnswerFigures(12.5, 1.5, 2.5, None, 1, 10, 0, "stopped"))
    assert line == (
        "1.5 s to the first token &middot; 1 new tokens &middot; 0 of 10 prompt tokens from the cache &middot; 12.5 s "
        "in line &middot; stopped"
    )
    assert "ended at the most tokens" in shown.figures_line(AnswerFigures(0, 1, 1, 1, 1, 1, 1, "length"))


def test_bars():
    stages = [("preprocess", 0.010), ("LR tower", 0.020), ("HR tower", 0.180), ("preprocess", 0.010), ("decode", 0.1)]
    bars = shown.stage_bars(stages)
    assert [bars.index(f">{name}<") for name in ("preprocess", "towers", "mining", "prefill", "decode")]
    # The longest bar has its full width; what was not run has none, and says so.
    assert 'style="width:60.0%"></span><span class="mg-value">200 ms' in bars
    assert 'style="width:6.0%"></span><span class="mg-value">20 ms' in bars
    assert bars.count('</span><span class="mg-value">not run') == 2 and bars.count('class="mg-bar"') == 3
    assert "Measure the stages" in shown.stage_bars(())


def test_a_panel():
    names = [f"/{letter}/picture.png" for letter in "abcde"]
    found = LookedAt("What?", "A cat", *names)
    panel = shown.look_panel(found, 0.25, False)
    # The heat lies over the picture in its colours; the borders lie over both, and do not fade with it.
    assert re.findall("file=(/./picture)", panel) == ["/a/picture", "/d/picture"] and "opacity:0.25" in panel
    panel = shown.look_panel(found, 7, True)
    assert re.findall("file=(/./picture)", panel) == ["/a/picture", "/d/picture", "/e/picture"]
    assert panel.count("opacity") == 1 and "opacity:1.00" in panel


def test_wishes_are_not_shown_while_they_are_written():
    for text in ("<h>a blue circle</h>", "<h>a blue", "<h", "<"):
        assert shown.without_wishes(f"Here: {text}") == "Here:"
    assert shown.without_wishes("2 < 3 and <b>") == "2 < 3 and <b>"


def test_heat_is_a_layer_that_shades_cold_places():
    heat = Image.new("RGB", (2, 1), (90, 90, 90))
    heat.putpixel((1, 0), (220, 120, 30))
    layer = glow(heat)
    # A black shade lies on what is cold, and the heat's own colour on what is hot.
    cold, hot = layer.getpixel((0, 0)), layer.getpixel((1, 0))
    assert cold[:3] == (0, 0, 0) and 100 < cold[3] < 150 and hot[0] > 200 and hot[3] > 230


def test_borders_of_windows_are_seen_on_any_ground():
    for ground in (0, 128, 255):
        drawn = bordered(Image.new("RGB", (768, 768), (ground,) * 3), 6)
        across = [drawn.getpixel((x, 60))[0] for x in range(120, 136)]
        assert max(across) > 200 and min(across) < 150
        # Five borders each way, and the edges of the picture are none.
        edges = [drawn.getpixel((x, 60))[0] != ground for x in range(768)]
        assert sum(now and not before for before, now in zip([False, *edges], edges)) == 5
