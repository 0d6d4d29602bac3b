"""What happens when the page is used, without a browser and without a model: edits, and conversations that ended."""

import asyncio
from types import SimpleNamespace

import pytest

from mg_fast.web.limits import Limits
from mg_fast.web.site import Site, WebOptions
from tests.web.conversing import FOLDER, HeldWords, SpokenPipeline

pytest.importorskip("gradio", reason="gradio is not installed: `make test` installs it")

REQUEST = SimpleNamespace(session_hash="session-one", request=SimpleNamespace(headers={"x-request-id": "request-1"}))
SETTINGS = (False, False, False, 0, 1, 100, "")


class Page:
    """The events of a page, and what was changed by them last."""

    def __init__(self, pace=None):
        from mg_fast.web.events import PageEvents

        self.site = Site(SpokenPipeline(pace), WebOptions(limits=Limits()), FOLDER)
        self.events, self.shown = PageEvents(self.site), {}

    async def do(self, event, *arguments):
        from mg_fast.web.events import OUTPUTS

        async for outputs in getattr(self.events, event)(*arguments, REQUEST):
            self.shown = dict(zip(OUTPUTS, outputs, strict=True))

    async def ask(self, text):
        await self.do("ask", {"text": text, "files": []}, *SETTINGS)

    @property
    def session(self):
        return self.site.sessions.find("session-one", "")

    def texts(self):
        return [turn.question.text for turn in self.session.turns]


def test_an_edit_replaces_the_question_that_was_the_last_one_and_can_be_cancelled():
    async def use():
        page = Page()
        for text in ("first", "second"):
            await page.ask(text)
        await page.do("edit")
        assert page.shown["box"] == {"text": "second", "files": []} and page.shown["edit"].value == "Cancel edit"
        await page.do("edit")
        assert page.shown["box"] is None and page.shown["edit"].value == "Edit last"
        await page.ask("third")
        assert page.texts() == ["first", "second", "third"]
        await page.do("edit")
        await page.ask("fourth")
        await page.ask("fifth")
        assert page.texts() == ["first", "second", "fourth", "fifth"]

    asyncio.run(use())


def test_a_question_that_is_answered_cannot_be_edited():
    held = HeldWords()

    async def use():
        page = Page(held)
        with pytest.raises(Exception, match="there is no question yet that could be edited"):
            await page.do("edit")
        for before in ([], ["first"]):
            asking = asyncio.create_task(page.ask("second" if before else "first"))
            while not (page.session and page.session.answering):
                await asyncio.sleep(0.01)
            with pytest.raises(Exception, match="is still being answered"):
                await page.do("edit")
            held.let(3)
            await asking
        # The first question is still there.
        assert page.texts() == ["first", "second"]

    asyncio.run(use())


@pytest.mark.parametrize(
    "event, arguments",
    [("ask", ({"text": "and?", "files": ["/x"]}, *SETTINGS)), ("edit", ()), ("look", (1, 0.5, False))],
    ids=["ask", "edit", "look"],
)
def test_a_page_whose_conversation_ended_is_cleared_and_told_once(event, arguments):
    async def use():
        page = Page()
        await page.ask("first")
        page.site.sessions.listen(page.session)
        page.site.sessions.close(page.session)
        # The gate opens a new session for the message.
        with pytest.raises(Exception, match="this conversation has ended"):
            await page.do(event, *arguments)
        assert page.shown["chat"] == [] and page.session.turns == []
        if event == "ask":
            assert page.shown["box"] == {"text": "and?", "files": []}
        await page.ask("anew")
        assert page.texts() == ["anew"]

    asyncio.run(use())
