"""What a run may do to a teacher: how fast, how many at once, for how much, and when to stop.

All of them live in one event loop, so that no lock is needed. `Clock` is `time.monotonic` and
`asyncio.sleep`, but for tests.
"""

import asyncio
import collections
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable


@dataclasses.dataclass(frozen=True)
class Clock:
    """Tells the time in seconds, and waits for some."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


REAL_TIME = Clock()


class Rate:
    """At most so much a minute, requests or tokens: a bucket that fills evenly.

    Bursts are a second's worth, since providers count over shorter times than they say.
    """

    def __init__(self, per_minute: float | None, clock: Clock = REAL_TIME):
        self._per_second = per_minute / 60 if per_minute else None
        self._clock = clock
        self._free_at = clock.now()  # when everything that was taken is paid back

    async def take(self, amount: float = 1.0) -> None:
        """Waits until what was taken before is paid back, then takes `amount`."""
        if self._per_second is None:
            return
        now = self._clock.now()
        start = max(self._free_at, now - 1.0)
        # The place in the queue is taken at once; who comes later waits longer.
        self._free_at = start + amount / self._per_second
        if start > now:
            await self._clock.sleep(start - now)

    def correct(self, amount: float) -> None:
        """Takes more (or, below 0, gives back) after the fact, without waiting."""
        if self._per_second is not None:
            self._free_at += amount / self._per_second


class Concurrency:
    """How many requests are under way: halved by "too many requests", then slowly more again.

    Additive increase, multiplicative decrease, as TCP has it: every full round of successes allows
    one more, up to the most that was asked for. Of the 429s that one burst brings only the first
    counts. The very first request goes alone: a wrong key costs one call, not one for each place.
    """

    def __init__(self, most: int, clock: Clock = REAL_TIME):
        self.most = most
        self.limit = 1.0
        self._first = True
        self.under_way = 0
        self._clock = clock
        self._cut_at = -1e9
        self._waiting: collections.deque[asyncio.Future] = collections.deque()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Holds one of the places."""
        while self.under_way >= max(1, int(self.limit)):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self._wake()

    def succeeded(self) -> None:
        if self._first:
            self._first, self.limit = False, float(self.most)
            self._wake()
        elif self.limit < self.most:
            self.limit = min(self.most, self.limit + 1 / self.limit)
            self._wake()

    def too_many(self) -> None:
        now = self._clock.now()
        if now - self._cut_at > 1.0:
            self._cut_at = now
            self.limit = max(1.0, self.limit / 2)

    def _wake(self) -> None:
        free = max(1, int(self.limit)) - self.under_way
        while free > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1


class CeilingReached(Exception):
    """The next request could pass the ceiling."""


class Budget:
    """A ceiling in tokens and in money, over everything in the store and under way.

    Before a request its most is set aside; afterwards what it really was takes its place. So what
    is spent stays below the ceiling as long as no reply is dearer than its most.
    """

    def __init__(
        self, max_tokens: int | None, max_cost: float | None, tokens: int = 0, cost: float = 0.0
    ):
        self.max_tokens, self.max_cost = max_tokens, max_cost
        self.tokens, self.cost = tokens, cost

    def set_aside(self, tokens: int, cost: float) -> None:
        """Sets aside the most that a request can come to.

        Raises:
          CeilingReached: it does not fit any more.
        """
        if self.max_tokens is not None and self.tokens + tokens > self.max_tokens:
            raise CeilingReached(
                f"MAX_TOTAL_TOKENS={self.max_tokens:,}: {self.tokens:,} are spent or under way"
            )
        if self.max_cost is not None and self.cost + cost > self.max_cost:
            raise CeilingReached(f"MAX_COST={self.max_cost:g}: {self.cost:.4f} spent or under way")
        self.tokens += tokens
        self.cost += cost

    def settle(self, aside: tuple[int, float], spent: tuple[int, float]) -> None:
        """Puts what a request came to in the place of what was set aside, (tokens, cost) each."""
        self.tokens += spent[0] - aside[0]
        self.cost += spent[1] - aside[1]


class BreakerOpen(Exception):
    """The teacher does not answer any more."""


class Breaker:
    """Stops asking a teacher that fails every time: a pause, one try, then a longer pause.

    Attributes:
      after: failures in a row that open it.
      pauses: of these seconds; after the last one, `BreakerOpen`.
    """

    def __init__(
        self,
        after: int = 20,
        pauses: tuple[float, ...] = (5, 15, 60, 180),
        clock: Clock = REAL_TIME,
    ):
        self.after, self.pauses = after, pauses
        self._clock = clock
        self._in_a_row = self._opened = 0
        self._closed_at = -1e9
        self._trying = False
        self.last = ""

    async def wait(self) -> None:
        """Waits while it is open.

        Raises:
          BreakerOpen: it has been for the last time.
        """
        while self._in_a_row >= self.after:
            if self._opened > len(self.pauses):
                raise BreakerOpen(
                    f"{self._in_a_row} attempts in a row failed, the last with: {self.last}"
                )
            left = self._closed_at - self._clock.now()
            if left <= 0 and not self._trying:
                self._trying = True
                return
            await self._clock.sleep(max(left, 0.05))

    def succeeded(self) -> None:
        self._in_a_row = self._opened = 0
        self._trying = False

    def failed(self, why: str) -> None:
        self._in_a_row += 1
        self.last = why
        was_try, self._trying = self._trying, False
        if self._in_a_row == self.after or was_try:
            pause = self.pauses[min(self._opened, len(self.pauses) - 1)]
            self._opened += 1
            self._closed_at = self._clock.now() + pause


def backoff(attempt: int, retry_after: float | None, rng: random.Random, most: float = 60) -> float:
    """Returns the seconds to wait after attempt number `attempt` (from 1) has failed.

    Full jitter (up to 0.5 * 2^attempt seconds), so that requests that failed together do not come
    back together; never less than the provider asked for, of which at most `most` is believed.
    """
    wait = rng.uniform(0, min(most, 0.5 * 2**attempt))
    return max(wait, min(retry_after or 0.0, most) * rng.uniform(1.0, 1.1))
