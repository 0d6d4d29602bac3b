"""`mg-fast story`: one page with the story, progress on stderr, and one-line errors."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

import mg_fast
from mg_fast import cli
from mg_fast.cli.story_page import StoryPart, shown_size, story_page, write_page
from tests.models.mm_interleaved.recorded import folder_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Page(html.parser.HTMLParser):
    """The elements of a page: tags with attributes, and the text within each kind of element."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self._open[-1], data))

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


# ---- The page


def test_texts_are_escaped_and_pictures_lie_in_the_page():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    bad = "<script>alert('&')</script>\n\nnext"
    page = story_page(
        [StoryPart(noise, True), StoryPart(bad, True), StoryPart("  ", False), StoryPart(noise, False)],
        title="<b>&",
        note='a "note" <i>',
    )
    read = Page(page)
    assert [(tag, text) for tag, text in read.texts if tag != "style"] == [
        ("title", "<b>&"),
        ("h1", "<b>&"),
        ("figcaption", "Picture 1, given"),
        ("p", bad),
        ("figcaption", "Picture 2, drawn by the model"),
        ("footer", 'a "note" <i>'),
    ]
    assert all(np.array_equal(np.asarray(picture), np.asarray(noise)) for picture in read.pictures())
    assert len(read.pictures()) == 2
    assert {tag for tag, _ in read.tags} & {"script", "link", "b", "i"} == set()
    # Nothing is fetched from elsewhere.
    assert re.findall(r"https?:|url\(|@import", page) == []


def test_large_pictures_are_shown_smaller():
    assert shown_size(Image.new("RGB", (4096, 1000))).size == (1024, 250)
    small = Image.new("RGB", (1024, 3))
    assert shown_size(small) is small


def test_a_page_is_written_as_a_whole(tmp_path):
    file = tmp_path / "story.html"
    write_page(file, "first")
    write_page(file, "second é")
    assert file.read_text(encoding="utf-8") == "second é" and [*tmp_path.iterdir()] == [file]


# ---- The command


@pytest.fixture
def run(tmp_path, capsys):
    """Runs `mg-fast story` on a tiny checkpoint; returns its exit code, stderr and the page, if one was written."""

    def run(*arguments, model=None, out="story.html"):
        model = folder_of("mmi-tiny") if model is None else model
        file = tmp_path / out
        code = cli.main(
            [
                "story",
                "--model",
                str(model),
                "--device",
                "cpu",
                "--dtype",
                "float32",
                "--out",
                str(file),
                *map(str, arguments),
            ]
        )
        out, err = capsys.readouterr()
        assert out == ""
        return code, err, file.read_text(encoding="utf-8") if file.is_file() else None

    return run


def test_the_story_is_the_pipelines(run):
    picture = folder_of("mmi-tiny") / "image0.png"
    start = "A red cat sits on the table. Then it"
    sizes = ("--rounds", 4, "--steps", 2, "--seed", 3, "--max-new-tokens", 9)
    code, err, page = run("--start", start, "--image", picture, *sizes)
    assert code == 0 and err.count("[picture, ") == 2 and err.endswith("story.html\n")
    pipeline = mg_fast.load(folder_of("mmi-tiny"), device="cpu", dtype="float32")
    with Image.open(picture) as opened:
        items = [opened.convert("RGB"), start]
    expected = pipeline.interleave(
        items, rounds=4, force_pictures=True, seed=3, num_inference_steps=2, max_new_tokens=9
    )
    read = Page(page)
    texts = [text for tag, text in read.texts if tag == "p"]
    assert texts == [start, *(part.strip() for part in expected if isinstance(part, str))]
    drawn = [part for part in expected if not isinstance(part, str)]
    assert len(drawn) == 2
    for found, part in zip(read.pictures(), [items[0], *drawn], strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(part))
    assert ("footer", "Made by mg-fast story with mmi-tiny, 4 rounds, seed 3. Grey parts were given.") in read.texts


def test_an_interruption_leaves_the_page(run, monkeypatch):
    from mg_fast.engine.interleaved.conversation import InterleavedConversation

    def interrupted(*_, **options):
        yield from ("Once ", "upon")
        raise KeyboardInterrupt

    monkeypatch.setattr(InterleavedConversation, "interleave", interrupted)
    picture = folder_of("mmi-tiny") / "image0.png"
    code, err, page = run("--start", "A", "--image", picture)
    assert code == 130 and "Once upon" in [text for tag, text in Page(page).texts if tag == "p"]


def test_errors(run, tmp_path):
    picture = folder_of("mmi-tiny") / "image0.png"
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:200])
    started = ("--start", "A dog", "--image")
    for expected, arguments, options, message in (
        (5, ("--start", " ", "--image", picture), {}, "--start is empty"),
        (5, ("--start", "\udcff", "--image", picture), {}, "--start cannot be encoded as UTF-8"),
        (5, ("--start", "A <image> dog", "--image", picture), {}, "--start holds <image>: pictures are given"),
        (4, (*started, tmp_path / "absent.png"), {}, "absent.png: no such file"),
        (4, (*started, tmp_path / "broken.png"), {}, "broken or truncated"),
        (3, (*started, picture), {"model": "nano"}, "nano is no MM-Interleaved checkpoint, which mg-fast story needs"),
        (3, (*started, picture), {"model": tmp_path / "absent"}, "absent is not a folder"),
    ):
        code, err, page = run(*arguments, **options)
        assert (code, page) == (expected, None) and err.startswith("mg-fast: error: ") and err.count("\n") == 1
        assert message in err
    for out in ("story.txt", "absent/story.html"):
        with pytest.raises(SystemExit) as ended:
            run(*started, picture, out=out)
        assert ended.value.code == 2
