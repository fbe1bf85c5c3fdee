"""The store of a teacher's answers: nothing lost, nothing twice, one writer."""

import dataclasses
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
from distill.teacher import store as store_lib
from distill.teacher.store import Asked, Bought, Failure, Store


def asked(number: int = 0, text: str | None = None, **changes) -> Asked:
    text = f"input {number}" if text is None else text
    row = Asked(f"d/train/{number}", "d", "train", text, sources.input_sha256(text), None)
    return dataclasses.replace(row, **changes)


def bought(key: str = "k", **changes) -> Bought:
    answer = Bought(
        key=key, input_sha256="0" * 64, sample=0, kind="answer", provider="p", model="m",
        parameters="{}", prompt="d", prompt_sha256="1" * 64, cls="ok", text="t", text_length=1,
        finish_reason="stop", rationale="because", label="8", prompt_tokens=7,
        completion_tokens=3, tokens=10, cost=0.5, latency=0.1, attempts=1,
        time="2026-01-01T00:00:00Z",
    )  # fmt: skip
    return dataclasses.replace(answer, **changes)


TEXTS = {
    "plain": "9, then 4.",
    "empty": "",
    "nul": "a\0b",
    "lone surrogate": "a\ud800b",
    "pair": "\U0001f600",
    "bidi": "\u202eabc",
    "line separators": "a\u2028b\u0085c\r\nd\x0b",
    "the mark itself": '\u0001json:"x"',
    "quotes": "'; DROP TABLE answers; --",
    "long": "x" * 20_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_any_text_comes_back_as_it_was(tmp_path, text):
    answer = bought(text=text, rationale=text or None, label=None, error=text, cost=None)
    row = Asked("d/train/0", "d", "train", text, "0" * 64, text)
    with Store(tmp_path / "s.sqlite") as store:
        store.ask([row])
        store.add([answer], [Failure("k", "now", text, 5, None)])
        store_lib.export(store, tmp_path / "s.jsonl")
    with Store(tmp_path / "s.sqlite", write=False) as store:
        assert (store.answers(), store.asked()) == ([answer], [row])
    with Store(tmp_path / "copy.sqlite") as copy:
        store_lib.read_export(tmp_path / "s.jsonl", copy)
        assert (copy.answers(), copy.asked()) == ([answer], [row])
        assert copy.failures() == [Failure("k", "now", text, 5, None)]
        # Once more changes nothing.
        store_lib.read_export(tmp_path / "s.jsonl", copy)
        store_lib.export(copy, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()


def test_an_answer_replaces_that_of_its_key(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        store.add([bought("a", cls="transport", tokens=0, cost=None), bought("b")])
        assert store.keys() == {"a": "transport", "b": "ok"}
        store.add([bought("a", label="9")])
        assert store.keys() == {"a": "ok", "b": "ok"}
        assert {a.key: a.label for a in store.answers()} == {"a": "9", "b": "8"}


def test_what_is_asked_again_stays_paid_and_is_replaced_by_an_answer_only(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        store.add([bought("a", cls="truncated")])
        store.add([bought("a", cls="transport", tokens=0, cost=None, text=None)])
        assert store.keys() == {"a": "truncated"} and store.spent() == (10, 0.5)
        store.add([bought("a")])
        assert store.keys() == {"a": "ok"} and store.spent() == (20, 1.0)
        assert "was truncated" in store.failures()[0].error


def test_a_commit_that_fails_leaves_no_transaction_open(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        store._db.execute("CREATE TABLE one (id PRIMARY KEY)")
        store._db.execute("CREATE TABLE two (id REFERENCES one DEFERRABLE INITIALLY DEFERRED)")
        store._db.execute("PRAGMA foreign_keys = 1")
        with pytest.raises(sqlite3.IntegrityError), store.transaction():
            store._db.execute("INSERT INTO two VALUES (1)")
        store.add([bought("a")])
        assert store.keys() == {"a": "ok"}


def test_what_was_spent_counts_failures_at_their_most(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        assert store.spent() == (0, 0.0)
        store.add([bought("a"), bought("b", cost=None)], [Failure("c", "now", "reset", 100, 2.0)])
        store.add([], [Failure("c", "now", "429", 0, None)])
        assert store.spent() == (120, 2.5)


def test_decisions_are_replaced_and_flags_stay_flags(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Decision:
        id: str
        key: str
        kept: bool
        right: bool | None
        words: int
        confidence: float | None

    first = [Decision("d/train/0", "k", True, None, 3, 0.5),
             Decision("d/train/1", "k", False, True, 3, None)]  # fmt: skip
    other = [Decision("d/test/2", "k", True, True, 1, None)]
    with Store(tmp_path / "s.sqlite") as store:
        store.ask([asked(0), asked(1), asked(2, id="d/test/2", split="test")])
        store.decide(Decision, first, "d", "train")
        store.decide(Decision, other, "d", "test")
        assert store.read("decisions", Decision) == first + other
        store.decide(Decision, first[1:], "d", "train")
        kept, changed = store.read("decisions", Decision)
        assert kept == other[0]
        assert changed.kept is False and changed.right is True
        store.decide(Decision, [], "d", "test")
        assert store.read("decisions", Decision) == first[1:]


def test_the_key_changes_with_everything_that_is_asked():
    given = dict(
        provider="p", model="m", parameters="{}", prompt_sha256="1", input_sha256="2", sample=0,
        given_label=None,
    )  # fmt: skip
    keys = {store_lib.key_of(**given)}
    for name in given:
        keys.add(store_lib.key_of(**given | {name: 1 if name == "sample" else "other"}))
    assert len(keys) == 1 + len(given)
    assert store_lib.key_of(**given) == store_lib.key_of(**given)


def test_one_writer_many_readers(tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store.add([bought()])
        with pytest.raises(ValueError, match="written by another process"):
            Store(path)
        with Store(path, write=False) as reader:
            assert len(reader.answers()) == 1
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                reader.add([bought("b")])
    with Store(path) as store:  # The lock went with the writer.
        assert len(store.answers()) == 1


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no store"):
        Store(tmp_path / "s.sqlite", write=False)
    with pytest.raises(FileNotFoundError, match="no folder"):
        Store(tmp_path / "no" / "s.sqlite")
    with pytest.raises(ValueError, match="local disk"):
        Store("gs://bucket/s.sqlite")
    (tmp_path / "text.sqlite").write_text("no database at all, but long enough to be read" * 99)
    with pytest.raises(ValueError, match="not a store"):
        Store(tmp_path / "text.sqlite")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(ValueError, match="version 0"):
        Store(tmp_path / "other.sqlite")
    Store(tmp_path / "new.sqlite").close()
    newer = sqlite3.connect(tmp_path / "new.sqlite")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(ValueError, match="version 99"):
        Store(tmp_path / "new.sqlite")


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"schema": 2, "table": "answers"}', '{"schema": 1, "table": "users"}',
             '{"schema": 1, "table": "inputs", "id": "x"}',
             '{"schema": 1, "table": "answers", "class": "best"}'],
)  # fmt: skip
def test_a_bad_line_imports_nothing(tmp_path, line):
    with Store(tmp_path / "s.sqlite") as store:
        store.ask([asked()])
        store_lib.export(store, tmp_path / "s.jsonl")
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write(line + "\n")
    with Store(tmp_path / "copy.sqlite") as copy:
        with pytest.raises(ValueError, match=r"s\.jsonl:2: not a line"):
            store_lib.read_export(tmp_path / "s.jsonl", copy)
        assert copy.asked() == []


def test_what_was_added_survives_sigkill(tmp_path):
    """Ten times: a child adds answers and says which; killed at any time, none of them is lost."""
    script = tmp_path / "child.py"
    script.write_text(
        textwrap.dedent(
            """
            import dataclasses, pathlib, sys
            sys.path.insert(0, sys.argv[2])
            from test_teacher_store import bought
            from distill.teacher.store import Store
            store = Store(sys.argv[1])
            n = len(store.keys())
            while True:
                store.add([bought(f"{n + i}", text="x" * 500) for i in range(7)])
                n += 7
                print(n, flush=True)
            """
        )
    )
    rng = random.Random(0)
    acknowledged = 0
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, script, tmp_path / "s.sqlite", os.path.dirname(__file__)],
            stdout=subprocess.PIPE, text=True,
        ) as child:  # fmt: skip
            acknowledged = max(acknowledged, int(child.stdout.readline()))
            time.sleep(rng.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
            lines = child.stdout.read().split("\n")[:-1]  # The last one may be torn.
            acknowledged = max([acknowledged, *map(int, lines)])
        with Store(tmp_path / "s.sqlite", write=False) as store:
            kept = store.keys()
            assert len(kept) % 7 == 0  # All of an `add`, or nothing.
            assert len(kept) >= acknowledged
    assert acknowledged > 70
    assert sorted(map(int, kept)) == list(range(len(kept)))
