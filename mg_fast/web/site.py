"""What belongs to one server of the web page, put together."""

import importlib.util
from dataclasses import dataclass, field

from .accounts import Accounts
from .limits import Limits
from .line import WaitingLine
from .looking import Looking
from .metrics import ServerMetrics
from .sessions import GRACE_S, BrowserSession, BrowserSessions
from .store import PictureStore
from .talk import Talk
from .uploading import UploadDesk


@dataclass(frozen=True)
class WebOptions:
    """How a server is run.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        root_path: the path below which a proxy shows the page, such as `/pictures`; empty where it has its own host.
        limits: what it gives to its users.
        accounts: who may use it; None: everyone.
        allow_urls: fetch pictures by their URLs, from public addresses.
        drain_s: seconds that running answers have to end when the server is stopped.
        grace_s: seconds for which a session without a connection is kept.
        hosts: further names of the server; requests for other names are refused.
        title: the heading of the page.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    root_path: str = ""
    limits: Limits = field(default_factory=Limits)
    accounts: Accounts | None = None
    allow_urls: bool = False
    drain_s: float = 60.0
    grace_s: float = GRACE_S
    hosts: tuple[str, ...] = ()
    title: str = "Mini-Gemini"


class Site:
    """The parts of a server around one pipeline.

    Args:
        pipeline: of Mini-Gemini, as `mg_fast.load` returns it.
        options: of the server.
        folder: the server's private folder.

    Attributes:
        sessions, store, line, talk, looking, desk, metrics: the parts.
        can_draw: whether the pipeline has a painter.
        can_read: whether text in pictures can be read.
    """

    def __init__(self, pipeline, options: WebOptions, folder: str):
        self.pipeline, self.options, self.folder = pipeline, options, folder
        limits = options.limits
        self.can_draw = pipeline.painter is not None
        self.can_read = all(importlib.util.find_spec(name) is not None for name in ("rapidocr", "onnxruntime"))
        self.metrics = ServerMetrics()
        # Each session may have its share, and as much again may wait for questions to use it.
        self.store = PictureStore(folder, min(2 * limits.sessions * limits.session_bytes, 2**31), limits.session_bytes)
        self.line = WaitingLine(limits.parallel, limits.queue)
        self.sessions = BrowserSessions(
            limits,
            lambda: pipeline.conversation(private=True),
            self.store,
            on_close=self._closed,
            grace_s=options.grace_s,
        )
        self.talk = Talk(limits, self.line, self.store, self.metrics, can_draw=self.can_draw)
        self.looking = Looking(pipeline, self.talk)
        self.desk = UploadDesk(limits, self.store, self.metrics)
        # Called with the key of a session that has been closed, and with the names of its pictures.
        self.forget = lambda key, names: None
        for name, told, read in (
            ("sessions", "Sessions that are open.", lambda: len(self.sessions)),
            ("waiting", "Questions that wait in line.", lambda: self.line.waiting),
            ("running", "Answers that are being made.", lambda: self.line.running),
            ("picture_bytes", "Bytes of pictures held in memory.", lambda: self.store.held_bytes),
            ("device_bytes", "Bytes that torch holds on GPUs.", _device_bytes),
        ):
            self.metrics.watch(name, told, read)

    def _closed(self, session: BrowserSession, names: list[str]) -> None:
        self.forget(session.key, names)


def _device_bytes() -> int:
    import torch

    if not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))
