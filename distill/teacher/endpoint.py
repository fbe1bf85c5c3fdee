"""A teacher behind an OpenAI-compatible endpoint: hosted models, vLLM, Ollama and others.

The official client keeps the connections and signs; its own retries are off, because it would
retry behind the back of the budget and would take HTML under status 200 for an answer. The body is
read here, as data that nobody vouches for.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import email.utils
import json
import logging as std_logging
import math
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.teacher import prompting
from distill.teacher.backends import Failed, Hopeless, Reply, Request

DEFAULT_URL = "https://api.openai.com/v1"
APIS = ("chat", "completions")
_NEEDS = "TEACHER=openai needs the official client: pip install -e '.[teacher]'"
# What looks like a key, whoever's it is.
_SECRET = re.compile(r"\b(sk|hf|gsk|xai|AIza|Bearer)([-_ ])[A-Za-z0-9_\-.*]{8,}")
_SECRET_LENGTH = 16  # characters of a key, at least, that no text has by chance
_SHOWN = 300  # characters of an error
# What a prompt, a macro or the reading of replies decides.
_NOT_EXTRA = ("messages", "prompt", "model", "n", "stream")


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """Where the teacher is, and what a request says.

    Attributes:
      model: its name at the endpoint.
      base_url: such as http://localhost:8000/v1; None = $OPENAI_BASE_URL, else OpenAI.
      api: `chat`, or `completions` for base models: the prompt as one text.
      key_env: the environment variable that holds the key. A server of one's own needs none.
      key_file: a file that holds the key, instead.
      temperature: of the samples.
      top_p: of the samples; None leaves it to the endpoint.
      max_tokens: of a completion.
      extra: more fields of the request, as the endpoint names them; None takes one out.
      timeout: seconds that one request may take.
    """

    model: str | None = None
    base_url: str | None = None
    api: str = "chat"
    key_env: str = "OPENAI_API_KEY"
    key_file: str | None = None
    temperature: float = 0.0
    top_p: float | None = None
    max_tokens: int = 256
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout: float = 120.0

    def __post_init__(self):
        if self.api not in APIS:
            raise ValueError(f"API must be one of {', '.join(APIS)}, not {self.api!r}")
        if not isinstance(self.extra, Mapping):
            raise ValueError(f"EXTRA must be a dict such as {{'top_k': 40}}, not {self.extra!r}")
        if taken := [name for name in _NOT_EXTRA if name in self.extra]:
            raise ValueError(
                f"EXTRA may not hold {taken[0]!r}: MODEL, PROMPT and NUM_SAMPLES say what is "
                "asked, and replies come whole"
            )
        for field, least in (("temperature", 0.0), ("timeout", 1e-3)):
            if not isinstance(value := getattr(self, field), int | float) or not value >= least:
                raise ValueError(f"{field.upper()} must be {least:g} or more, not {value!r}")
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"MAX_TOKENS must be a positive integer, not {self.max_tokens!r}")

    @property
    def url(self) -> str:
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")

    @property
    def provider(self) -> str:
        """Host and path of the endpoint."""
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"BASE_URL must be such as http://localhost:8000/v1, not {redacted(self.url)!r}"
            )
        if "@" in parts.netloc:
            raise ValueError(
                "BASE_URL may hold no user and no password: they would be shown with the settings. "
                "Put the key into the environment (API_KEY_ENV) or a file (API_KEY_FILE)"
            )
        if parts.query or parts.fragment:
            raise ValueError(
                "BASE_URL may have no query and no fragment (what follows `?` or `#`): the client "
                "would put the path of a request behind it. A key belongs into API_KEY_ENV"
            )
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.hostname}{port}{parts.path}"

    def key(self) -> str:
        """Returns the key; a server of one's own is content with any.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: there is no key, or it is none.
        """
        if self.key_file is not None:
            path = pathlib.Path(self.key_file).expanduser()
            if not path.exists():
                raise FileNotFoundError(f"API_KEY_FILE={path}: there is no such file")
            key, where = path.read_text("utf-8").strip(), f"API_KEY_FILE={path}"
        else:
            key, where = os.environ.get(self.key_env, "").strip(), f"${self.key_env}"
            if not key and self.url != DEFAULT_URL:
                return "none"
        # It becomes a header: a line break in it would be another one.
        if not key or not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ValueError(
                f"{where} {'holds no key of printable characters' if key else 'is empty'}: give "
                "the key of the endpoint in the environment (API_KEY_ENV names the variable) or in "
                "a file (API_KEY_FILE). Never write it into a config or a command"
            )
        return key


def redacted(text: str, key: str = "") -> str:
    """Returns a text without the key, without what looks like one, and without URL passwords."""
    if key and key != "none":
        text = text.replace(key, "<key>")
    text = re.sub(r"//[^/@\s]+@", "//<user>@", text)
    return _SECRET.sub(r"\1\2<key>", text)


class Endpoint:
    """Asks an OpenAI-compatible endpoint."""

    batch = 1

    def __init__(self, config: EndpointConfig, prompt: prompting.Prompt):
        """Takes the key and makes the client; sends nothing.

        Args:
          config: where the teacher is.
          prompt: what it is asked.

        Raises:
          ValueError: there is no key, no model, or the client is not installed.
        """
        if not config.model:
            raise ValueError("MODEL is missing: the teacher's name at the endpoint")
        try:
            import openai  # the `teacher` extra
        except ImportError as e:
            raise ValueError(_NEEDS) from e
        self._openai, self._config, self._prompt = openai, config, prompt
        self._key = config.key()
        self.provider, self.model, self.api = config.provider, config.model, config.api
        # One body can be meant for either, and is another request there.
        self.parameters = {"api": config.api, **self._body({})}
        self._fixed: dict[bool, int] = {}
        self.path = "/chat/completions" if config.api == "chat" else "/completions"
        self._client: Any = None
        # Its lines name every URL, which may hold a password.
        for name in ("httpx", "httpx2", "openai"):
            std_logging.getLogger(name).setLevel(std_logging.WARNING)

    @property
    def client(self) -> Any:
        """The official client; after `close` a new one, since it belongs to one event loop."""
        if self._client is None:
            self._client = self._openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self._config.url,
                max_retries=0,
                timeout=self._config.timeout,
            )
        return self._client

    @property
    def max_tokens(self) -> int:
        """Of a completion."""
        names = ("max_completion_tokens", "max_tokens")
        return next((self.parameters[name] for name in names if name in self.parameters), 4096)

    def prompt_bytes(self, request: Request) -> int:
        """Returns about the size of the texts that are sent, in bytes."""
        label = request.given_label
        if (label is None) not in self._fixed:
            texts = [turn["content"] for turn in self._prompt.messages("", label)]
            # What stands between the turns of a chat comes to a few tokens each.
            size = sum(len(text.encode("utf-8", "replace")) + 16 for text in texts)
            self._fixed[label is None] = size
        return self._fixed[label is None] + len(request.row.input.encode("utf-8", "replace"))

    def body(self, request: Request) -> dict[str, Any]:
        """Returns the JSON of a request."""
        text, label = request.row.input, request.given_label
        if self._config.api == "chat":
            return self._body({"messages": self._prompt.messages(text, label)})
        return self._body({"prompt": self._prompt.text(text, label)})

    def _body(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        config = self._config
        own_limit = "max_completion_tokens" in config.extra  # what newer hosted models call it
        body = {
            "model": config.model,
            **asked,
            # 1 and 1.0 are one request.
            "temperature": float(config.temperature),
            "top_p": None if config.top_p is None else float(config.top_p),
            "max_tokens": None if own_limit else config.max_tokens,
            # A chat model ends its turn by itself, and some refuse the field.
            "stop": [self._prompt.stop] if self._prompt.stop and config.api != "chat" else None,
            **config.extra,
        }
        return {name: value for name, value in body.items() if value is not None}

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        (request,) = requests
        response = await self.guarded(
            self.client.post,
            self.path,
            body=self.body(request),
            cast_to=self._openai.HttpxBinaryResponseContent,  # the bytes, whatever they are
            # A provider that knows the header does not answer a repeated request twice.
            options={"headers": {"Idempotency-Key": request.key}},
            row=True,
        )
        return [response if isinstance(response, Reply) else self.read(response.content)]

    def read(self, content: bytes) -> Reply:
        """Reads the body of a reply with status 200; what is said beside the text is shortened.

        Raises:
          Failed: it is no reply.
        """
        try:
            reply = parse_reply(content, self.api)
        except Failed as e:
            raise Failed(self.short(str(e)), malformed=e.malformed) from None
        said = {
            name: value and self.short(value)
            for name, value in (("refused", reply.refused), ("finish_reason", reply.finish_reason))
        }
        return dataclasses.replace(reply, **said)

    async def guarded(self, fn: Callable[..., Any], *args, row: bool = False, **kwargs) -> Any:
        """Calls the client; returns what it returns, or raises our errors.

        Args:
          fn: of the client.
          *args: of `fn`.
          row: it is about one row: what the endpoint refuses then is a `Reply` that says so.
          **kwargs: of `fn`.

        Raises:
          Failed: another attempt may succeed.
          Hopeless: none will.
        """
        openai = self._openai
        try:
            # The client's own limit is for each read: a byte a second would go on for ever.
            async with asyncio.timeout(self._config.timeout):
                return await fn(*args, **kwargs)
        except openai.APIStatusError as e:
            refusal = self._refusal(e.status_code, e.response)
            if row:
                return refusal
            raise Hopeless(f"{self.provider}: {refusal.refused}") from None
        except (TimeoutError, openai.APITimeoutError):
            raise Failed(f"no answer in {self._config.timeout:g} s") from None
        except openai.APIConnectionError as e:
            cause = e.__cause__ or e
            why = self.short(f"{type(cause).__name__}: {cause}")
            # What was not even connected to has done no work.
            raise Failed(why, may_cost="Connect" not in type(cause).__name__) from None
        except (OSError, ValueError, RuntimeError, openai.OpenAIError) as e:
            # Such as a body that is not gzip though it says so.
            raise Failed(self.short(f"{type(e).__name__}: {e}")) from None

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(RuntimeError):
                await client.close()

    def short(self, text: str) -> str:
        """Returns an error as it may be shown and kept."""
        return " ".join(redacted(text, self._key).split())[:_SHOWN]

    def clean(self, text: str) -> str:
        """Returns a text of the teacher without the key, should it echo it."""
        # A server of one's own is given any word as a key, which a rationale may hold.
        return text.replace(self._key, "<key>") if len(self._key) >= _SECRET_LENGTH else text

    def _refusal(self, status: int, response: Any) -> Reply:
        """Judges a status other than 2xx: returns what concerns this row alone, raises the rest."""
        body = response.content[:20_000].decode("utf-8", "replace")
        why = self.short(f"HTTP {status}: {_message(body)}")
        if status in (401, 403):
            raise Hopeless(f"{self.provider} refuses the key ({why})")
        if status == 402 or "insufficient_quota" in body:
            raise Hopeless(f"{self.provider}: the account has no credit ({why})")
        if status == 404:
            raise Hopeless(f"{self.provider} has no model {self.model!r} or no such path ({why})")
        if status in (408, 409, 425, 429) or status >= 500:
            raise Failed(
                why,
                retry_after=retry_after(response.headers),
                too_many=status == 429,
                may_cost=status >= 500,
            )
        return Reply(None, None, why, 0, 0)


def _message(body: str) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, Mapping) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return body


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that a reply asks to wait, by any of the three ways to say it."""
    with contextlib.suppress(KeyError, ValueError):
        return _sane(float(headers["retry-after-ms"]) / 1000)
    said = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return _sane(float(said))
    with contextlib.suppress(ValueError, TypeError):
        until = email.utils.parsedate_to_datetime(said)
        if until.tzinfo is None:
            until = until.replace(tzinfo=datetime.UTC)
        return _sane((until - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None


def _sane(seconds: float) -> float | None:
    return max(0.0, seconds) if math.isfinite(seconds) else None


def parse_reply(content: bytes, api: str) -> Reply:
    """Reads the body of a reply with status 200, whatever it is.

    Raises:
      Failed: it is no reply.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise _garbage(f"no JSON, {len(content)} bytes beginning {content[:40]!r}") from None
    if not isinstance(body, dict):
        raise _garbage(f"JSON, but no object: {content[:40]!r}")
    if body.get("error"):
        raise _garbage(f"an error: {body['error']}")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _garbage("no choices")
    choice = choices[0]
    message = choice.get("message") if api == "chat" else {"content": choice.get("text")}
    if not isinstance(message, dict):
        raise _garbage("no message")
    text, refusal, finish = map(_text, (
        message.get("content"), message.get("refusal"), choice.get("finish_reason")
    ))  # fmt: skip
    if finish == "content_filter":
        refusal = refusal or "content_filter"
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text, finish, refusal and refusal[:_SHOWN],
        _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")),
    )  # fmt: skip


def _garbage(why: str) -> Failed:
    return Failed(redacted(f"HTTP 200 with {why}")[:_SHOWN], malformed=True)


def _text(value: Any) -> str | None:
    if isinstance(value, list):  # of parts, as some endpoints have it
        parts = [part.get("text") for part in value if isinstance(part, dict)]
        value = "".join(part for part in parts if isinstance(part, str))
    if value is not None and not isinstance(value, str):
        raise _garbage(f"{type(value).__name__} in the place of a text")
    return value


def _count(value: Any) -> int | None:
    """A number of tokens, if it is one."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < 10**9 else None
