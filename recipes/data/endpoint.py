"""Asks an endpoint that speaks OpenAI's protocol for chats, such as vLLM's server or a hosted model."""

import asyncio
import email.utils
import time
from collections.abc import Mapping, Sequence

import httpx

from mg_fast.errors import quoted, shortened

from .asking import Refused, Trouble
from .errors import AskingError
from .journal import Reply

# Answers to a key, an address or a model that is wrong: no other question would fare better.
_FATAL = (401, 403, 404, 405)
# Answers that may be others a moment later.
_PASSING = (408, 409, 425, 429)
_BUSY = 429
# Codes of answers with this status that no waiting helps against.
_SPENT = ("insufficient_quota", "billing_hard_limit_reached")


class Endpoint:
    """An endpoint of OpenAI's protocol. It is an asynchronous context manager.

    Args:
        address: the base address, to which `/chat/completions` is added; for vLLM `http://HOST:8000/v1`.
        model: the model's name there.
        key: sent as the bearer token; None sends none.
        timeout: seconds until a request without a whole answer counts as failed.
        parameters: fields of the request, such as `temperature`; a value of None leaves a field out.

    Raises:
        AskingError: the key cannot be sent.
    """

    def __init__(
        self, address: str, model: str, *, key: str | None = None, timeout: float = 120.0, parameters: Mapping = {}
    ):
        self._url = f"{address.rstrip('/')}/chat/completions"
        self._body = {"model": model, **{name: v for name, v in parameters.items() if v is not None}}
        self.where = f"{shortened(self._url, 120)}, model {shortened(model, 60)}"
        self._timeout = timeout
        if key is not None and not (key.isascii() and key.isprintable()):
            raise AskingError("the endpoint's key has characters that no request can carry: expected printable ASCII")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.AsyncClient(
            headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None, max_keepalive_connections=64)
        )

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_) -> None:
        await self._client.aclose()

    async def ask(self, messages: Sequence[dict], name: str) -> Reply:
        """The reply to a chat. A server that knows the header `Idempotency-Key` answers a repeated request once.

        Raises:
            Trouble: there was no answer, or one that may be another a moment later.
            Refused: this request will not be taken.
            AskingError: no request will be taken.
        """
        request = self._client.post(
            self._url, json={**self._body, "messages": list(messages)}, headers={"Idempotency-Key": name}
        )
        try:
            # httpx's own limit is for each piece of an answer.
            answer = await asyncio.wait_for(request, self._timeout)
        except (httpx.TimeoutException, asyncio.TimeoutError):
            raise Trouble("no answer in time") from None
        except httpx.InvalidURL as error:
            raise AskingError(f"{shortened(self._url, 120)} is no address: {error}") from None
        except httpx.UnsupportedProtocol as error:
            raise AskingError(f"{shortened(self._url, 120)}: expected http:// or https://: {error}") from None
        except httpx.RequestError as error:
            raise Trouble(f"no connection ({type(error).__name__})") from None
        status = answer.status_code
        if 300 <= status < 400:
            to = shortened(answer.headers.get("Location", "nowhere"), 120)
            raise AskingError(f"{shortened(self._url, 120)} answers HTTP {status}, a redirection to {to}: ask there")
        if status == _BUSY and _code(answer) in _SPENT:
            raise AskingError(f"{shortened(self._url, 120)} answers HTTP {status}: {_message(answer)}")
        if status in _FATAL:
            raise AskingError(f"{shortened(self._url, 120)} answers HTTP {status}: {_message(answer)}")
        if status in _PASSING or status >= 500:
            raise Trouble(f"HTTP {status}", retry_after=_retry_after(answer), busy=status == _BUSY)
        if status != 200:
            raise Refused(f"HTTP {status}: {shortened(_message(answer), 160)}")
        return _reply(answer)


def _reply(answer: httpx.Response) -> Reply:
    """The reply in a chat completion. Anything else counts as a failure of the server, which may pass."""
    try:
        found = answer.json()
        choice = found["choices"][0]
        message = choice["message"]
        text, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        usage = found.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Trouble("an answer that is no chat completion") from None
    if not isinstance(text, str | None) or not isinstance(refusal, str | None):
        raise Trouble("an answer that is no chat completion")
    return Reply(
        text or "",
        finish if isinstance(finish, str) else "stop",
        refusal or None,
        *(count if isinstance(count, int) and count < 2**63 else None for count in counts),
    )


def _retry_after(answer: httpx.Response) -> float | None:
    """The seconds that the answer asks to wait, which it may give as a number or as a date."""
    value = answer.headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _message(answer: httpx.Response) -> str:
    """What the answer says about its error."""
    try:
        error = answer.json()["error"]
        return str(error["message"] if isinstance(error, Mapping) else error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return quoted(answer.text[:200])


def _code(answer: httpx.Response) -> object:
    """The name that the answer gives to its error."""
    try:
        return answer.json()["error"]["code"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
