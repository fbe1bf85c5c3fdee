"""How an OpenAI-compatible endpoint errs: the table of faults of `teacher_server`."""

import collections
import dataclasses
import email.utils
import functools
import gzip
import http
import json
import math
import time
from collections.abc import Callable

HUGE = 20_000_000  # Characters of the fault `content_huge`.


@dataclasses.dataclass
class Reply:
    """An HTTP response; Content-Length follows from the body, unless another framing is given."""

    status: int
    body: bytes
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}"]
        if "Content-Type" not in self.headers:
            lines.append("Content-Type: application/json")
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if "Transfer-Encoding" not in self.headers:
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "\r\n"]).encode()


class Refused(Exception):
    """A request that the API answers by an error."""

    def __init__(self, reply: Reply):
        super().__init__(reply.status)
        self.reply = reply


@dataclasses.dataclass(frozen=True)
class Fault:
    """One way to err.

    Attributes:
      group: it belongs to; a name for all of them in `names`.
      reply: (API key, seconds to wait) -> the response instead of the right one.
      change: changes the JSON of a completion in place.
      encode: makes another response of the right one.
      how: the response is sent (`teacher_server.Connection`).
      sold: there is a completion in the response.
      readable: and a client that gets all of it can read it.
    """

    group: str
    reply: Callable[[str, float], Reply] | None = None
    change: Callable[[dict], None] | None = None
    encode: Callable[[Reply], Reply] | None = None
    how: str = "whole"
    sold: bool = True
    readable: bool = True

    @property
    def answers(self) -> bool:
        """Whether the teacher is asked at all."""
        return self.reply is None and self.how not in ("never", "close_before", "reset_before")


# --- Errors ---------------------------------------------------------------------------------------


def error(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """An error in OpenAI's form."""
    content = {"message": message, "type": kind, "param": None, "code": code}
    return Reply(status, json.dumps({"error": content}).encode(), dict(headers or {}))


def page(status: int, key: str = "", wait: float = 0.0) -> Reply:
    """What a proxy in between says."""
    del key, wait
    title = f"{status} {http.HTTPStatus(status).phrase}"
    body = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
    return Reply(status, body.encode(), {"Content-Type": "text/html"})


def rate_limited(headers: dict[str, str]) -> Reply:
    message = "Rate limit reached for requests."
    return error(429, message, "requests", "rate_limit_exceeded", headers)


def unauthorized(key: str, wait: float = 0.0) -> Reply:
    """OpenAI's servers repeat the key; theirs is masked, those of others are not."""
    del wait
    where = "You can find your API key at https://platform.openai.com/account/api-keys."
    return error(401, f"Incorrect API key provided: {key}. {where}", code="invalid_api_key")


def no_model(name: str) -> Reply:
    message = f"The model `{name}` does not exist or you do not have access to it."
    return error(404, message, code="model_not_found")


def no_quota(status: int) -> Reply:
    message = "You exceeded your current quota, please check your plan and billing details."
    return error(status, message, "insufficient_quota", "insufficient_quota")


def _retry_date(key: str, wait: float) -> Reply:
    del key
    # Dates have whole seconds.
    date = email.utils.formatdate(math.ceil(time.time() + wait), usegmt=True)
    return rate_limited({"Retry-After": date})


def _context(key: str, wait: float) -> Reply:
    del key, wait
    message = (
        "This model's maximum context length is 4096 tokens. However, your messages resulted in "
        "5120 tokens."
    )
    return error(400, message, code="context_length_exceeded")


def _forbidden(key: str, wait: float) -> Reply:
    del wait
    return error(403, f"The key {key} may not sample from this model.", code="permission_denied")


def _ok(body: bytes, content_type: str = "application/json") -> Callable[[str, float], Reply]:
    return lambda key, wait: Reply(200, body, {"Content-Type": content_type})


# --- Odd completions ------------------------------------------------------------------------------


def _set(name: str, value) -> Callable[[dict], None]:
    """Sets a field of the completion; `...` removes it."""

    def change(completion: dict) -> None:
        del completion[name]
        if value is not ...:
            completion[name] = value

    return change


def _finish(reason: str | None) -> Callable[[dict], None]:
    def change(completion: dict) -> None:
        for choice in completion["choices"]:
            choice["finish_reason"] = reason

    return change


def _say(text) -> Callable[[dict], None]:
    """Replaces the text; a function makes the new one of the old."""

    def change(completion: dict) -> None:
        for choice in completion["choices"]:
            place = choice.get("message", choice)
            name = "content" if "message" in choice else "text"
            place[name] = text(place[name]) if callable(text) else text

    return change


def _refuse(completion: dict) -> None:
    sorry = "I'm sorry, but I can't help with that."
    for choice in completion["choices"]:
        if "message" in choice:
            choice["message"].update(content=None, refusal=sorry)
        else:
            choice["text"] = sorry


def _cut_short(completion: dict) -> None:
    _say(lambda text: text[: len(text) // 2])(completion)
    _finish("length")(completion)


def _chunked(reply: Reply) -> Reply:
    pieces = [reply.body[i : i + 97] for i in range(0, len(reply.body), 97)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    return Reply(reply.status, body, {**reply.headers, "Transfer-Encoding": "chunked"})


def _gzip(reply: Reply) -> Reply:
    return _header("Content-Encoding", "gzip")(_body(gzip.compress)(reply))


def _header(name: str, value: str) -> Callable[[Reply], Reply]:
    return lambda reply: Reply(reply.status, reply.body, {**reply.headers, name: value})


def _body(change: Callable[[bytes], bytes]) -> Callable[[Reply], Reply]:
    return lambda reply: Reply(reply.status, change(reply.body), reply.headers)


FAULTS: dict[str, Fault] = {
    "429_retry_after": Fault(
        "rate_limits", lambda key, wait: rate_limited({"Retry-After": f"{wait:g}"})
    ),
    "429_retry_date": Fault("rate_limits", _retry_date),
    "429_retry_ms": Fault(
        "rate_limits", lambda key, wait: rate_limited({"retry-after-ms": f"{wait * 1000:g}"})
    ),
    "429_bare": Fault("rate_limits", lambda key, wait: rate_limited({})),
    "500": Fault(
        "server_errors", lambda key, wait: error(500, "The server had an error.", "server_error")
    ),
    "500_html": Fault("server_errors", functools.partial(page, 500)),
    "502_html": Fault("server_errors", functools.partial(page, 502)),
    "503_html": Fault("server_errors", functools.partial(page, 503)),
    "401": Fault("fatal", unauthorized),
    "403": Fault("fatal", _forbidden),
    "402_quota": Fault("fatal", lambda key, wait: no_quota(402)),
    "429_quota": Fault("fatal", lambda key, wait: no_quota(429)),
    "404_model": Fault("fatal", lambda key, wait: no_model("teacher")),
    "400_context": Fault("input", _context),
    # The client waits for its own time limit.
    "timeout": Fault("slow", how="never"),
    "drip": Fault("slow", how="drip"),
    "close_before": Fault("connection", how="close_before"),
    "reset_before": Fault("connection", how="reset_before"),
    "reset_headers": Fault("connection", how="reset_headers", readable=False),
    "reset_body": Fault("connection", how="reset_body", readable=False),
    "cut": Fault("connection", how="cut", readable=False),
    # 200, and no completion that could be read.
    "200_html": Fault("garbage", _ok(b"<html><body>Welcome to Wi-Fi.</body></html>", "text/html")),
    "200_error": Fault("garbage", _ok(b'{"error": {"message": "Overloaded", "code": 529}}')),
    "200_list": Fault("garbage", _ok(b"[]")),
    "200_empty": Fault("garbage", _ok(b"")),
    "200_invalid_json": Fault(
        "garbage", encode=_body(lambda body: body[: len(body) // 2]), readable=False
    ),
    "200_invalid_utf8": Fault(
        "garbage", encode=_body(lambda body: body.replace(b'"stop"', b'"\xff"')), readable=False
    ),
    "gzip_broken": Fault("garbage", encode=_header("Content-Encoding", "gzip"), readable=False),
    "choices_empty": Fault("garbage", change=_set("choices", []), sold=False),
    "choices_null": Fault("garbage", change=_set("choices", None), sold=False),
    # 200, with a completion of an odd kind.
    "content_null": Fault("odd", change=_say(None)),
    "content_empty": Fault("odd", change=_say("")),
    "content_blank": Fault("odd", change=_say(" \n\t ")),
    "content_list": Fault("odd", change=_say(lambda text: [{"type": "text", "text": text}])),
    "content_huge": Fault("odd", change=_say(lambda text: "so " * (HUGE // 3) + text)),
    "content_surrogates": Fault("odd", change=_say(lambda text: f"\ud83d{text}\udc00")),
    "content_nul": Fault("odd", change=_say(lambda text: text.replace(",", "\0,"))),
    "content_bidi": Fault("odd", change=_say(lambda text: f"\u202e\u2066{text}")),
    "refusal": Fault("odd", change=_refuse),
    "finish_length": Fault("odd", change=_cut_short),
    "finish_content_filter": Fault("odd", change=_finish("content_filter")),
    "finish_null": Fault("odd", change=_finish(None)),
    # 200, with the right text.
    "usage_missing": Fault("harmless", change=_set("usage", ...)),
    "usage_null": Fault("harmless", change=_set("usage", None)),
    "usage_negative": Fault(
        "harmless", change=_set("usage", {"prompt_tokens": -7, "completion_tokens": -1})
    ),
    "usage_strings": Fault(
        "harmless", change=_set("usage", {"prompt_tokens": "7", "completion_tokens": "many"})
    ),
    "wrong_content_type": Fault("harmless", encode=_header("Content-Type", "text/plain")),
    "chunked": Fault("harmless", encode=_chunked),
    "gzip": Fault("harmless", encode=_gzip),
    # Of two keys of one name parsers take the last.
    "duplicate_keys": Fault(
        "harmless", encode=_body(lambda body: b'{"choices": [], "usage": {},' + body[1:])
    ),
}
# Groups that asking again may mend, and that end at once.
TRANSIENT = ("rate_limits", "server_errors", "connection", "garbage")


@functools.cache
def names(given: str) -> tuple[str, ...]:
    """Names and groups of faults (also `transient` and `all`), separated by commas -> names.

    Raises:
      ValueError: if there is no such fault or group.
    """
    groups = collections.defaultdict(list)
    for name, fault in FAULTS.items():
        for group in (name, fault.group, "all", *["transient"] * (fault.group in TRANSIENT)):
            groups[group].append(name)
    wanted = given.replace(" ", "").split(",")
    if unknown := [name for name in wanted if name not in groups]:
        raise ValueError(f"no fault or group {unknown}; there are {', '.join(groups)}")
    return tuple(name for group in wanted for name in groups[group])
