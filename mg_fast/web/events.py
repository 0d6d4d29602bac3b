"""What happens when the page is used. Errors that a user can do something about are shown to the user."""

import asyncio
import html
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import gradio as gr

from . import shown
from .addresses import fetched
from .examples import EXAMPLES
from .limits import RequestRefused
from .sessions import AskedQuestion, BrowserSession
from .site import Site
from .store import names_in
from .talk import DrawingSteps, InLine, TextSoFar, TurnDone
from .visits import browser_of

# Seconds for an answer that is stopped to end.
STOPS_WITHIN_S = 30.0
# Pictures that are fetched by their URLs at the same time; each takes one of the threads that uploads need, too.
MOST_FETCHED = 2


def session_of(site: Site, request: gr.Request) -> BrowserSession:
    """The session of a request.

    Raises:
        RequestRefused: there is no place for it, or it belongs to another browser.
    """
    return site.sessions.open(request.session_hash, browser_of(request.request.headers.get("cookie", "")))


def request_id_of(request: gr.Request) -> str | None:
    """The id that the gate gave to a request."""
    return request.request.headers.get("x-request-id")


# What the events of the page may change, in order; see `_outputs`.
OUTPUTS = ("chat", "box", "bars", "choice", "panel", "stop", "edit", "note")


class ConversationEnded(RequestRefused):
    """The session of a page that is still open was closed, because the page was not used for long."""


def going_on(session: BrowserSession) -> BrowserSession:
    """The session.

    Raises:
        ConversationEnded: once, where it follows another one that its page does not know to have ended.
    """
    if session.follows:
        session.follows = False
        raise ConversationEnded("this conversation has ended, because it was not used for long: ask anew")
    return session


def told(refusal: RequestRefused) -> gr.Error:
    """A refusal as gradio shows it, which takes its text for HTML."""
    return gr.Error(html.escape(str(refusal)), print_exception=False)


async def stop_answer(session: BrowserSession) -> None:
    """Ends what a session is being answered, and waits for it.

    Raises:
        RequestRefused: it does not end in time.
    """
    session.stop.set()
    for _ in range(int(STOPS_WITHIN_S / 0.05)):
        if not session.answering:
            session.stop.clear()
            return
        await asyncio.sleep(0.05)
    raise RequestRefused("the answer does not end: try again in a moment")


class PageEvents:
    """The events of the page of a site.

    Outputs are the conversation, the question, the bars, the choice of a picture, the panel, the button that stops, the
    button that edits, and the note that says so.
    """

    def __init__(self, site: Site):
        self.site = site
        self._fetching = asyncio.Semaphore(MOST_FETCHED)

    async def ask(
        self, box: dict | None, draw, ocr, measure, temperature, top_p, tokens, seed, request: gr.Request
    ) -> AsyncIterator[tuple]:
        """Answers the question in the box."""
        box = box or {}
        try:
            settings = _settings(draw, ocr, measure, temperature, top_p, tokens, seed)
            question = AskedQuestion(box.get("text") or "", tuple(box.get("files") or ()), **settings)
            session = going_on(session_of(self.site, request))
            async for outputs in self._answered(session, question, request, replacing=session.editing):
                yield outputs
        except RequestRefused as refusal:
            if isinstance(refusal, ConversationEnded):
                # The question stays, without the pictures that have ended as well.
                yield _cleared(box={"text": box.get("text") or "", "files": []})
            raise told(refusal) from None

    async def regenerate(
        self, draw, ocr, measure, temperature, top_p, tokens, seed, request: gr.Request
    ) -> AsyncIterator[tuple]:
        """Answers the last question once more, with the settings as they are now."""
        try:
            session = going_on(session_of(self.site, request))
            if session.answering:
                raise RequestRefused("the last question is still being answered: stop it, or wait for its end")
            if not session.turns:
                raise RequestRefused("there is no question yet that could be answered again")
            settings = _settings(draw, ocr, measure, temperature, top_p, tokens, seed)
            question = replace(session.turns[-1].question, **settings)
            async for outputs in self._answered(session, question, request, replacing=True):
                yield outputs
        except RequestRefused as refusal:
            if isinstance(refusal, ConversationEnded):
                yield _cleared()
            raise told(refusal) from None

    async def edit(self, request: gr.Request) -> AsyncIterator[tuple]:
        """Puts the last question back into the box; the next one that is asked takes its place. Once more ends that."""
        try:
            session = going_on(session_of(self.site, request))
            if session.answering:
                raise RequestRefused("the last question is still being answered: stop it, or wait for its end")
            if not session.turns:
                raise RequestRefused("there is no question yet that could be edited")
        except RequestRefused as refusal:
            if isinstance(refusal, ConversationEnded):
                yield _cleared()
            raise told(refusal) from None
        session.editing = not session.editing
        question = session.turns[-1].question
        box = {"text": question.text, "files": list(question.pictures)} if session.editing else None
        yield _outputs(box=box, **_editing(session.editing))

    async def clear(self, request: gr.Request) -> tuple:
        """Forgets the conversation."""
        try:
            session = session_of(self.site, request)
            if session.answering:
                await stop_answer(session)
        except RequestRefused as refusal:
            raise told(refusal) from None
        session.clear()
        self.site.store.drop_all_of(session.key)
        return _cleared(box=None)

    async def stop(self, request: gr.Request) -> None:
        """Ends the answer where it is."""
        try:
            session = session_of(self.site, request)
        except RequestRefused as refusal:
            raise told(refusal) from None
        if session.answering:
            session.stop.set()

    def example(self, number: int) -> Callable:
        """The event that puts an example into the box."""
        example = EXAMPLES[number]

        async def use(request: gr.Request) -> tuple:
            try:
                session = session_of(self.site, request)
                files = []
                if example.scene is not None:
                    data, kind = await asyncio.to_thread(example.scene.file)
                    files = [self.site.store.put(data, kind, browser=session.browser)]
            except RequestRefused as refusal:
                raise told(refusal) from None
            return {"text": example.text, "files": files}, example.draw

        return use

    async def add_photo(self, box: dict | None, photo: dict | None, request: gr.Request) -> tuple:
        """Adds the camera's picture to the question; both come as gradio sends them."""
        text, files = (box or {}).get("text"), list(names_in((box or {}).get("files")))
        return _with_file({"text": text, "files": files}, (photo or {}).get("path")), None

    async def add_by_address(self, box: dict | None, url: str, request: gr.Request) -> tuple:
        """Fetches a picture by its URL, and adds it to the question."""
        site = self.site
        outcome = "error"
        try:
            session = session_of(site, request)
            if not site.options.allow_urls:
                raise RequestRefused("this server fetches no pictures")
            async with self._fetching:
                data = await asyncio.to_thread(fetched, url.strip(), site.options.limits.picture_bytes)
            name = await site.desk.keep(data, session.browser)
            outcome = "ok"
        except RequestRefused as refusal:
            outcome = "refused"
            raise told(refusal) from None
        finally:
            site.metrics.done("fetch", outcome)
        return _with_file(box, name), ""

    async def look(
        self, number: int | None, strength: float, windows: bool, request: gr.Request
    ) -> AsyncIterator[tuple]:
        """Shows what the model looked at in a picture."""
        try:
            session = going_on(session_of(self.site, request))
            async for update in self.site.looking.explain(session, number or 1, request_id_of(request)):
                if isinstance(update, InLine):
                    yield _outputs(panel=f'<p class="mg-hint">{shown.place_note(update.place, update.length)}</p>')
                else:
                    yield _outputs(panel=shown.look_panel(update, strength, windows))
        except RequestRefused as refusal:
            if isinstance(refusal, ConversationEnded):
                yield _cleared()
            raise told(refusal) from None

    async def relook(self, strength: float, windows: bool, request: gr.Request) -> str:
        """Shows the same explanation with another strength, or with other layers."""
        try:
            session = session_of(self.site, request)
        except RequestRefused as refusal:
            raise told(refusal) from None
        return shown.look_panel(session.explanation, strength, windows)

    async def _answered(
        self, session: BrowserSession, question: AskedQuestion, request: gr.Request, *, replacing: bool
    ) -> AsyncIterator[tuple]:
        """The outputs on the way to an answer. A refusal leaves the page as it is, or as it was before the question."""
        # Texts before the question do not change while it is answered.
        before = shown.messages(session.turns[:-1] if replacing else session.turns)
        begun, edited = False, session.editing
        asked = self.site.talk.ask(session, question, request_id_of(request), replacing=replacing)
        try:
            async for update in asked:
                if isinstance(update, TurnDone):
                    yield _outputs(
                        chat=shown.messages(session.turns),
                        bars=shown.stage_bars(update.turn.stages),
                        choice=_choice(session.pictures()),
                        panel=shown.look_panel(None, 0, False),
                        stop=_stop_button(False),
                    )
                    return
                now = [*before, shown.question_message(question), _message(update, question.draw)]
                if begun:
                    yield _outputs(chat=now)
                    continue
                # The edit is over: what comes after this is about this question, and not about a later edit.
                begun, session.editing = True, False
                yield _outputs(chat=now, box=None, stop=_stop_button(True), **_editing(False))
        except RequestRefused:
            if begun:
                kept = {"text": question.text, "files": list(question.pictures)}
                # An edit goes on, because its question is in the box again.
                session.editing = edited
                yield _outputs(
                    chat=shown.messages(session.turns), box=kept, stop=_stop_button(False), **_editing(edited)
                )
            raise


def _outputs(**given) -> tuple:
    """Outputs by their names; those that are not given stay as they are."""
    return tuple(given.get(name, gr.skip()) for name in OUTPUTS)


def _cleared(**more) -> tuple:
    """The outputs of a page without a conversation."""
    return _outputs(
        chat=[],
        bars=shown.stage_bars(()),
        choice=_choice([]),
        panel=shown.look_panel(None, 0, False),
        stop=_stop_button(False),
        **_editing(False),
        **more,
    )


def _editing(on: bool) -> dict:
    """Shows whether the last question is being edited."""
    button = gr.Button("Cancel edit" if on else "Edit last", variant="primary" if on else "secondary")
    return {"edit": button, "note": gr.HTML(visible=on)}


def _stop_button(running: bool) -> gr.Button:
    """The button that ends an answer, which can be pressed while there is one."""
    return gr.Button(interactive=running, variant="stop" if running else "secondary")


def _choice(names: Sequence[str]) -> gr.Radio:
    """The choice among the pictures of a conversation, with the last one chosen; one picture is no choice."""
    numbers = range(1, len(names) + 1)
    return gr.Radio(choices=[(f"Picture {i}", i) for i in numbers], value=len(names) or None, visible=len(names) > 1)


def _message(update, draw: bool) -> dict:
    """An answer that is not complete yet, as a message. Where a picture is asked for, its wish is not shown yet."""
    if isinstance(update, InLine):
        return shown.answer_so_far("", shown.place_note(update.place, update.length))
    if isinstance(update, DrawingSteps):
        return shown.answer_so_far(shown.without_wishes(update.text), f"Drawing: step {update.step} of {update.total}")
    text = update.text if isinstance(update, TextSoFar) else ""
    return shown.answer_so_far(shown.without_wishes(text) if draw else text)


def _settings(draw, ocr, measure, temperature, top_p, tokens, seed) -> dict:
    """The settings of the page as those of a question; a top-p of 1 and an empty seed are no settings.

    Raises:
        RequestRefused: the seed is no whole number.
    """
    seed = str(seed or "").strip()
    if seed and not re.fullmatch(r"-?\d{1,18}", seed, re.ASCII):
        raise RequestRefused("the seed is a whole number of at most 18 digits, or empty")
    return {
        "draw": bool(draw),
        "ocr": bool(ocr),
        "measure": bool(measure),
        "temperature": float(temperature or 0),
        "top_p": None if top_p is None or top_p >= 1 else float(top_p),
        "tokens": None if tokens is None else int(tokens),
        "seed": int(seed) if seed else None,
    }


def _with_file(box: dict | None, name: str | None) -> dict:
    """The question with one more picture."""
    box = box or {}
    return {"text": box.get("text") or "", "files": [*(box.get("files") or ()), *([name] if name else [])]}
