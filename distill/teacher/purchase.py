"""Asks a teacher for many answers, at the pace and for the money that were allowed.

`buy` is the loop: workers take requests from one queue; each waits for its place (concurrency),
for the teacher (circuit breaker), for the rate and for the budget, asks, and hands what came back
to one writer, which commits groups of answers. An answer counts as bought when its group is on the
disk. Whatever stops a run, from a signal to a wrong key, what was answered until then is kept.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import functools
import random
import re
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from absl import logging

from distill.teacher import limits, prompting, store
from distill.teacher.backends import Backend, Failed, Hopeless, Reply, Request

MAX_TEXT = 20_000  # characters of a completion that are kept; more is `oversize`
_GROUP_SECONDS = 0.05  # between two commits
_PATIENCE = 20  # refusals of the disk, over about 10 s
_SAME_FAULT = 10  # requests that are turned down before one was answered
_APOLOGY = re.compile(
    r"\s*(I[’']?m|I am)?\s*(very |really )?(sorry|unable to|not able to)\b"
    r"|\s*I\s+(can[’']?t|cannot|can ?not|won[’']?t)\b|\s*As an AI\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast the teacher may be asked, and how patiently.

    Attributes:
      concurrency: requests under way at a time, at most.
      requests_per_minute: at most; None = no limit.
      tokens_per_minute: at most, of prompts and completions; None = no limit.
      max_attempts: for one answer, before it is given up as `transport`.
    """

    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_attempts: int = 8

    def __post_init__(self):
        for field in ("concurrency", "max_attempts"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.upper()} must be a positive integer, not {value!r}")
        for field in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{field.upper()} must be positive or None, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Prices:
    """Of the teacher, per million tokens, in any currency; None = unknown."""

    prompt: float | None = None
    completion: float | None = None

    def __post_init__(self):
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("Give PRICE_PROMPT and PRICE_COMPLETION, or neither")
        for value in (self.prompt, self.completion):
            if value is not None and not (isinstance(value, int | float) and value >= 0):
                raise ValueError(f"a price is 0 or more per million tokens, not {value!r}")

    def of(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        if self.prompt is None or self.completion is None:
            return None
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclasses.dataclass(frozen=True)
class Size:
    """Tokens that a request can come to, at most."""

    prompt: int
    completion: int


@dataclasses.dataclass
class Outcome:
    """What a round of buying came to.

    Attributes:
      bought: answers that came.
      given_up: answers that did not come in MAX_ATTEMPTS attempts.
      left: requests that were not tried, or not to the end.
      stopped: why it ended before all was asked; None where it did not.
    """

    bought: int = 0
    given_up: int = 0
    left: int = 0
    stopped: str | None = None


def classify(reply: Reply, stop: str, max_text: int = MAX_TEXT) -> str:
    """Returns the class of a reply, see `store.CLASSES`.

    A completion that was cut for its length is whole all the same where the teacher had gone on to
    a question of its own.

    Args:
      reply: what came back.
      stop: what such a question begins with.
      max_text: characters of a completion; more is no rationale.
    """
    text = reply.text
    if reply.refused is not None:
        return "refused"
    if text is None or not text.strip():
        return "truncated" if reply.finish_reason == "length" else "empty"
    if len(text) > max_text:
        return "oversize"
    if reply.finish_reason == "length" and not (stop and stop in text):
        return "truncated"
    return "ok"


def to_bought(
    request: Request, reply: Reply, backend: Backend, parameters: str, prompt: prompting.Prompt,
    prices: Prices, most: Size, latency: float, attempts: int,
) -> store.Bought:  # fmt: skip
    """Returns a reply as the store keeps it."""
    cls, rationale, label = classify(reply, prompt.stop), None, None
    clean = getattr(backend, "clean", str)
    text = None if reply.text is None else clean(reply.text)
    if cls in ("ok", "truncated"):
        rationale, label = map(_trainable, prompt.parse(text or ""))
    if cls == "ok" and label is None and _APOLOGY.match(text or ""):
        cls = "refused"
    # What the provider did not count may have been as much as it could.
    counts = (
        most.prompt if reply.prompt_tokens is None else reply.prompt_tokens,
        most.completion if reply.completion_tokens is None else reply.completion_tokens,
    )
    return store.Bought(
        key=request.key,
        input_sha256=request.row.input_sha256,
        sample=request.sample,
        kind="answer" if request.given_label is None else "rationalised",
        provider=backend.provider,
        model=backend.model,
        parameters=parameters,
        prompt=prompt.name,
        prompt_sha256=prompt.sha256,
        cls=cls,
        text=None if text is None else text[:MAX_TEXT],
        text_length=len(text or ""),
        finish_reason=reply.finish_reason and reply.finish_reason[:40],
        rationale=rationale,
        label=label,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        tokens=sum(counts),
        cost=prices.of(*counts),
        latency=round(latency, 4),
        attempts=attempts,
        time=now(),
        error=reply.refused,
    )


def _trainable(text: str | None) -> str | None:
    """Without what no file of rows can hold: NUL and halves of surrogate pairs."""
    if text is None or (text.isascii() and "\0" not in text):
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "") or None


def now() -> str:
    """Returns the time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def buy(
    backend: Backend,
    requests: Sequence[Request],
    into: store.Store,
    *,
    prompt: prompting.Prompt,
    parameters: str,
    sizes: Callable[[Request], Size],
    pace: Pace = Pace(),
    prices: Prices = Prices(),
    budget: limits.Budget | None = None,
    progress: Callable[[store.Bought], None] | None = None,
    clock: limits.Clock = limits.REAL_TIME,
    seed: int | None = None,
) -> Outcome:
    """Asks for answers until all are there, or something ends it.

    Args:
      backend: who is asked.
      requests: what is wanted.
      into: the store, open for writing.
      prompt: reads the completions.
      parameters: of the requests, as `store.Bought` keeps them.
      sizes: the most tokens of a request, for the budget and the rate.
      pace: how fast.
      prices: of the teacher.
      budget: the ceiling; None = none.
      progress: is told of every answer that is on the disk.
      clock: for tests.
      seed: of the waiting times after failures.
    """
    run = _Round(
        backend, into, prompt, parameters, sizes, pace, prices,
        budget or limits.Budget(None, None), progress or (lambda bought: None), clock,
        random.Random(seed),
    )  # fmt: skip
    return await run.buy(requests)


class _Stopped(Exception):
    """No more requests are sent."""


class _Round:
    """One call of `buy`: what its workers and its writer share."""

    def __init__(
        self, backend, into, prompt, parameters, sizes, pace, prices, budget, progress, clock,
        rng,
    ):  # fmt: skip
        self.backend, self.into, self.prompt, self.parameters = backend, into, prompt, parameters
        self.sizes, self.pace, self.prices, self.budget = sizes, pace, prices, budget
        self.progress, self.rng, self.stop = progress, rng, asyncio.Event()
        self.clock = limits.Clock(clock.now, functools.partial(self._pause, clock.sleep))
        clock = self.clock
        self.places = limits.Concurrency(pace.concurrency, clock)
        self.breaker = limits.Breaker(clock=clock)
        self.requests = limits.Rate(pace.requests_per_minute, clock)
        self.tokens = limits.Rate(pace.tokens_per_minute, clock)
        self.outcome = Outcome()
        self.waiting: list[store.Bought] = []  # for the next commit
        self.failures: list[store.Failure] = []
        self.proved, self.turned_down = False, 0

    async def buy(self, requests: Sequence[Request]) -> Outcome:
        size = self.backend.batch
        # In the order of the rows; a batch shares an attempt.
        queue = iter([requests[i : i + size] for i in range(0, len(requests), size)])
        writer = asyncio.create_task(self._write())
        # Without it (a full disk) nothing is kept, so that nothing more may be bought.
        writer.add_done_callback(lambda _: self.stop.set())
        workers = [
            asyncio.create_task(self._work(queue))
            for _ in range(min(self.pace.concurrency, -(-len(requests) // size)))
        ]
        with self._interruptible():
            try:
                await asyncio.gather(*workers)
            finally:
                # An error of our own: the others are let go, and what was paid is kept.
                for worker in workers:
                    worker.cancel()
                self.stop.set()
                try:
                    await writer
                finally:
                    if self.waiting or self.failures:  # a second Ctrl-C ends the writer, too
                        self.into.add(self.waiting, self.failures)
        self.outcome.left = len(requests) - self.outcome.bought - self.outcome.given_up
        return self.outcome

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """A first signal lets the requests under way come to their end; a second one ends all."""
        loop = asyncio.get_running_loop()

        def end(name: str) -> None:
            self._end(name)
            logging.info(
                "%s: waiting for the %d requests under way; once more ends them at once",
                name, self.places.under_way,
            )  # fmt: skip
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

        caught = []
        # Not in a thread that is not the main one.
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, end, number.name)
                caught.append(number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)

    def _end(self, why: str) -> None:
        self.outcome.stopped = self.outcome.stopped or why
        self.stop.set()

    async def _work(self, queue: Iterator[Sequence[Request]]) -> None:
        for requests in queue:
            if self.stop.is_set():
                return
            try:
                await self._answer(requests)
                # Who answers without waiting for anything lets the writer and signals in here.
                await asyncio.sleep(0)
            except (limits.CeilingReached, limits.BreakerOpen, Hopeless) as e:
                return self._end(str(e))
            except _Stopped:
                return

    async def _answer(self, requests: Sequence[Request]) -> None:
        """Asks until there is an answer, or it is given up."""
        size = [self.sizes(request) for request in requests]
        most = sum(s.prompt for s in size), sum(s.completion for s in size)
        aside = sum(most), self.prices.of(*most) or 0.0
        wait = 0.0
        for attempt in range(1, self.pace.max_attempts + 1):
            # One place for each attempt and the wait before it: when there are to be fewer at a
            # time, those that were turned down queue here, and do not use up their attempts.
            async with self.places.slot():
                if wait:
                    await self.clock.sleep(wait)
                failed = await self._attempt(requests, aside, attempt)
            if failed is None:
                return
            wait = limits.backoff(attempt, failed.retry_after, self.rng)

    async def _attempt(self, requests, aside: tuple[int, float], attempt: int) -> Failed | None:
        """Asks once; returns why it is to be tried again, None where it is not."""
        await self.breaker.wait()
        await self.requests.take(len(requests))
        await self.tokens.take(aside[0])
        if self.stop.is_set():
            raise _Stopped
        self.budget.set_aside(*aside)
        began = self.clock.now()
        try:
            replies = await self.backend.ask(requests)
        except Failed as e:
            self._note_failure(requests, str(e), aside, e.may_cost)
            self.breaker.failed(str(e))
            if e.too_many:
                self.places.too_many()
            if attempt < self.pace.max_attempts:
                return e
            self._give_up(requests, e, self.clock.now() - began, attempt)
            return None
        except Hopeless:
            self.budget.settle(aside, (0, 0.0))
            raise
        except BaseException as e:  # above all, that it was cancelled
            self._note_failure(requests, f"cut off: {type(e).__name__}", aside, True)
            raise
        latency = (self.clock.now() - began) / len(requests)
        self.breaker.succeeded()
        self.places.succeeded()
        self._keep(requests, replies, aside, latency, attempt)
        return None

    def _note_failure(self, requests, why: str, aside: tuple[int, float], may_cost: bool) -> None:
        """What may have cost something stays set aside."""
        spent = aside if may_cost else (0, 0.0)
        self.budget.settle(aside, spent)
        cost = spent[1] if self.prices.prompt is not None else None
        self.failures.append(store.Failure(requests[0].key, now(), why, spent[0], cost))

    def _keep(self, requests, replies, aside, latency, attempt) -> None:
        answers = [
            to_bought(request, reply, self.backend, self.parameters, self.prompt, self.prices,
                      self.sizes(request), latency, attempt)
            for request, reply in zip(requests, replies, strict=True)
        ]  # fmt: skip
        tokens = sum(answer.tokens for answer in answers)
        self.budget.settle(aside, (tokens, sum(answer.cost or 0.0 for answer in answers)))
        self.tokens.correct(tokens - aside[0])
        self.waiting += answers
        self._judge(answers)

    def _judge(self, answers: Sequence[store.Bought]) -> None:
        """A request that is wrong for every row is not sent for every row."""
        self.proved |= any(answer.error is None for answer in answers)
        self.turned_down += sum(answer.error is not None for answer in answers)
        if not self.proved and self.turned_down >= _SAME_FAULT:
            self._end(f"the first {_SAME_FAULT} requests were turned down: {answers[-1].error}")

    def _give_up(self, requests, why: Failed, latency: float, attempts: int) -> None:
        cls = "malformed" if why.malformed else "transport"
        for request in requests:
            answer = to_bought(request, Reply(None), self.backend, self.parameters, self.prompt,
                               Prices(), Size(0, 0), latency, attempts)  # fmt: skip
            self.waiting.append(dataclasses.replace(answer, cls=cls, error=str(why)))

    async def _pause(self, sleep: Callable[[float], Awaitable[None]], seconds: float) -> None:
        """Waits, or raises `_Stopped` as soon as it is over."""
        over = asyncio.ensure_future(self.stop.wait())
        waited = asyncio.ensure_future(sleep(seconds))
        await asyncio.wait({over, waited}, return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        waited.cancel()
        if self.stop.is_set():
            raise _Stopped

    async def _write(self) -> None:
        """Commits what came in groups, until nothing comes any more."""
        refusals = 0
        while True:
            over = self.stop.is_set() and self._idle()
            answers, self.waiting = self.waiting, []
            failures, self.failures = self.failures, []
            if answers or failures:
                began = time.monotonic()
                loop = asyncio.get_running_loop()
                group = loop.run_in_executor(None, self.into.add, answers, failures)
                try:
                    # Shielded: when all tasks are cancelled, this group still gets to the disk.
                    await asyncio.shield(group)
                except sqlite3.Error as e:
                    # Such as a full disk: nothing more is bought, and what is paid is tried again.
                    self._end(f"the store cannot be written: {e}")
                    refusals += 1
                    if refusals > _PATIENCE:
                        self.outcome.stopped += f"; {len(answers)} answers that came are lost"
                        return
                    self.waiting[:0], self.failures[:0] = answers, failures
                    await asyncio.sleep(_GROUP_SECONDS * refusals)
                    continue
                for answer in answers:
                    given_up = answer.cls in store.UNHEARD
                    self.outcome.given_up += given_up
                    self.outcome.bought += not given_up
                    self.progress(answer)
                if (left := _GROUP_SECONDS - (time.monotonic() - began)) <= 0 or over:
                    continue
                await asyncio.sleep(left)
            elif over:
                return
            else:
                await asyncio.sleep(_GROUP_SECONDS)

    def _idle(self) -> bool:
        return self.places.under_way == 0
