"""What a server of the web page counts and measures, as Prometheus reads it."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from .sessions import AnsweredTurn

# Seconds, from an answer of the smallest model to one that waited long.
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Every outcome of a question: answered, refused with a reason, failed by a fault, or given up.
OUTCOMES = ("ok", "refused", "error", "cancelled")


class ServerMetrics:
    """The counters of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self._requests = Counter("mg_fast_web_requests", "Requests by kind and outcome.", ["kind", "outcome"], **own)
        self._wait = Histogram("mg_fast_web_wait_seconds", "Time in the line.", buckets=_SECONDS, **own)
        self._first = Histogram(
            "mg_fast_web_time_to_first_token_seconds", "From the turn to the first text.", buckets=_SECONDS, **own
        )
        self._whole = Histogram("mg_fast_web_answer_seconds", "From the turn to the end.", buckets=_SECONDS, **own)
        self._tokens = Counter("mg_fast_web_tokens", "Tokens: of prompts, remembered, and new.", ["kind"], **own)
        self._pictures = Counter("mg_fast_web_pictures", "Pictures: uploaded, refused, asked, drawn.", ["kind"], **own)
        for outcome in OUTCOMES:
            self._requests.labels("ask", outcome)
        for kind in ("uploaded", "refused", "asked", "drawn"):
            self._pictures.labels(kind)
        # Resident memory of the process, its processor time and its open files.
        ProcessCollector(registry=self.registry)

    def watch(self, name: str, told: str, read: Callable[[], float]) -> None:
        """Adds a gauge that is read whenever the metrics are."""
        Gauge(f"mg_fast_web_{name}", told, registry=self.registry).set_function(read)

    def refused(self, kind: str) -> None:
        """Counts a request that was refused at once."""
        self._requests.labels(kind, "refused").inc()

    def asked(self, outcome: str, turn: AnsweredTurn | None, pictures: int) -> None:
        """Counts a question that had its place in the line."""
        self._requests.labels("ask", outcome).inc()
        self._pictures.labels("asked").inc(pictures)
        if turn is None:
            return
        took = turn.figures
        self._wait.observe(took.wait_s)
        self._first.observe(took.first_s)
        self._whole.observe(took.whole_s)
        for kind, number in (
            ("prompt", took.prompt_tokens),
            ("cached", took.cached_tokens),
            ("new", took.new_tokens),
        ):
            self._tokens.labels(kind).inc(number)
        self._pictures.labels("drawn").inc(len(turn.drawn))

    def done(self, kind: str, outcome: str) -> None:
        """Counts a request of another kind: `explain`, `upload`, `fetch`."""
        self._requests.labels(kind, outcome).inc()

    def uploaded(self, *, taken: bool) -> None:
        """Counts a picture file that came."""
        self._pictures.labels("uploaded" if taken else "refused").inc()

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
