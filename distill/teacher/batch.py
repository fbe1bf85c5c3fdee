"""Providers' batch API: hand in many requests at once, for half the price, and collect them later.

A job is noted in the store before it is handed in, and its provider's number afterwards; what lies
in a job that is not collected is not asked for again. A run that died between the two finds its job
by the mark that it bears at the provider. Ctrl-C while waiting loses nothing: the jobs go on, and
the same command collects them.
"""

import asyncio
import dataclasses
import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from distill.teacher import limits, prompting, purchase, store
from distill.teacher.backends import Failed, Hopeless, Reply, Request
from distill.teacher.endpoint import Endpoint

MAX_REQUESTS = 50_000  # of a job, what providers take
MAX_BYTES = 100 << 20
# Any other status, also one that is not known here, is of a job that goes on.
_ENDED = ("completed", "failed", "expired", "cancelled")
_MARK = "distill_job"


@dataclasses.dataclass(frozen=True)
class Job:
    """One job at the provider, a row of the table `batches`.

    Attributes:
      id: ours; the job bears it at the provider as metadata `distill_job`.
      batch_id: the provider's; None while it is being handed in.
      status: `submitting`, the provider's (`in_progress`, ...), or `collected`.
      time: when it was handed in, UTC, ISO 8601.
      provider: who has it.
      parameters: of its requests; with the prompt they say which runs may collect it.
      prompt_sha256: see `store.Bought`.
    """

    id: str
    batch_id: str | None
    status: str
    time: str
    provider: str
    parameters: str
    prompt_sha256: str


@dataclasses.dataclass(frozen=True)
class Part:
    """One request of a job, a row of the table `batch_requests`; see `Request`."""

    key: str
    job: str
    row: str
    input_sha256: str  # as it was handed in; the row may have another input since
    sample: int
    given_label: str | None


def handed_in(into: store.Store) -> set[str]:
    """Returns the keys of what lies in jobs that were not collected."""
    prepare(into)
    return {part.key for part in into.read("batch_requests", Part)}


def prepare(into: store.Store) -> None:
    """Makes the tables."""
    with into.transaction():
        into.table("batches", Job, "id")
        into.table("batch_requests", Part, "key")


async def buy(
    endpoint: Endpoint,
    requests: Sequence[Request],
    into: store.Store,
    *,
    prompt: prompting.Prompt,
    parameters: str,
    sizes: Callable[[Request], purchase.Size],
    prices: purchase.Prices,
    budget: limits.Budget,
    poll_seconds: float = 30.0,
    progress: Callable[[store.Bought], None] = lambda bought: None,
) -> purchase.Outcome:
    """Hands requests in, waits, and collects: as `purchase.buy`, through the batch API.

    Requests that an earlier run handed in are collected, not handed in again.

    Args:
      endpoint: who is asked.
      requests: what is wanted.
      into: the store, open for writing.
      prompt: reads the completions.
      parameters: of the requests, as `store.Bought` keeps them.
      sizes: the most tokens of a request.
      prices: of the batch API.
      budget: the ceiling.
      poll_seconds: between two looks at the jobs.
      progress: is told of every answer that is on the disk.

    Raises:
      Hopeless: the provider refuses the key, or a whole job.
      Failed: the provider does not answer.
    """
    prepare(into)
    outcome = purchase.Outcome()
    client = _Client(endpoint)
    await _find_lost(client, into)
    rows = {row.id: row for row in into.asked()}
    open_jobs = [
        job for job in into.read("batches", Job)
        if job.status != "collected" and job.provider == endpoint.provider
        and (job.parameters, job.prompt_sha256) == (parameters, prompt.sha256)
    ]  # fmt: skip
    ours = {job.id for job in open_jobs}
    by_key = {}
    for part in into.read("batch_requests", Part):
        if part.job in ours:
            row = dataclasses.replace(rows[part.row], input_sha256=part.input_sha256)
            by_key[part.key] = Request(part.key, row, part.sample, part.given_label)
    for request in by_key.values():  # spent, as far as the ceiling is concerned
        size = sizes(request)
        budget.settle((0, 0.0), (sum(dataclasses.astuple(size)), _cost(prices, size)))
    fresh = [request for request in requests if request.key not in by_key]
    by_key |= {request.key: request for request in fresh}
    for part in _parts(endpoint, fresh):
        fits = []
        try:
            for request in part:
                size = sizes(request)
                budget.set_aside(sum(dataclasses.astuple(size)), _cost(prices, size))
                fits.append(request)
        except limits.CeilingReached as e:
            outcome.stopped = str(e)
        if fits:
            open_jobs.append(await _submit(client, fits, into, parameters, prompt))
        if outcome.stopped:
            break
    while open_jobs:
        for job in list(open_jobs):
            try:
                found = await client.call("look at a job", client.batches.retrieve, job.batch_id)
            except Failed as e:  # A day is long: a network comes back.
                logging.warning("%s. Waiting goes on", e)
                continue
            if found.status not in _ENDED:
                _note(into, dataclasses.replace(job, status=found.status))
                continue
            open_jobs.remove(job)
            answers = await _collect(
                client, found, by_key, endpoint, parameters, prompt, prices, sizes
            )
            _close(into, job, answers)
            for answer in answers:
                size = sizes(by_key[answer.key])
                aside = sum(dataclasses.astuple(size)), _cost(prices, size)
                budget.settle(aside, (answer.tokens, answer.cost or 0.0))
                outcome.bought += answer.cls != "transport"
                outcome.given_up += answer.cls == "transport"
                progress(answer)
            if found.status == "failed":
                errors = [str(e.message) for e in (found.errors and found.errors.data) or ()]
                raise Hopeless(f"{endpoint.provider} refuses the job: {'; '.join(errors[:3])}")
        if open_jobs:
            await asyncio.sleep(poll_seconds)
    outcome.left = len(by_key) - outcome.bought - outcome.given_up
    return outcome


class _Client:
    """The two parts of the official client, with our errors."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.files, self.batches = endpoint.client.files, endpoint.client.batches

    async def call(self, what: str, fn: Callable[..., Any], *args, **kwargs) -> Any:
        """Calls the provider; a few attempts, since each of these is cheap to repeat."""
        for attempt in range(1, 6):
            try:
                return await self.endpoint.guarded(fn, *args, **kwargs)
            except Failed as e:
                if attempt == 5:
                    raise Failed(f"could not {what} at {self.endpoint.provider}: {e}") from e
                await asyncio.sleep(min(2.0**attempt, e.retry_after or 2.0**attempt))
        raise AssertionError


def _cost(prices: purchase.Prices, size: purchase.Size) -> float:
    return prices.of(size.prompt, size.completion) or 0.0


def _parts(endpoint: Endpoint, requests: Sequence[Request]):
    """Yields as many requests as a job may have, in turn."""
    part, size = [], 0
    for request in requests:
        more = endpoint.prompt_bytes(request) + 200
        if part and (len(part) == MAX_REQUESTS or size + more > MAX_BYTES):
            yield part
            part, size = [], 0
        part.append(request)
        size += more
    if part:
        yield part


async def _submit(
    client: _Client, requests: Sequence[Request], into: store.Store, parameters: str,
    prompt: prompting.Prompt,
) -> Job:  # fmt: skip
    endpoint = client.endpoint
    job = Job(
        uuid.uuid4().hex, None, "submitting", purchase.now(), endpoint.provider, parameters,
        prompt.sha256,
    )  # fmt: skip
    parts = [
        Part(r.key, job.id, r.row.id, r.row.input_sha256, r.sample, r.given_label) for r in requests
    ]
    with into.transaction():
        into.put("batches", [job])
        into.put("batch_requests", parts)
    lines = [
        json.dumps(
            {"custom_id": r.key, "method": "POST", "url": f"/v1{endpoint.path}",
             "body": endpoint.body(r)}
        )
        for r in requests
    ]  # fmt: skip
    content = ("\n".join(lines) + "\n").encode()
    uploaded = False
    try:
        file = await client.call(
            "upload a job", client.files.create, file=(f"{job.id}.jsonl", content), purpose="batch"
        )
        uploaded = True
        # Not repeated: a second one would be paid, too. `_find_lost` looks whether it got through.
        made = await endpoint.guarded(
            client.batches.create, input_file_id=file.id, endpoint=f"/v1{endpoint.path}",
            completion_window="24h", metadata={_MARK: job.id},
        )  # fmt: skip
    except (Failed, Hopeless) as e:
        if isinstance(e, Hopeless) or not uploaded:
            _forget(into, job)  # There is none.
        raise
    job = dataclasses.replace(job, batch_id=made.id, status=made.status)
    _note(into, job)
    logging.info("Handed in %d requests as %s", len(requests), made.id)
    return job


async def _find_lost(client: _Client, into: store.Store) -> None:
    """Finds out what became of jobs that a run was handing in when it died."""
    provider = client.endpoint.provider  # Others are not known here, and not lost.
    lost = [
        job
        for job in into.read("batches", Job)
        if job.status == "submitting" and job.provider == provider
    ]
    if not lost:
        return
    marks = {}

    async def look() -> None:
        async for batch in client.batches.list(limit=100):
            marks[(batch.metadata or {}).get(_MARK)] = batch

    await client.call("list the jobs", look)
    for job in lost:
        if job.id in marks:
            batch = marks[job.id]
            _note(into, dataclasses.replace(job, batch_id=batch.id, status=batch.status))
        else:
            _forget(into, job)


async def _collect(
    client, found, by_key, endpoint, parameters, prompt, prices, sizes
) -> list[store.Bought]:
    """Returns the answers of a job that has ended, in whatever way."""
    answers: dict[str, store.Bought] = {}
    done = getattr(found.request_counts, "completed", 0)
    if found.status == "completed" and done and not found.output_file_id:
        raise Failed(f"{found.id} has {done} answers, but names no file of them")
    for file_id in (found.output_file_id, found.error_file_id):
        if not file_id:
            continue
        content = await client.call("fetch a job's answers", client.files.content, file_id)
        for line in content.text.split("\n"):
            key, reply, failed = _read(line, endpoint)
            request = by_key.get(key) if isinstance(key, str) else None
            if request is None or key in answers:
                continue
            size = purchase.Size(0, 0) if failed else sizes(request)
            answer = purchase.to_bought(
                request, reply, endpoint, parameters, prompt, prices, size, 0.0, 1
            )
            if failed:
                answer = dataclasses.replace(answer, cls="transport", error=failed)
            answers[key] = answer
    return list(answers.values())


def _read(line: str, endpoint: Endpoint) -> tuple[str | None, Reply, str | None]:
    """Returns key, reply, and why there is none."""
    try:
        fields = json.loads(line)
        key, response = fields["custom_id"], fields.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        if status == 200:
            return key, endpoint.read(json.dumps(body).encode()), None
        why = endpoint.short(f"HTTP {status}: {body or fields.get('error')}")
        if status == 400:
            return key, Reply(None, None, why, 0, 0), None
        return key, Reply(None), why
    except Failed as e:
        return key, Reply(None), str(e)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, Reply(None), None


def _note(into: store.Store, job: Job) -> None:
    with into.transaction():
        into.put("batches", [job])


def _forget(into: store.Store, job: Job) -> None:
    with into.transaction():
        into.remove("batch_requests", "job", job.id)
        into.remove("batches", "id", job.id)


def _close(into: store.Store, job: Job, answers: Sequence[store.Bought]) -> None:
    """Keeps a job's answers; what it did not answer may be handed in again."""
    with into.transaction():
        into.keep(answers)
        into.put("batches", [dataclasses.replace(job, status="collected")])
        into.remove("batch_requests", "job", job.id)
