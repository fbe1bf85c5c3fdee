"""Saves, lists, verifies and restores training checkpoints; the only module that imports Orbax.

One checkpoint is one folder, `MODEL_DIR/checkpoint_<step>/`:

    metadata.json    the caller's JSON dict (step, data position, model config, ...); written first
    state/<key>/     the arrays under one top-level key of the state ("params", "opt_state", ...),
                     each key its own Orbax item, so that evaluation reads and hashes params alone
    manifest.json    written last. It *is* the commit: size and sha256 of every other file, the
                     shape and dtype of every leaf, and a sha256 of itself

A folder without a valid manifest is not a checkpoint. That holds on storage that has no atomic
rename (gs://) as well, and Orbax 0.12.8 needs it: flipped bits in its array files are restored
without an error, and its own commit marker says only that a write ended.

A leaf is named by its keys joined with "/" (`params/encoder/layers/mlp/wo/kernel`,
`opt_state/0/mu/...`); None and empty nodes (optax.EmptyState) have no leaves and come back from
the target's structure. Errors: FileNotFoundError where there is no checkpoint, FileExistsError
where a save would overwrite something, ValueError where a checkpoint is damaged or does not fit.

With several processes every method and function that saves, waits or restores is a collective:
call it on all of them. Process 0 alone writes JSON, hashes, renames and deletes. Only one job may
hold a `Checkpointer` on a folder (opening it removes what killed saves left); other jobs read
through `list_checkpoints`, `read_metadata` and `restore`, which change nothing.
"""

import concurrent.futures
import errno
import hashlib
import json
import math
import operator
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from distill import cluster

PyTree = Any
Leaves = dict[str, tuple[tuple[int, ...], str]]  # leaf path -> (shape, dtype name)

FORMAT = 1
_MANIFEST = "manifest.json"
_METADATA = "metadata.json"
_STATE = "state"
_TMP = ".tmp"
_FOLDER = re.compile(r"checkpoint_(0|[1-9][0-9]*)")
_KEY = re.compile(r"[A-Za-z0-9_]+")  # a top-level key of the state is a folder's name
_HASH_CHUNK = 4 << 20  # bytes
_HASH_THREADS = 8
_WRITE_TIMEOUT = 3600  # seconds; Orbax's default of 600 is short for a large state on a slow disk
_FAILED = -1


class Checkpointer:
    """Keeps the checkpoints of one training run in one folder.

    Attributes:
      folder: MODEL_DIR. Created by the first save.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int | None = 3,
        keep_best: int = 1,
        keep_every: int | None = None,
    ):
        """Opens a folder and removes from it what killed saves and deletes left behind.

        Args:
          folder: MODEL_DIR, local or remote.
          keep: how many of the newest checkpoints stay; None keeps all.
          keep_best: how many of those with the highest finite metric stay beside them.
          keep_every: steps that are a multiple of this stay for ever; None for no such rule.

        Raises:
          ValueError: if a number is out of range.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None for all; got {keep}")
        if keep_best < 0:
            raise ValueError(f"keep_best must be 0 or more; got {keep_best}")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every must be at least 1, or None; got {keep_every}")
        self.folder = _absolute(folder)
        self._keep, self._keep_best, self._keep_every = keep, keep_best, keep_every
        # COMMIT_FILE everywhere: the manifest commits, so a rename would add nothing, and what is
        # tested on a local disk is then what runs on gs://. The handler has to be told as well:
        # Orbax 0.12.8 renames the items otherwise, wherever that is not gs://.
        commit_file = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(atomicity_options=commit_file)
            ),
            timeout_secs=_WRITE_TIMEOUT,
            atomicity_options=commit_file,
        )
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._told: set[str] = set()
        _on_first_process(self._remove_leftovers)

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: dict[str, Any],
        metric: float | None = None,
    ) -> None:
        """Starts to save `state` as `checkpoint_<step>`; returns once the arrays may change.

        The arrays are copied to the host before this returns, so their buffers may be donated or
        overwritten. (On CPU, where the host's copy is the buffer itself, JAX declines the donation
        while the file is written: one step uses a second copy of the state.) Files, hashes, the
        manifest and retention follow in a background thread. The next `save` or `wait` joins it
        and raises its error; after that error the next save starts afresh.

        Args:
          step: global step, 0 or more.
          state: dict whose values are trees of jax or numpy arrays or scalars, for instance
            {"params": ..., "opt_state": ..., "step": ...}.
          metadata: JSON dict that `restore` returns beside the state.
          metric: for retention, higher is better. None and non-finite values are never best.

        Raises:
          FileExistsError: if this step is committed, or its folder holds something else.
          OSError: if a local disk has no room for the state plus 10 %.
          RuntimeError: if the save before this one failed; this one has not started.
          TypeError: if a leaf is not an array, or metadata is not JSON.
          ValueError: if the step, or the name or the shape of a leaf, cannot be stored.
        """
        self.wait()
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step must be 0 or more; got {step}")
        arrays = {
            path: leaf if isinstance(leaf, (jax.Array, np.ndarray)) else np.asarray(leaf)
            for path, leaf in _flatten(state)[0].items()
        }
        leaves = _describe(arrays)
        _require_storable(leaves)
        metadata_bytes = _encode(metadata)
        folder = self.folder / f"checkpoint_{step}"

        def prepare() -> int:
            _make_way(folder)
            _require_space(self.folder, _size(leaves))
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / _METADATA, metadata_bytes)
            return step

        _on_first_process(prepare)  # barrier: nobody writes arrays into a folder still being made
        items = {key: ocp.args.PyTreeSave(tree) for key, tree in _items(arrays).items()}
        self._writer.save(folder / _STATE, args=ocp.args.Composite(**items))
        manifest = {
            "format": FORMAT,
            "step": step,
            "metric": None if metric is None or not math.isfinite(metric) else float(metric),
            "leaves": leaves,
        }
        self._thread = threading.Thread(
            target=self._finish, args=(folder, manifest), name=f"checkpoint_{step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until the save in progress is committed.

        Raises:
          RuntimeError: if it failed, with the cause. It is raised once.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        failed = error is not None
        if jax.process_count() > 1:  # barrier: on return the manifest is there for every process
            failed = bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))
        if error is not None:
            raise RuntimeError(f"a checkpoint was not saved: {error}") from error
        if failed:
            raise RuntimeError("a checkpoint was not saved: another process failed; see its log")

    def close(self) -> None:
        """Waits for the save in progress and ends Orbax's threads.

        Call it before the interpreter exits: Orbax 0.12.8 cannot finish a save after that.

        Raises:
          RuntimeError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._writer.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns the committed steps, ascending; other folders are skipped with a line each."""
        found, skipped = _scan(self.folder)
        for line in skipped:
            if line not in self._told:
                self._told.add(line)
                logging.warning("skipped %s", line)
        return sorted(found)

    def latest(self) -> int | None:
        """Returns the newest committed step, or None. Its files have not been verified."""
        steps = self.steps()
        return steps[-1] if steps else None

    def restore(self, target: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Verifies and reads one checkpoint.

        Args:
          target: as in the function `restore`.
          step: None for the newest that is intact. A damaged one is then renamed to
            `checkpoint_<step>.corrupt`, with a log line that names the file, and the one before
            it is tried. A given step that is damaged is an error and stays where it is.

        Returns:
          The state, and the metadata saved with it.

        Raises:
          FileNotFoundError: if there is no such checkpoint, or no intact one.
          ValueError: if the checkpoint does not fit the target, or the given step is damaged.
        """
        self.wait()
        if step is not None:
            return restore(self.folder / f"checkpoint_{operator.index(step)}", target)
        wanted, treedef = _flatten(target)
        step = _on_first_process(lambda: self._newest_intact(wanted))
        folder = self.folder / f"checkpoint_{step}"
        return _read(folder, wanted, treedef), json.loads((folder / _METADATA).read_bytes())

    def _newest_intact(self, wanted: dict[str, Any]) -> int:
        for step in reversed(self.steps()):
            folder = self.folder / f"checkpoint_{step}"
            # A wrong configuration must raise here, not walk back through every checkpoint.
            require_match(folder, _describe(wanted), _leaves(_read_manifest(folder)))
            problems = verify(folder)
            if not problems:
                return step
            _quarantine(folder, problems)
        raise FileNotFoundError(f"no intact checkpoint in {self.folder}")

    def _remove_leftovers(self) -> int:
        removed = 0
        for _, folder in _step_folders(self.folder):
            if _kind(folder) == "leftover":
                logging.warning("removed %s: an unfinished save or delete", folder)
                _remove(folder)
                removed += 1
        return removed

    def _finish(self, folder: epath.Path, manifest: dict[str, Any]) -> None:
        """The background half of `save`: waits for Orbax, commits, deletes what retention drops."""
        first = jax.process_index() == 0
        try:
            # Orbax's own barrier: it returns on process 0 after all processes have written.
            self._writer.wait_until_finished()
            if first:
                _commit(folder, manifest)
        except Exception as error:  # handed to the training thread by wait()
            self._error = error
            if first:
                _remove_failed(folder)
            return
        if first:
            try:
                self._delete_old()
            except OSError as error:
                self._error = error

    def _delete_old(self) -> None:
        found, _ = _scan(self.folder)
        metrics = {step: manifest["metric"] for step, manifest in found.items()}
        for step in _to_delete(metrics, self._keep, self._keep_best, self._keep_every):
            _remove(self.folder / f"checkpoint_{step}")


def list_checkpoints(path: epath.PathLike) -> list[epath.Path]:
    """Returns the committed checkpoint folders at `path`, by step, ascending.

    Args:
      path: one checkpoint folder, or a MODEL_DIR, whose other folders are skipped with a line.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it is named like one checkpoint but is none of ours.
    """
    path = _absolute(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    if (path / _MANIFEST).exists() or _FOLDER.fullmatch(path.name):
        _read_manifest(path)
        return [path]
    found, skipped = _scan(path)
    for line in skipped:
        logging.warning("skipped %s", line)
    return [path / f"checkpoint_{step}" for step in sorted(found)]


def read_metadata(folder: epath.PathLike) -> dict[str, Any]:
    """Returns the metadata of one checkpoint folder, after checking its sha256.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it is not a checkpoint or its metadata is damaged.
    """
    folder = _absolute(folder)
    _require_intact(folder, _read_manifest(folder), [_METADATA])
    return json.loads((folder / _METADATA).read_bytes())


def fingerprint(folder: epath.PathLike) -> str:
    """Returns a sha256 that changes with any file of a checkpoint folder; reads the manifest only.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it is not a checkpoint.
    """
    return hashlib.sha256(_sealed(_read_manifest(_absolute(folder)))).hexdigest()


def leaves(folder: epath.PathLike) -> Leaves:
    """Returns {leaf's path: (shape, dtype name)} of one checkpoint folder; reads no array.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it is not a checkpoint.
    """
    return _leaves(_read_manifest(_absolute(folder)))


def restore(
    folder: epath.PathLike, target: PyTree, *, subtree: str | None = None
) -> tuple[PyTree, dict[str, Any]]:
    """Verifies and reads one checkpoint folder; changes nothing in it.

    The leaf table is compared first (nothing is read when it differs: no cast, no padding), then
    the sha256 of every file that belongs to what is asked, then the arrays are read.

    Args:
      folder: `.../checkpoint_<step>`.
      target: tree of jax.ShapeDtypeStruct (or arrays). A leaf with a sharding is restored onto it
        as a jax.Array, whatever the sharding it was saved with; without one as a numpy array.
      subtree: a top-level key, such as "params", if `target` is the tree under that key alone.
        Nothing else of the state is then read or hashed.

    Returns:
      A tree with the structure of `target`, and the metadata.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it is no checkpoint, is damaged, or does not fit (with a want/have table).
    """
    folder = _absolute(folder)
    wanted, treedef = _flatten(target, () if subtree is None else (subtree,))

    def check() -> int:
        manifest = _read_manifest(folder)
        have = _leaves(manifest)
        if subtree is not None:
            have = {p: spec for p, spec in have.items() if p.split("/")[0] == subtree}
            if not have:
                keys = sorted({p.split("/")[0] for p in _leaves(manifest)})
                raise ValueError(f"{folder} has no {subtree!r}; it has {', '.join(keys)}")
        require_match(folder, _describe(wanted), have)
        return _require_intact(folder, manifest, _files_of(manifest, subtree))

    _on_first_process(check)
    return _read(folder, wanted, treedef), json.loads((folder / _METADATA).read_bytes())


def verify(folder: epath.PathLike) -> list[str]:
    """Reads every file of a checkpoint and returns what is wrong, a line each; [] if intact.

    Raises:
      FileNotFoundError: if there is no such folder.
    """
    folder = _absolute(folder)
    try:
        manifest = _read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    return _damage(folder, manifest, _files_of(manifest, None))


# ---- leaves -------------------------------------------------------------------------------------


def _flatten(tree: PyTree, prefix: tuple[str, ...] = ()) -> tuple[dict[str, Any], Any]:
    """Returns ({"/"-joined path: leaf}, treedef).

    Orbax is given plain nested dicts made of these paths, never the caller's own containers: how
    it stores namedtuples, None and empty nodes is then of no concern.
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat: dict[str, Any] = {}
    for keys, leaf in keyed:
        parts = [*prefix, *(jax.tree_util.keystr((key,), simple=True) for key in keys)]
        path = "/".join(parts)
        # "." separates keys in Orbax's array names: {"a.b": x} and {"a": {"b": x}} would collide.
        if not parts or any(not part or set(part) & set("/.\\\0") for part in parts):
            raise ValueError(f"cannot store a leaf with keys {parts}: empty, or with '/' or '.'")
        if not _KEY.fullmatch(parts[0]):
            raise ValueError(f"a top-level key must match {_KEY.pattern}; got {parts[0]!r}")
        if path in flat:
            raise ValueError(f"two leaves are called {path!r}")
        flat[path] = leaf
    if not flat:
        raise ValueError("the tree has no arrays")
    return flat, treedef


def _describe(flat: dict[str, Any]) -> Leaves:
    """Returns the leaf table of flattened arrays, jax.ShapeDtypeStructs or Python scalars."""
    table: Leaves = {}
    for path, leaf in flat.items():
        if not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{path} is a typed PRNG key; store jax.random.key_data of it")
        if np.dtype(leaf.dtype).kind in "OSUMm":
            raise TypeError(f"{path} is not an array of numbers: dtype {leaf.dtype}")
        table[path] = (tuple(int(n) for n in leaf.shape), np.dtype(leaf.dtype).name)
    return table


def _leaves(manifest: dict[str, Any]) -> Leaves:
    return {p: (tuple(shape), dtype) for p, (shape, dtype) in manifest["leaves"].items()}


def _size(leaves: Leaves) -> int:
    """Returns the bytes of all leaves."""
    return sum(math.prod(s) * jax.numpy.dtype(dtype).itemsize for s, dtype in leaves.values())


def _require_storable(leaves: Leaves) -> None:
    empty = [path for path, (shape, _) in leaves.items() if 0 in shape]
    if empty:  # Orbax 0.12.8 refuses them too, later and in the background thread
        raise ValueError(f"arrays without elements cannot be stored: {', '.join(empty)}")


def require_match(label: epath.Path | str, want: Leaves, have: Leaves, reason: str = "") -> None:
    """Compares two leaf tables.

    Args:
      label: what does not fit, for the message.
      want: {leaf: (shape, dtype)} of the program.
      have: the same of a checkpoint.
      reason: what the likely cause is, put under the table.

    Raises:
      ValueError: they differ; the message has a line for each leaf in which they do.
    """

    def text(table: Leaves, path: str) -> str:
        if path not in table:
            return "(absent)"
        shape, dtype = table[path]
        return f"{dtype}[{','.join(map(str, shape))}]"

    paths = sorted(want.keys() | have.keys())
    rows = [(p, text(want, p), text(have, p)) for p in paths if want.get(p) != have.get(p)]
    if not rows:
        return
    rows.insert(0, ("leaf", "want", "have"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    raise ValueError(
        "\n".join(
            [f"{label} does not fit: {len(rows) - 1} of {len(paths)} leaves differ", *lines, reason]
        ).rstrip()
    )


def _items(flat: dict[str, Any]) -> dict[str, Any]:
    """Nests flattened leaves; each top-level key becomes one Orbax item.

    The item's own tree repeats the key, so that a lone leaf such as "step" needs no special case.
    """
    items: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = items.setdefault((parents or [name])[0], {})
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return items


def _read(folder: epath.Path, wanted: dict[str, Any], treedef: Any) -> PyTree:
    """Reads the wanted leaves of a verified checkpoint whose leaf table matches."""

    def how(leaf: Any) -> ocp.RestoreArgs:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(leaf.shape))

    trees = _items(wanted)
    items = {
        key: ocp.args.PyTreeRestore(item=tree, restore_args=jax.tree.map(how, tree))
        for key, tree in trees.items()
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        result = reader.restore(folder / _STATE, args=ocp.args.Composite(**items))
    flat = {}
    for key in items:
        flat.update(_flatten(result[key])[0])
    # The tables matched, so this can only be a cast inside Orbax or JAX.
    label = f"{folder}, once restored (64-bit leaves on devices need jax_enable_x64),"
    require_match(label, _describe(wanted), _describe(flat))
    return jax.tree_util.tree_unflatten(treedef, [flat[path] for path in wanted])


# ---- the manifest -------------------------------------------------------------------------------


def _encode(value: dict[str, Any]) -> bytes:
    # NaN stays NaN: Python reads it back, and a NaN metric in the metadata must not stop a save.
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sealed(manifest: dict[str, Any]) -> bytes:
    """Returns the manifest's only valid bytes: canonical JSON that carries its own sha256."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return _encode({**body, "sha256": hashlib.sha256(_encode(body)).hexdigest()})


def _commit(folder: epath.Path, manifest: dict[str, Any]) -> None:
    """Hashes every file below `folder` and writes the manifest, which makes it a checkpoint."""
    names = sorted(files_below(folder))
    with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = pool.map(lambda name: _digest(folder / name), names)
        files = dict(zip(names, digests, strict=True))
    _write(folder / _MANIFEST, _sealed({**manifest, "files": files}))


def _read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if the folder has no valid manifest, with the reason.
    """
    path = folder / _MANIFEST
    if not path.exists():
        if not folder.is_dir():
            raise FileNotFoundError(f"no such checkpoint: {folder}")
        raise ValueError(f"{folder} is not a checkpoint: {_REASONS[_kind(folder)]}")
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        sound = isinstance(manifest, dict) and content == _sealed(manifest)
    except (OSError, ValueError, RecursionError):  # not JSON and not UTF-8 are ValueErrors
        sound = False
    if not sound:
        raise ValueError(f"{folder} is not a checkpoint: {_REASONS['damaged']}")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{folder} has format {manifest['format']}; this code reads {FORMAT}")
    for name in manifest["files"]:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{folder} is not a checkpoint: its manifest lists {name!r}")
    return manifest


def _files_of(manifest: dict[str, Any], subtree: str | None) -> list[str]:
    """Returns the listed files that a restore of one top-level key reads; None for all files."""
    return [
        name
        for name in sorted(manifest["files"])
        if subtree is None or name.count("/") < 2 or name.startswith(f"{_STATE}/{subtree}/")
    ]


def _damage(folder: epath.Path, manifest: dict[str, Any], names: list[str]) -> list[str]:
    """Returns a line for each of the named files that is not as it was saved."""

    def problem(name: str) -> str | None:
        size, sha256 = manifest["files"][name]
        try:
            now_size, now_sha256 = _digest(folder / name)
        except OSError as error:
            return f"{folder / name}: cannot be read ({error.strerror or error})"
        if now_size != size:
            return f"{folder / name}: {now_size} bytes, saved as {size}"
        return None if now_sha256 == sha256 else f"{folder / name}: sha256 differs"

    with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
        return [line for line in pool.map(problem, names) if line is not None]


def _require_intact(folder: epath.Path, manifest: dict[str, Any], names: list[str]) -> int:
    problems = _damage(folder, manifest, names)
    if problems:
        raise ValueError(f"{folder} is damaged:\n" + "\n".join(f"  {line}" for line in problems))
    return 0


def _digest(path: epath.Path) -> tuple[int, str]:
    """Returns (bytes, sha256) of a file."""
    size, sha256 = 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            size += len(chunk)
            sha256.update(chunk)
    return size, sha256.hexdigest()


# ---- folders ------------------------------------------------------------------------------------

_REASONS = {
    "empty": "an empty folder",
    "leftover": "an unfinished save or delete",
    "damaged": "its manifest.json is damaged",
    "t5x": "a T5X checkpoint; convert it first",
    "foreign": "no manifest.json, and not written by this code",
}


def _kind(folder: epath.Path) -> str:
    """Says what a folder without a valid manifest is; a key of `_REASONS`.

    A save writes metadata.json first and a delete removes it last, so a leftover always has it.
    """
    names = {path.name for path in folder.iterdir()}
    if _MANIFEST in names:
        return "damaged"
    if not names:
        return "empty"
    if "checkpoint" in names:
        return "t5x"
    ours = {name for name in names if _is_ours(name)}
    marked = names & {_METADATA, _METADATA + _TMP}
    return "leftover" if ours == names and marked else "foreign"


def _is_ours(name: str) -> bool:
    """True for what a save puts into its folder, Orbax's temporary `state.*` folders included."""
    mine = (_STATE, _METADATA, _MANIFEST, _METADATA + _TMP, _MANIFEST + _TMP)
    return name in mine or name.startswith(_STATE + ".orbax-checkpoint-tmp")


def _step_folders(folder: epath.Path) -> Iterator[tuple[int, epath.Path]]:
    """Yields (step, path) for each `checkpoint_<step>` folder, of whatever origin."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        match = _FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def _scan(folder: epath.Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Returns ({step: manifest}, [why a folder was skipped])."""
    found: dict[int, dict[str, Any]] = {}
    skipped = []
    for step, path in _step_folders(folder):
        try:
            manifest = _read_manifest(path)
        except (FileNotFoundError, ValueError) as error:  # the first: deleted while we looked
            skipped.append(str(error))
            continue
        if manifest["step"] != step:
            skipped.append(f"{path}: it is a copy of checkpoint_{manifest['step']}")
            continue
        found[step] = manifest
    return found, skipped


def _to_delete(
    metrics: dict[int, float | None], keep: int | None, keep_best: int, keep_every: int | None
) -> list[int]:
    """Returns the steps that no retention rule holds, ascending; see `Checkpointer.__init__`."""
    steps = sorted(metrics)
    if keep is None:
        return []
    kept = set(steps[-keep:])
    if keep_every is not None:
        kept.update(step for step in steps if step % keep_every == 0)
    ranked = sorted((metric, step) for step, metric in metrics.items() if metric is not None)
    kept.update(step for _, step in ranked[max(0, len(ranked) - keep_best) :])
    return [step for step in steps if step not in kept]


def _make_way(folder: epath.Path) -> None:
    """Leaves `folder` absent or empty, or raises FileExistsError; deletes only what is ours."""
    if not folder.exists():
        return
    try:
        _read_manifest(folder)
    except ValueError as error:
        kind = _kind(folder)
        if kind == "leftover":
            logging.warning("removed %s: an unfinished save or delete", folder)
            _remove(folder)
        elif kind == "damaged":
            _quarantine(folder, [str(error)])
        elif kind != "empty":
            raise FileExistsError(f"cannot save to {folder}: {_REASONS[kind]}") from error
        return
    raise FileExistsError(f"{folder} is already a committed checkpoint")


def _remove(folder: epath.Path) -> None:
    """Deletes one of our folders: manifest first, metadata last, nothing that we did not write.

    Killed in between, it is a leftover, which the next `Checkpointer` removes.
    """
    (folder / _MANIFEST).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if path.name != _METADATA and _is_ours(path.name):
            path.rmtree() if path.is_dir() else path.unlink()
    (folder / _METADATA).unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):  # an object store has no empty folders
        folder.rmdir()


def _remove_failed(folder: epath.Path) -> None:
    """Frees the space of a save that failed, which is what a full disk needs."""
    try:
        _remove(folder)
    except OSError as error:
        logging.warning("could not remove %s after its save failed: %s", folder, error)


def _quarantine(folder: epath.Path, problems: list[str]) -> None:
    aside, n = folder.with_name(f"{folder.name}.corrupt"), 1
    while aside.exists():
        aside, n = folder.with_name(f"{folder.name}.corrupt-{n}"), n + 1
    folder.rename(aside)
    logging.warning("renamed %s to %s: %s", folder, aside.name, "; ".join(problems))


def _require_space(folder: epath.Path, size: int) -> None:
    """Raises OSError if a local disk cannot take `size` bytes plus 10 %."""
    if not _is_local(folder):
        return
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free, need = shutil.disk_usage(os.fspath(existing)).free, size + size // 10
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint needs {need:,} bytes ({size:,} of state plus 10 %) in {folder}, "
            f"where {free:,} are free",
        )


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()  # Orbax 0.12.8 refuses relative paths
    return epath.Path(os.path.abspath(path)) if _is_local(path) else path


def _write(path: epath.Path, content: bytes) -> None:
    """Writes a file whole: renamed into place where that is atomic, else as one object."""
    if not _is_local(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(path.name + _TMP)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def files_below(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yields the files below a folder as "/"-joined relative names."""
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir():
            yield from files_below(path, name + "/")
        else:
            yield name


def _on_first_process(do: Callable[[], int]) -> int:
    """Runs `do` on process 0; all processes return its number, or all raise. Also a barrier."""
    if jax.process_count() == 1:
        return do()
    value, error = _FAILED, None
    if jax.process_index() == 0:
        try:
            value = do()
        except Exception as caught:  # raised below, once the other processes know
            error = caught
    value = int(multihost_utils.broadcast_one_to_all(np.int32(value)))
    if value == _FAILED:
        kind, message = cluster.agreed([type(error).__name__, str(error)])
        if error is not None:
            raise error
        kinds = {kind.__name__: kind for kind in (FileNotFoundError, ValueError)}
        raise kinds.get(kind, RuntimeError)(f"process 0: {message}")
    return value
