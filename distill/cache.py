"""The row cache: a mixture's split, tokenised once, in ArrayRecord files.

    config = RowsConfig("svamp_step_by_step", data_dir="/data")
    corpus = load(config, "train")          # builds it if it is not there or not fresh
    corpus.tasks[0].lengths                 # from memory-mapped columns
    corpus.tasks[0].read([3, 17])           # tokens and texts, at random access

A split's folder holds generations and `index.json`, which names the current one and the hashes of
all that decided it: the source files, the code of the task modules, the vocabulary. A fresh cache
is recognised, and training starts, without importing SeqIO and TensorFlow. A generation is named by
the hash of its rows, is built in a temporary folder and renamed when it is complete; the index is
replaced last. So a half-built cache is never read, and of two processes that build at once the
second finds the same generation already there.

Rows are kept whole: where they are cut is decided by the reader.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from distill import prompts, sources
from distill import vocabulary as vocabulary_lib

FORMAT = 5
# A generation that is not the current one any more may still be read for so long (seconds).
GRACE = 7 * 24 * 3600
_COLUMNS = ("lengths", "loss_groups", "keys", "choices", "weights", "population")
# Texts of a row that some have; the order is that of `Record`.
_EXTRA = ("teacher", "teacher_rationale", "options", "human_rationale")
_HEADER = struct.Struct("<II")  # input and target tokens of a record
_REPORT_EVERY = 500  # rows
_MAIN = ("__main__", "__mp_main__")  # multiprocessing has a second name for it
_SIGN = "\x1e"  # what the tokenising process tells its parent, among other output


def default_dir() -> str:
    """Where everything is kept that can be made again, where CACHE_DIR does not say it."""
    return os.environ.get("DISTILL_CACHE_DIR") or "~/.cache/distill-step-by-step"


class NoSplitError(FileNotFoundError):
    """The mixture has no such split at all, which is no fault where the split is optional."""


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """What rows to read, and all that decides them.

    Attributes:
      mixture_or_task_name: a SeqIO task or mixture, e.g. `svamp_step_by_step`.
      mixture_or_task_module: the module whose import registers it.
      data_dir: folder of the datasets; None = $DISTILL_DATA_DIR.
      vocabulary: `bytes`, a SentencePiece file or a Hugging Face folder; None =
        $DISTILL_VOCABULARY, else `bytes`.
      parsing: `reference` or `repaired`, see `sources.Settings`; so are the next three. None = the
        environment's, else the default.
      teacher_filter: `keep`, `drop`, `label_only` or `keep_gold`.
      rationale_store: a file of the teacher's answers, to be used in place of the sources' own.
      max_bad_rows: unusable lines of a JSON-lines file that may be left out.
      allow_missing: datasets of the mixture that may be absent.
      cache_dir: where tokenised rows are kept, and compiled programs (`compilation`); None =
        $DISTILL_CACHE_DIR, else `~/.cache/distill-step-by-step`.
    """

    mixture_or_task_name: str
    mixture_or_task_module: str = "tasks"
    data_dir: str | None = None
    vocabulary: str | None = None
    parsing: str | None = None
    teacher_filter: str | None = None
    rationale_store: str | None = None
    max_bad_rows: int | None = None
    allow_missing: Sequence[str] = ()
    cache_dir: str | None = None

    def __post_init__(self):
        def default(field: str, last: str | None = None) -> None:
            value = getattr(self, field)
            if value is None or value == "":
                value = os.environ.get(f"DISTILL_{field.upper()}") or last
            object.__setattr__(self, field, value)

        for field in dataclasses.fields(sources.Settings):
            default(field.name)
        default("vocabulary", vocabulary_lib.BYTES)
        default("cache_dir", default_dir())
        for field in ("parsing", "teacher_filter", "max_bad_rows"):
            if (value := getattr(self, field)) is not None:
                object.__setattr__(self, field, sources.checked(field, value))
        if "://" in self.cache_dir:
            raise ValueError(
                f"CACHE_DIR={self.cache_dir} must be a local folder: rows are read from it at "
                "random, through memory maps. Every host keeps its own."
            )
        names = self.allow_missing
        if isinstance(names, str):  # --gin.ALLOW_MISSING=esnli,gsm8k
            names = [name.strip() for name in names.split(",") if name.strip()]
        object.__setattr__(self, "allow_missing", tuple(names or ()))

    def source_settings(self) -> dict[str, Any]:
        """The fields of `sources.Settings`, for `task.bind`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(sources.Settings)}

    def rows(self) -> "RowsConfig":
        """The fields of this class alone, where a subclass has more."""
        return RowsConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(RowsConfig)})


# --- Reading --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """One tokenised row.

    Attributes:
      inputs: token ids, EOS last, int32.
      targets: token ids, EOS last, int32.
      example_id: shared by the sequences of one example.
      label: the gold label, text; empty where there is none.
      text: the input before tokenising.
      teacher: the teacher's label, in validation and test; empty where there is none.
      teacher_rationale: the same for its rationale.
      options: the labels of a classification task, one a line, in validation and test.
      human_rationale: in place of the teacher's, where people wrote them.
    """

    inputs: np.ndarray
    targets: np.ndarray
    example_id: str
    label: str
    text: str
    teacher: str = ""
    teacher_rationale: str = ""
    options: str = ""
    human_rationale: str = ""


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """The rows of one task's split.

    Attributes:
      name: of the SeqIO task.
      rate: mixing rate in the mixture it was loaded for.
      metrics: names of its metric functions, `module.function`.
      dataset: what the task was registered for; None for a foreign SeqIO task.
      answer_form: how the label is found in an answer, see `metrics.answer`.
      path: of the ArrayRecord file.
      lengths: input and target tokens of each row, int32 [n, 2].
      loss_groups: int32 [n].
      keys: hashes of the example ids, uint64 [n]; the sequences of one example share theirs.
      choices: int32 [n]; of the rows with one key, one is drawn per epoch.
      weights: of each row in the loss, thousandths, int32 [n].
      population: keys of all examples of the dataset's split, also of those that give no row of
        this task, uint64 [m].
    """

    name: str
    rate: float
    metrics: tuple[str, ...]
    dataset: str | None
    answer_form: str
    path: str
    lengths: np.ndarray
    loss_groups: np.ndarray
    keys: np.ndarray
    choices: np.ndarray
    weights: np.ndarray
    population: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def _records(self):
        from array_record.python import array_record_data_source

        return array_record_data_source.ArrayRecordDataSource([self.path])

    def read_tokens(self, indices: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (inputs, targets) of the rows of these numbers, int32."""
        return [_tokens(record) for record in self._raw(indices)]

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the rows of these numbers."""
        found = []
        for record in self._raw(indices):
            inputs, targets = _tokens(record)
            texts = json.loads(record[_HEADER.size + 4 * (len(inputs) + len(targets)) :])
            found.append(Record(inputs, targets, *texts))
        return found

    def _raw(self, indices: Sequence[int]) -> Sequence[bytes]:
        return self._records.__getitems__([int(i) for i in indices]) if len(indices) else []


def _tokens(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = _HEADER.unpack_from(record)
    both = np.frombuffer(record, np.int32, inputs + targets, _HEADER.size)
    return both[:inputs], both[inputs:]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A mixture's split, tokenised. Pickled as its folder, so that processes share the files.

    Attributes:
      name: of the mixture or task.
      split: `train`, `validation` or `test`.
      tasks: the rows of each member.
      pairs: see `number_pairs`.
      fingerprint: sha256 over rows and rates; corpora with the same one give the same batches.
      folder: of this generation.
    """

    name: str
    split: str
    tasks: list[TaskRows]
    pairs: np.ndarray
    fingerprint: str
    folder: pathlib.Path

    def __reduce__(self):
        return open_generation, (self.folder,)

    @property
    def loss_groups(self) -> set[int]:
        return {int(g) for task in self.tasks for g in np.unique(task.loss_groups)}


def open_generation(folder: pathlib.Path) -> Corpus:
    """Returns the corpus in a folder that `write_generation` has made."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tasks = []
    for number, member in enumerate(manifest["members"]):
        # Memory-mapped: a plan reads lengths, a step the records that it needs.
        columns = {
            name: np.load(folder / f"{number}.{name}.npy", mmap_mode="r") for name in _COLUMNS
        }
        member = {**member, "metrics": tuple(member["metrics"])}
        tasks.append(TaskRows(**member, path=str(folder / f"{number}.array_record"), **columns))
    pairs = np.load(folder / "pairs.npy", mmap_mode="r")
    fingerprint = manifest["fingerprint"]
    return Corpus(manifest["name"], manifest["split"], tasks, pairs, fingerprint, folder)


def number_pairs(keys: Sequence[np.ndarray]) -> np.ndarray:
    """The example of every row, numbered in the order in which examples first occur.

    Args:
      keys: `TaskRows.keys` of each task.

    Returns:
      int64 [rows of all tasks].
    """
    _, first, example = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[example]


def load(config: RowsConfig, split: str, *, prepared: bool = False) -> Corpus:
    """Opens a split of the mixture, after building its cache if that is not fresh.

    Args:
      config: names the mixture, and what its rows depend on.
      split: `train`, `validation` or `test`.
      prepared: the caller has just called `prepare`; do not look again.

    Raises:
      prompts.UnknownNameError: unknown task.
      ValueError: rows that do not add up (from the task's source).
      FileNotFoundError: the task's data is missing; NoSplitError where it never had this split.
    """
    if not prepared:
        prepare(config, (split,))
    folder = _folder(config, split)
    index = json.loads((folder / "index.json").read_text())
    if index["generation"] is None:
        raise NoSplitError(f"{', '.join(index['lacking'])}: no split {split!r}.")
    if index["skipped"]:
        logging.warning(
            "%s is without %s: absent when it was tokenised, as ALLOW_MISSING allows.",
            config.mixture_or_task_name, ", ".join(index["skipped"]),
        )  # fmt: skip
    return open_generation(folder / index["generation"])


# --- Freshness ------------------------------------------------------------------------------------


def _folder(config: RowsConfig, split: str) -> pathlib.Path:
    """Where the rows of a split are kept: by all that names them."""
    identity = dataclasses.asdict(config.rows()) | {"format": FORMAT, "split": split}
    identity["seqio_caches"] = os.environ.get("DISTILL_SEQIO_CACHE_DIRS")  # see task.import_module
    del identity["cache_dir"]
    for field in ("data_dir", "rationale_store"):
        if identity[field] and "://" not in identity[field]:
            identity[field] = os.path.abspath(identity[field])
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    root = pathlib.Path(config.cache_dir).expanduser()
    return root / f"{config.mixture_or_task_name}-{split}-{key}"


def _sha256(path) -> str:
    with epath.Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _require_module(module: str) -> None:
    """Raises ValueError where there is no such module."""
    if importlib.util.find_spec(module.split(".")[0]) is None:  # finding it imports nothing
        raise ValueError(
            f"There is no module {module!r} to import tasks from. Set MIXTURE_OR_TASK_MODULE to "
            "one on the Python path (the default is 'tasks')."
        )


@functools.cache  # before the first rows are read: TensorFlow makes modules of its own then
def _code(module: str) -> dict[str, str]:
    """Hashes of the source that decides the rows, by file; called where all of it is imported.

    The code that tokenises, the task module's package, and what it imports but for installed
    packages and the standard library.
    """
    here = pathlib.Path(__file__).parent
    files = {here / f"{name}.py" for name in ("task", "prompts", "vocabulary")}
    files |= {file for package in ("sources", "metrics") for file in (here / package).glob("*.py")}
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib",
                                                             "platlib")})  # fmt: skip
    for name, imported in list(sys.modules.items()):
        file = getattr(imported, "__file__", None)
        own = name.split(".")[0] == module.split(".")[0]
        if not file or not file.endswith(".py") or name.split(".")[0] in ("distill", *_MAIN):
            continue
        if own or not os.path.abspath(file).startswith(installed):
            files.add(pathlib.Path(file))
    return {str(file): _sha256(file) for file in sorted(files)}


def _surroundings(config: RowsConfig, files: Sequence[str], datasets: Sequence[str]) -> dict:
    """What lies around the files that were read.

    Which completions there are, and which of several sources is used, is decided by what exists:
    a file that was not there may decide the rows once it is.

    Returns:
      Folder -> the names in it; None where it does not exist. Folders in the data folder only.
    """
    if not config.data_dir:
        return {}
    root = epath.Path(config.data_dir)
    folders = {root / name for name in (*datasets, "tfds")}
    for file in files:
        folders |= {p for p in list(epath.Path(file).parents)[:2] if root in p.parents}
    return {str(folder): _names(folder) for folder in sorted(folders, key=str)}


def _names(folder) -> list[str] | None:
    folder = epath.Path(folder)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else None


def _is_fresh(folder: pathlib.Path, config: RowsConfig) -> bool:
    _require_module(config.mixture_or_task_module)
    try:
        index = json.loads((folder / "index.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    if index["files"] is None:  # a foreign SeqIO task: nobody knows what it reads
        return False
    hashed = index["code"] | index["files"]
    return (
        (index["generation"] is None or _is_whole(folder / index["generation"]))
        and index["vocabulary"] == vocabulary_lib.load(config.vocabulary).fingerprint
        and all(_names(around) == names for around, names in index["around"].items())
        and all(epath.Path(f).exists() and _sha256(f) == h for f, h in hashed.items())
    )


def _is_whole(generation: pathlib.Path) -> bool:
    """Whether all files of a generation are there, with the sizes that were written."""
    try:
        sizes = json.loads((generation / "manifest.json").read_text())["sizes"]
        return all((generation / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError):
        return False


# --- Building -------------------------------------------------------------------------------------


def prepare(config: RowsConfig, splits: Sequence[str], *, rebuild: bool = False) -> list[str]:
    """Builds the caches of those splits that are not fresh, in one process of its own.

    That process imports SeqIO and TensorFlow (seconds, and 800 MB), so that this one never does.

    Args:
      config: names the mixture, and what its rows depend on.
      splits: what to build.
      rebuild: build also what is fresh.

    Returns:
      The splits that were built.

    Raises:
      As `load`, but a split that the mixture never had is no error here.
    """
    stale = [s for s in splits if rebuild or not _is_fresh(_folder(config, s), config)]
    if not stale:
        return []
    logging.info(
        "Tokenising %s, %s, into %s",
        config.mixture_or_task_name, " and ".join(stale), config.cache_dir,
    )  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "CUDA_VISIBLE_DEVICES": "",  # TensorFlow would take the accelerator's memory
    }
    request = json.dumps([dataclasses.asdict(config.rows()), stale])
    failure = None
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            # -P: the modules are those of this process, not what lies in the current folder.
            [sys.executable, "-P", "-m", "distill.cache", request],
            env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        with child, tqdm(unit="row", disable=not sys.stderr.isatty(), leave=False) as bar:
            for line in child.stdout:
                if not line.startswith(_SIGN):
                    continue  # a task module that prints
                message = json.loads(line.removeprefix(_SIGN))
                failure = message.get("failure")
                if failure is None:
                    bar.set_description(f"tokenising {message['task']} {message['split']}")
                    bar.total, bar.n = message["total"], message["done"]
                    bar.refresh()
        errors.seek(0)
        said = errors.read()
    if failure is not None:
        kinds = (prompts.UnknownNameError, ValueError, FileNotFoundError, ModuleNotFoundError)
        raise {kind.__name__: kind for kind in kinds}[failure["kind"]](failure["message"])
    if child.returncode:
        raise RuntimeError(f"Tokenising failed (exit {child.returncode}):\n{said}")
    for line in said.splitlines():
        if not _TENSORFLOW_NOTE.match(line):
            logging.warning(line)
    return stale


# What TensorFlow says of itself whenever it is imported on a machine without a GPU.
_TENSORFLOW_NOTE = re.compile(r"[IWE]0000 |WARNING: All log messages before absl|\s*$")


def _build_all(request: str) -> int:
    """What the process of `prepare` does; user errors go to it as a message, others are raised."""
    settings, splits = json.loads(request)
    config = RowsConfig(**settings)
    try:
        for split in splits:
            _build(_folder(config, split), config, split)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        kinds = (
            ModuleNotFoundError, FileNotFoundError, prompts.UnknownNameError, ValueError
        )  # fmt: skip
        kind = next(k for k in kinds if isinstance(error, k))
        _tell(failure={"kind": kind.__name__, "message": str(error)})
        return 1
    return 0


def _tell(**message) -> None:
    print(f"\n{_SIGN}{json.dumps(message)}", flush=True)


def _build(folder: pathlib.Path, config: RowsConfig, split: str) -> None:
    """Tokenises a split through SeqIO. That a mixture has no such split is cached too."""
    from distill import task  # imports SeqIO and TensorFlow

    task.bind(vocabulary=config.vocabulary, **config.source_settings())
    task.import_module(config.mixture_or_task_module)
    info = task.describe(
        config.mixture_or_task_name, allow_missing=config.allow_missing, split=split
    )
    # As in SeqIO, a split of a mixture is that of the members that have it.
    members = [m for m in info.members if split in task.lookup(m.name).splits]
    lacking = [m.name for m in info.members if m not in members]
    info = dataclasses.replace(info, members=tuple(members))
    files = info.files(split) if members else []
    datasets = sorted({m.dataset for m in members if m.dataset} | set(info.skipped))
    # Looked at before the rows are read: what changes meanwhile makes the cache stale.
    hashes = None if files is None else {str(f): _sha256(f) for f in files}
    index = {
        "mixture": config.mixture_or_task_name,
        "split": split,
        "lacking": lacking,
        "skipped": list(info.skipped),
        "code": _code(config.mixture_or_task_module),
        "vocabulary": vocabulary_lib.load(config.vocabulary).fingerprint,
        "files": hashes,
        "around": _surroundings(config, files or (), datasets),
        "generation": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if members:
        wanted = []
        for member in members:
            _require_vocabulary(task.lookup(member.name), config)
            facts = {
                "name": member.name, "rate": float(member.rate), "metrics": list(member.metrics),
                "dataset": member.dataset, "answer_form": member.answer_form,
            }  # fmt: skip
            population = task.population(member.name, split)
            wanted.append((facts, population, task.tokenized_rows(member.name, split)))
        index["generation"] = write_generation(
            folder, config.mixture_or_task_name, split, wanted, _tell
        )
    _replace_index(folder, index)


def _replace_index(folder: pathlib.Path, index: dict) -> None:
    """Makes a generation the current one, and removes those that nobody can be reading."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        displaced = json.loads((folder / "index.json").read_text())["generation"]
        if displaced and displaced != index["generation"]:
            os.utime(folder / displaced)  # it may be read until GRACE from now
    for path in folder.iterdir():
        if not path.is_dir() or path.name == index["generation"]:
            continue
        if time.time() - path.stat().st_mtime > GRACE:
            shutil.rmtree(path, ignore_errors=True)
    handle, partial = tempfile.mkstemp(prefix=".index.", dir=folder)
    with os.fdopen(handle, "w") as f:
        json.dump(index, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, folder / "index.json")


def write_generation(
    folder: pathlib.Path,
    name: str,
    split: str,
    members: Iterable[tuple[dict, list[str] | None, Iterable[dict]]],
    progress: Callable[..., None] | None = None,
) -> str:
    """Writes the rows of all members into a new folder inside `folder`.

    Args:
      folder: of the split.
      name: of the mixture.
      split: of the rows.
      members: for each the facts (the fields of `TaskRows` up to `answer_form`), the ids of all
        examples of its dataset (None = those of its rows), and rows as `task.tokenized_rows` gives
        them.
      progress: is told now and then the task, the split, and the rows done and in all.

    Returns:
      The generation: the hash of all that was written, which is the new folder's name.

    Raises:
      ValueError: two examples of a dataset have one id, or a row has no tokens.
    """
    new = pathlib.Path(tempfile.mkdtemp(prefix=".building.", dir=folder))
    try:
        digest = hashlib.sha256()
        kept, keys = [], []
        for number, (facts, population, rows) in enumerate(members):
            kept.append(facts)
            digest.update(json.dumps([facts["name"], facts["rate"]]).encode())
            told = functools.partial(progress or _ignore, task=facts["name"], split=split)
            keys.append(_write_task(new, number, facts["name"], population, rows, digest, told))
        np.save(new / "pairs.npy", number_pairs(keys or [np.zeros(0, np.uint64)]))
        fingerprint = digest.hexdigest()
        # Metrics and the like are no rows: they make another generation of the same rows.
        generation = hashlib.sha256(json.dumps([fingerprint, kept]).encode()).hexdigest()
        sizes = {}
        for path in sorted(new.iterdir()):
            sizes[path.name] = path.stat().st_size
            with path.open("rb") as f:
                os.fsync(f.fileno())
        manifest = {
            "name": name, "split": split, "members": kept, "fingerprint": fingerprint,
            "sizes": sizes,
        }  # fmt: skip
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1))
        target = folder / generation
        if target.exists() and not _is_whole(target):  # damaged
            shutil.rmtree(target, ignore_errors=True)
        try:
            new.rename(target)
        except OSError:
            if not _is_whole(target):
                raise  # else another process has just built the same
        return generation
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _ignore(**message) -> None:
    pass


def _write_task(folder, number: int, name: str, population, rows, digest, told) -> np.ndarray:
    """Writes the rows of one task; returns their keys."""
    from array_record.python import array_record_module

    # One record per group: rows are read at random.
    writer = array_record_module.ArrayRecordWriter(
        str(folder / f"{number}.array_record"), "group_size:1"
    )
    columns: dict[str, list] = {"lengths": [], "loss_groups": [], "choices": [], "weights": []}
    ids: list[str] = []
    for row in rows:
        inputs, targets = (row[k].astype("<i4").tobytes() for k in ("inputs", "targets"))
        lengths = (len(row["inputs"]), len(row["targets"]))
        if not any(lengths):
            raise ValueError(f"{name}: the row of example {row['example_id']!r} has no tokens.")
        texts = [row["example_id"], row["label"], row["inputs_pretokenized"]]
        extra = [row.get(key, "") for key in _EXTRA]
        texts = json.dumps(texts + extra if any(extra) else texts)
        record = _HEADER.pack(*lengths) + inputs + targets + texts.encode()
        writer.write(record)
        digest.update(record)
        columns["lengths"].append(lengths)
        columns["loss_groups"].append(row["loss_group"])
        columns["choices"].append(row["choice"])
        columns["weights"].append(row["loss_weight"])
        ids.append(row["example_id"])
        if len(ids) % _REPORT_EVERY == 0:
            told(done=len(ids), total=population and len(population))
    writer.close()
    everyone = list(dict.fromkeys(ids)) if population is None else population
    repeated = [i for i, n in collections.Counter(everyone).items() if n > 1]
    same = collections.Counter(zip(ids, columns["choices"], strict=True))
    repeated += [i for (i, _), n in same.items() if n > 1]
    if repeated:
        raise ValueError(
            f"{name}: two examples have the id {repeated[0]!r}; ids must be unique, since the rows "
            "of one id are taken for answers to one input."
        )
    keys = {i: _key(i) for i in everyone}
    if len(set(keys.values())) < len(keys):
        raise ValueError(f"{name}: two example ids have one hash; rename the dataset.")
    arrays = {k: np.array(v, np.int32) for k, v in columns.items()}
    arrays["lengths"] = arrays["lengths"].reshape(-1, 2)
    arrays["keys"] = np.array([keys.get(i) or _key(i) for i in ids], np.uint64)
    arrays["population"] = np.array(list(keys.values()), np.uint64)
    for column in _COLUMNS:
        np.save(folder / f"{number}.{column}.npy", arrays[column])
        digest.update(np.ascontiguousarray(arrays[column]).tobytes())
    return arrays["keys"]


def _key(example_id: str) -> int:
    return int.from_bytes(hashlib.sha256(example_id.encode()).digest()[:8], "little")


def _require_vocabulary(provider, config: RowsConfig) -> None:
    """A task from elsewhere brings its own vocabulary; it must be the student's."""
    bound = vocabulary_lib.load(config.vocabulary).as_seqio()
    for key in ("inputs", "targets"):
        own = provider.output_features[key].vocabulary
        if own != bound:
            raise ValueError(
                f"{provider.name} tokenises its {key} with {own}, but VOCABULARY is "
                f"{config.vocabulary!r} ({bound}): set --gin.VOCABULARY to the task's own."
            )


if __name__ == "__main__":
    sys.exit(_build_all(sys.argv[1]))
