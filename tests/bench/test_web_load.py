"""The load of the web page: what is counted, and what is said of it. The page itself runs in tests/web."""

import pytest

from bench import web_load
from bench.__main__ import main
from bench.web_visitors import VisitLog, WebReply, different_numbers


def test_numbers_tell_visitors_apart():
    numbers = different_numbers(50)
    assert len(set(numbers)) == 50 and all(len(number) == 4 for number in numbers)
    assert numbers == different_numbers(50)


def reply(number, text, first=0.1, whole=0.2, wait=0.05):
    return WebReply(number, text, first, whole, wait)


@pytest.fixture
def alone():
    # The third is misread, as another visitor's number.
    return {"1111": "The number is 1111.", "2222": "The number is 2222.", "3333": "The number is 2222."}


def test_mixed_answers_are_counted(alone):
    replies = [reply(number, text) for number, text in alone.items()]
    log = VisitLog([*replies, reply("1111", "The number is 1171."), reply("2222", "The number is 1111.", 3.0, 4.0)])
    log.errors, log.visits = ["refused"] * 7, 4
    found = web_load.summary(log, alone, 10.0)
    assert (found["answers"], found["same_as_alone"], found["mixed"]) == (5, 3, 1)
    assert (found["errors"], found["first_errors"], found["visits"]) == (7, ["refused"] * 5, 4)
    assert found["first_s"] == (0.1, 3.0) and found["whole_s"] == (0.2, 4.0) and found["answers_per_second"] == 0.5


def test_what_is_said(alone, monkeypatch, tmp_path, capsys):
    conditions = {"cpu": "a CPU", "torch": "2.11.0", "date": "2026-01-01", "commit": "abc", "load": 1}
    conditions |= {"sessions": 3, "threads_of_the_page": 1, "seconds": 10.0, "exit_status": 0}
    document = conditions | web_load.summary(VisitLog([reply("1111", "x")]), alone, 10.0)
    document["memory_mib"] = [300.0, 350.0, 340.0, 345.0]
    asked = []
    monkeypatch.setattr(web_load, "RECORD", tmp_path / "web.json")
    monkeypatch.setattr(web_load, "measure", lambda *given: asked.append(given) or document)
    assert web_load.load_of_page({}) == "Not measured yet: `python -m bench web --save` measures it."
    assert main(["web", "--sessions", "3", "--seconds", "10"]) == 0 and asked == [(3, 10.0, 1)]
    said = " ".join(capsys.readouterr().out.split())
    assert "3 sessions at once for 10 s, 0 visits: 1 answers (0.1 a second), 0 errors, 0 mixed; 0 answers" in said
    assert "300 MiB at first, at most 350 MiB, in the second half 340 to 345 MiB. Exit status 0." in said
    assert not web_load.RECORD.exists()
    main(["web", "--save"])
    assert asked[-1] == (50, 120.0, 1) and " ".join(web_load.load_of_page({}).split()) == said
    # Without any answer there are figures, too.
    assert web_load.summary(VisitLog(errors=["x"]), alone, 1.0)["whole_s"] == (0.0, 0.0)
