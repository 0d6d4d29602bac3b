"""What the model looked at: the heat map of a picture of the last question, as layers that a page lays over it."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..engine.explain import Explanation
from ..errors import quoted
from .limits import RequestRefused
from .line import LineTicket
from .sessions import BrowserSession
from .talk import STOPPING, TOLD, InLine, LastUpdate, Talk, place_of
from .uploads import written

logger = logging.getLogger("mg_fast.web")

# How opaque the layer of a heat map is where it is hot and where it is cold, with 1 for full strength.
HOT, SHADE = 0.9, 0.4


@dataclass(frozen=True)
class LookedAt:
    """An explanation as pictures of the same size.

    Attributes:
        question: which was asked about this picture alone.
        answer: the model's greedy answer to it.
        picture: the name in the store of the picture as the model saw it.
        heat: of the picture in grey under its heat map.
        windows: of the same with the borders of the windows.
        glow: of the heat alone, a shade where it is cold, to be laid over the picture in its colours.
        borders: of the borders alone.
    """

    question: str
    answer: str
    picture: str
    heat: str
    windows: str
    glow: str
    borders: str


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
        talk, names = self.talk, session.pictures()
        try:
            if talk.draining:
                raise RequestRefused(STOPPING)
            if type(number) is not int:
                raise RequestRefused(f"picture: expected a whole number from 1 on, got {quoted(number)}")
            if not names:
                raise RequestRefused("no picture has been asked about yet")
            if session.answering:
                raise RequestRefused("the last question is still being answered: wait for its end")
            if not 1 <= number <= len(names):
                raise RequestRefused(f"there is no picture {number}: the conversation has {len(names)}")
            question = session.turns[-1].question.text
            data = talk.store.claim(names[number - 1], session.browser, session.key).data
            ticket = talk.line.enter()
        except RequestRefused:
            talk.metrics.refused("explain")
            logger.info("request=%s kind=explain outcome=refused", request_id)
            raise
        following = talk.follow(
            session, lambda updates: self._explain(session, data, question, ticket, updates, request_id)
        )
        async with contextlib.aclosing(following):
            async for update in following:
                yield update

    async def _explain(
        self,
        session: BrowserSession,
        data: bytes,
        question: str,
        ticket: LineTicket,
        updates: asyncio.Queue,
        request_id: str,
    ) -> None:
        talk, outcome = self.talk, "error"
        last: object = RequestRefused(f"explaining failed; the server's log tells more under {request_id}")
        try:
            with ticket:
                await talk.turn(session, ticket, updates)
                layers = await talk.run(lambda: self._layers(data, question))
            outcome, last = "ok", LastUpdate(self._kept(session, question, *layers))
        except TOLD as error:
            outcome, last = "refused", error if isinstance(error, RequestRefused) else RequestRefused(str(error))
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception as error:
            logger.error("request=%s kind=explain error=%s at=%s", request_id, type(error).__name__, place_of(error))
        finally:
            session.answering = False
            session.stop.clear()
            updates.put_nowait(last)
            talk.metrics.done("explain", outcome)
            logger.info("request=%s kind=explain outcome=%s", request_id, outcome)

    def _layers(self, data: bytes, question: str) -> tuple[str, list[tuple[bytes, str]]]:
        explanation: Explanation = self.pipeline.explain(data, question, max_new_tokens=self.talk.limits.tokens)
        heat = explanation.image
        seen = explanation.picture.resize(heat.size, Image.Resampling.BICUBIC)
        # A window has as many positions along its side as the weights of one query.
        windows = len(explanation.map) // explanation.weights.shape[-1]
        layers = [(layer, True) for layer in (seen, heat, bordered(heat, windows))]
        layers += [(glow(heat), False), (bordered(Image.new("RGBA", heat.size), windows), False)]
        return explanation.answer.text, [written(layer, photo=photo) for layer, photo in layers]

    def _kept(self, session: BrowserSession, question: str, answer: str, files: list[tuple[bytes, str]]) -> LookedAt:
        if session.closed:
            raise RequestRefused("this session has ended: reload the page")
        store = self.talk.store
        for name in session.looked:
            store.drop(name)
        session.looked = tuple(
            store.put(data, kind, browser=session.browser, owner=session.key) for data, kind in files
        )
        session.explanation = found = LookedAt(question, answer, *session.looked)
        return found


def glow(heat: Image.Image) -> Image.Image:
    """The heat of a heat map over grey as a layer: in its colours where it is hot, and a shade where it is cold.

    The shade makes small hot places stand out, and leaves the colours of what is below it as they are, only darker.
    """
    drawn = np.asarray(heat, np.float32)
    # A map over grey has colour where it is hot. Its hottest colours are bright yellows, with nearly no blue.
    hot = ((drawn.max(-1) - drawn.min(-1)) / 60).clip(0, 1)[..., None] * HOT
    opaque = hot + SHADE * (1 - hot)
    return Image.fromarray(np.concatenate([drawn * hot / opaque, 255 * opaque], -1).astype(np.uint8), "RGBA")


def bordered(picture: Image.Image, windows: int) -> Image.Image:
    """A picture with the borders of so many windows along a side: bright between dark edges, to be seen anywhere."""
    drawn, (width, height) = picture.copy(), picture.size
    lines = ImageDraw.Draw(drawn, "RGBA")
    for thick, colour in ((max(3, width // 192), (0, 0, 0, 110)), (max(1, width // 512), (255, 255, 255, 220))):
        for i in range(1, windows):
            x, y = round(i * width / windows), round(i * height / windows)
            lines.line((x, 0, x, height), fill=colour, width=thick)
            lines.line((0, y, width, y), fill=colour, width=thick)
    return drawn
