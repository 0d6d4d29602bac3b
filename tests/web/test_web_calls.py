"""What may be asked of the page, as it is known from the page itself; and what is said of errors."""

import logging
import traceback
from types import SimpleNamespace

import pytest

from mg_fast.web.calls import Calls
from mg_fast.web.faults import only_kinds_of_errors
from mg_fast.web.limits import RequestRefused
from tests.web.conversing import SpokenPipeline

FILE = {"path": "/x/picture.png", "meta": {"_type": "gradio.FileData"}}
SETTINGS = [False, False, True, 0.5, 1, 16, ""]


@pytest.fixture(scope="module")
def calls():
    """What checks a message for an event of the page by the event's name."""
    pytest.importorskip("gradio", reason="gradio is not installed: `make test` installs it")
    from mg_fast.web.page import build_page
    from mg_fast.web.site import Site, WebOptions

    page = build_page(Site(SpokenPipeline(), WebOptions(allow_urls=True), "/nowhere"))
    config = page.get_config_file()
    numbers = {call["api_name"]: call["id"] for call in config["dependencies"]}
    found = Calls(config, page.get_api_info())
    return lambda name, data, **more: found.check({"fn_index": numbers.get(name, name), "data": data, **more})


@pytest.mark.parametrize(
    "name, data",
    [
        ("ask", ["What?", [FILE], True, False, False, 0.7, None, 12, 3]),
        ("ask", ["What?", None, None, None, None, None, None, None, None]),
        ("explain", [2]),
        ("clear", []),
        ("ask_1", [{"text": "What?", "files": [FILE]}, *SETTINGS]),
        ("ask_1", [None, *SETTINGS]),
        ("regenerate", SETTINGS),
        ("look", [None, 0.8, False]),
        ("look", [2, 1, True]),
        ("add_photo", [{"text": "", "files": []}, FILE]),
        ("add_photo", [None, None]),
        ("add_by_address", [{"text": None, "files": None}, "https://a.example/a.png"]),
    ],
)
def test_what_the_page_and_programs_send(calls, name, data):
    calls(name, data, trigger_id=7)
    calls(name, data, trigger_id=None)


@pytest.mark.parametrize(
    "name, data, message",
    [
        (999, [], "no such event"),
        (None, [], "no such event"),
        (True, [], "no such event"),
        ("0", [], "no such event"),
        ("ask", ["SECRET"], "expected 9 values, got 1"),
        ("ask", None, "expected 9 values, got no list"),
        ("clear", ["SECRET"], "expected 0 values, got 1"),
        ("ask", [None, *[None] * 8], "text: expected text, got nothing"),
        ("ask", [["SECRET"], *[None] * 8], "text: expected text, got a list"),
        ("ask", ["x", None, 1, *[None] * 6], "draw: expected true or false, got a number"),
        ("ask", ["x", *[None] * 4, "SECRET", *[None] * 3], "temperature: expected a number, got text"),
        ("ask", ["x", *[None] * 7, 1.5], "seed: expected a whole number, got a number"),
        ("ask_1", ["SECRET", *SETTINGS], "Question: expected text with files, got text"),
        ("ask_1", [{"text": ["SECRET"]}, *SETTINGS], "Question: expected text with files"),
        ("ask_1", [{"files": [{"x": "SECRET"}]}, *SETTINGS], "Question: expected text with files"),
        ("ask_1", [None, False, False, True, "SECRET", 1, 16, ""], "expected a number from 0 to 2, got text"),
        ("ask_1", [None, False, False, True, 3, 1, 16, ""], "expected a number from 0 to 2, got a number"),
        ("ask_1", [None, None, *SETTINGS[1:]], "Draw a picture: expected true or false, got nothing"),
        ("look", ["SECRET", 0.8, False], "Picture: expected a whole number, got text"),
        ("relook", [float("nan"), False], "Strength: expected a number from 0 to 1"),
        ("add_photo", [None, "SECRET"], "Camera: expected a file, got text"),
        ("add_by_address", [None, 5], "Address: expected text, got a number"),
    ],
)
def test_what_does_not_fit(calls, name, data, message):
    with pytest.raises(RequestRefused, match=message) as refused:
        calls(name, data)
    assert "SECRET" not in str(refused.value)


def test_a_trigger_is_a_number(calls):
    with pytest.raises(RequestRefused, match="trigger_id: expected a whole number, got text"):
        calls("clear", [], trigger_id="SECRET")


def test_errors_are_logged_by_their_kinds(capsys, caplog):
    caplog.set_level("INFO")
    library = SimpleNamespace(traceback=traceback)
    with only_kinds_of_errors([library]):
        try:
            raise ValueError("SECRET")
        except ValueError:
            library.traceback.print_exc()
            for name in ("uvicorn.error", "asyncio"):
                logging.getLogger(name).exception("SECRET %s", "SECRET")
        assert library.traceback.format_exc is traceback.format_exc
        logging.getLogger("uvicorn.error").info("started")
    assert library.traceback is traceback and "SECRET" not in caplog.text + capsys.readouterr().err
    assert caplog.text.count("ValueError at test_web_calls.py:") == 3 and "started" in caplog.text
