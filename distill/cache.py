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
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from distill import vocabulary as vocabulary_lib

FORMAT = 3
# A generation that is not the current one any more may still be read for so long (seconds).
GRACE = 24 * 3600
_COLUMNS = ("lengths", "loss_groups", "keys", "choices", "weights", "population")
_HEADER = struct.Struct("<II")  # input and target tokens of a record
_REPORT_EVERY = 500  # rows
_SIGN = "\x1e"  # what the tokenising process tells its parent, among other output


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
      cache_dir: where tokenised rows are kept; None = $DISTILL_CACHE_DIR, else
        `~/.cache/distill-step-by-step`.
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

        for field in ("data_dir", "parsing", "teacher_filter", "rationale_store", "max_bad_rows"):
            default(field)
        default("vocabulary", vocabulary_lib.BYTES)
        default("cache_dir", "~/.cache/distill-step-by-step")
        if self.max_bad_rows is not None:
            object.__setattr__(self, "max_bad_rows", int(self.max_bad_rows))
        names = self.allow_missing
        if isinstance(names, str):  # --gin.ALLOW_MISSING=esnli,gsm8k
            names = [name.strip() for name in names.split(",") if name.strip()]
        object.__setattr__(self, "allow_missing", tuple(names or ()))

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
    """

    inputs: np.ndarray
    targets: np.ndarray
    example_id: str
    label: str
    text: str


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
      fingerprint: sha256 over all rows; two corpora with the same one give the same batches.
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
    return Corpus(manifest["name"], manifest["split"], tasks, pairs, folder.name, folder)


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
      ValueError: unknown task, or rows that do not add up (from the task's source).
      FileNotFoundError: the task's data is missing; NoSplitError where it never had this split.
    """
    if not prepared:
        prepare(config, (split,))
    folder = _folder(config, split)
    index = json.loads((folder / "index.json").read_text())
    if index["lacking"]:
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


def _code_hash(module: str) -> str:
    """Hash of the source that decides the rows: the task modules and the code that tokenises."""
    top = importlib.util.find_spec(module.split(".")[0])  # finding a top level imports nothing
    if top is None:
        raise ValueError(
            f"There is no module {module!r} to import tasks from. Set MIXTURE_OR_TASK_MODULE to "
            "one on the Python path (the default is 'tasks')."
        )
    here = pathlib.Path(__file__).parent
    files = [here / f"{name}.py" for name in ("task", "metrics", "vocabulary")]
    files += sorted((here / "sources").glob("*.py"))
    for folder in top.submodule_search_locations or ():
        files += sorted(pathlib.Path(folder).rglob("*.py"))
    if not top.submodule_search_locations:
        files.append(pathlib.Path(top.origin))
    return hashlib.sha256("".join(_sha256(f) for f in files).encode()).hexdigest()


def _is_fresh(folder: pathlib.Path, config: RowsConfig) -> bool:
    try:
        index = json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        return False
    if index["files"] is None:  # a foreign SeqIO task: nobody knows what it reads
        return False
    generation = index["generation"]
    return (
        (generation is None or (folder / generation / "manifest.json").exists())
        and index["code"] == _code_hash(config.mixture_or_task_module)
        and index["vocabulary"] == vocabulary_lib.load(config.vocabulary).fingerprint
        and all(epath.Path(f).exists() and _sha256(f) == h for f, h in index["files"].items())
    )


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
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "CUDA_VISIBLE_DEVICES": "",  # TensorFlow would take the accelerator's memory
    }
    request = json.dumps([dataclasses.asdict(config.rows()), stale])
    failure = None
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "distill.cache", request],
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
        kinds = (ValueError, FileNotFoundError, ModuleNotFoundError)
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
        kinds = (ModuleNotFoundError, FileNotFoundError, ValueError)
        kind = next(k for k in kinds if isinstance(error, k))
        _tell(failure={"kind": kind.__name__, "message": str(error)})
        return 1
    return 0


def _tell(**message) -> None:
    print(_SIGN + json.dumps(message), flush=True)


def _build(folder: pathlib.Path, config: RowsConfig, split: str) -> None:
    """Tokenises a split through SeqIO. That a mixture has no such split is cached too."""
    from distill import task  # imports SeqIO and TensorFlow

    task.bind(
        vocabulary=config.vocabulary,
        data_dir=config.data_dir,
        parsing=config.parsing,
        teacher_filter=config.teacher_filter,
        rationale_store=config.rationale_store,
        max_bad_rows=config.max_bad_rows,
    )
    task.import_module(config.mixture_or_task_module)
    info = task.describe(
        config.mixture_or_task_name, allow_missing=config.allow_missing, split=split
    )
    lacking = [m.name for m in info.members if split not in task.lookup(m.name).splits]
    files = [] if lacking else info.files(split)
    # Hashed before the rows are read: a file that changes meanwhile makes the cache stale.
    hashes = None if files is None else {str(f): _sha256(f) for f in files}
    index = {
        "mixture": config.mixture_or_task_name,
        "split": split,
        "lacking": lacking,
        "skipped": list(info.skipped),
        "code": _code_hash(config.mixture_or_task_module),
        "vocabulary": vocabulary_lib.load(config.vocabulary).fingerprint,
        "files": hashes,
        "generation": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not lacking:
        members = []
        for member in info.members:
            _require_vocabulary(task.lookup(member.name), config)
            facts = {
                "name": member.name, "rate": float(member.rate), "metrics": list(member.metrics),
                "dataset": member.dataset, "answer_form": member.answer_form,
            }  # fmt: skip
            population = task.population(member.name, split)
            members.append((facts, population, task.tokenized_rows(member.name, split)))
        index["generation"] = write_generation(
            folder, config.mixture_or_task_name, split, members, _tell
        )
    partial = folder / f".index.{os.getpid()}"
    partial.write_text(json.dumps(index, indent=1))
    partial.replace(folder / "index.json")
    _remove_old(folder, index["generation"])


def _remove_old(folder: pathlib.Path, current: str | None) -> None:
    for path in folder.iterdir():
        unused = path.is_dir() and path.name != current
        if unused and time.time() - path.stat().st_mtime > GRACE:
            shutil.rmtree(path, ignore_errors=True)


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
      The generation: the hash of the rows, which is the new folder's name.

    Raises:
      ValueError: two examples of a dataset have one id.
    """
    new = pathlib.Path(tempfile.mkdtemp(prefix=".building.", dir=folder))
    try:
        digest = hashlib.sha256()
        kept, keys = [], []
        for number, (facts, population, rows) in enumerate(members):
            kept.append(facts)
            digest.update(json.dumps(facts).encode())
            told = functools.partial(progress or _ignore, task=facts["name"], split=split)
            keys.append(_write_task(new, number, facts["name"], population, rows, digest, told))
        np.save(new / "pairs.npy", number_pairs(keys or [np.zeros(0, np.uint64)]))
        generation = digest.hexdigest()
        manifest = {"name": name, "split": split, "members": kept}
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1))
        try:
            new.rename(folder / generation)
        except OSError:
            if not (folder / generation / "manifest.json").exists():
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
        texts = json.dumps([row["example_id"], row["label"], row["inputs_pretokenized"]])
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
    keys = {i: _key(i) for i in everyone}
    if len(keys) < len(everyone) or len(set(keys.values())) < len(keys):
        twice = next((i for i in everyone if everyone.count(i) > 1), None)
        raise ValueError(
            f"{name}: two examples have the id {twice!r}; ids must be unique."
            if twice is not None
            else f"{name}: two example ids have one hash; rename one dataset's ids."
        )
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
