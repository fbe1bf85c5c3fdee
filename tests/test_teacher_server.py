"""The server of the teacher tests itself: to plain HTTP, and to OpenAI's client."""

import ast
import asyncio
import collections
import contextlib
import email.utils
import gzip
import http.client
import io
import json
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
import teacher_server
import teacher_texts
from teacher_faults import FAULTS, HUGE, names
from teacher_server import CHAT, TEXT, bought_twice, read_log, request_key, start, teach

from tasks import arithmetic

HERE = pathlib.Path(__file__).parent
PROBLEM = "Ann has 7 nuts, gets 2, eats 5, gets 4."
SOLUTION = "9, then 4, then 8. The answer is 8."
SHOTS = "Q: Ben has 3 nuts, eats 1.\nA: 2. The answer is 2.\n\n"
KEY = "sk-canary"


@pytest.fixture
def serve(tmp_path):
    """Starts servers with these settings; they end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(start(tmp_path / "bought.jsonl", **settings))


@pytest.fixture
def openai():
    return pytest.importorskip("openai", reason="the client of OpenAI is not installed")


@pytest.fixture
def client(openai):
    """Makes clients that do not ask again by themselves."""
    with contextlib.ExitStack() as stack:

        def make(server, **settings):
            settings = {"api_key": KEY, "max_retries": 0, "timeout": 30} | settings
            return stack.enter_context(openai.OpenAI(base_url=server.base_url, **settings))

        yield make


@contextlib.contextmanager
def connected(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        yield connection


def chat(text=PROBLEM, **more):
    return {"model": "teacher", "messages": [{"role": "user", "content": text}], **more}


def post(connection, body, path=CHAT, **headers):
    """Asks, and returns the response with its content read."""
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    response.content = response.read()
    return response


def ask(server, body, path=CHAT, **headers):
    with connected(server) as connection:
        return post(connection, body, path, **headers)


def said(response) -> list[str]:
    choices = json.loads(response.content)["choices"]
    return [choice["message"]["content"] if "message" in choice else choice["text"]
            for choice in choices]  # fmt: skip


def wait_for(condition):
    """Waits until it is true; what a connection's end tells comes a moment later."""
    for _ in range(500):
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("waited for 5 s")


# --- What it says ---------------------------------------------------------------------------------


def test_it_imports_the_standard_library_only():
    for name in ("teacher_server", "teacher_faults", "teacher_batches"):
        for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text("utf-8"))):
            modules = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            )
            for module in modules:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names or top.startswith("teacher_"), module


def test_it_solves_the_embedded_task():
    for row in arithmetic.NutsSource("nuts", sizes=(200, 20, 20)).rows("train"):
        expected = f" {row.answers[0].rationale} The answer is {row.label}."
        assert teach(f"{SHOTS}Q: {row.input}\nA:") == expected


def test_key_of_a_request_is_that_of_its_content():
    assert request_key({"a": 1, "b": "\ud800"}) == request_key({"b": "\ud800", "a": 1})
    assert request_key({"a": 1}) != request_key({"a": 2})


@pytest.mark.parametrize("slip", [0.0, 0.3, 0.5, 0.999])
def test_a_slip_is_one_wrong_sum_that_the_label_follows(slip):
    steps, label = teach(PROBLEM, slip).removesuffix(".").split(". The answer is ")
    amounts = [7, *map(int, steps.split(", then "))]
    changes = [b - a for a, b in zip(amounts, amounts[1:], strict=False)]
    assert sum(a != b for a, b in zip(changes, (2, -5, 4), strict=True)) == 1
    assert label == str(amounts[-1])


@pytest.mark.parametrize(
    "prompt, echo",
    [("Where is a cat?", " Where is a cat?"), ("Q: one\nA: two\n\nQ: three\nA:", " three"),
     ("Ann has no nuts.", " Ann has no nuts."), ("", " Nothing was asked.")],
)  # fmt: skip
def test_anything_else_is_echoed(prompt, echo):
    assert teach(prompt) == echo


def test_chat_and_text(serve):
    server = serve()
    with connected(server) as connection:
        response = post(connection, chat())
        about = json.loads(response.content)
        assert response.status == 200 and response.headers["Content-Type"] == "application/json"
        assert about["object"] == "chat.completion" and about["model"] == "teacher"
        assert about["choices"] == [{
            "index": 0, "logprobs": None, "finish_reason": "stop",
            "message": {"role": "assistant", "content": SOLUTION, "refusal": None},
        }]  # fmt: skip
        assert about["usage"] == {"prompt_tokens": 10, "completion_tokens": 9, "total_tokens": 19}
        body = {"model": "teacher", "prompt": [f"{SHOTS}Q: {PROBLEM}\nA:", "Hello."], "n": 2}
        response = post(connection, body, TEXT)
        assert said(response) == [f" {SOLUTION}"] * 2 + [" Hello."] * 2
        assert json.loads(response.content)["object"] == "text_completion"
    # The last user message counts, and the parts of one are joined.
    parts = [{"type": "text", "text": PROBLEM[:10]}, {"type": "text", "text": PROBLEM[10:]}]
    messages = [
        {"role": "user", "content": "Ben has 3 nuts, eats 1."},
        {"role": "assistant", "content": "2."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
    ]
    assert said(ask(server, {"model": "teacher", "messages": messages})) == [SOLUTION]


def test_stop_and_max_tokens(serve):
    server = serve()
    assert said(ask(server, chat(stop=["never", ". The"]))) == ["9, then 4, then 8"]
    for name in ("max_tokens", "max_completion_tokens"):
        response = ask(server, chat(**{name: 3}))
        assert said(response) == ["9, then 4,"]
        assert json.loads(response.content)["choices"][0]["finish_reason"] == "length"
    response = ask(server, chat(max_tokens=9))
    assert said(response) == [SOLUTION] and b'"stop"' in response.content


def test_errors_of_the_teacher_have_their_rate_and_follow_from_the_request(serve):
    server = serve(error_rate=0.25)
    with connected(server) as connection:
        texts = said(post(connection, chat(n=1000)))
        wrong = sum(not text.endswith("answer is 8.") for text in texts) / 1000
        assert wrong == pytest.approx(0.25, abs=0.05)
        assert said(post(connection, chat(n=1000))) == texts
        assert said(post(connection, chat(n=1000, seed=1))) != texts


@pytest.mark.parametrize(
    "body, message",
    [({}, "model"), ({"model": "teacher"}, "messages"), (chat(stream=True), "stream"), ([], "JSON"),
     ({"model": "teacher", "messages": []}, "messages")],
)  # fmt: skip
def test_wrong_requests(serve, body, message):
    response = ask(serve(), body)
    assert response.status == 400 and message in json.loads(response.content)["error"]["message"]


def test_key_models_and_paths(serve):
    server = serve(api_key="sk-right", models="small,large")
    assert ask(server, chat(), Authorization="Bearer sk-right").status == 404
    response = ask(server, chat(model="large"), Authorization="Bearer sk-right")
    assert said(response) == [SOLUTION]
    response = ask(server, chat(model="large"), Authorization=f"Bearer {KEY}")
    assert response.status == 401 and KEY.encode() in response.content
    response = ask(server, {}, "/v1/nothing", Authorization="Bearer sk-right")
    assert response.status == 404


# --- Faults ---------------------------------------------------------------------------------------

# What OpenAI's client (3.54) makes of each: an error and its status, or a value of a completion.
ERRORS = {
    "429_retry_after": ("RateLimitError", 429), "429_retry_date": ("RateLimitError", 429),
    "429_retry_ms": ("RateLimitError", 429), "429_bare": ("RateLimitError", 429),
    "500": ("InternalServerError", 500), "500_html": ("InternalServerError", 500),
    "502_html": ("InternalServerError", 502), "503_html": ("InternalServerError", 503),
    "401": ("AuthenticationError", 401), "403": ("PermissionDeniedError", 403),
    "402_quota": ("APIStatusError", 402), "429_quota": ("RateLimitError", 429),
    "404_model": ("NotFoundError", 404), "400_context": ("BadRequestError", 400),
    "timeout": ("APITimeoutError", None),
    "close_before": ("APIConnectionError", None), "reset_before": ("APIConnectionError", None),
    "reset_headers": ("APIConnectionError", None), "reset_body": ("APIConnectionError", None),
    "cut": ("APIConnectionError", None), "gzip_broken": ("APIConnectionError", None),
    # Not errors of the client's own: it does not look into a 200.
    "200_empty": ("JSONDecodeError", None), "200_invalid_json": ("JSONDecodeError", None),
    "200_invalid_utf8": ("UnicodeDecodeError", None),
}  # fmt: skip
NO_COMPLETION = {
    "200_html": "<html><body>Welcome to Wi-Fi.</body></html>", "200_list": [], "200_error": None,
    "choices_empty": [], "choices_null": None,
}  # fmt: skip
CONTENTS = {
    "content_null": None, "content_empty": "", "content_blank": " \n\t ", "refusal": None,
    "content_list": [{"type": "text", "text": SOLUTION}],
    "content_huge": "so " * (HUGE // 3) + SOLUTION,
    "content_surrogates": f"\ud83d{SOLUTION}\udc00",
    "content_nul": SOLUTION.replace(",", "\0,"),
    "content_bidi": f"\u202e\u2066{SOLUTION}",
    "finish_length": SOLUTION[: len(SOLUTION) // 2],
}  # fmt: skip


def test_every_fault_is_in_these_tests():
    told = [*ERRORS, *NO_COMPLETION, *CONTENTS]
    right = [name for name in FAULTS if name.startswith(("usage", "finish_")) or
             FAULTS[name].group == "harmless" or name == "drip"]  # fmt: skip
    assert set(FAULTS) == {*told, *right}
    assert set(names("all")) == set(FAULTS)
    assert set(names("transient")) == {
        name for name in FAULTS
        if name[:3] in ("429", "500", "502", "503", "200") and name != "429_quota"
        or name.startswith(("reset", "cut", "close", "choices", "gzip_b"))
    }  # fmt: skip
    with pytest.raises(ValueError, match="no fault or group"):
        names("429_bare,nonsense")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A server, and a client of it, for many tests."""
    openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed")
    log = tmp_path_factory.mktemp("faulty") / "bought.jsonl"
    with (
        start(log, drip=0.0001) as server,
        openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0, timeout=60) as api,
    ):
        yield server, api


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_client_makes_of_a_fault(faulty, name):
    server, api = faulty
    server.script({"answers": [name]})
    body = chat(user=name)

    def buy(**settings):
        return api.with_options(**settings).chat.completions.create(**body)

    if name in ERRORS:
        kind, status = ERRORS[name]
        with pytest.raises(Exception) as caught:
            buy(**{"timeout": 0.3} if name == "timeout" else {})
        assert type(caught.value).__name__ == kind
        assert getattr(caught.value, "status_code", None) == status
        if name in ("401", "403"):
            assert KEY in str(caught.value)  # Whoever prints it has told the key.
        if name.endswith("quota"):
            assert caught.value.code == "insufficient_quota"
    elif name in NO_COMPLETION:
        got = buy()
        assert getattr(got, "choices", got) == NO_COMPLETION[name]
    else:
        got = buy()
        (choice,) = got.choices
        assert choice.message.content == CONTENTS.get(name, SOLUTION)
        reason = name.removeprefix("finish_") if name.startswith("finish_") else "stop"
        assert choice.finish_reason == (None if reason == "null" else reason)
        assert (choice.message.refusal is not None) == (name == "refusal")
        if name.startswith("usage"):
            tokens = got.usage and got.usage.prompt_tokens
            assert tokens == {"usage_negative": -7, "usage_strings": "7"}.get(name)
    # The script is used up: the second is right, and all that was sold is in the log.
    assert buy().choices[0].message.content == SOLUTION
    assert server.stats()["faults"][name] == 1
    answers = [answer for answer in server.answers() if answer.key == request_key(body)]
    fault = FAULTS[name]
    sold = [name] if fault.answers and fault.sold else []
    assert [answer.fault for answer in answers] == [*sold, None]
    if sold:
        assert answers[0].delivered == fault.readable


def test_what_429_asks_for(serve):
    server = serve(retry_after=3)
    server.script({"answers": ["429_retry_after", "429_retry_date", "429_retry_ms", "429_bare"]})
    with connected(server) as connection:
        seconds, date, milliseconds, bare = [post(connection, chat()).headers for _ in range(4)]
    assert seconds["Retry-After"] == "3" and milliseconds["retry-after-ms"] == "3000"
    assert "Retry-After" not in milliseconds and "retry-after-ms" not in seconds
    assert not {"Retry-After", "retry-after-ms"} & set(bare)
    at = email.utils.parsedate_to_datetime(date["Retry-After"]).timestamp()
    assert 1 < at - time.time() <= 4


def test_framing(serve):
    server = serve()
    server.script({"answers": ["chunked", "gzip", "wrong_content_type", "duplicate_keys"]})
    with connected(server) as connection:
        chunked, packed, plain, twice = [post(connection, chat()) for _ in range(4)]
    assert chunked.headers["Transfer-Encoding"] == "chunked"
    assert "Content-Length" not in chunked.headers and said(chunked) == [SOLUTION]
    assert packed.headers["Content-Encoding"] == "gzip"
    assert SOLUTION.encode() in gzip.decompress(packed.content)
    assert plain.headers["Content-Type"] == "text/plain" and said(plain) == [SOLUTION]
    assert twice.content.count(b'"choices"') == 2 and said(twice) == [SOLUTION]


def test_a_chunked_request(serve):
    server = serve()
    body = json.dumps(chat()).encode()
    with connected(server) as connection:
        pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
        connection.request("POST", CHAT, iter(pieces), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        response = connection.getresponse()
        response.content = response.read()
        assert said(response) == [SOLUTION]
        assert said(post(connection, chat("Hello."))) == ["Hello."]


def outcomes(server, texts, times):
    """The statuses of each text's requests, in turn."""
    got = collections.defaultdict(list)
    with connected(server) as connection:
        for _ in range(times):
            for text in texts:
                got[text].append(post(connection, chat(text)).status)
    return got


def test_faults_come_at_their_rate_and_whatever_the_order(tmp_path):
    texts = [f"Number {n}." for n in range(200)]
    settings = {"fault_rate": 0.3, "faults": "rate_limits,500", "seed": 4}
    with start(tmp_path / "a", **settings) as server:
        first = outcomes(server, texts, 3)
        assert sum(server.stats()["faults"].values()) == server.stats()["statuses"]["429"] + (
            server.stats()["statuses"]["500"])  # fmt: skip
    statuses = collections.Counter(status for got in first.values() for status in got)
    assert 1 - statuses[200] / 600 == pytest.approx(0.3, abs=0.06)
    assert 4 == pytest.approx(statuses[429] / statuses[500], abs=1.5)
    # An input that failed once does not fail for ever, and one that did not may.
    assert len({tuple(got) for got in first.values()}) > 8
    with start(tmp_path / "b", **settings) as server:
        assert outcomes(server, texts[::-1], 3) == first
    with start(tmp_path / "c", **settings | {"seed": 5}) as server:
        assert outcomes(server, texts, 3) != first


def test_script(serve):
    server = serve(fault_rate=1.0, faults="503_html")
    server.script(
        {"contains": "Ann", "answers": ["500", {"text": "\ud800\0", "finish_reason": "length",
                                                "usage": None}, None]},
        {"contains": "Ben", "answers": ["500", "502_html"], "repeat": True},
        {"path": "/v1/models", "answers": ["500"]},
    )  # fmt: skip
    with connected(server) as connection:
        assert [post(connection, chat()).status for _ in range(4)] == [500, 200, 200, 200]
        # Another request with the same input has turns of its own.
        assert post(connection, chat(seed=1)).status == 500
        got = json.loads(post(connection, chat(seed=1)).content)
        assert got["choices"][0]["message"]["content"] == "\ud800\0" and got["usage"] is None
        assert got["choices"][0]["finish_reason"] == "length"
        statuses = [post(connection, chat("Ben has none.")).status for _ in range(5)]
        assert statuses == [500, 502, 500, 502, 500]
        # What the script does not know is drawn for.
        assert post(connection, chat("Eva has none.")).status == 503
        for status in (500, 200):
            connection.request("GET", "/v1/models")
            response = connection.getresponse()
            response.read()
            assert response.status == status
    for rule in ({"answers": ["nonsense"]}, {"answers": [{"fault": "nonsense"}]},
                 {"contain": "x", "answers": []}):  # fmt: skip
        with pytest.raises(ValueError, match="nonsense|contain"):
            server.script(rule)
    with pytest.raises(ValueError, match="nonsense"):
        server.settings(nonsense=1)
    with pytest.raises(ValueError, match="no fault or group"):
        server.settings(faults="nonsense")
    server.settings(fault_rate=0.0)
    assert ask(server, chat("Eva has none.")).status == 200


def test_rate_limit(serve):
    server = serve(requests_per_minute=300)  # 5 a second.
    with connected(server) as connection:
        started, refused = time.monotonic(), 0
        for n in range(9):
            while (response := post(connection, chat(f"{n}"))).status == 429:
                assert response.headers["Retry-After"] == "1"
                wait = int(response.headers["retry-after-ms"])
                assert 1 <= wait <= 201
                refused += 1
                time.sleep(wait / 1000)
        passed = time.monotonic() - started
    # At most the 5 of the first second are there at once.
    assert refused and passed > 3 / 5
    assert server.stats()["rate_limited"] == refused and server.stats()["answers"] == 9


def test_quota(serve):
    server = serve(quota=3)
    with connected(server) as connection:
        responses = [post(connection, chat(f"{n}")) for n in range(5)]
    assert [response.status for response in responses] == [200, 200, 200, 429, 429]
    assert json.loads(responses[3].content)["error"]["code"] == "insufficient_quota"


# --- The log --------------------------------------------------------------------------------------


def test_log_is_written_before_the_response_and_delivery_after(serve):
    server = serve()
    with connected(server) as connection:
        assert post(connection, chat(), **{"X-Client-Request-Id": "row 7"}).status == 200
        (answer,) = server.answers()
        assert answer.key == request_key(chat()) and answer.client == "row 7"
        assert answer.delivered is None and abs(answer.time - time.time()) < 60
        post(connection, chat("Hello."))
        assert [a.delivered for a in server.answers()] == [True, None]
    assert wait_for(lambda: server.answers()[1].delivered)
    assert bought_twice(server.answers()) == []
    ask(server, chat())
    answers = server.answers()
    assert len(answers) == 3 and bought_twice(answers) == answers[2:]


def test_an_answer_that_nobody_read_was_not_delivered(serve):
    server = serve()
    body = json.dumps(chat()).encode()
    wire = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    for linger in (False, True):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(wire)
            n = wait_for(lambda: [a for a in server.answers() if a.delivered is None])[0].n
            if linger:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_for(lambda n=n: server.answers()[n - 1].delivered is False)
    # Gone at once: the server answers a client that has closed already.
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(wire)
    wait_for(lambda: server.stats()["lost"] + server.stats()["gone"] == 22)
    assert server.stats()["delivered"] == 0
    # To ask again for what was never had is not to buy it twice.
    ask(server, chat())
    assert bought_twice(server.answers()) == []


def test_a_client_that_was_killed_had_not_bought_what_was_not_sent(serve):
    server = serve(delay=0.5)
    code = f"""
        import http.client
        connection = http.client.HTTPConnection("127.0.0.1", {server.port})
        connection.request("POST", {CHAT!r}, {json.dumps(chat())!r})
        connection.getresponse()
    """
    with subprocess.Popen([sys.executable, "-c", "\n".join(map(str.strip, code.split("\n")))]) as p:
        wait_for(lambda: server.stats()["in_flight"])
        p.send_signal(signal.SIGKILL)
    wait_for(lambda: server.stats()["gone"])
    assert server.answers() == [] and server.stats()["answers"] == 0


def test_a_server_that_is_started_again_goes_on_with_the_log(tmp_path):
    for _ in range(2):
        with start(tmp_path / "log") as server:
            ask(server, chat())
            wait_for(lambda server=server: server.stats()["delivered"])
    answers = read_log(tmp_path / "log")
    assert [answer.n for answer in answers] == [1, 2] and bought_twice(answers) == answers[1:]


def test_it_ends_with_the_block_and_with_the_process_that_started_it(tmp_path):
    with start(tmp_path / "log") as server:
        assert ask(server, chat()).status == 200
    with pytest.raises(ConnectionRefusedError):
        ask(server, chat())
    code = (
        "import os, signal, teacher_server\n"
        f"with teacher_server.start({str(tmp_path / 'log')!r}) as server:\n"
        "    print(server.port, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE,
                          timeout=60)  # fmt: skip
    assert done.returncode == -signal.SIGKILL

    def refused():
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", int(done.stdout)))

    wait_for(refused)
    with pytest.raises(ValueError, match="did not start"), start(tmp_path / "log", faults="x"):
        pass


def test_64_connections_get_their_own_answers(serve):
    server = serve(delay=0.02)

    async def worker(numbers):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for n in numbers:
            body = json.dumps(chat(f"Ann has {n} nuts, gets 2.")).encode()
            writer.write(b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (
                CHAT.encode(), len(body), body))  # fmt: skip
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            content = await reader.readexactly(int(head.rpartition("Content-Length: ")[2]))
            answer = json.loads(content)["choices"][0]["message"]["content"]
            assert answer == f"{n + 2}. The answer is {n + 2}."
        writer.close()
        await writer.wait_closed()

    async def all_of_them():
        numbers = iter(range(1_280))
        await asyncio.gather(*[worker(numbers) for _ in range(64)])

    asyncio.run(all_of_them())
    wait_for(lambda: server.stats()["delivered"] == 1_280)
    stats = server.stats()
    assert stats["most_in_flight"] == 64 and stats["connections"] >= 64
    assert stats["in_flight"] == 0
    assert len({answer.key for answer in server.answers()}) == stats["answers"] == 1_280


# --- Hostile texts --------------------------------------------------------------------------------


def test_expectations_fit_the_texts():
    assert len(teacher_texts.TEXTS) > 150
    assert teacher_texts.TEXTS.keys() == teacher_texts.EXPECTED.keys()
    classes = collections.Counter(cls for cls, _, _ in teacher_texts.EXPECTED.values())
    assert set(classes) == {"ok", "empty", "oversize"}
    for name, (cls, rationale, label) in teacher_texts.EXPECTED.items():
        text = teacher_texts.TEXTS[name]
        assert (cls == "empty") == (not text.strip()), name
        for part in (rationale, label):
            if part not in (None, teacher_texts.ANY):
                assert part and part == part.strip() and part in text, name
                assert teacher_texts.MARKER not in part and "Q:" not in part, name
        if (rationale, label) != (None, None):
            assert text.partition("Q:")[0].count(teacher_texts.MARKER) == 1, name
        if isinstance(label, str):
            assert label.isdigit(), name


def test_hostile_texts_travel_unchanged(serve, client):
    server = serve()
    completions = client(server).chat.completions
    server.script(*({"contains": f"text {name}.", "answers": [{"text": text}]}
                    for name, text in teacher_texts.TEXTS.items()))  # fmt: skip
    for name, text in teacher_texts.TEXTS.items():
        got = completions.create(**chat(f"Say text {name}.")).choices[0].message.content
        assert got == text, name


# --- The client of OpenAI -------------------------------------------------------------------------


def test_client_completions_and_models(serve, client):
    server = serve(models="teacher,other")
    api = client(server)
    assert [model.id for model in api.models.list()] == ["teacher", "other"]
    got = api.chat.completions.create(**chat(n=2))
    assert [choice.message.content for choice in got.choices] == [SOLUTION] * 2
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens == 28
    got = api.completions.create(model="other", prompt=f"{SHOTS}Q: {PROBLEM}\nA:")
    assert got.choices[0].text == f" {SOLUTION}" and got.choices[0].finish_reason == "stop"
    assert server.answers()[0].key == request_key(chat(n=2))


@pytest.mark.parametrize("name", ["429_retry_after", "429_retry_ms", "500", "reset_body"])
def test_client_asks_again_by_itself(serve, client, name):
    server = serve(retry_after=0.1)
    server.script({"answers": [name]})
    started = time.monotonic()
    got = client(server, max_retries=2).chat.completions.create(**chat())
    assert got.choices[0].message.content == SOLUTION and server.stats()["requests"] == 2
    if name.startswith("429"):
        assert 0.1 <= time.monotonic() - started


def test_client_s_timeout_does_not_end_a_drip(serve, client):
    """Its time limit is for each read: whoever wants one for the whole has to set it."""
    server = serve(drip=0.005)
    server.script({"answers": ["drip"]})
    started = time.monotonic()
    got = client(server, timeout=1).chat.completions.create(**chat())
    assert got.choices[0].message.content == SOLUTION and time.monotonic() - started > 1


def lines_of(texts, url=CHAT):
    return [{"custom_id": f"row {n}", "method": "POST", "url": url, "body": chat(text)}
            for n, text in enumerate(texts)]  # fmt: skip


def submit(api, lines, **more):
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    file = api.files.create(file=("rows.jsonl", io.BytesIO(content)), purpose="batch")
    assert file.bytes == len(content) and file.purpose == "batch"
    return api.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **more)


def finish(api, batch):
    """Looks until it has ended; returns it and what it was on the way."""
    seen = [batch.status]
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        batch = api.batches.retrieve(batch.id)
        seen.append(batch.status)
    return batch, seen


def read(api, file):
    return [json.loads(line) for line in api.files.content(file).text.splitlines()] if file else []


def test_batch(serve, client):
    server = serve(batch_polls=3)
    api = client(server)
    server.script({"contains": "Ben", "answers": ["400_context"]},
                  {"contains": "Eva", "answers": ["reset_body"]},
                  {"contains": "Kim", "answers": ["content_empty"]})  # fmt: skip
    people = ("Ann", "Ben", "Eva", "Kim", "Sam", "Tom")
    lines = lines_of([f"{who} has {n} nuts, gets 2." for n in range(7) for who in people])
    batch, seen = finish(api, submit(api, lines, metadata={"run": "7"}))
    assert seen == ["validating", *["in_progress"] * 3, "finalizing", "completed"]
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (42, 35, 7)
    output, errors = read(api, batch.output_file_id), read(api, batch.error_file_id)
    ids = [line["custom_id"] for line in output]
    assert sorted(ids + [line["custom_id"] for line in errors]) == sorted(
        line["custom_id"] for line in lines)  # fmt: skip
    assert ids != sorted(ids, key=lambda name: int(name.split()[1]))
    for line in output:
        n, who = divmod(int(line["custom_id"].split()[1]), 6)
        expected = "" if people[who] == "Kim" else f"{n + 2}. The answer is {n + 2}."
        choice = line["response"]["body"]["choices"][0]
        assert line["response"]["status_code"] == 200 and line["error"] is None
        assert choice["message"]["content"] == expected
    for line in errors:
        assert line["response"]["status_code"] == 400 and line["error"] is None
        error = line["response"]["body"]["error"]
        assert error["code"] == "context_length_exceeded"
    answers = server.answers()
    assert {answer.batch for answer in answers} == {batch.id} and len(answers) == 35
    assert {answer.client for answer in answers} == set(ids)
    assert batch.usage.total_tokens > batch.usage.output_tokens > 0
    # A request that was bought in a batch and is sent by itself is bought twice.
    api.chat.completions.create(**lines[0]["body"])
    assert [answer.batch for answer in bought_twice(server.answers())] == [None]


@pytest.mark.parametrize("outcome, error", [("expired", "batch_expired"), ("cancelled", None)])
def test_batch_that_ends_early(serve, client, outcome, error):
    server = serve(batch_outcome="expired" if error else "completed", batch_polls=4)
    api = client(server)
    batch = submit(api, lines_of([f"Ann has {n} nuts, gets 2." for n in range(10)]))
    if outcome == "cancelled":
        for _ in range(3):
            batch = api.batches.retrieve(batch.id)
        batch = api.batches.cancel(batch.id)
        assert batch.status == "cancelling"
    batch, _ = finish(api, batch)
    assert batch.status == outcome and batch.request_counts.total == 10
    output, errors = read(api, batch.output_file_id), read(api, batch.error_file_id)
    assert len(output) == 5 and {line["error"]["code"] for line in errors} == {f"batch_{outcome}"}
    ids = {line["custom_id"] for line in output + errors}
    assert len(ids) == len(output) + len(errors) == 10
    assert all(line["response"] is None for line in errors)
    assert len(server.answers()) == 5


@pytest.mark.parametrize("wrong, code", [
    ("duplicate", "duplicate_custom_id"), ("url", "mismatched_endpoint"),
    ("body", "missing_required_parameter"), ("empty", "empty_file"), (None, "token_limit_exceeded"),
])  # fmt: skip
def test_batch_that_is_refused(serve, client, wrong, code):
    server = serve(batch_outcome="failed" if wrong is None else "completed")
    api = client(server)
    lines = lines_of(["one", "two", "three"])
    if wrong == "duplicate":
        lines[1]["custom_id"] = lines[0]["custom_id"]
    elif wrong == "url":
        lines[1]["url"] = TEXT
    elif wrong == "body":
        del lines[1]["body"]
    elif wrong == "empty":
        lines = []
    batch, _ = finish(api, submit(api, lines))
    assert batch.status == "failed" and batch.output_file_id is batch.error_file_id is None
    (problem,) = batch.errors.data
    assert problem.code == code and problem.line == (None if wrong in (None, "empty") else 2)
    assert server.answers() == []


def test_batch_with_garbage_in_its_file(serve, client):
    api = client(serve(batch_garbage=True))
    batch, _ = finish(api, submit(api, lines_of(["one", "two", "three"])))
    *lines, torn = api.files.content(batch.output_file_id).text.splitlines()
    ids = [json.loads(line)["custom_id"] if line else "" for line in lines]
    assert sorted(ids[:3]) == ["row 0", "row 1", "row 2"] and ids[3:] == [ids[0], "never-asked", ""]
    with pytest.raises(json.JSONDecodeError):
        json.loads(torn)


def test_batches_are_listed_and_files_deleted(serve, openai, client):
    server = serve()
    api = client(server)
    made = [submit(api, lines_of(["one"]), metadata={"n": str(n)}) for n in range(5)]
    listed = list(api.batches.list(limit=2))  # In three pages.
    assert [batch.id for batch in listed] == [batch.id for batch in made[::-1]]
    assert listed[0].metadata == {"n": "4"}
    assert server.stats()["paths"]["/v1/batches"] == 5 + 3
    assert api.files.delete(made[0].input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        api.files.content(made[0].input_file_id)
    with pytest.raises(openai.NotFoundError):
        api.batches.retrieve("batch_unknown")
    with pytest.raises(openai.BadRequestError):
        api.batches.create(input_file_id=made[1].input_file_id, endpoint="/v1/embeddings",
                           completion_window="24h")  # fmt: skip


@pytest.mark.parametrize("path, call", [
    ("/v1/files", lambda api: submit(api, lines_of(["one"]))),
    ("/v1/batches", lambda api: api.batches.list()),
])  # fmt: skip
@pytest.mark.parametrize("name", ["500", "reset_body", "cut", "429_bare"])
def test_faults_befall_files_and_batches_too(serve, openai, client, path, call, name):
    server = serve()
    server.script({"path": path, "answers": [name]})
    kind = openai.APIConnectionError if name in ("reset_body", "cut") else openai.APIStatusError
    with pytest.raises(kind):
        call(client(server))
    call(client(server))
    assert server.stats()["faults"] == {name: 1}


def test_flags_are_the_settings():
    done = subprocess.run([sys.executable, teacher_server.__file__, "--help"], check=True,
                          capture_output=True, text=True)  # fmt: skip
    for field in teacher_server.Settings.__dataclass_fields__:
        assert f"--{field}" in done.stdout
