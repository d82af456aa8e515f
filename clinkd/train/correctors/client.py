"""Calls to an OpenAI-compatible endpoint that survive its bad days and stop at its refusals."""

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from clinkd._version import __version__
from clinkd.errors import SetupError
from clinkd.train.correction.settings import CorrectorSettings, is_here
from clinkd.train.correctors.limits import (
    Breaker,
    Budget,
    RateLimit,
    Spending,
    Stopped,
)
from clinkd.train.correctors.wire import (
    QUOTA,
    CallFailed,
    Completion,
    NoRedirects,
    TryAgain,
    asked_pause,
    estimate_tokens,
    explain,
    read_body,
    read_completion,
    read_error,
)

FIRST_PAUSE = 1.0  # seconds; the longest first pause, doubled with each try
_AGAIN = {408, 409, 425, 429}  # and every 5xx
_REFUSED = {401, 402, 403, 404, 405}


class ChatClient:
    """Chat completions, for many threads at once.

    Args:
        key: sent as bearer token to the settings' URL and nowhere else; redirects are not followed.
        spent: what earlier runs paid of the budgets.
        on_loss: told what a try has cost that brought nothing.
        now, sleep, uniform: time and chance, exchanged by tests; `sleep` says True when stopped.
    """

    def __init__(
        self,
        settings: CorrectorSettings,
        key: str | None = None,
        *,
        spent: Spending | None = None,
        on_loss: Callable[[Spending], None] = lambda paid: None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], bool] | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        assert settings.url is not None
        self._settings, self._key = settings, key
        self._url = settings.url.rstrip("/") + "/chat/completions"
        self._host = urlsplit(settings.url).netloc
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._uniform = uniform
        self._limit = RateLimit(
            settings.requests_per_minute, settings.tokens_per_minute, self._sleep, now
        )
        self._budget = Budget(settings, spent or Spending())
        self._breaker = Breaker(settings.max_failures, self._host)
        self._on_loss = on_loss
        handlers: list[Any] = [NoRedirects]
        if is_here(urlsplit(settings.url).hostname or ""):
            # a proxy is another machine, which would read key and texts in the clear
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    @property
    def spent(self) -> Spending:
        """Of the budgets, by this client and before it."""
        return self._budget.spent

    def stop(self) -> None:
        """Let every thread that waits come back with `Stopped`."""
        self._stop.set()

    def complete(self, messages: Sequence[Any]) -> Completion:
        """One reply.

        Raises:
            CallFailed: no try succeeded, or the server refuses this very request.
            BudgetUsedUp: before a try that the budgets do not allow.
            SetupError: going on makes no sense: key or quota refused, wrong address, nothing but
                failures.
            Stopped: another thread met such an error.
        """
        body = self._body(messages)
        most = Spending(1, estimate_tokens(messages), self._settings.max_tokens)
        why = ""
        for number in range(self._settings.max_tries):
            if self._stop.is_set():
                raise Stopped
            self._budget.reserve(most)
            paid = Spending()
            try:
                self._limit.take(most.tokens)
                paid = Spending(calls=1)
                completion = self._once(body, most)
                paid = completion.paid
                self._breaker.succeed()
                return completion
            except TryAgain as error:
                why = str(error)
                paid = most if error.paid else paid
                self._on_loss(paid)
                if error.pause is not None and error.pause <= self._settings.max_wait:
                    self._limit.hold(error.pause)
                last = number + 1 == self._settings.max_tries
                if last or not self._pause(number, error.pause):
                    break
            except (CallFailed, SetupError) as error:
                self._on_loss(paid)
                if isinstance(error, CallFailed):
                    self._breaker.fail(str(error))
                raise
            finally:
                self._budget.settle(most, paid)
        self._breaker.fail(why)
        raise CallFailed(f"{why}; gave up after {number + 1} tries")

    def _body(self, messages: Sequence[Any]) -> bytes:
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": list(messages),
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        if settings.json_mode:
            body["response_format"] = {"type": "json_object"}
        body |= settings.parameters
        return json.dumps({k: v for k, v in body.items() if v is not None}).encode()

    def _pause(self, number: int, asked: float | None) -> bool:
        """Wait before the next try; False where the server asks for too long a pause.

        Full jitter: anything between nothing and a limit that doubles, so that many clients do not
        come back at once.
        """
        longest = self._settings.max_wait
        if asked is not None and asked > longest:
            return False
        pause = self._uniform(0.0, min(longest, FIRST_PAUSE * 2.0**number))
        if self._sleep(max(pause, asked or 0.0)):
            raise Stopped
        return True

    def _once(self, body: bytes, most: Spending) -> Completion:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": f"clinkd/{__version__}",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        timeout = self._settings.timeout
        deadline = time.monotonic() + timeout
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return read_completion(read_body(response, deadline), most, self._key)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error.code, error.headers, read_error(error, deadline))
        except TimeoutError:
            raise TryAgain(f"no reply within {timeout:g} s", paid=True) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TryAgain(f"no reply within {timeout:g} s", paid=True) from None
            raise TryAgain(f"no connection: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            why = f"the connection broke: {type(error).__name__}"
            raise TryAgain(why, paid=True) from None
        raise AssertionError("an HTTP error passed unseen")

    def _refused(self, status: int, headers: Message, body: bytes) -> None:
        """Raise what an HTTP error means."""
        code, message = explain(body, self._key)
        what = f"HTTP {status}" + (f": {message}" if message else "")
        if status in _REFUSED or code in QUOTA or 300 <= status < 400:
            raise SetupError(f"{self._host} refuses: {what}. {self._remedy(status, code)}")
        if status in _AGAIN or status >= 500:
            raise TryAgain(what, asked_pause(headers))
        raise CallFailed(what)

    def _remedy(self, status: int, code: str) -> str:
        if code in QUOTA or status == 402:
            return "The account has no money or quota left; replies so far are kept"
        if status in (401, 403):
            variable = self._settings.key_env
            return f"Check the key in {variable}" if variable else "Set key_env: it wants a key"
        if 300 <= status < 400:
            return "It points elsewhere, which is not followed: write the final address in url"
        return f"Check url and model: {self._url}, {self._settings.model!r}"
