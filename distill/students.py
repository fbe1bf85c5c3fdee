"""Trained students on disk: which checkpoints there are, and one of them ready to answer.

    for checkpoint in find("/runs/svamp_*", "latest"):
        student = load(checkpoint)
        student.answer([student.vocabulary.encode_input("predict: 2 + 2")], max_length=16)

A checkpoint is one of ours, of T5X, or a folder in Hugging Face's format.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from distill import checkpoints, cluster, convert, data, decode, estimate, partitioning, prompts, t5
from distill import vocabulary as vocabulary_lib
from distill.formats import hugging_face, t5x

RESULTS = "inference_eval"  # the folder of a run's results, as T5X calls it
CHOICES = ("latest", "all", "best", "specific", "every-<k>")
# Files of a run's folder that are there before its first checkpoint.
_LEFT_BY_TRAINING = ("config.gin", "model-info.txt")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder; nothing but its metadata has been read.

    Attributes:
      path: of the folder.
      run: the folder that holds it, or itself where it stands alone.
      step: global step; None where the format keeps none.
      fingerprint: changes with its content.
      metadata: what training noted; {} for a checkpoint that was not trained here.
    """

    path: epath.Path
    run: epath.Path
    step: int | None
    fingerprint: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def form(self) -> str | None:
        """In which form the student answers, see `prompts.FORMS`; None where that is not known."""
        names = self.metadata.get("tasks") or [self.metadata.get("mixture") or ""]
        forms = {prompts.answering_form(name) for name in names} - {None, "explain"}
        return forms.pop() if len(forms) == 1 else None

    @property
    def explains(self) -> bool | None:
        """Whether it learnt to answer `explain: `; None where that is not known."""
        names = self.metadata.get("tasks") or [self.metadata.get("mixture") or ""]
        forms = {prompts.split_name(name)[1] for name in names}
        return None if None in forms else bool(forms & {"explain", *prompts.MIXTURES})


def find(path: str, which: str = "latest", *, must_exist: bool = True) -> list[Checkpoint]:
    """Finds checkpoints, run by run, each run's by step.

    Args:
      path: a checkpoint, a folder with checkpoints (a run), or a pattern such as `/runs/*`, which
        may match folders without one; several are separated by commas.
      which: of each run `latest`, `all`, `best` (highest accuracy on the validation split, as
        training noted it), or `every-<k>` (steps that are multiples of k). `specific` demands that
        there is only one.
      must_exist: each of the paths must have a checkpoint. False: one without has none yet.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: `which` is none of these, or it cannot be said which one is best.
    """
    every = re.fullmatch(r"every-([1-9][0-9]*)", which)
    if not every and which not in CHOICES:
        raise ValueError(f"RESTORE_MODE must be one of {', '.join(CHOICES)}, not {which!r}.")
    found: list[Checkpoint] = []
    for pattern in paths(path):
        runs = [run for _, run in _runs(pattern, must_exist) if run]
        if must_exist and not runs:
            raise FileNotFoundError(f"No folder that matches {pattern} holds a checkpoint.")
        for run in runs:
            chosen = [c for c in _chosen(run, which, every and int(every[1])) if c not in found]
            found += chosen
    if must_exist and not found:
        raise FileNotFoundError(f"RESTORE_MODE={which}: no checkpoint of {path} has such a step.")
    if which == "specific" and len(found) > 1:
        raise ValueError(
            f"RESTORE_MODE=specific needs one checkpoint folder; {path} has {len(found)}, such as "
            f"{found[-1].path}."
        )
    return found


def unfinished(path: str) -> dict[str, str]:
    """What is to write more checkpoints, and how far it is: `{"/runs/a": "at step 10 of 50"}`.

    A run goes on until it has written its last checkpoint. The newest one says so: the best, or
    every other one, may be older, and a run that was made longer has passed what was its last step.
    Of the folders that a pattern matches, one without a checkpoint is such a run where training has
    begun. Checkpoints of other formats, and single ones, are what they are.

    Args:
      path: as in `find`; what does not exist is to come.
    """
    left: dict[str, str] = {}
    for pattern in paths(path):
        runs = list(_runs(pattern, must_exist=False))
        found = sorted((c for _, run in runs for c in run), key=lambda c: c.step or 0)
        newest = {c.run: c for c in found}
        begun = [
            str(folder) for folder, run in runs
            if not run and any((folder / name).exists() for name in _LEFT_BY_TRAINING)
        ]  # fmt: skip
        if not newest and not begun:
            begun = [pattern]
        left |= dict.fromkeys(begun, "without a checkpoint")
        for run, checkpoint in newest.items():
            last = checkpoint.metadata.get("last_step", checkpoint.step)
            single = not _is_pattern(pattern) and checkpoint.path == absolute(pattern)
            if checkpoint.step != last and not single:
                left[str(run)] = f"at step {checkpoint.step} of {last}"
    return left


def paths(path: str) -> list[str]:
    """The paths and patterns in one text, which are separated by commas."""
    return [stripped for part in path.split(",") if (stripped := part.strip())]


def absolute(folder: epath.PathLike) -> epath.Path:
    """The one name of a run, for whoever writes results about it."""
    folder = epath.Path(folder).expanduser()
    return folder if "://" in str(folder) else epath.Path(os.path.abspath(folder))


def _is_pattern(path: str) -> bool:
    return any(c in path for c in "*?[")


def _folders(pattern: str) -> list[epath.Path]:
    if not _is_pattern(pattern):
        return [epath.Path(pattern).expanduser()]
    if "://" in pattern:
        parts = pattern.split("/")
        first = next(i for i, part in enumerate(parts) if _is_pattern(part))
        matches = epath.Path("/".join(parts[:first])).glob("/".join(parts[first:]))
    else:
        matches = map(epath.Path, glob.glob(os.path.expanduser(pattern)))
    return sorted(match for match in matches if match.is_dir())


def _runs(pattern: str, must_exist: bool) -> Iterator[tuple[epath.Path, list[Checkpoint]]]:
    """Yields each folder of a pattern, and its checkpoints by step."""
    for folder in _folders(pattern):
        yield folder, _checkpoints(folder, must=must_exist and not _is_pattern(pattern))


def _checkpoints(folder: epath.Path, must: bool) -> list[Checkpoint]:
    """All checkpoints of a run, or the one that the folder is."""
    folder = absolute(folder)
    if not folder.is_dir():
        if not must:
            return []
        raise FileNotFoundError(f"No checkpoint at {folder}: there is no such folder.")
    if t5x.is_t5x(folder):
        return [_foreign(folder, folder.parent)]
    theirs = [c for c in folder.iterdir() if _step_of(c) is not None and t5x.is_t5x(c)]
    if theirs:
        return [_foreign(c, folder) for c in sorted(theirs, key=_step_of)]
    if hugging_face.is_hugging_face(folder):
        return [_foreign(folder, folder)]
    try:
        ours = checkpoints.list_checkpoints(folder)
    except ValueError:
        if must:
            raise
        ours = []
    if must and not ours:
        below = sorted(c.name for c in folder.iterdir() if (c / "config.gin").exists())
        hint = f" There are runs below it: give {folder}/*." if below else ""
        raise FileNotFoundError(
            f"No checkpoint in {folder}: give a run's MODEL_DIR, one checkpoint_<step> folder, a "
            f"folder of T5X, or one in Hugging Face's format (--gin.CHECKPOINT_PATH=...).{hint}"
        )
    return [checkpoint for c in ours if (checkpoint := _ours(c))]


def _ours(folder: epath.Path) -> Checkpoint | None:
    """One checkpoint; None where the run has deleted it since it was listed."""
    try:
        facts = checkpoints.read_metadata(folder)
        fingerprint = checkpoints.fingerprint(folder)
    except (FileNotFoundError, ValueError):
        if _fingerprint(folder) is not None:
            raise  # it is there, and damaged
        return None
    return Checkpoint(folder, folder.parent, facts["step"], fingerprint, facts)


def _fingerprint(folder: epath.Path) -> str | None:
    """None where there is no checkpoint; a delete takes the manifest first."""
    try:
        return checkpoints.fingerprint(folder)
    except (FileNotFoundError, ValueError):
        return None


def _step_of(folder: epath.Path) -> int | None:
    match = re.fullmatch(r"checkpoint_([0-9]+)", folder.name)
    return int(match[1]) if match else None


def _foreign(folder: epath.Path, run: epath.Path) -> Checkpoint:
    """A checkpoint of another format, known by its files' names, sizes and times."""
    facts = []
    for name in sorted(checkpoints.files_below(folder)):
        if not name.startswith(f"{RESULTS}/"):
            stat = (folder / name).stat()
            facts.append((name, stat.length, stat.mtime))
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Checkpoint(folder, run, _step_of(folder), digest)


def _chosen(run: Sequence[Checkpoint], which: str, every: int | None) -> Sequence[Checkpoint]:
    if which in ("latest", "specific"):
        return run[-1:] if which == "latest" else run
    if which == "all":
        return run
    if every:
        return [c for c in run if c.step is not None and c.step % every == 0]
    scored = [(score, c) for c in run if not math.isnan(score := _validation_accuracy(c))]
    if not scored:
        raise ValueError(
            f"RESTORE_MODE=best: no checkpoint of {run[0].run} was evaluated on a validation split "
            "while it trained (EVAL_PERIOD). Take latest, or all with SPLIT=validation."
        )
    return [max(scored, key=lambda item: item[0])[1]]


def _validation_accuracy(checkpoint: Checkpoint) -> float:
    """Mean over the tasks; NaN where training noted none."""
    noted = checkpoint.metadata.get("metrics", {})
    values = [
        metrics["accuracy"] for name, metrics in noted.items()
        if name.endswith("/validation") and "accuracy" in metrics
    ]  # fmt: skip
    return float(np.mean(values)) if values else math.nan


def is_there(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is still what `find` saw; a run deletes its old ones, file by file."""
    if not checkpoint.metadata:
        return checkpoint.path.is_dir()
    return _fingerprint(checkpoint.path) == checkpoint.fingerprint


@dataclasses.dataclass(frozen=True)
class Student:
    """A model that is ready to answer.

    Attributes:
      params: its parameters, on the mesh.
      net: the network.
      mesh: from `partitioning.make_mesh`.
      vocabulary: the one that it was trained with.
      lengths: tokens of inputs and targets that it was trained on; longer inputs are cut, but never
        below the published limits.
    """

    params: Any
    net: t5.T5
    mesh: Any
    vocabulary: vocabulary_lib.Vocabulary
    lengths: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict(data.MAX_LENGTHS))

    def limit(self, side: str) -> int:
        """Tokens of `inputs` or `targets` at most."""
        return max(data.MAX_LENGTHS[side], self.lengths[side])

    def answer(
        self, inputs: Sequence[np.ndarray], decoding: decode.Decoding = decode.Decoding(),  # noqa: B008
        *, max_length: int, batch_size: int = 64, progress: Callable[[int], None] | None = None,
    ) -> decode.Generated:  # fmt: skip
        """Answers to tokenised inputs, see `decode.generate`; `texts` reads them."""
        cut = [data.truncate(np.asarray(x, np.int32), self.limit("inputs")) for x in inputs]
        return decode.generate(
            self.params, self.net, cut, self.mesh, decoding,
            max_length=max_length, batch_size=batch_size, progress=progress,
        )  # fmt: skip

    def texts(self, generated: decode.Generated) -> list[list[str]]:
        """The texts of all answers to each input."""
        return [[self.vocabulary.decode(a) for a in answers] for answers in generated.tokens]

    def likelihoods(
        self, inputs: Sequence[np.ndarray], options: Sequence[Sequence[str]], batch_size: int = 64
    ) -> list[np.ndarray]:
        """Log-probability, in nats, of each option as the whole answer to its input."""
        cut = [data.truncate(np.asarray(x, np.int32), self.limit("inputs")) for x in inputs]
        known = {o: np.array(self.vocabulary.encode(o), np.int32) for row in options for o in row}
        choices = [[known[o] for o in row] for row in options]
        return decode.score_choices(
            self.params, self.net, cut, choices, self.mesh, batch_size=batch_size
        )


def load(checkpoint: Checkpoint, vocabulary: str | None = None) -> Student:
    """Reads a checkpoint's parameters onto all devices; on all processes, or on none.

    Args:
      checkpoint: from `find`.
      vocabulary: as in `vocabulary.load`; None = the student's own.

    Raises:
      FileNotFoundError: the checkpoint has gone, or there is no such vocabulary.
      ValueError: it is damaged, no T5, or the vocabulary is not the student's.
    """
    known = cluster.together(lambda: vocabulary_lib.load(vocabulary_of(checkpoint, vocabulary)))
    weights = cluster.together(lambda: convert.open_weights(str(checkpoint.path)))
    net, mesh = _network(weights.model)
    abstract = abstract_params(net, mesh)
    params = cluster.together(lambda: convert.load(weights, weights.model, abstract))
    lengths = checkpoint.metadata.get("data", {}).get("lengths", data.MAX_LENGTHS)
    return Student(params, net, mesh, known, lengths)


@functools.lru_cache(maxsize=4)
def _network(model: t5.T5Config) -> tuple[t5.T5, Any]:
    """The same object for all checkpoints of a size, so that its programs are compiled once."""
    chip = estimate.chip_of(jax.devices()[0])
    mesh = partitioning.make_mesh(estimate.choose_mesh(
        partitioning.MeshConfig(), model, None, None, chip, jax.device_count()
    ))  # fmt: skip
    return t5.T5(model, partitioning.activation_constraint(mesh)), mesh


def vocabulary_of(checkpoint: Checkpoint, given: str | None = None) -> str:
    """Returns what `vocabulary.load` takes for a checkpoint.

    Args:
      checkpoint: from `find`.
      given: by the user, in place of what the checkpoint says: its file may have moved.

    Raises:
      FileNotFoundError: there is no such vocabulary.
      ValueError: the checkpoint does not say which it is, or the student was trained with another.
    """
    trained = checkpoint.metadata.get("vocabulary")
    if not checkpoint.metadata:
        trained = convert.open_weights(str(checkpoint.path)).vocabulary
    spec = given or trained
    if spec is None:  # a checkpoint that was converted, not trained here
        raise ValueError(f"{checkpoint.path} does not say its VOCABULARY: set --gin.VOCABULARY=...")
    fingerprint = vocabulary_lib.load(spec).fingerprint
    if fingerprint != checkpoint.metadata.get("data", {}).get("vocabulary", fingerprint):
        raise ValueError(
            f"The vocabulary {spec!r} is not the one that the student was trained with "
            f"({trained!r}); its answers would be noise. Set --gin.VOCABULARY to the original file."
        )
    return spec


def abstract_params(net: t5.T5, mesh) -> Any:
    """Shapes and shardings of the parameters, to restore into."""
    shapes = t5.param_shapes(net.config)
    shardings = partitioning.param_shardings(mesh, shapes, t5.param_axes(net.config))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
