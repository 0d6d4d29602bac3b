"""What programs call, by their names in docs/web.md: `ask`, `clear`, `explain` and `limits`."""

import dataclasses

import gradio as gr

from ..errors import quoted
from .events import going_on, request_id_of, session_of, stop_answer
from .limits import RequestRefused
from .looking import LookedAt
from .sessions import AnsweredTurn, AskedQuestion
from .site import Site
from .talk import DrawingSteps, InLine, TextSoFar, TurnDone


class Endpoints:
    """The endpoints of a site. Each client has a conversation of its own.

    gradio reads from the annotations what a program gives and gets. Of a generator it wants the kind of each piece.
    """

    def __init__(self, site: Site):
        self.site = site

    async def ask(
        self,
        request: gr.Request,
        text: str,
        pictures: list = None,
        draw: bool = False,
        ocr: bool = False,
        measure: bool = False,
        temperature: float = 0.0,
        top_p: float = None,
        tokens: int = None,
        seed: int = None,
    ) -> dict:
        """Asks a question about pictures in the client's conversation; the answer comes piece by piece.

        Each piece is an object with `state` (`waiting`, `answering`, `drawing` or `done`) and `text` so far. The last
        one also has the figures of the answer, its drawn pictures with their prompts, and the reason if none came.
        """
        try:
            names = _names(pictures)
            session = going_on(session_of(self.site, request))
            question = AskedQuestion(
                text, names, bool(draw), bool(ocr), temperature, top_p, tokens, seed, bool(measure)
            )
            async for update in self.site.talk.ask(session, question, request_id_of(request)):
                yield _piece(update)
        except RequestRefused as refusal:
            raise gr.Error(str(refusal), print_exception=False) from None

    async def clear(self, request: gr.Request) -> bool:
        """Forgets the client's conversation."""
        try:
            session = session_of(self.site, request)
            if session.answering:
                await stop_answer(session)
        except RequestRefused as refusal:
            raise gr.Error(str(refusal), print_exception=False) from None
        session.clear()
        self.site.store.drop_all_of(session.key)
        return True

    async def explain(self, request: gr.Request, picture: int = 1) -> dict:
        """Shows what the model looked at in a picture of the conversation (from 1 on) for the last question."""
        try:
            session = going_on(session_of(self.site, request))
            async for update in self.site.looking.explain(session, picture, request_id_of(request)):
                yield _layers(update) if isinstance(update, LookedAt) else _piece(update)
        except RequestRefused as refusal:
            raise gr.Error(str(refusal), print_exception=False) from None

    async def limits(self) -> dict:
        """What the server gives to its users, and how many wait."""
        line = self.site.line
        return dataclasses.asdict(self.site.options.limits) | {"waiting": line.waiting, "running": line.running}


def _names(pictures: object) -> tuple[str, ...]:
    """The names of uploaded files, as gradio's clients send them.

    Raises:
        RequestRefused: this is no list of files.
    """
    files = [] if pictures is None else pictures
    if isinstance(files, list) and all(isinstance(file, dict) and isinstance(file.get("path"), str) for file in files):
        return tuple(file["path"] for file in files)
    raise RequestRefused(
        f"pictures: expected a list of files, each by gradio_client's handle_file, got {quoted(pictures)}"
    )


def _piece(update) -> dict:
    if isinstance(update, InLine):
        return {"state": "waiting", "text": "", "place": update.place, "length": update.length}
    if isinstance(update, TextSoFar):
        return {"state": "answering", "text": update.text}
    if isinstance(update, DrawingSteps):
        return {"state": "drawing", "text": update.text, "step": update.step, "total": update.total}
    return _answer(update.turn) if isinstance(update, TurnDone) else {}


def _answer(turn: AnsweredTurn) -> dict:
    return {
        "state": "done",
        "text": turn.text,
        **dataclasses.asdict(turn.figures),
        "drawn": [_file(name) for name, _ in turn.drawn],
        "prompts": [prompt for _, prompt in turn.drawn],
        "no_picture": turn.no_picture,
        "stages": {name: sum(s for n, s in turn.stages if n == name) for name, _ in turn.stages},
    }


def _layers(found: LookedAt) -> dict:
    layers = {layer: _file(getattr(found, layer)) for layer in ("picture", "heat", "windows")}
    return {"state": "done", "question": found.question, "answer": found.answer, **layers}


def _file(name: str) -> dict:
    """A picture of the store, as gradio's clients fetch it."""
    return {"path": name, "orig_name": name.rsplit("/", 1)[-1], "meta": {"_type": "gradio.FileData"}}
