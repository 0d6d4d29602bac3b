"""The page in a real browser without a window: `make web-test`."""

import base64
import io
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mg_fast.web.limits import Limits
from tests.web.conversing import HeldWords, SpokenPipeline
from tests.web.serving import running, until
from tests.web.test_web_uploads import file_of

# Where screenshots are kept for somebody to look at; none are kept by default.
KEPT = os.environ.get("MG_FAST_SCREENSHOTS")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
WAIT_MS = 60_000


@pytest.fixture(scope="module", autouse=True)
def browser():
    pytest.importorskip("gradio", reason="gradio is not installed: `make test` installs it")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: `make web-test` installs it"
    )
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no chromium on this machine: `make web-test` installs it where apt-get is at hand")
    with playwright.sync_playwright() as started:
        # Chromium has no sandbox for the administrator, who runs tests in containers.
        # It has no camera either, but can play one, which nobody has to allow.
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        launched = started.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage", *camera]
        )
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server as a new user, and collects what goes wrong in it."""
    contexts, faults = [], []

    def opened(server, *, size="desktop", scheme="light", **options):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}") or dialog.dismiss())
        page.goto(server.address)
        page.wait_for_selector("#mg-box textarea")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def ask(page, text, *files):
    if files:
        page.set_input_files("#mg-box input[type=file]", [str(file) for file in files])
        page.wait_for_function("n => document.querySelectorAll('#mg-box img').length >= n", arg=len(files))
    page.fill("#mg-box textarea", text)
    page.press("#mg-box textarea", "Enter")


# Lets a file come to the question as if it were pasted, or dragged there and dropped.
BRING = """([data, how]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], 'a.png', {type: 'image/png'}));
    const box = document.querySelector('#mg-box textarea'), more = {bubbles: true, cancelable: true};
    if (how === 'paste') box.dispatchEvent(new ClipboardEvent('paste', {clipboardData: transfer, ...more}));
    else for (const kind of ['dragenter', 'dragover', 'drop'])
        box.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, ...more}));
}"""


def said(page):
    """The text of the conversation."""
    return page.inner_text("#mg-chat")


def answered(page, count=1):
    """Waits until so many answers are complete, which then have their figures; returns the conversation's text."""
    try:
        page.wait_for_function(
            "n => (document.querySelector('#mg-chat').innerText.match(/to the first token/g) || []).length >= n",
            arg=count,
        )
    except Exception as error:
        raise AssertionError(f"no answer came; the page shows:\n{page.inner_text('body')}") from error
    return said(page)


def shot(page, name):
    if KEPT:
        Path(KEPT).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{KEPT}/{name}.png")


# ---- conversation


def test_a_scene_is_uploaded_and_its_number_read(server, open_page, scenes):
    page = open_page(server)
    ask(page, "What does the sign say?", scenes["4083"])
    assert "The number is 4083." in answered(page)
    assert re.search(r"\d+ ms to the first token|\d+\.\d s to the first token", said(page))
    assert "prompt tokens from the cache" in said(page)
    assert page.locator("#mg-chat img").count() == 1
    # The bars of the stages have come.
    page.wait_for_selector("#mg-bars .mg-bar")
    assert page.locator("#mg-bars .mg-name").all_inner_texts() == [
        "preprocess",
        "towers",
        "mining",
        "prefill",
        "decode",
    ]
    ask(page, "How many circles are there?")
    assert "circle" in answered(page, 2)


def test_an_answer_appears_in_pieces_and_can_be_stopped(open_page):
    held = HeldWords()
    with running(SpokenPipeline(held)) as server:
        page = open_page(server)
        ask(page, "1 2 3 4")
        words = ("You", "You said", "You said 1", "You said 1 2")
        for text, longer in zip(words, words[1:]):
            held.let(1)
            page.wait_for_function("text => document.querySelector('#mg-chat').innerText.includes(text)", arg=text)
            assert longer not in said(page)
        page.click("#mg-stop")
        until(lambda: any(session.stop.is_set() for session in server.site.sessions._sessions.values()))
        held.let()
        text = answered(page)
        assert "stopped" in text and "You said 1 2" in text and "You said 1 2 3" not in text
        page.close()


def test_two_users_see_nothing_of_each_other(open_page):
    held = HeldWords()
    with running(SpokenPipeline(held), Limits(parallel=2)) as server:
        one, two = open_page(server), open_page(server)
        ask(one, "the first user's words")
        ask(two, "the second user's words")
        held.let()
        assert "first user's" in answered(one) and "second" not in one.inner_text("#mg-chat")
        assert "second user's" in answered(two) and "first user" not in two.inner_text("#mg-chat")
        # Who reloads begins anew.
        one.reload()
        one.wait_for_selector("#mg-box textarea")
        assert "words" not in one.inner_text("#mg-chat")


def test_whoever_waits_sees_its_place(open_page):
    held = HeldWords()
    with running(SpokenPipeline(held)) as server:
        pages = [open_page(server) for _ in range(3)]
        ask(pages[0], "a")
        until(held.reached.is_set)
        for number, page in enumerate(pages[1:], 1):
            ask(page, "b")
            page.wait_for_function(
                "n => document.querySelector('#mg-chat').innerText.includes(`In line: place ${n} of`)", arg=number
            )
        held.let()
        for page in pages:
            answered(page)


def test_regenerate_edit_and_clear(open_page):
    with running(SpokenPipeline()) as server:
        page = open_page(server)
        ask(page, "first")
        answered(page)
        ask(page, "a note")
        answered(page, 2)
        before = server.site.metrics.text()
        page.click("#mg-regenerate")
        until(lambda: server.site.metrics.text() != before)
        answered(page, 2)
        assert said(page).count("You said a note") == 1
        page.click("#mg-edit")
        page.wait_for_selector("#mg-note", state="visible")
        page.click("#mg-edit")
        page.wait_for_selector("#mg-note", state="hidden")
        assert page.input_value("#mg-box textarea") == ""
        page.click("#mg-edit")
        page.wait_for_function("() => document.querySelector('#mg-box textarea').value === 'a note'")
        ask(page, "second")
        page.wait_for_function("() => document.querySelector('#mg-chat').innerText.includes('You said second')")
        assert "You said first" in answered(page, 2) and "a note" not in said(page)
        page.click("#mg-clear")
        page.wait_for_function("() => !document.querySelector('#mg-chat').innerText.includes('second')")


def test_pictures_are_pasted_dropped_and_taken_by_the_camera(open_page):
    def wait_for(count):
        page.wait_for_function("n => document.querySelectorAll('#mg-box img').length === n", arg=count)

    with running(SpokenPipeline()) as server:
        page = open_page(server)
        data = base64.b64encode(file_of("PNG")).decode()
        for count, how in enumerate(("paste", "drop"), 1):
            page.evaluate(BRING, [data, how])
            wait_for(count)
        page.click("text=Camera >> nth=0")
        page.click("text=Click to Access Webcam")
        page.wait_for_function("() => (document.querySelector('#mg-camera video') || {}).videoWidth > 0")
        page.click('#mg-camera button[aria-label="capture photo"]')
        wait_for(3)
        ask(page, "Three pictures")
        answered(page)
        [session] = server.site.sessions._sessions.values()
        sizes = [Image.open(io.BytesIO(server.site.store._kept[name].data)).size for name in session.pictures()]
        assert sizes[:2] == [(20, 10), (20, 10)] and min(sizes[2]) >= 240
        page.wait_for_selector("#mg-choice label")
        assert page.locator("#mg-choice label").all_inner_texts() == ["Picture 1", "Picture 2", "Picture 3"]


def test_html_is_shown_as_text(open_page):
    with running(SpokenPipeline()) as server:
        page = open_page(server)
        script = "<script>alert(1)</script><img src=x onerror=alert(2)>"
        ask(page, script)
        assert answered(page).count(script) == 2
        assert page.locator("#mg-chat img[src='x']").count() == 0


def test_a_refusal_is_told_and_the_question_kept(open_page):
    with running(SpokenPipeline(), Limits(characters=20)) as server:
        page = open_page(server)
        ask(page, "x" * 21)
        page.wait_for_function("() => document.body.innerText.includes('may have 20 characters')")
        assert page.input_value("#mg-box textarea") == "x" * 21
        ask(page, "short")
        assert "You said short" in answered(page)


def test_a_file_that_is_no_picture(open_page, tmp_path):
    (tmp_path / "a.png").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    with running(SpokenPipeline()) as server:
        page = open_page(server)
        page.set_input_files("#mg-box input[type=file]", str(tmp_path / "a.png"))
        page.wait_for_function("() => document.body.innerText.includes('is no picture')")


# ---- drawing, explaining, examples


def test_a_drawn_picture_has_its_prompt_and_a_download(server, open_page, broken_painter):
    page = open_page(server)
    page.check("#mg-draw input")
    ask(page, "Draw a red star on a white background.")
    text = answered(page)
    # The prompt stands below its picture, and not also in the answer.
    assert text.count("Drawn: a red star on a white background") == 1 and "<h>" not in text
    page.wait_for_function("() => [...document.querySelectorAll('#mg-chat img')].some(i => i.naturalWidth === 128)")
    with page.expect_download() as download:
        page.click("#mg-chat a[download]")
    assert download.value.suggested_filename.endswith(".png")
    assert Image.open(download.value.path()).size == (128, 128)
    ask(page, "Draw a red star on a white background.")
    page.wait_for_function("() => document.querySelector('#mg-chat').innerText.includes('Drawing: step')")
    page.click("#mg-stop")
    assert "No picture: stopped while drawing" in answered(page, 2)
    broken_painter()
    ask(page, "Draw a red star on a white background.")
    assert "No picture: drawing failed: the paint is empty" in answered(page, 3)


def test_the_panel_shows_what_the_model_looked_at(server, open_page, scenes):
    page = open_page(server)
    ask(page, "What does the sign say?", scenes["4083"])
    answered(page)

    def heat():
        page.click("#mg-look")
        page.wait_for_function(
            "() => [...document.querySelectorAll('#mg-panel img')].filter(i => i.complete).length === 2"
        )
        return page.locator("#mg-panel img").nth(1).get_attribute("src")

    def pixels(source):
        return page.evaluate("async s => (await (await fetch(s)).text()).length", source)

    number = heat()
    first = pixels(number)
    assert "opacity:0.8" in page.locator("#mg-panel img").nth(1).get_attribute("style").replace(" ", "")
    page.check("#mg-windows input")
    page.wait_for_function("() => (document.querySelectorAll('#mg-panel img')[2] || {}).naturalWidth === 768")
    shot(page, "looked-at")
    page.uncheck("#mg-windows input")
    page.wait_for_function("() => document.querySelectorAll('#mg-panel img').length === 2")
    # The slider is pulled to its middle.
    slider = page.locator("#mg-strength input[type=range]")
    slider.click(position={"x": slider.bounding_box()["width"] / 2, "y": 4})
    page.wait_for_function(
        "() => Math.abs(Number(document.querySelectorAll('#mg-panel img')[1].style.opacity) - 0.5) < 0.06"
    )
    ask(page, "What colour is the background?")
    answered(page, 2)
    page.wait_for_function("() => document.querySelectorAll('#mg-panel img').length === 0")
    assert pixels(heat()) != first


def test_an_example_begins_a_conversation(server, open_page):
    page = open_page(server)
    page.click("#mg-example-0")
    page.wait_for_selector("#mg-box img")
    page.press("#mg-box textarea", "Enter")
    assert "4083" in answered(page)


def test_a_page_without_a_place_says_why(open_page):
    with running(SpokenPipeline(), Limits(sessions=1)) as server:
        first, second = open_page(server), open_page(server)
        ask(first, "hello")
        assert "You said hello" in answered(first)
        ask(second, "hello")
        second.wait_for_selector("text=all 1 places of this server are taken")


# ---- looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_looks(server, open_page, scenes, size, scheme):
    page = open_page(server, size=size, scheme=scheme)
    shot(page, f"empty-{size}-{scheme}")
    ask(page, "What does the sign say?", scenes["4083"])
    answered(page)
    page.click("#mg-look")
    page.wait_for_selector("#mg-panel img")
    shot(page, f"answered-{size}-{scheme}")
    # Nothing lies beyond the right edge, and what one types into can be seen.
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    for selector in ("#mg-box textarea", "#mg-stop", "#mg-chat"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= SIZES[size][0]
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    bright = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert (bright > 128) == (scheme == "light")
