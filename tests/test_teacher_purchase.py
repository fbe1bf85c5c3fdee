"""Buying answers from a teacher that errs, over real HTTP; see `teacher_server`."""

import asyncio
import collections
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest

from distill import sources
from distill.teacher import backends, endpoint, limits, prompting, purchase
from distill.teacher.store import Asked, Store, key_of

pytest.importorskip("openai", reason="the `teacher` extra")

import teacher_server  # noqa: E402 (needs nothing, but what follows needs openai)
from teacher_texts import EXPECTED, TEXTS  # noqa: E402

KEY = "sk-verysecret-0123456789abcdef"
PROMPT = prompting.load("arithmetic")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def row_of(text, number=0):
    sha256 = sources.input_sha256(text)
    return Asked(f"arithmetic/train/{number}", "arithmetic", "train", text, sha256, None)


def rows(count):
    """Row n has the label n + 4."""
    return [row_of(f"Ann has 7 nuts, gets 2, eats 5, gets {n}.", n) for n in range(count)]


def to_requests(backend, asked, samples=1):
    parameters = json.dumps(backend.parameters, sort_keys=True)
    return [
        backends.Request(
            key_of(provider=backend.provider, model=backend.model, parameters=parameters,
                   prompt_sha256=PROMPT.sha256, input_sha256=row.input_sha256, sample=sample),
            row, sample,
        )
        for row in asked for sample in range(samples)
    ]  # fmt: skip


def buy(base_url, path, asked, *, samples=1, pace=None, prices=purchase.Prices(),  # noqa: B008
        budget=None, clock=limits.REAL_TIME, **connection):  # fmt: skip
    """Asks for what the store lacks; returns the outcome and the answers in the store."""
    config = endpoint.EndpointConfig(model="teacher", base_url=base_url, **connection)

    async def run(store):
        backend = endpoint.Endpoint(config, PROMPT)
        have = store.keys()
        wanted = [r for r in to_requests(backend, asked, samples) if r.key not in have]
        try:
            return await purchase.buy(
                backend, wanted, store, prompt=PROMPT, parameters=json.dumps(backend.parameters),
                sizes=lambda r: purchase.Size(backend.prompt_bytes(r) // 2, backend.max_tokens),
                pace=pace or purchase.Pace(), prices=prices, budget=budget, clock=clock, seed=0,
            )  # fmt: skip
        finally:
            await backend.close()

    with Store(path) as store:
        outcome = asyncio.run(asyncio.wait_for(run(store), 120))
        return outcome, store.answers()


def test_every_row_is_answered_rightly_and_bought_once(tmp_path):
    with teacher_server.start(tmp_path / "log.jsonl") as server:
        outcome, answers = buy(server.base_url, tmp_path / "s.sqlite", rows(200))
        again, _ = buy(server.base_url, tmp_path / "s.sqlite", rows(200))
        stats = server.stats()
    assert outcome == purchase.Outcome(bought=200)
    assert again == purchase.Outcome()
    assert stats["requests"] == 200
    assert stats["most_in_flight"] <= 64
    assert {a.cls for a in answers} == {"ok"}
    by_input = {answer.input_sha256: answer for answer in answers}
    for n, row in enumerate(rows(200)):
        answer = by_input[row.input_sha256]
        assert (answer.rationale, answer.label) == (f"9, then 4, then {n + 4}.", f"{n + 4}")
        assert answer.tokens == answer.prompt_tokens + answer.completion_tokens > 100
        assert answer.attempts == 1 and answer.latency > 0


def test_one_changed_input_is_the_only_one_bought_anew(tmp_path):
    asked = rows(30)
    with teacher_server.start(tmp_path / "log.jsonl") as server:
        buy(server.base_url, tmp_path / "s.sqlite", asked)
        asked[7] = row_of("Ben has 1 nuts, gets 1.", 7)
        outcome, answers = buy(server.base_url, tmp_path / "s.sqlite", asked)
        assert server.stats()["requests"] == 31
    assert outcome.bought == 1 and len(answers) == 31


def test_samples_are_bought_each(tmp_path):
    with teacher_server.start(tmp_path / "log.jsonl") as server:
        outcome, answers = buy(
            server.base_url, tmp_path / "s.sqlite", rows(10), samples=3, temperature=0.7
        )
    assert outcome.bought == 30
    assert collections.Counter(a.sample for a in answers) == {0: 10, 1: 10, 2: 10}


CHILD = textwrap.dedent(
    """
    import json, pathlib, sys
    sys.path.insert(0, sys.argv[1])
    import test_teacher_purchase as t
    from distill.teacher import purchase
    outcome, answers = t.buy(sys.argv[2], sys.argv[3], t.rows(int(sys.argv[4])), timeout=2,
                             pace=purchase.Pace(concurrency=32, max_attempts=12))
    print(json.dumps([outcome.bought, outcome.given_up, outcome.left, outcome.stopped]))
    """
)


def server_keys(base_url, asked):
    """Our key -> the server's key of the same request."""
    config = endpoint.EndpointConfig(model="teacher", base_url=base_url)
    backend = endpoint.Endpoint(config, PROMPT)
    return {r.key: teacher_server.request_key(backend.body(r)) for r in to_requests(backend, asked)}


def test_a_thousand_rows_under_faults_and_ten_kills(tmp_path):
    """30 % of the requests fail somehow, and the client is killed ten times at random instants."""
    count, rng = 1_000, random.Random(0)
    path, log = tmp_path / "s.sqlite", tmp_path / "log.jsonl"
    (tmp_path / "child.py").write_text(CHILD)
    kills = []  # (answers that the server had sold, keys on the disk) after each
    with teacher_server.start(log, fault_rate=0.3, retry_after=0.05, drip=0.001) as server:
        command = [
            sys.executable, tmp_path / "child.py", os.path.dirname(__file__), server.base_url,
            str(path), str(count),
        ]  # fmt: skip
        theirs = server_keys(server.base_url, rows(count))
        while len(kills) < 10:
            before = server.stats()["requests"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                until, deadline = before + rng.randint(20, 90), time.monotonic() + 60
                while server.stats()["requests"] < until and time.monotonic() < deadline:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.1))
                child.send_signal(signal.SIGKILL)
            time.sleep(0.3)  # The server hears of it.
            with Store(path, write=False) as store:
                kills.append((len(server.answers()), set(store.keys())))
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        assert json.loads(ended.stdout) == [count - len(kills[-1][1]), 0, 0, None]
        sold = server.answers()
    with Store(path, write=False) as store:
        kept = store.answers()
    # Nothing that was on the disk was lost, and every row is there.
    stages = [on_disk for _, on_disk in kills] + [{a.key for a in kept}]
    assert all(before <= after for before, after in itertools.pairwise(stages))
    assert {a.key for a in kept} == set(theirs)
    # Nothing that was on the disk was bought again.
    for seen, on_disk in kills:
        again = {answer.key for answer in sold[seen:]}
        assert not again & {theirs[key] for key in on_disk}
    # Nor what was not, but for what was under way when the client was killed.
    twice = teacher_server.bought_twice(sold)
    readable = [a for a in twice if a.fault is None]
    assert len(readable) <= 10 * 32
    # Odd answers (null, blank, refused) are kept as what they are; all others are right.
    classes = collections.Counter(a.cls for a in kept)
    assert classes["ok"] > 900 and classes["transport"] == 0
    by_input = {a.input_sha256: a for a in kept}
    for n, row in enumerate(rows(count)):
        if by_input[row.input_sha256].cls == "ok":
            assert by_input[row.input_sha256].label == f"{n + 4}"


@pytest.mark.parametrize("fault", ["401", "403", "402_quota", "429_quota", "404_model"])
def test_what_is_hopeless_costs_one_call_and_tells_no_key(tmp_path, fault, capfd, caplog):
    with teacher_server.start(tmp_path / "log.jsonl") as server:
        server.script({"answers": [fault], "repeat": True})
        outcome, answers = buy(server.base_url, tmp_path / "s.sqlite", rows(100))
        assert server.stats()["requests"] == 1
    assert outcome.bought == 0 and outcome.left == 100 and outcome.stopped
    assert answers == []
    everything = outcome.stopped + caplog.text + "".join(capfd.readouterr())
    everything += (tmp_path / "s.sqlite").read_bytes().decode("latin-1")
    assert KEY not in everything and KEY[3:] not in everything


def test_a_completion_that_echoes_the_key_is_kept_without_it(tmp_path):
    with teacher_server.start(tmp_path / "log.jsonl") as server:
        server.script({"answers": [{"text": f"Your key is {KEY}. The answer is 8."}]})
        _, (answer,) = buy(server.base_url, tmp_path / "s.sqlite", rows(1))
    assert answer.text == "Your key is <key>. The answer is 8."
    assert answer.label == "8"


@pytest.mark.parametrize(
    "body",
    [{"choices": [{"message": {"refusal": "not with {key}"}, "finish_reason": "stop"}]},
     {"choices": [{"message": {"content": "8"}, "finish_reason": "{key}"}]},
     {"error": {"message": "wrong key {key}"}}],
)  # fmt: skip
def test_a_key_of_any_form_is_nowhere_in_a_reply(body, monkeypatch):
    key = "plain0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    backend = endpoint.Endpoint(endpoint.EndpointConfig(model="m"), PROMPT)
    try:
        read = str(backend.read(json.dumps(body).replace("{key}", key).encode()))
    except backends.Failed as e:
        read = str(e)
    assert key not in read and "<key>" in read


def test_a_word_that_serves_as_a_key_stays_in_rationales(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    backend = endpoint.Endpoint(endpoint.EndpointConfig(model="m"), PROMPT)
    assert backend.clean("The cup is EMPTY.") == "The cup is EMPTY."


def test_one_request_has_one_key_and_two_have_two():
    def parameters(**settings):
        config = endpoint.EndpointConfig(model="m", **settings)
        return json.dumps(endpoint.Endpoint(config, PROMPT).parameters, sort_keys=True)

    assert parameters(temperature=1, top_p=1) == parameters(temperature=1.0, top_p=1.0)
    assert parameters(extra={"a": 1, "b": 2}) == parameters(extra={"b": 2, "a": 1})
    # The same fields, sent to another path with another form of the prompt.
    stop = {"stop": [PROMPT.stop]}
    assert parameters(extra=stop) != parameters(extra=stop, api="completions")


@pytest.mark.parametrize(
    "fault, cls", [("content_null", "empty"), ("content_empty", "empty"),
                   ("content_blank", "empty"), ("content_huge", "oversize"),
                   ("refusal", "refused"), ("finish_content_filter", "refused"),
                   ("finish_length", "truncated"), ("400_context", "refused"),
                   ("200_html", "malformed"), ("choices_null", "malformed"),
                   ("500", "transport"), ("reset_body", "transport"),
                   ("usage_strings", "ok"), ("chunked", "ok"), ("gzip", "ok"),
                   ("content_list", "ok"), ("duplicate_keys", "ok")],
)  # fmt: skip
def test_each_fault_has_its_class(tmp_path, fault, cls):
    fake = _NoWaiting()
    with teacher_server.start(tmp_path / "log.jsonl") as server:
        server.script({"contains": "gets 1.", "answers": [fault], "repeat": True})
        outcome, answers = buy(
            server.base_url, tmp_path / "s.sqlite", rows(3), pace=purchase.Pace(max_attempts=3),
            clock=fake.clock,
        )  # fmt: skip
    (odd,) = [a for a in answers if a.input_sha256 == rows(2)[1].input_sha256]
    assert odd.cls == cls
    assert {a.cls for a in answers if a != odd} == {"ok"}
    assert (outcome.bought, outcome.given_up) == (
        (2, 1) if cls in ("malformed", "transport") else (3, 0)
    )
    assert odd.attempts == (3 if cls in ("malformed", "transport") else 1)
    assert odd.text is None or len(odd.text) <= purchase.MAX_TEXT < 10**6
    if cls == "oversize":
        assert odd.text_length > 10**7


class _NoWaiting:
    """A clock on which waiting takes no time."""

    def __init__(self):
        self.waited = 0.0
        self.clock = limits.Clock(lambda: time.monotonic() + self.waited, self._sleep)

    async def _sleep(self, seconds):
        self.waited += seconds
        await asyncio.sleep(0)


@pytest.mark.parametrize("fault", ["429_retry_after", "429_retry_date", "429_retry_ms"])
def test_the_provider_is_given_the_time_it_asks_for(tmp_path, fault):
    with teacher_server.start(tmp_path / "log.jsonl", retry_after=1.5) as server:
        server.script({"answers": [fault]})
        began = time.monotonic()
        outcome, _ = buy(server.base_url, tmp_path / "s.sqlite", rows(1))
    assert outcome.bought == 1
    assert 0.9 < time.monotonic() - began < 15  # A date has whole seconds.


def test_rate_limits_of_the_provider_are_found_out(tmp_path):
    """At 1,200 requests a minute a client that knows nothing of it gets all answers."""
    with teacher_server.start(tmp_path / "log.jsonl", requests_per_minute=1200) as server:
        outcome, answers = buy(server.base_url, tmp_path / "s.sqlite", rows(150))
        stats = server.stats()
    assert outcome.bought == 150 and {a.cls for a in answers} == {"ok"}
    assert stats["rate_limited"] < 600  # Not 64 at a time, over and over.


def test_own_rate_limit_spares_the_provider(tmp_path):
    with teacher_server.start(tmp_path / "log.jsonl", requests_per_minute=1200) as server:
        pace = purchase.Pace(requests_per_minute=1000)
        outcome, _ = buy(server.base_url, tmp_path / "s.sqlite", rows(60), pace=pace)
        assert outcome.bought == 60
        assert server.stats()["rate_limited"] <= 3


@pytest.mark.parametrize("concurrency", [1, 16])
def test_the_ceiling_holds(tmp_path, concurrency):
    """Also over several runs, and with half of the attempts failing after they cost something."""
    prices = purchase.Prices(prompt=2.0, completion=10.0)
    path, ceiling = tmp_path / "s.sqlite", 0.05
    with teacher_server.start(tmp_path / "log.jsonl", fault_rate=0.5, faults="500_html") as server:
        for _ in range(2):
            with Store(path) as store:
                budget = limits.Budget(None, ceiling, *store.spent())
            outcome, answers = buy(
                server.base_url, path, rows(300), prices=prices, budget=budget,
                pace=purchase.Pace(concurrency=concurrency), clock=_NoWaiting().clock,
            )  # fmt: skip
            assert "MAX_COST=0.05" in outcome.stopped and outcome.left > 0
        stats = server.stats()
    with Store(path, write=False) as store:
        tokens, cost = store.spent()
    real = prices.of(stats["prompt_tokens"], stats["completion_tokens"])
    assert real <= cost <= ceiling
    assert 0.5 * ceiling < cost
    assert sum(a.cost for a in answers) == pytest.approx(real)


def test_a_teacher_that_is_down_is_not_asked_for_ever(tmp_path):
    fake = _NoWaiting()
    with teacher_server.start(tmp_path / "log.jsonl") as server:
        server.script({"answers": ["503_html"], "repeat": True})
        outcome, answers = buy(
            server.base_url, tmp_path / "s.sqlite", rows(500), clock=fake.clock,
            pace=purchase.Pace(max_attempts=100),
        )  # fmt: skip
        assert server.stats()["requests"] < 150
    assert "attempts in a row failed" in outcome.stopped and "HTTP 503" in outcome.stopped
    assert answers == [] and outcome.left == 500
    assert fake.waited > 5 + 15 + 60 + 180


def test_requests_that_are_wrong_for_every_row_stop_early(tmp_path):
    with teacher_server.start(tmp_path / "log.jsonl") as server:
        server.script({"answers": ["400_context"], "repeat": True})
        outcome, answers = buy(
            server.base_url, tmp_path / "s.sqlite", rows(500), pace=purchase.Pace(concurrency=4)
        )
        assert server.stats()["requests"] < 20
    assert "were turned down" in outcome.stopped and "context" in outcome.stopped
    assert all(a.cls == "refused" and not a.tokens for a in answers)


def test_a_signal_keeps_what_was_paid(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    path = tmp_path / "s.sqlite"
    with teacher_server.start(tmp_path / "log.jsonl", delay=0.3) as server:
        command = [sys.executable, tmp_path / "child.py", os.path.dirname(__file__),
                   server.base_url, str(path), "400"]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            while server.stats()["requests"] < 60:
                time.sleep(0.01)
            child.send_signal(signal.SIGTERM)
            bought, given_up, left, stopped = json.loads(child.stdout.read())
        sold = len(server.answers())
    assert stopped == "SIGTERM" and given_up == 0 and bought + left == 400
    with Store(path, write=False) as store:
        assert len(store.answers()) == bought == sold


@pytest.mark.parametrize("heals", [True, False])
def test_a_full_disk_stops_buying_and_is_tried_again(tmp_path, heals, monkeypatch):
    """SQLite has no page left; where there is room again in time, nothing is lost."""
    monkeypatch.setattr(purchase, "_PATIENCE", 3)
    refused, add = [], Store.add

    def counting(self, *given):
        try:
            add(self, *given)
        except sqlite3.OperationalError as e:
            refused.append(str(e))
            if heals and len(refused) == 2:
                self._db.execute("PRAGMA max_page_count = 1000000")
            raise

    monkeypatch.setattr(Store, "add", counting)
    with teacher_server.start(tmp_path / "log.jsonl") as server, Store(tmp_path / "s") as store:
        config = endpoint.EndpointConfig(model="teacher", base_url=server.base_url)
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages + 5}")

        async def run():
            backend = endpoint.Endpoint(config, PROMPT)
            try:
                return await purchase.buy(
                    backend, to_requests(backend, rows(2_000)), store, prompt=PROMPT,
                    parameters="{}", sizes=lambda r: purchase.Size(1, 1),
                    pace=purchase.Pace(concurrency=8),
                )  # fmt: skip
            finally:
                await backend.close()

        outcome = asyncio.run(asyncio.wait_for(run(), 60))
        sold = len(server.answers())
        assert sold < 2_000 and len(refused) == (2 if heals else 4)
        assert "cannot be written: database or disk is full" in outcome.stopped
        assert len(store.answers()) == outcome.bought
        assert (outcome.bought == sold) == heals == ("lost" not in outcome.stopped)


def test_a_second_ctrl_c_keeps_what_was_answered_and_what_it_may_have_cost(tmp_path):
    (tmp_path / "child.py").write_text(CHILD.replace("timeout=2", "timeout=60"))
    path = tmp_path / "s.sqlite"
    with teacher_server.start(tmp_path / "log.jsonl") as server:
        server.script({"contains": "gets 7.", "answers": ["timeout"], "repeat": True})
        command = [sys.executable, tmp_path / "child.py", os.path.dirname(__file__),
                   server.base_url, str(path), "40"]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
            while server.stats()["requests"] < 40:
                time.sleep(0.01)
            for _ in range(2):
                time.sleep(0.3)
                child.send_signal(signal.SIGINT)
            assert "KeyboardInterrupt" in child.stderr.read()
    with Store(path, write=False) as store:
        assert len(store.answers()) == 39
        (failure,) = store.failures()
    assert "cut off" in failure.error and failure.tokens > 256


class Local:
    """A teacher that computes, and never waits."""

    provider, model, batch, parameters = "here", "slow", 1, {}

    def __init__(self, seconds=0.0):
        self.seconds, self.asked = seconds, 0

    async def ask(self, requests):
        self.asked += len(requests)
        time.sleep(self.seconds)
        return [backends.Reply("8. The answer is 8.", "stop") for _ in requests]

    async def close(self):
        pass


def buy_of(backend, path, count, *, clock=limits.REAL_TIME, loop_factory=None, **settings):
    async def run(store):
        return await purchase.buy(
            backend, to_requests(backend, rows(count)), store, prompt=PROMPT, parameters="{}",
            sizes=lambda r: purchase.Size(0, 0), clock=clock, seed=0, **settings,
        )  # fmt: skip

    with Store(path) as store, asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(run(store))


def test_a_teacher_that_never_waits_lets_its_answers_be_written(tmp_path):
    seen, backend = [], Local(0.02)
    buy_of(
        backend, tmp_path / "s.sqlite", 50, pace=purchase.Pace(concurrency=1),
        progress=lambda answer: seen.append(backend.asked),
    )  # fmt: skip
    assert seen[0] < 25


def test_without_a_disk_nothing_more_is_bought(tmp_path, monkeypatch):
    def full(self, *_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Store, "add", full)
    monkeypatch.setattr(purchase, "_PATIENCE", 3)
    backend = Local(0.01)
    outcome = buy_of(backend, tmp_path / "s.sqlite", 400, pace=purchase.Pace(concurrency=1))
    assert "disk is full" in outcome.stopped and "are lost" in outcome.stopped
    assert backend.asked < 100 and outcome.bought == 0


class _Skipping(asyncio.SelectorEventLoop):
    """A loop whose time jumps to the next thing that is to be done."""

    def __init__(self):
        super().__init__()
        self.skipped = 0.0
        select = self._selector.select

        def skip(timeout=None):
            found = select(0.001 if timeout else timeout)
            self.skipped += 0.0 if found else timeout or 0.0
            return found

        self._selector.select = skip

    def time(self):
        return super().time() + self.skipped


class _Limited(Local):
    """Takes 30 requests a minute, and turns the others down without saying until when."""

    free_at, turned_down = 0.0, 0

    async def ask(self, requests):
        now = asyncio.get_running_loop().time()
        if now < self.free_at:
            self.turned_down += 1
            raise backends.Failed("HTTP 429", too_many=True, may_cost=False)
        self.free_at = now + 2.0
        await asyncio.sleep(0.5)
        return await super().ask(requests)


def test_a_slow_provider_is_asked_slowly_until_all_is_answered(tmp_path):
    """64 at a time wait for each other, and do not use up their attempts on a full teacher."""
    clock = limits.Clock(lambda: asyncio.get_running_loop().time(), asyncio.sleep)
    backend = _Limited()
    outcome = buy_of(backend, tmp_path / "s.sqlite", 200, clock=clock, loop_factory=_Skipping)
    assert outcome == purchase.Outcome(bought=200)
    assert backend.turned_down < 5 * 200


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_texts_are_classified(name):
    """As `teacher_texts` expects, but that what is too long is so earlier here."""
    text, (cls, rationale, label) = TEXTS[name], EXPECTED[name]
    backend = backends.Scripted(PROMPT)
    (request,) = to_requests(backend, rows(1))
    began = time.monotonic()
    answer = purchase.to_bought(
        request, backends.Reply(text, "stop"), backend, "{}", PROMPT, purchase.Prices(),
        purchase.Size(1, 1), 0.0, 1,
    )  # fmt: skip
    assert time.monotonic() - began < 2
    if len(text) > purchase.MAX_TEXT:
        assert (answer.cls, answer.rationale, answer.label) == ("oversize", None, None)
        assert len(answer.text) == purchase.MAX_TEXT and answer.text_length == len(text)
        return
    assert answer.text == text
    if answer.cls == "refused":
        assert "refus" in name or "sorry" in text.lower()
        assert answer.label is None
        return
    assert answer.cls == cls
    for found, wanted in ((answer.rationale, rationale), (answer.label, label)):
        if wanted is not ...:
            fit = wanted and (wanted.encode("utf-8", "replace").decode().replace("\0", "") or None)
            assert found == fit


@pytest.mark.parametrize(
    "text, kept",
    [(f"HTTP 401: wrong key {KEY}", "HTTP 401: wrong key <key>"),
     ("Bearer abcdefghijkl", "Bearer <key>"), ("hf_abcdefghijklmn", "hf_<key>"),
     ("https://user:word@host/v1", "https://<user>@host/v1"), ("sk-", "sk-"),
     ("task-list of risk-takers", "task-list of risk-takers")],
)  # fmt: skip
def test_redaction(text, kept):
    assert endpoint.redacted(text, KEY) == kept


@pytest.mark.parametrize(
    "settings, message",
    [(dict(model=None), "MODEL is missing"), (dict(api="responses"), "API must be one of"),
     (dict(base_url="localhost:8000"), "BASE_URL must be"),
     (dict(base_url="https://me:word@host/v1"), "no user and no password"),
     (dict(key_env="NO_SUCH"), "is empty"),
     (dict(key_file="/no/such"), "no such file"), (dict(max_tokens=0), "MAX_TOKENS"),
     (dict(base_url="https://host/v1?key=word"), "may have no query"),
     (dict(extra={"n": 5}), "may not hold 'n'"), (dict(temperature=-1.0), "TEMPERATURE"),
     (dict(extra=[1]), "EXTRA must be a dict")],
)  # fmt: skip
def test_settings_are_checked_before_anything_is_sent(settings, message, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        endpoint.Endpoint(endpoint.EndpointConfig(**{"model": "m"} | settings), PROMPT)


def test_a_key_with_a_line_break_is_refused_without_being_shown(tmp_path):
    (tmp_path / "key").write_text("sk-first\nX-Header: second\n")
    config = endpoint.EndpointConfig(model="m", key_file=str(tmp_path / "key"))
    with pytest.raises(ValueError, match="no key of printable") as e:
        config.key()
    assert "sk-first" not in str(e.value)


def test_extra_fields_change_and_remove():
    config = endpoint.EndpointConfig(
        model="m", extra={"max_completion_tokens": 9, "temperature": None, "top_k": 3}
    )
    backend = endpoint.Endpoint(config, PROMPT)
    assert backend.parameters == {
        "api": "chat",
        "model": "m",
        "max_completion_tokens": 9,
        "top_k": 3,
    }
    assert backend.max_tokens == 9


@pytest.mark.parametrize(
    "headers, seconds",
    [({"retry-after": "3"}, 3), ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
     ({"retry-after": "-5"}, 0), ({"retry-after": "nan"}, None), ({"retry-after": "soon"}, None),
     ({}, None), ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0)],
)  # fmt: skip
def test_retry_after(headers, seconds):
    assert endpoint.retry_after(headers) == seconds
