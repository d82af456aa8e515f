"""How fast, how much, how long in vain: limits on calls to an endpoint, shared by its threads."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from clinkd.errors import SetupError
from clinkd.train.correction.settings import CorrectorSettings

WINDOW = 60.0  # seconds


class Stopped(Exception):
    """Another thread met an error that ends the work."""


class BudgetUsedUp(Exception):
    """One of the budgets does not allow another call."""


class RateLimit:
    """No 60 seconds see more calls, or more tokens, than the limits say.

    Every try counts, failed ones too, since servers count them. A call of more tokens than a whole
    minute may have waits for an empty minute.

    Args:
        sleep: waits so many seconds; True where the work was stopped meanwhile.
    """

    def __init__(
        self,
        requests_per_minute: int,
        tokens_per_minute: int | None,
        sleep: Callable[[float], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests, self._tokens = requests_per_minute, tokens_per_minute
        self._sleep, self._now = sleep, now
        self._recent: deque[tuple[float, int]] = deque()  # when, tokens
        self._not_before = float("-inf")
        self._lock = threading.Lock()

    def take(self, tokens: int) -> None:
        """Wait until a call of so many tokens may start, and count it.

        Raises:
            Stopped: the work was stopped meanwhile.
        """
        while True:
            with self._lock:
                moment = self._now()
                wait = self._wait(moment, tokens)
                if wait <= 0:
                    self._recent.append((moment, tokens))
                    return
            if self._sleep(wait):
                raise Stopped

    def hold(self, seconds: float) -> None:
        """Start no call for so long: a server asked for it."""
        with self._lock:
            self._not_before = max(self._not_before, self._now() + seconds)

    def _wait(self, moment: float, tokens: int) -> float:
        while self._recent and self._recent[0][0] <= moment - WINDOW:
            self._recent.popleft()
        wait = self._not_before - moment
        if len(self._recent) >= self._requests:
            wait = max(wait, self._recent[-self._requests][0] + WINDOW - moment)
        if self._tokens is not None:
            room = self._tokens - tokens - sum(used for _, used in self._recent)
            for started, used in self._recent:
                if room >= 0:
                    break
                room += used
                wait = max(wait, started + WINDOW - moment)
        return wait


@dataclass(frozen=True, slots=True)
class Spending:
    """Calls and tokens."""

    calls: int = 0
    sent: int = 0  # tokens
    received: int = 0  # tokens

    def __add__(self, other: "Spending") -> "Spending":
        return Spending(
            self.calls + other.calls, self.sent + other.sent, self.received + other.received
        )

    def __sub__(self, other: "Spending") -> "Spending":
        return self + Spending(-other.calls, -other.sent, -other.received)

    @property
    def tokens(self) -> int:
        return self.sent + self.received

    def cost(self, settings: CorrectorSettings) -> float:
        """Money, in the currency of the prices."""
        return (self.sent * settings.input_price + self.received * settings.output_price) / 1e6


class Budget:
    """What may still be spent; calls under way count with the most that they can cost.

    Args:
        spent: what earlier runs paid for the same cache.
    """

    def __init__(self, settings: CorrectorSettings, spent: Spending) -> None:
        self._settings = settings
        self.spent = spent
        self._under_way = Spending()
        self._lock = threading.Lock()

    def reserve(self, most: Spending) -> None:
        """Make room for a call.

        Raises:
            BudgetUsedUp: it might cost more than is left.
        """
        with self._lock:
            then = self.spent + self._under_way + most
            settings = self._settings
            for what, value, limit in (
                ("calls", then.calls, settings.max_calls),
                ("tokens", then.tokens, settings.max_total_tokens),
                ("money", then.cost(settings), settings.max_cost),
            ):
                if limit is not None and value > limit:
                    raise BudgetUsedUp(f"the budget of {what} ({limit:,}) is used up")
            self._under_way += most

    def settle(self, most: Spending, paid: Spending) -> None:
        """Replace what a call might have cost by what it did."""
        with self._lock:
            self._under_way -= most
            self.spent += paid


class Breaker:
    """Ends the work when nothing but failures comes back."""

    def __init__(self, max_failures: int, place: str) -> None:
        self._max, self._place = max_failures, place
        self._in_a_row = 0
        self._lock = threading.Lock()

    def succeed(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def fail(self, why: str) -> None:
        """Count a call that failed after all its tries.

        Raises:
            SetupError: it was one too many.
        """
        with self._lock:
            self._in_a_row += 1
            if self._in_a_row >= self._max:
                raise SetupError(
                    f"{self._place}: {self._in_a_row} calls in a row failed, the last one: {why}. "
                    "Replies so far are kept; start again when it works"
                )
