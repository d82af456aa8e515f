"""What travels between us and a chat endpoint: replies, refusals, and what each of them means."""

import http.client
import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any

from clinkd.train.correctors.limits import Spending

MAX_BYTES = 4 << 20  # of a server's answer
MOST_TOKENS = 1 << 40  # that a server can have counted; a number of 400 digits fits no float
IMAGE_TOKENS = 1500  # estimate for one image
QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})


class CallFailed(Exception):
    """One call came to nothing; others may still succeed."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model replied.

    Attributes:
        finish: why it stopped: `stop`, `length`, `content_filter`, ….
        model: what the server says it was.
    """

    text: str
    finish: str
    model: str
    paid: Spending


class TryAgain(Exception):
    """A failure that may pass.

    Args:
        pause: seconds that the server asks for.
        paid: whether the server may have done the work all the same.
    """

    def __init__(self, why: str, pause: float | None = None, paid: bool = False) -> None:
        super().__init__(why)
        self.pause, self.paid = pause, paid


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key and patients' texts go to the address that the user wrote, and to no other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def estimate_tokens(messages: Sequence[Any]) -> int:
    """Tokens of a prompt, rather too many: a third of its bytes, and some for each image."""
    total = 0
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            text = part.get("text")
            total += IMAGE_TOKENS if text is None else len(text.encode("utf-8", "replace")) // 3
        total += 8
    return total


def read_body(response: Any, deadline: float) -> bytes:
    """The body of an answer, whole, in time, and not too large."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise CallFailed(f"the answer has over {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    announced = response.headers.get("Content-Length")
    if announced is not None and announced.isdecimal() and size < int(announced):
        raise TryAgain(f"the answer was cut off after {size} of {announced} bytes", paid=True)
    return b"".join(parts)


def read_error(error: Any, deadline: float) -> bytes:
    """The body of an HTTP error, as far as it can be had: its status says enough."""
    try:
        return read_body(error, deadline)
    except (OSError, http.client.HTTPException, CallFailed, TryAgain):
        return b""


def read_completion(body: bytes, most: Spending, key: str | None) -> Completion:
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        content = choice["message"].get("content")
        refusal = choice["message"].get("refusal")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        # some gateways send an error's words under status 200
        said = f": {explain(body, key)[1]}" if b'"error"' in body else ""
        why = f"the answer is not the JSON of a chat completion{said}"
        raise TryAgain(why, paid=True) from None
    if isinstance(content, list):  # parts
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    finish = str(choice.get("finish_reason") or "stop")
    return Completion(
        text=content if isinstance(content, str) else "",
        finish="refusal" if refusal and not content else finish,
        model=str(value.get("model") or ""),
        paid=_paid(value.get("usage"), most),
    )


def explain(body: bytes, key: str | None) -> tuple[str, str]:
    """An error's code, if it is one of `QUOTA`, and its message, fit to be printed, keyless."""
    try:
        value = json.loads(body)
        error = value.get("error", value) if isinstance(value, dict) else value
    except (ValueError, RecursionError):
        error = body.decode("utf-8", "replace")
    code, message = "", error
    if isinstance(error, dict):
        names = (str(error.get("code")), str(error.get("type")))
        code = next((name for name in names if name in QUOTA), "")
        message = error.get("message") or error.get("detail") or ""
    text = " ".join(str(message).split())
    if key:
        text = text.replace(key, "***")
    return code, "".join(c for c in text if c.isprintable())[:200]


def _paid(usage: Any, most: Spending) -> Spending:
    """Tokens that the server counted; where it does not say, the estimate."""
    counts = usage if isinstance(usage, dict) else {}
    sent, received = counts.get("prompt_tokens"), counts.get("completion_tokens")
    return Spending(
        1,
        sent if type(sent) is int and 0 <= sent < MOST_TOKENS else most.sent,
        received if type(received) is int and 0 <= received < MOST_TOKENS else most.received,
    )


def asked_pause(headers: Message) -> float | None:
    """Seconds that `Retry-After` asks for, as a number or a date."""
    milliseconds = headers.get("retry-after-ms")
    value = headers.get("Retry-After")
    try:
        if milliseconds is not None:
            return max(0.0, float(milliseconds) / 1000)
        return None if value is None else max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    except (TypeError, ValueError):
        return None
