r"""Asking a teacher, beside the bare loop over the official client that one would write first.

    python scripts/benchmarks/teacher.py --rows=2000 --rounds=5

Both ask the same few-shot prompts of a local server (tests/teacher_server.py, a process of its
own), 64 at a time, over HTTP. The bare loop keeps the completions in a list. Ours counts tokens and
money, classifies, parses, and keeps every answer in an SQLite store on the disk; it is done when
the last one is there. Rounds are interleaved; the ratios are medians over the rounds.

  turns   the bare loop, with the exemplars as turns of the chat, as ours sends them
  text    the bare loop, with all of the prompt in one message: the client checks every message that
          it is given, so that this is its fastest way
  ours    `purchase.buy`
"""

import asyncio
import json
import logging
import os
import pathlib
import sys
import tempfile
import time

import record
from absl import app, flags

from distill import sources
from distill.teacher import backends, endpoint, limits, prompting, purchase, store

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests"))
import teacher_server

_ROWS = flags.DEFINE_integer("rows", 2000, "Inputs that are asked in a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; medians are shown.", lower_bound=1)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 64, "Requests at a time.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", None, "Where the store is; a temporary one otherwise.")
_JSON = flags.DEFINE_string("json", None, "File for every measurement.")


async def bare(base_url: str, to_messages, rows: list[store.Asked]) -> None:
    """What one would write first: a semaphore around the client."""
    import openai

    async with openai.AsyncOpenAI(base_url=base_url, max_retries=0) as client:
        places, texts = asyncio.Semaphore(_CONCURRENCY.value), []

        async def ask(row: store.Asked) -> None:
            async with places:
                reply = await client.chat.completions.create(
                    model="teacher", messages=to_messages(row.input), temperature=0.0,
                    max_tokens=256,
                )  # fmt: skip
                texts.append(reply.choices[0].message.content)

        await asyncio.gather(*map(ask, rows))
    assert len(texts) == len(rows)


async def ours(base_url: str, prompt: prompting.Prompt, rows: list[store.Asked], path) -> None:
    connection = endpoint.EndpointConfig(model="teacher", base_url=base_url)
    teacher = endpoint.Endpoint(connection, prompt)
    parameters = json.dumps(teacher.parameters, sort_keys=True)
    with store.Store(path) as into:
        into.ask(rows)
        requests = [
            backends.Request(
                store.key_of(
                    provider=teacher.provider, model=teacher.model, parameters=parameters,
                    prompt_sha256=prompt.sha256, input_sha256=row.input_sha256, sample=0,
                ),
                row, 0,
            )
            for row in rows
        ]  # fmt: skip
        outcome = await purchase.buy(
            teacher, requests, into, prompt=prompt, parameters=parameters,
            sizes=lambda r: purchase.Size(teacher.prompt_bytes(r) // 2, teacher.max_tokens),
            pace=purchase.Pace(_CONCURRENCY.value), prices=purchase.Prices(1.0, 1.0),
            budget=limits.Budget(10**12, 1e9),
        )  # fmt: skip
        assert outcome.bought == len(rows)
    await teacher.close()


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    os.environ.setdefault("OPENAI_API_KEY", "none")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request otherwise
    prompt = prompting.load("arithmetic")
    texts = [f"Ann has 7 nuts, gets 2, eats 5, gets {n}." for n in range(_ROWS.value)]
    rows = [
        store.Asked(
            f"arithmetic/{n}", "arithmetic", "train", text, sources.input_sha256(text), None
        )
        for n, text in enumerate(texts)
    ]
    bare_messages = {
        "turns": prompt.messages,
        "text": lambda text: [{"role": "user", "content": prompt.text(text)}],
    }
    measured: dict[str, list[float]] = {"turns": [], "text": [], "ours": []}
    with (
        tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder,
        teacher_server.start(pathlib.Path(folder) / "log.jsonl") as server,
    ):
        for n in range(_ROUNDS.value):
            for name in measured:
                started = time.monotonic()
                if name in bare_messages:
                    asyncio.run(bare(server.base_url, bare_messages[name], rows))
                else:
                    path = pathlib.Path(folder) / f"{n}.sqlite"
                    asyncio.run(ours(server.base_url, prompt, rows, path))
                measured[name].append(len(rows) / (time.monotonic() - started))
                print(name, f"{measured[name][-1]:.0f} rows/s", file=sys.stderr, flush=True)
    lines = []
    for name, speeds in measured.items():
        ratios = [b / a for a, b in zip(speeds, measured["ours"], strict=True)]
        beside = (
            (record.median(ratios), min(ratios), max(ratios)) if name != "ours" else (None,) * 3
        )
        lines.append((name, record.median(speeds), *beside))
    print(record.table(("", "rows/s", "ours beside it", "least", "most"), lines))
    about = record.about(("openai", "httpx2", "aiohttp"))
    record.save(_JSON.value, about | {"rows": len(rows), "rows_per_second": measured})


if __name__ == "__main__":
    app.run(main)
