"""An OpenAI-compatible server that errs on demand: the other end of the tests of teacher clients.

    python tests/teacher_server.py --port=0 --log=/tmp/bought.jsonl --fault_rate=0.3

prints `{"base_url": "http://127.0.0.1:40123/v1", ...}` and serves real HTTP/1.1 on loopback:
`/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/v1/files` and `/v1/batches`. In tests,
`with start(tmp_path / "bought.jsonl") as server:` runs it as a process of its own.

What it answers follows from the request alone. It solves the task of `tasks/arithmetic.py`
(`Ann has 7 nuts, gets 2, eats 5, gets 4.` -> ` 9, then 4, then 8. The answer is 8.`) and echoes
anything else. `error_rate` of the sums are wrong; `stop`, `max_tokens` and `n` are honoured.

Faults (`teacher_faults.FAULTS`) are drawn from (seed, request, how often it was asked before), so
that they do not depend on the order of arrival, or are scripted for given inputs. The log has a
line for each completion that was paid for, written *before* the response is sent, and one for
whether it was delivered whole: known once the client asks again on its connection, or closes it
(a client that ends with an answer unread resets it). `read_log` joins the two.

It imports the standard library only.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import http.client
import json
import math
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterable, Iterator

import teacher_faults
from teacher_batches import Batches, json_object, json_reply, listed
from teacher_faults import FAULTS, Fault, Refused, Reply, error

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set by a flag, by `start`, and while it runs by `Server.settings`.

    Attributes:
      seed: of the faults, the wrong sums and the order of a batch's output.
      fault_rate: fraction of the requests for a completion, in [0, 1], that a fault befalls.
      faults: which: names and groups of them, separated by commas.
      error_rate: fraction of the sums, in [0, 1], that are wrong.
      delay: seconds before each completion.
      drip: seconds between two bytes of the fault `drip`.
      retry_after: seconds that the 429 faults ask for; as a date up to the next whole one.
      requests_per_minute: more are refused by 429; one second's worth may come at once, and what
        was refused does not count. 0: no limit.
      quota: completions until there is no more credit; 0: no limit.
      api_key: the only one that is accepted; empty: any, or none.
      models: the only ones that exist, separated by commas; empty: any.
      batch_polls: how many polls see a batch in progress; at least 1.
      batch_outcome: completed, failed (found invalid) or expired.
      batch_share: fraction of the lines that an expired batch has answered.
      batch_garbage: the output file also has a line twice, one of an unknown id, an empty one and
        a torn one.
    """

    seed: int = 0
    fault_rate: float = 0.0
    faults: str = "transient"
    error_rate: float = 0.0
    delay: float = 0.0
    drip: float = 0.05
    retry_after: float = 1.0
    requests_per_minute: float = 0.0
    quota: int = 0
    api_key: str = ""
    models: str = ""
    batch_polls: int = 1
    batch_outcome: str = "completed"
    batch_share: float = 0.5
    batch_garbage: bool = False

    def __post_init__(self):
        teacher_faults.names(self.faults)
        if self.batch_outcome not in ("completed", "failed", "expired"):
            raise ValueError(f"batch_outcome {self.batch_outcome!r}")


# --- What the teacher says ------------------------------------------------------------------------

_PROBLEM = re.compile(r"has (\d+) nuts, ((?:gets|eats) \d+(?:, (?:gets|eats) \d+)*)\.")


def teach(prompt: str, slip: float | None = None) -> str:
    """Returns the completion of a prompt: its last problem solved, else an echo of its last line.

    Args:
      prompt: any text.
      slip: in [0, 1): which sum is wrong, and by how much; None: none is.
    """
    problem = collections.deque(_PROBLEM.finditer(prompt), maxlen=1)
    if not problem:
        lines = [re.sub(r"^\s*\w+:", "", line).strip() for line in prompt.splitlines()]
        return " " + next((line for line in reversed(lines) if line), "Nothing was asked.")
    start, changes = problem[0].groups()
    amounts = [int(start)]
    for verb, number in map(str.split, changes.split(", ")):
        amounts.append(amounts[-1] + (int(number) if verb == "gets" else -int(number)))
    steps = amounts[1:]
    if slip is not None:
        wrong, by = divmod(int(slip * len(steps) * 9), 9)
        steps[wrong:] = [step + by + 1 for step in steps[wrong:]]
    return f" {', then '.join(map(str, steps))}. The answer is {steps[-1]}."


def draw(*of) -> float:
    """A number in [0, 1) that follows from the arguments."""
    digest = hashlib.sha256("/".join(map(str, of)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def request_key(body: dict) -> str:
    """The sha256 of a request's canonical JSON: the same sent by itself and in a batch."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(content) -> str:
    """The text of a chat message: a string, or a list of parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


@dataclasses.dataclass
class Request:
    """An HTTP request: its path without the query, its headers by lower-case name."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def api_key(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclasses.dataclass
class Call:
    """A request for a completion, by itself or in a batch.

    Attributes:
      path: CHAT or TEXT.
      body: the JSON object.
      key: `request_key` of it.
      prompts: what to complete: the last user message, or each prompt.
      read: all texts that are paid for.
      attempt: how often the same was asked before.
    """

    path: str
    body: dict
    key: str
    prompts: list[str]
    read: list[str]
    attempt: int

    @property
    def text(self) -> str:
        return "\n".join(self.prompts)


@dataclasses.dataclass
class Exchange:
    """What is done about a request.

    Attributes:
      reply: to send.
      fault: that befell it.
      bought: the log's line about the completion in the reply, without its number.
      delay: seconds to wait before.
    """

    reply: Reply
    fault: Fault | None = None
    bought: dict | None = None
    delay: float = 0.0


class Teacher:
    """All that the connections share: settings, script, counts, batches and the log.

    Args:
      settings: at the start.
      log: path of the log, to append to; None: no log.
    """

    def __init__(self, settings: Settings, log: str | None):
        self.settings = settings
        self.rules: list[dict] = []
        self.asked: collections.Counter = collections.Counter()
        self.turns: collections.Counter = collections.Counter()
        self.counts: collections.Counter = collections.Counter()
        self.paths: collections.Counter = collections.Counter()
        self.statuses: collections.Counter = collections.Counter()
        self.faults: collections.Counter = collections.Counter()
        self.batches = Batches(self._answer_line, (CHAT, TEXT))
        # One write for each line of a file that is only appended to: lines are whole, and in the
        # kernel's hands before the response is.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._earlier = len(read_log(log)) if log and os.path.exists(log) else 0
        self._log = os.open(log, flags, 0o644) if log else None
        self._allowed, self._allowed_at = 1.0, time.monotonic()

    def handle(self, request: Request) -> Exchange:
        """Answers one request."""
        try:
            if request.path.startswith("/control/"):
                return Exchange(self._control(request))
            self.paths[request.path] += 1
            exchange = self._serve(request)
        except Refused as refused:
            exchange = Exchange(refused.reply)
        if exchange.fault is None or exchange.fault.answers or exchange.fault.reply:
            self.statuses[exchange.reply.status] += 1
        return exchange

    def buy(self, bought: dict) -> int:
        """Logs a completion that is about to be sent, and returns its number."""
        self.counts["answers"] += 1
        n = self._earlier + self.counts["answers"]
        self._write({"n": n, **bought})
        return n

    def settle(self, n: int, delivered: bool) -> None:
        """Logs whether it was delivered whole."""
        self.counts["delivered" if delivered else "lost"] += 1
        self._write({"n": n, "delivered": delivered})

    def stats(self) -> dict:
        """The counters since the start; what went to /control is not in them."""
        counted = (
            "connections", "open_connections", "in_flight", "most_in_flight", "gone",
            "rate_limited", "answers", "delivered", "lost", "prompt_tokens", "completion_tokens",
        )  # fmt: skip
        return {
            **{name: self.counts[name] for name in counted},
            "requests": self.paths.total(),
            "paths": self.paths,
            "statuses": self.statuses,
            "faults": self.faults,
        }

    def _write(self, line: dict) -> None:
        if self._log is not None:
            os.write(self._log, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def _serve(self, request: Request) -> Exchange:
        if self.settings.api_key not in ("", request.api_key):
            raise Refused(teacher_faults.unauthorized(request.api_key))
        if request.path in (CHAT, TEXT):
            self._limit_rate()
            call = self._call(request.path, json_object(request.body))
            answer = self._choose(call)
            fault = self._fault(answer)
            exchange = self._respond(fault, request, lambda: self._complete(call, answer, fault))
            if fault is None or (fault.answers and fault.sold):
                exchange.bought = _bought(call, answer)
                if "x-client-request-id" in request.headers:
                    exchange.bought["client"] = request.headers["x-client-request-id"]
            exchange.delay = self.settings.delay
            return exchange
        name = f"{request.method} {request.path}"
        fault = self._fault(self._scripted(name, request.path, "") or {})
        return self._respond(fault, request, lambda: self._api(request))

    def _respond(self, fault: Fault | None, request: Request, right) -> Exchange:
        """Makes the reply `right()`, or what the fault makes of it."""
        if fault is not None and fault.reply is not None:
            return Exchange(fault.reply(request.api_key, self.settings.retry_after), fault)
        if fault is not None and not fault.answers:
            return Exchange(Reply(200, b""), fault)
        reply = right()
        return Exchange(fault.encode(reply) if fault and fault.encode else reply, fault)

    def _api(self, request: Request) -> Reply:
        names = self.settings.models.split(",") if self.settings.models else ["teacher"]
        query = dict(urllib.parse.parse_qsl(request.query))
        models = [
            {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "tests"}
            for name in names
        ]
        if (request.method, request.path) == ("GET", "/v1/models"):
            return json_reply(listed(models, query))
        reply = self.batches.handle(request, query, self.settings)
        if reply is None:
            raise Refused(error(404, f"Invalid URL ({request.method} {request.path})"))
        return reply

    def _limit_rate(self) -> None:
        """A bucket of tokens: one for each request, refilled steadily."""
        per_second = self.settings.requests_per_minute / 60
        if not per_second:
            return
        now = time.monotonic()
        refilled = self._allowed + (now - self._allowed_at) * per_second
        self._allowed, self._allowed_at = min(refilled, max(per_second, 1.0)), now
        if self._allowed < 1:
            self.counts["rate_limited"] += 1
            wait = (1 - self._allowed) / per_second
            raise Refused(
                teacher_faults.rate_limited({
                    "Retry-After": str(math.ceil(wait)),
                    "retry-after-ms": str(math.ceil(wait * 1000)),
                    "x-ratelimit-limit-requests": f"{self.settings.requests_per_minute:g}",
                    "x-ratelimit-remaining-requests": "0",
                    "x-ratelimit-reset-requests": f"{math.ceil(wait * 1000)}ms",
                })
            )  # fmt: skip
        self._allowed -= 1

    def _call(self, path: str, body: dict) -> Call:
        """Checks a request for a completion, and counts it."""
        if not isinstance(body.get("model"), str):
            raise Refused(error(400, "you must provide a model parameter"))
        if self.settings.models and body["model"] not in self.settings.models.split(","):
            raise Refused(teacher_faults.no_model(body["model"]))
        if body.get("stream"):
            raise Refused(error(400, "this server does not stream"))
        if path == CHAT:
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages:
                raise Refused(error(400, "'messages' must be a list that is not empty"))
            read = [_plain(message.get("content")) for message in messages]
            asked = [i for i, message in enumerate(messages) if message.get("role") == "user"]
            prompts = [read[asked[-1] if asked else -1]]
        else:
            prompt = body.get("prompt")
            prompts = read = prompt if isinstance(prompt, list) else [prompt]
            if not prompts or not all(isinstance(text, str) for text in prompts):
                raise Refused(error(400, "'prompt' must be a string or a list of strings"))
        key = request_key(body)
        self.asked[key] += 1
        return Call(path, body, key, prompts, read, self.asked[key] - 1)

    def _scripted(self, key: str, path: str, text: str) -> dict | None:
        """The script's answer (see `Server.script`), {} for the right one; None: it has none."""
        for number, rule in enumerate(self.rules):
            fits = path.startswith(rule["path"]) if "path" in rule else path in (CHAT, TEXT)
            if fits and rule.get("contains", "") in text:
                answers, turn = rule["answers"], self.turns[number, key]
                self.turns[number, key] += 1
                if turn >= len(answers) and not rule.get("repeat"):
                    return {}
                answer = answers[turn % len(answers)]
                return answer if isinstance(answer, dict) else {"fault": answer}
        return None

    def _choose(self, call: Call) -> dict:
        """The answer to a call: {} (the right one), a fault, or what the script says."""
        answer = self._scripted(call.key, call.path, call.text)
        if answer is None:
            answer, rate = {}, self.settings.fault_rate
            drawn = draw("fault", self.settings.seed, call.key, call.attempt) if rate else 1.0
            if drawn < rate:
                names = teacher_faults.names(self.settings.faults)
                answer = {"fault": names[int(drawn / rate * len(names))]}
        if self.settings.quota and self.counts["answers"] >= self.settings.quota:
            answer = {"fault": "429_quota"}
        return answer

    def _fault(self, answer: dict) -> Fault | None:
        name = answer.get("fault")
        if name is None:
            return None
        self.faults[name] += 1
        return FAULTS[name]

    def _complete(self, call: Call, answer: dict, fault: Fault | None) -> Reply:
        """A completion: `n` choices for each prompt."""
        choices = []
        for prompt in call.prompts:
            for _ in range(call.body.get("n") or 1):
                text, reason = self._text(call, prompt, len(choices), answer)
                choice = {"index": len(choices), "logprobs": None, "finish_reason": reason}
                if call.path == CHAT:
                    refusal = answer.get("refusal")
                    choice["message"] = {"role": "assistant", "content": text, "refusal": refusal}
                else:
                    choice["text"] = text
                choices.append(choice)
        texts = [choice.get("message", {"content": choice.get("text")}) for choice in choices]
        tokens = [
            sum(len(text.split()) for text in call.read),
            sum(len(text["content"].split()) for text in texts if text["content"]),
        ]
        self.counts.update(prompt_tokens=tokens[0], completion_tokens=tokens[1])
        usage = {
            "prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)
        }  # fmt: skip
        completion = {
            "id": f"{'chatcmpl' if call.path == CHAT else 'cmpl'}-{call.key[:24]}",
            "object": "chat.completion" if call.path == CHAT else "text_completion",
            "created": int(time.time()),
            "model": call.body["model"],
            "choices": choices,
            "usage": answer.get("usage", usage),
        }
        if fault is not None and fault.change is not None:
            fault.change(completion)
        # Only ASCII, so that lone surrogates travel, as JSON's escapes.
        return json_reply(completion)

    def _text(self, call: Call, prompt: str, index: int, answer: dict) -> tuple[str | None, str]:
        """The text of a choice, and why it ended."""
        if "text" in answer:
            return answer["text"], answer.get("finish_reason", "stop")
        slip, rate = None, self.settings.error_rate
        if rate:
            drawn = draw("sum", self.settings.seed, call.key, index)
            slip = drawn / rate if drawn < rate else None
        text, reason = teach(prompt, slip), "stop"
        if call.path == CHAT:
            text = text.lstrip()
        stops = call.body.get("stop") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.partition(stop)[0]
        most = call.body.get("max_completion_tokens", call.body.get("max_tokens"))
        if most is not None and len(tokens := re.findall(r"\s*\S+", text)) > most:
            text, reason = "".join(tokens[:most]), "length"
        return text, answer.get("finish_reason", reason)

    def _answer_line(self, endpoint: str, line: dict, batch: dict) -> tuple[int, dict]:
        """Answers a line of a batch. What faults do to the transport does not reach it."""
        try:
            call = self._call(endpoint, line["body"])
        except Refused as refused:
            return refused.reply.status, json.loads(refused.reply.body)
        answer = self._choose(call)
        fault = self._fault(answer)
        if fault is not None and fault.reply is not None:
            reply = fault.reply("", self.settings.retry_after)
            # A page, or a 200 with garbage: the batch's workers saw it, not the client.
            failed = reply if reply.body.startswith(b'{"error"') else error(500, "An error.")
            return max(failed.status, 400), json.loads(failed.body)
        reply = self._complete(call, answer, fault)
        if fault is None or fault.sold:
            about = {**_bought(call, answer), "client": line["custom_id"], "batch": batch["id"]}
            self.settle(self.buy(about), True)
        return reply.status, json.loads(reply.body)

    def _control(self, request: Request) -> Reply:
        try:
            match request.method, request.path:
                case "GET", "/control/stats":
                    return json_reply(self.stats())
                case "POST", "/control/script":
                    self.rules = _rules(json.loads(request.body))
                    self.turns.clear()
                    return json_reply({})
                case "POST", "/control/settings":
                    given = json.loads(request.body)
                    self.settings = dataclasses.replace(self.settings, **given)
                    return json_reply({})
        except (TypeError, ValueError) as wrong:
            raise Refused(error(400, str(wrong))) from None
        raise Refused(error(404, f"no {request.method} {request.path}"))


def _bought(call: Call, answer: dict) -> dict:
    return {"key": call.key, "fault": answer.get("fault"), "time": time.time()}


def _rules(rules: list[dict]) -> list[dict]:
    for rule in rules:
        if unknown := set(rule) - {"contains", "path", "answers", "repeat"}:
            raise ValueError(f"a rule has no {unknown}")
        for answer in rule["answers"]:
            fault = answer.get("fault") if isinstance(answer, dict) else answer
            if fault is not None and fault not in FAULTS:
                raise ValueError(f"no fault {fault!r}; there are {', '.join(FAULTS)}")
    return rules


# --- HTTP -----------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One connection, with its requests one after the other."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.buffer = bytearray()
        self.busy = self.counted = False
        # The number of the completion that was sent last, until it is known whether it arrived.
        self.sent: int | None = None
        self.task: asyncio.Task | None = None

    def connection_made(self, transport):
        self.transport = transport
        self.teacher.counts.update(connections=1, open_connections=1)

    def connection_lost(self, exc):
        self.teacher.counts["open_connections"] -= 1
        self._settle(exc is None)
        if self.busy:
            self._done()
        if self.task is not None:
            self.task.cancel()

    def eof_received(self):
        # A client that closes with an answer unread sends a reset, and the kernel may report the
        # end of the stream before it.
        sock = self.transport.get_extra_info("socket")
        failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._settle(not failed and not self.busy and not self.transport.get_write_buffer_size())

    def data_received(self, data):
        self.buffer += data
        while not self.busy and (request := self._parse()) is not None:
            self._settle(True)
            self.busy = True
            if not request.path.startswith("/control/"):
                counts, self.counted = self.teacher.counts, True
                counts["in_flight"] += 1
                counts["most_in_flight"] = max(counts["most_in_flight"], counts["in_flight"])
            exchange = self.teacher.handle(request)
            if request.headers.get("connection") == "close":
                exchange.reply.headers["Connection"] = "close"
            if exchange.delay:
                loop = asyncio.get_running_loop()
                loop.call_later(exchange.delay, self._respond, exchange)
            else:
                self._respond(exchange)

    def _parse(self) -> Request | None:
        """Takes a whole request out of the buffer."""
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") == "chunked":
            found = _unchunk(self.buffer, end + 4)
            if found is None:
                return None
            body, stop = found
        else:
            stop = end + 4 + int(headers.get("content-length", 0))
            if len(self.buffer) < stop:
                return None
            body = bytes(self.buffer[end + 4 : stop])
        del self.buffer[:stop]
        method, target, _ = first.split(" ")
        path, _, query = target.partition("?")
        return Request(method, urllib.parse.unquote(path), query, headers, body)

    def _respond(self, exchange: Exchange) -> None:
        if self.transport.is_closing():
            self.teacher.counts["gone"] += 1  # Nobody waits any more: nothing is bought.
            return
        if exchange.bought is not None:
            self.sent = self.teacher.buy(exchange.bought)
        reply, fault = exchange.reply, exchange.fault
        if fault is not None and fault.how != "whole":
            self.task = asyncio.ensure_future(self._misbehave(fault.how, reply))
            return
        self.transport.write(reply.head() + reply.body)
        if fault is not None and not fault.readable:
            self._settle(False)
        if reply.headers.get("Connection") == "close":
            self.transport.write_eof()
        self._done()

    async def _misbehave(self, how: str, reply: Reply) -> None:
        """Sends a reply as a fault has it."""
        head, body = reply.head(), reply.body
        match how:
            case "never":
                return
            case "drip":
                self.transport.write(head)
                for at in range(len(body)):
                    await asyncio.sleep(self.teacher.settings.drip)
                    self.transport.write(body[at : at + 1])
                self._done()
                return
            case "reset_headers":
                self.transport.write(head[: len(head) // 2])
            case "reset_body" | "cut":
                self.transport.write(head + body[: len(body) // 2])
        self._settle(False)
        # What was written shall be read before the reset overtakes it.
        await asyncio.sleep(0.005)
        if how.startswith("reset"):
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()

    def _settle(self, delivered: bool) -> None:
        if self.sent is not None:
            self.teacher.settle(self.sent, delivered)
            self.sent = None

    def _done(self) -> None:
        self.teacher.counts["in_flight"] -= self.counted
        self.busy = self.counted = False
        if self.buffer and not self.transport.is_closing():
            asyncio.get_running_loop().call_soon(self.data_received, b"")


def _unchunk(buffer: bytearray, start: int) -> tuple[bytes, int] | None:
    """Reads a chunked body: it and where it ends, or None while some of it is missing."""
    pieces = []
    while (line := buffer.find(b"\r\n", start)) >= 0:
        size = int(buffer[start:line], 16)
        end = line + 2 + size
        if len(buffer) < end + 2:
            return None
        if not size:
            return b"".join(pieces), end + 2
        pieces.append(bytes(buffer[line + 2 : end]))
        start = end + 2
    return None


async def serve(settings: Settings, port: int, log: str | None, with_stdin: bool) -> None:
    """Serves for ever, or until standard input ends; prints where as one line of JSON."""
    loop, teacher = asyncio.get_running_loop(), Teacher(settings, log)
    server = await loop.create_server(lambda: Connection(teacher), "127.0.0.1", port, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    about = {"base_url": f"http://127.0.0.1:{port}/v1", "port": port, "pid": os.getpid()}
    print(json.dumps(about), flush=True)
    ended = asyncio.Event()
    if with_stdin:
        loop.add_reader(sys.stdin, ended.set)
    await ended.wait()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: one that is free")
    parser.add_argument("--log", help="the file of completions that were bought, to append to")
    parser.add_argument("--with_stdin", action="store_true", help="end when standard input does")
    for field in dataclasses.fields(Settings):
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{field.name}", default=field.default, **kind)
    given = vars(parser.parse_args(argv))
    port, log, with_stdin = (given.pop(name) for name in ("port", "log", "with_stdin"))
    asyncio.run(serve(Settings(**given), port, log, with_stdin))


# --- For tests ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """A completion that was paid for.

    Attributes:
      n: its number, in the order of sending.
      key: `request_key` of the request.
      fault: that befell it, or None.
      time: when it was sent, seconds since 1970.
      delivered: whole and readable; None while that is not known.
      client: the header X-Client-Request-Id, or the custom_id in a batch.
      batch: the id of its batch.
    """

    n: int
    key: str
    fault: str | None
    time: float
    delivered: bool | None = None
    client: str | None = None
    batch: str | None = None


def read_log(path) -> list[Answer]:
    """Reads the log of one server, in the order of sending."""
    answers: dict[int, Answer] = {}
    for text in pathlib.Path(path).read_text("utf-8").splitlines():
        line = json.loads(text)
        if "key" in line:
            answers[line["n"]] = Answer(**line)
        else:
            answers[line["n"]] = dataclasses.replace(answers[line["n"]], **line)
    return list(answers.values())


def bought_twice(answers: Iterable[Answer]) -> list[Answer]:
    """The answers to a request of which one had been delivered whole before."""
    had, twice = set(), []
    for answer in answers:
        if answer.key in had:
            twice.append(answer)
        if answer.delivered:
            had.add(answer.key)
    return twice


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server: its address for a client, its port on 127.0.0.1, process and log."""

    base_url: str
    port: int
    pid: int
    log: pathlib.Path

    def stats(self) -> dict:
        """The counters since the start (`Teacher.stats`)."""
        return self._control("GET", "stats")

    def settings(self, **settings) -> None:
        """Changes some of `Settings`."""
        self._control("POST", "settings", settings)

    def script(self, *rules: dict) -> None:
        """Replaces the script: of its rules the first that fits a request decides about it.

        A rule is `{"contains": "Ann has 7", "answers": ["500", None], "repeat": False}`: for
        requests with this text in the last user message or the prompt. Its answers are used up in
        turn, for each request by itself: the name of a fault, None for the right answer, or an
        object with some of `text`, `finish_reason`, `refusal`, `usage` and `fault`. After the last
        one all are right, unless it repeats. A rule with a `path` (`/v1/batches`) is for the
        requests below it. What no rule fits, faults may befall at random.

        Raises:
          ValueError: if a rule or a fault is unknown.
        """
        self._control("POST", "script", rules)

    def answers(self) -> list[Answer]:
        """The completions that were bought so far."""
        return read_log(self.log)

    def _control(self, method: str, path: str, value=None) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            headers = {"Connection": "close"}
            connection.request(method, f"/control/{path}", json.dumps(value), headers)
            response = connection.getresponse()
            content = json.loads(response.read())
        if response.status != 200:
            raise ValueError(content["error"]["message"])
        return content


@contextlib.contextmanager
def start(log, *, port: int = 0, **settings) -> Iterator[Server]:
    """Runs a server as a process of its own; it ends with the block, and with this process.

    Args:
      log: path of the log; a server that is started again may go on with it.
      port: on 127.0.0.1; 0: one that is free.
      **settings: `Settings`.

    Raises:
      ValueError: if it did not start.
    """
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in settings.items() if value is not False
    ]  # fmt: skip
    command = [sys.executable, __file__, f"--port={port}", f"--log={log}", "--with_stdin", *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            about = process.stdout.readline()
            if not about:
                raise ValueError(f"the server did not start: {command}")
            yield Server(**json.loads(about), log=pathlib.Path(log))
        finally:
            process.kill()


if __name__ == "__main__":
    main()
