"""Rate, concurrency, ceiling and circuit breaker, under a clock of the tests' own."""

import asyncio
import random

import pytest

from distill.teacher import limits


class FakeTime:
    """A clock that jumps to the next time that anyone waits for."""

    def __init__(self):
        self.time = 1000.0
        self.clock = limits.Clock(lambda: self.time, self.sleep)
        self.slept = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        until = self.time + seconds
        await asyncio.sleep(0)
        self.time = max(self.time, until)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


@pytest.mark.parametrize("per_minute, amount", [(60, 1), (600, 1), (6000, 37)])
def test_rate_is_kept_over_any_time(per_minute, amount):
    fake = FakeTime()
    rate = limits.Rate(per_minute, fake.clock)
    taken = []

    async def take():
        for _ in range(200):
            await rate.take(amount)
            taken.append(fake.time)

    run(take())
    per_second = per_minute / 60 / amount
    for i in range(0, 200, 7):
        for j in range(i + 1, 200, 13):
            # A second's worth may come at once.
            assert j - i <= per_second * (taken[j] - taken[i] + 1) + 1
    assert taken[-1] - taken[0] == pytest.approx(200 / per_second, rel=0.1, abs=1.1)


def test_rate_that_was_taken_too_high_is_given_back():
    fake = FakeTime()
    rate = limits.Rate(600, fake.clock)

    async def take():
        for _ in range(100):
            await rate.take(100)
            rate.correct(-90)

    run(take())
    assert fake.time - 1000 == pytest.approx(100, rel=0.15)  # 10 each at 10 a second


def test_no_rate_never_waits():
    fake = FakeTime()
    run(limits.Rate(None, fake.clock).take(1e9))
    assert fake.slept == []


def test_the_first_request_goes_alone_then_as_many_as_allowed():
    places = limits.Concurrency(8)
    most = [0, 0]

    async def work(n):
        async with places.slot():
            most[n > 0] = max(most[n > 0], places.under_way)
            await asyncio.sleep(0)
            places.succeeded()
            await asyncio.sleep(0)

    async def all_of_it():
        await asyncio.gather(*(work(n) for n in range(50)))

    run(all_of_it())
    assert most == [1, 8]
    assert places.under_way == 0


def test_too_many_requests_halves_once_a_burst_and_grows_back():
    fake = FakeTime()
    places = limits.Concurrency(64, fake.clock)
    places.succeeded()
    assert places.limit == 64
    for _ in range(10):
        places.too_many()
    assert places.limit == 32
    fake.time += 2
    places.too_many()
    assert places.limit == 16
    for _ in range(17):
        places.succeeded()
    assert 16.9 < places.limit < 17.2
    for _ in range(10_000):
        places.succeeded()
    assert places.limit == 64
    for _ in range(20):
        fake.time += 2
        places.too_many()
    assert places.limit == 1


def test_who_waits_is_let_in_when_the_limit_falls_and_when_it_rises():
    places = limits.Concurrency(4)
    done = []

    async def work(n):
        async with places.slot():
            await asyncio.sleep(0)
            if n == 3:
                places.too_many()
            places.succeeded()
            done.append(n)

    async def all_of_it():
        await asyncio.gather(*(work(n) for n in range(200)))

    run(all_of_it())
    assert sorted(done) == list(range(200))


def test_budget_never_passes_its_ceiling():
    rng = random.Random(0)
    budget = limits.Budget(10_000, 5.0, tokens=1_000, cost=0.5)
    under_way = []
    with pytest.raises(limits.CeilingReached):
        while True:
            aside = (rng.randint(1, 300), rng.random() / 10)
            budget.set_aside(*aside)
            assert budget.tokens <= 10_000 and budget.cost <= 5.0
            under_way.append(aside)
            if len(under_way) > 5:
                aside = under_way.pop(rng.randrange(6))
                budget.settle(aside, (int(aside[0] * rng.random()), aside[1] * rng.random()))
    for aside in under_way:
        budget.settle(aside, aside)
    assert budget.tokens <= 10_000 and budget.cost <= 5.0


def test_budget_without_ceiling_only_counts():
    budget = limits.Budget(None, None)
    budget.set_aside(10**9, 1e6)
    budget.settle((10**9, 1e6), (5, 0.25))
    assert (budget.tokens, budget.cost) == (5, 0.25)


def test_the_message_of_a_ceiling_names_its_setting():
    with pytest.raises(limits.CeilingReached, match="MAX_TOTAL_TOKENS=10: 8 are spent"):
        limits.Budget(10, None, tokens=8).set_aside(3, 0)
    with pytest.raises(limits.CeilingReached, match=r"MAX_COST=1: 0\.9000 spent"):
        limits.Budget(None, 1, cost=0.9).set_aside(0, 0.2)


def test_breaker_pauses_tries_once_and_gives_up():
    fake = FakeTime()
    breaker = limits.Breaker(after=3, pauses=(5, 15), clock=fake.clock)
    asked = []

    async def ask():
        while True:
            await breaker.wait()
            asked.append(fake.time)
            breaker.failed("HTTP 503")

    with pytest.raises(limits.BreakerOpen, match="5 attempts in a row failed.*HTTP 503"):
        run(ask())
    # Three, a try after 5 s, a try after 15 s more.
    assert [round(t - 1000) for t in asked] == [0, 0, 0, 5, 20]


def test_a_success_closes_the_breaker():
    fake = FakeTime()
    breaker = limits.Breaker(after=2, pauses=(5,), clock=fake.clock)

    async def ask():
        for _ in range(50):
            await breaker.wait()
            breaker.failed("x")
            breaker.failed("x")
            await breaker.wait()
            breaker.succeeded()

    run(ask())
    assert fake.time == pytest.approx(1000 + 50 * 5)


def test_only_one_tries_whether_the_teacher_is_back():
    fake = FakeTime()
    breaker = limits.Breaker(after=2, pauses=(5, 5, 5), clock=fake.clock)
    breaker.failed("x")
    breaker.failed("x")
    trying = []

    async def ask(n):
        await breaker.wait()
        trying.append(n)
        if len(trying) == 1:
            for _ in range(20):  # The others have every chance meanwhile.
                await asyncio.sleep(0)
            assert trying == [n]
            breaker.succeeded()

    async def all_of_it():
        await asyncio.gather(*(ask(n) for n in range(10)))

    run(all_of_it())
    assert len(trying) == 10


def test_backoff_grows_is_spread_and_believes_the_provider_within_limits():
    rng = random.Random(0)
    means = []
    for attempt in range(1, 10):
        waits = [limits.backoff(attempt, None, rng) for _ in range(2000)]
        assert min(waits) < 0.1 * max(waits)  # Full jitter.
        assert max(waits) <= min(60, 0.5 * 2**attempt)
        means.append(sum(waits) / 2000)
    assert means[:6] == sorted(means[:6])
    for _ in range(100):
        assert 7 <= limits.backoff(1, 7.0, rng) <= 7.7
        assert limits.backoff(1, 1e9, rng) <= 66
