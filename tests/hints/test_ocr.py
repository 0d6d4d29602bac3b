"""Reading the text in pictures that are rendered here, and the hint that is made of it."""

import builtins
from pathlib import Path

import matplotlib
import matplotlib_fontja
import pytest
from PIL import Image, ImageDraw, ImageFont

from mg_fast.errors import BackendError, PictureError
from mg_fast.hints import ocr

LATIN = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
CHINESE = Path(matplotlib_fontja.__file__).parent / "fonts" / "ipaexg.ttf"


def page(*lines: str, font: Path = LATIN, height: int = 28) -> Image.Image:
    """A white page with lines of black print."""
    image = Image.new("RGB", (460, 40 + 2 * height * len(lines)), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((20, 20 + 2 * height * i), line, font=ImageFont.truetype(str(font), height), fill="black")
    return image


def texts(image) -> list[str]:
    return [line.text for line in ocr.read(image)]


def test_print():
    lines = ocr.read(page("The rent is 1200", "due on Friday"))
    assert [line.text for line in lines] == ["The rent is 1200", "due on Friday"]
    assert all(0.9 < line.score <= 1 for line in lines)


def test_small_print():
    assert texts(page("Serial number 84213", height=11)) == ["Serial number 84213"]


@pytest.mark.parametrize("angle", [90, 180])
def test_a_rotated_page(angle):
    assert set(texts(page("The rent is 1200", "due on Friday").rotate(angle, expand=True))) == {
        "The rent is 1200",
        "due on Friday",
    }


def test_chinese():
    assert texts(page("北京大学 中文", font=CHINESE))[0].replace(" ", "") == "北京大学中文"


def test_no_text(tmp_path):
    assert ocr.read(Image.new("RGB", (200, 100), "white")) == []
    page("from a file").save(tmp_path / "page.png")
    assert texts(tmp_path / "page.png") == ["from a file"]
    with pytest.raises(PictureError):
        ocr.read(tmp_path / "absent.png")


def test_hint():
    lines = [ocr.TextLine("one", 0.9), ocr.TextLine("unsure", 0.1), ocr.TextLine("two", 0.11)]
    assert ocr.hint(lines) == "\nReference OCR Token: one, two\n"
    assert ocr.hint([]) == ocr.hint(lines[1:2]) == ""


def test_without_rapidocr_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "rapidocr":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    ocr._engine.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"mg_fast\[ocr\]"):
        ocr.read(page("text"))
