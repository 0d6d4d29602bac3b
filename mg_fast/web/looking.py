"""What the model looked at: the heat map of a picture of the last question, as layers that a page lays over it."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

from PIL import Image

from ..engine.explain import Explanation
from ..engine.explain import draw as draw_heat
from .limits import RequestRefused
from .sessions import BrowserSession
from .talk import STOPPING, TOLD, InLine, Talk, place_of
from .uploads import written

logger = logging.getLogger("mg_fast.web")


@dataclass(frozen=True)
class LookedAt:
    """An explanation as pictures of the same size.

    Attributes:
        question: which was asked about this picture alone.
        answer: the model's greedy answer to it.
        picture: the name in the store of the picture as the model saw it.
        heat: of the picture in grey under its heat map.
        windows: of the same with the borders of the windows.
    """

    question: str
    answer: str
    picture: str
    heat: str
    windows: str


class Looking:
    """Explains the pictures of the last question. It is used from one event loop.

    Args:
        pipeline: a pipeline whose `explain` shows what its model mined.
        talk: whose line and threads it shares.
    """

    def __init__(self, pipeline, talk: Talk):
        self.pipeline, self.talk = pipeline, talk

    async def explain(
        self, session: BrowserSession, number: int, request_id: str | None = None
    ) -> AsyncIterator[InLine | LookedAt]:
        """Yields places in the line, and at the end what the model looked at in a picture.

        The last question is asked once more about this picture alone and without the conversation before it, because
        that is what a heat map can be made of.

        Args:
            number: which of the pictures of the conversation, from 1 on.
            request_id: names the request in the log.

        Raises:
            RequestRefused: there is no such picture, or it cannot be explained.
        """
        request_id = request_id or secrets.token_hex(8)
        talk, names, outcome = self.talk, session.pictures(), "error"
        try:
            if talk.draining:
                raise RequestRefused(STOPPING)
            if not names:
                raise RequestRefused("no picture has been asked about yet")
            if session.answering:
                raise RequestRefused("the last question is still being answered: wait for its end")
            if not 1 <= number <= len(names):
                raise RequestRefused(f"there is no picture {number}: the conversation has {len(names)}")
            question = session.turns[-1].question.text
            data = talk.store.claim(names[number - 1], session.browser, session.key).data
            with talk.line.enter() as ticket:
                while ticket.place:
                    yield InLine(ticket.place, talk.line.waiting)
                    await ticket.moved()
                # A caller who stops reading does not end the work, whose thread could not be ended anyway. The place
                # in line is kept until then.
                layers = await asyncio.shield(asyncio.ensure_future(talk.run(lambda: self._layers(data, question))))
            found = self._kept(session, question, *layers)
            outcome = "ok"
            yield found
        except RequestRefused:
            outcome = "refused"
            raise
        except TOLD as error:
            outcome = "refused"
            raise RequestRefused(str(error)) from None
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "cancelled" if outcome == "error" else outcome
            raise
        except Exception as error:
            logger.error("request=%s kind=explain error=%s at=%s", request_id, type(error).__name__, place_of(error))
            raise RequestRefused(f"explaining failed; the server's log tells more under {request_id}") from None
        finally:
            talk.metrics.done("explain", outcome)
            logger.info("request=%s kind=explain outcome=%s", request_id, outcome)

    def _layers(self, data: bytes, question: str) -> tuple[str, list[Image.Image]]:
        explanation: Explanation = self.pipeline.explain(data, question, max_new_tokens=self.talk.limits.tokens)
        heat = explanation.image
        seen = explanation.picture.resize(heat.size, Image.Resampling.BICUBIC)
        # A window has as many positions along its side as the weights of one query.
        windows = len(explanation.map) // explanation.weights.shape[-1]
        bordered = draw_heat(explanation.picture, explanation.map, windows=windows)
        return explanation.answer.text, [seen, heat, bordered]

    def _kept(self, session: BrowserSession, question: str, answer: str, layers: list[Image.Image]) -> LookedAt:
        if session.closed:
            raise RequestRefused("this session has ended: reload the page")
        store = self.talk.store
        for name in session.looked:
            store.drop(name)
        files = [written(layer, photo=True) for layer in layers]
        session.looked = tuple(
            store.put(data, kind, browser=session.browser, owner=session.key) for data, kind in files
        )
        return LookedAt(question, answer, *session.looked)
