"""The store of a teacher's answers: one SQLite file, in which a paid answer cannot get lost.

| table       | a row                                                                            |
|-------------|----------------------------------------------------------------------------------|
| `inputs`    | a row of a dataset that the teacher was asked about: `Asked`, by its id          |
| `answers`   | what the teacher said to an input text, once: `Bought`, by its key               |
| `failures`  | an attempt that brought no answer: `Failure`                                     |
| `decisions` | what becomes of an answer to a row, with every reason: `decisions.Decision`      |
| `batches`   | jobs of a provider's batch API that were handed in: `batch.Job`                  |

The file is in WAL mode with full synchronisation: when `add` returns, the answers are on the disk.
Appended JSON lines tear under SIGKILL; SQLite does not. Rows with the same input share its answers.
Read it with any SQLite tool, also while a run writes it:

    sqlite3 svamp.sqlite "select class, count(*), sum(cost) from answers group by class"
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sqlite3
import threading
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from etils import epath

from distill import results

SCHEMA = 1
# What an answer is. Only `transport`, for which nothing came back, is asked for again.
CLASSES = ("ok", "empty", "truncated", "oversize", "malformed", "refused", "transport")
UNHEARD = ("malformed", "transport")  # Not the teacher spoke, but what is between.
KINDS = ("answer", "rationalised")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One row that the teacher is asked about.

    Attributes:
      id: of the row, see `sources.Row`.
      dataset: that it belongs to.
      split: of the dataset.
      input: the text, without a prompt.
      input_sha256: `sources.input_sha256(input)`.
      gold: its label; None where there is none.
    """

    id: str
    dataset: str
    split: str
    input: str
    input_sha256: str
    gold: str | None


@dataclasses.dataclass(frozen=True)
class Bought:
    """One answer of a teacher to one input text.

    Attributes:
      key: hash of all that decided what was asked (`key_of`).
      input_sha256: of the input text.
      sample: which answer to this input it is, from 0; each given label has its own count.
      kind: `answer`, or `rationalised`: the gold label was given, and its reasons asked for.
      provider: who was asked, such as `api.example.com/v1` or `scripted`.
      model: its name there.
      parameters: of the request, as canonical JSON.
      prompt: name of the prompt.
      prompt_sha256: of its content.
      cls: one of `CLASSES`; the column is `class`.
      text: the raw completion, capped; None where none came.
      text_length: characters of the completion before the cap.
      finish_reason: as the provider gave it.
      rationale: what the prompt's parser found in the text.
      label: the same.
      prompt_tokens: as the provider counted them; None where it did not.
      completion_tokens: the same.
      tokens: of both; where the provider did not count, at most.
      cost: of these, in the currency of the prices that were given; None without prices.
      latency: of the attempt that brought it, in seconds.
      attempts: that were needed.
      time: when it came, UTC, ISO 8601.
      error: why it is `malformed`, `refused` or `transport`, in short and without secrets.
    """

    key: str
    input_sha256: str
    sample: int
    kind: str
    provider: str
    model: str
    parameters: str
    prompt: str
    prompt_sha256: str
    cls: str
    text: str | None
    text_length: int
    finish_reason: str | None
    rationale: str | None
    label: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    tokens: int
    cost: float | None
    latency: float
    attempts: int
    time: str
    error: str | None = None

    def __post_init__(self):
        if self.cls not in CLASSES:
            raise ValueError(f"the class of an answer is one of {CLASSES}, not {self.cls!r}")
        if self.kind not in KINDS:
            raise ValueError(f"the kind of an answer is one of {KINDS}, not {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class Failure:
    """One attempt that brought no answer, though it may have cost something.

    Attributes:
      key: of the answer that was asked for.
      time: UTC, ISO 8601.
      error: what happened, in short and without secrets.
      tokens: at most so many were spent on it; 0 where the provider refused to work.
      cost: the same, in the currency of the prices; None without prices.
    """

    key: str
    time: str
    error: str
    tokens: int
    cost: float | None


def key_of(
    *,
    provider: str,
    model: str,
    parameters: str,
    prompt_sha256: str,
    input_sha256: str,
    sample: int,
    given_label: str | None = None,
) -> str:
    """Returns the key of an answer: a hash of everything that decides what the teacher is asked.

    Args:
      provider: see `Bought`.
      model: see `Bought`.
      parameters: see `Bought`.
      prompt_sha256: see `Bought`.
      input_sha256: see `Bought`.
      sample: see `Bought`.
      given_label: the gold label, where its reasons are asked for.
    """
    parts = [provider, model, parameters, prompt_sha256, input_sha256, sample, given_label]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- The file -------------------------------------------------------------------------------------

_TABLES = {"inputs": Asked, "answers": Bought, "failures": Failure}
_Record = TypeVar("_Record")
_SQL_TYPES = {str: "TEXT", int: "INTEGER", float: "REAL", bool: "INTEGER"}


def _columns(record: type) -> dict[str, str]:
    """Returns column -> declaration for the fields of a dataclass; `cls` is the column `class`."""
    return {
        _column(name): _SQL_TYPES[_plain(kind)]
        + ("" if type(None) in typing.get_args(kind) else " NOT NULL")
        for name, kind in typing.get_type_hints(record).items()
    }


def _plain(kind: Any) -> type:
    """`str | None` -> `str`."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    (plain,) = (option for option in options if option is not type(None))
    return plain


def _column(field: str) -> str:
    return "class" if field == "cls" else field


class Store:
    """The answers in one SQLite file, open for one writer and any number of readers.

    with Store("/tmp/svamp.sqlite") as store:
        store.add([bought])
    """

    def __init__(self, path: epath.PathLike, *, write: bool = True):
        """Opens a store, and makes it where there is none.

        Args:
          path: of the file, on a local disk.
          write: False to read only; another process may be writing.

        Raises:
          FileNotFoundError: there is no such file to read, or no folder to write it in.
          ValueError: it is on no local disk, no store, of another version, or being written by
            another process.
        """
        self.path = epath.Path(path).expanduser()
        self._lock = None
        self._turn = threading.Lock()
        if "://" in str(path):
            raise ValueError(
                f"STORE={path}: SQLite needs a local disk. Generate into a local file and copy it"
            )
        if not (self.path if not write else self.path.parent).exists():
            raise FileNotFoundError(
                f"there is no {'store' if not write else 'folder for the store'} {self.path}"
            )
        if write:
            self._lock = self._locked()
        # Autocommit; `add` says where a transaction begins. The writer may be another thread.
        try:
            self._db = sqlite3.connect(
                os.fspath(self.path), isolation_level=None, check_same_thread=False, timeout=60
            )
            self._prepare(write)
        except sqlite3.DatabaseError as e:
            self.close()
            raise ValueError(f"{self.path} is not a store of answers, or is damaged: {e}") from e
        except ValueError:
            self.close()
            raise

    def _locked(self) -> int:
        lock = os.open(f"{self.path}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(lock)
            raise ValueError(
                f"{self.path} is being written by another process: wait for it, or use another "
                "STORE. (Two at once would buy the same answers twice.)"
            ) from e
        return lock

    def _prepare(self, write: bool) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != SCHEMA and (tables or not write):
            raise ValueError(
                f"{self.path} has version {version} of the store's tables; this release reads "
                f"{SCHEMA}. Export it to JSON lines with the release that wrote it, and import that"
            )
        if not write:
            self._db.execute("PRAGMA query_only = 1")
            return
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # an answer counts once it is on the disk
        with self.transaction():
            self.table("inputs", Asked, "id")
            self.table("answers", Bought, "key")
            self.table("failures", Failure)
            self._db.execute("CREATE INDEX IF NOT EXISTS by_input ON answers (input_sha256)")
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    def table(self, name: str, record: type, *key: str) -> None:
        """Makes a table with one column for each field of a dataclass, if it is not there."""
        columns = [f"{column} {kind}" for column, kind in _columns(record).items()]
        if key:
            columns.append(f"PRIMARY KEY ({', '.join(key)})")
        self._db.execute(f"CREATE TABLE IF NOT EXISTS {name} ({', '.join(columns)})")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing, and on the disk afterwards. Threads take turns."""
        with self._turn:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite itself may have rolled back: a full disk
                    self._db.execute("ROLLBACK")
                raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the lock goes with the process in any case."""
        if hasattr(self, "_db"):
            self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- Writing ---

    def put(self, table: str, records: Sequence[Any]) -> None:
        """Writes dataclasses into their table; a row with the same key is replaced."""
        if not records:
            return
        names = [field.name for field in dataclasses.fields(records[0])]
        sql = f"INSERT OR REPLACE INTO {table} ({', '.join(map(_column, names))}) VALUES "
        sql += f"({', '.join('?' * len(names))})"
        self._db.executemany(
            sql, [[_storable(getattr(record, name)) for name in names] for record in records]
        )

    def remove(self, table: str, column: str, value: str) -> None:
        """Takes rows out of a table."""
        self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", [value])

    def add(self, answers: Sequence[Bought], failures: Sequence[Failure] = ()) -> None:
        """Keeps answers and failed attempts; they are on the disk when this returns."""
        with self.transaction():
            self.keep(answers)
            self.put("failures", failures)

    def keep(self, answers: Sequence[Bought]) -> None:
        """Writes answers, in a transaction.

        One that was asked for again takes the place of the earlier one, if it came; what the
        earlier one cost stays spent, as a failure.
        """
        came, replaced = [], []
        for answer in answers:
            sql = "SELECT class, tokens, cost FROM answers WHERE key = ?"
            cls, tokens, cost = self._db.execute(sql, [answer.key]).fetchone() or (None, 0, None)
            if cls is not None and cls not in UNHEARD and answer.cls in UNHEARD:
                continue
            came.append(answer)
            if tokens:
                why = f"asked again, was {cls}"
                replaced.append(Failure(answer.key, answer.time, why, tokens, cost))
        self.put("answers", came)
        self.put("failures", replaced)

    def ask(self, rows: Sequence[Asked]) -> None:
        """Notes the rows that the teacher is asked about."""
        with self.transaction():
            self.put("inputs", rows)

    def decide(self, record: type, decisions: Sequence[Any], dataset: str, split: str) -> None:
        """Replaces the decisions, of type `record`, about the rows of one split of a dataset."""
        with self.transaction():
            self.table("decisions", record, "id", "key")
            rows = "SELECT id FROM inputs WHERE dataset = ? AND split = ?"
            self._db.execute(f"DELETE FROM decisions WHERE id IN ({rows})", [dataset, split])
            self.put("decisions", decisions)

    # --- Reading ---

    def read(self, table: str, record: type[_Record]) -> list[_Record]:
        """Returns the rows of a table as dataclasses, in the order in which they were written."""
        names = [field.name for field in dataclasses.fields(record)]
        flags = {n for n, kind in typing.get_type_hints(record).items() if _plain(kind) is bool}
        sql = f"SELECT {', '.join(map(_column, names))} FROM {table} ORDER BY rowid"
        return [
            record(**{n: _from_storable(v, n in flags) for n, v in zip(names, row, strict=True)})
            for row in self._db.execute(sql)
        ]

    def asked(self) -> list[Asked]:
        """The rows that the teacher was asked about."""
        return self.read("inputs", Asked)

    def answers(self) -> list[Bought]:
        """All answers, `transport` among them."""
        return self.read("answers", Bought)

    def failures(self) -> list[Failure]:
        """All attempts that brought no answer."""
        return self.read("failures", Failure)

    def keys(self) -> dict[str, str]:
        """Returns key -> class of all answers."""
        return dict(self._db.execute("SELECT key, class FROM answers"))

    def spent(self) -> tuple[int, float]:
        """Returns tokens and cost of everything in the store, failed attempts at their most."""
        tokens, cost = 0, 0.0
        for table in ("answers", "failures"):
            sql = f"SELECT coalesce(sum(tokens), 0), coalesce(sum(cost), 0.0) FROM {table}"
            some = self._db.execute(sql).fetchone()
            tokens, cost = tokens + some[0], cost + some[1]
        return tokens, cost


# --- As JSON lines --------------------------------------------------------------------------------


def export(store: Store, path: epath.PathLike) -> int:
    """Writes a whole store as JSON lines, one a row of a table; returns how many.

    The columns `class` and `table` name themselves; decisions are left out, since they follow from
    the rest. Who reads the file finds the old one or the new one, never a part.
    """
    lines = [
        {"schema": SCHEMA, "table": table, **{_column(k): v for k, v in vars(record).items()}}
        for table, kind in _TABLES.items()
        for record in store.read(table, kind)
    ]
    results.write_lines(epath.Path(path), lines)
    return len(lines)


def read_export(path: epath.PathLike, store: Store) -> int:
    """Puts what `export` wrote into a store; returns how many lines there were.

    Answers that the store has already are replaced by the same.

    Raises:
      ValueError: a line is not of this release's `export`; nothing of the file is in the store.
    """
    found: dict[str, list[Any]] = {table: [] for table in _TABLES}
    text = epath.Path(path).read_bytes().decode()
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            fields = json.loads(line)
            if fields.pop("schema") != SCHEMA:
                raise ValueError(f"not schema {SCHEMA}")
            table = fields.pop("table")
            if "class" in fields:
                fields["cls"] = fields.pop("class")
            found[table].append(_TABLES[table](**fields))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise ValueError(f"{path}:{number}: not a line of an exported store: {e}") from e
    known = set(store.failures())
    found["failures"] = [failure for failure in found["failures"] if failure not in known]
    with store.transaction():
        for table, records in found.items():
            store.put(table, records)
    return sum(map(len, found.values()))


# SQLite keeps UTF-8, which cannot hold half of a surrogate pair, and its tools end a text at NUL.
# Such texts are kept as JSON, behind a mark that no model writes by chance.
_MARK = "\u0001json:"


def _storable(value: Any) -> Any:
    if isinstance(value, str) and ("\0" in value or value.startswith(_MARK) or not _is_utf8(value)):
        return _MARK + json.dumps(value)
    return value


def _from_storable(value: Any, flag: bool) -> Any:
    if isinstance(value, str) and value.startswith(_MARK):
        return json.loads(value[len(_MARK) :])
    return bool(value) if flag and value is not None else value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
