"""Folders of Hugging Face models: `config.json` and the weights, in any of their formats.

    model.safetensors     the first choice, or shards and `model.safetensors.index.json`
    flax_model.msgpack    Flax's names, or shards and an index; see `msgpack_file`
    pytorch_model.bin     a pickle, or shards and an index; only where the user asks for it, and
                          opened in another process; see `torch_bin`

The files come from anywhere, so nothing in them is trusted: a name in an index is opened only if
it is a plain file name, and a tensor's name is never a path.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from distill.formats import msgpack_file
from distill.formats.tensors import Index, Tensor, some

CONFIG = "config.json"
SAFETENSORS, MSGPACK, BIN = "model.safetensors", "flax_model.msgpack", "pytorch_model.bin"
INDEX = ".index.json"
# The best first.
WEIGHTS = tuple(name + end for name in (SAFETENSORS, MSGPACK, BIN) for end in ("", INDEX))
TOKENIZER = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_CONFIG_BYTES, _INDEX_BYTES = 10**6, 10**8

# safetensors' names. It can open 8 and 4 bit floats too, but not for numpy.
_DTYPES = {
    "BOOL": np.dtype(bool),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Folder:
    """An opened folder.

    Attributes:
      folder: where it lies.
      config: what `config.json` says.
      tensors: by the names in the files.
      flax: whether those are Flax's ("encoder/block/0/.../kernel"), else torch's
        ("encoder.block.0....weight").
    """

    folder: epath.Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    flax: bool


def is_hugging_face(folder: epath.PathLike) -> bool:
    """Whether a folder looks like one: `config.json`, or weights under one of their known names.

    Either is enough for `open_folder` to say what is missing.
    """
    return any((epath.Path(folder) / name).exists() for name in (CONFIG, *WEIGHTS))


def open_folder(folder: epath.PathLike, *, read_bin: bool = False) -> Folder:
    """Opens a folder; the tensors are read when somebody asks.

    Args:
      folder: local; files are mapped into memory.
      read_bin: whether a `pytorch_model.bin` may be opened if there is nothing better. It needs
        torch, and as much space as it has in the folder of temporary files ($TMPDIR).

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it is not such a folder, or a file is damaged, missing or not trustworthy;
        with the file and, where it is about one, the tensor.
    """
    folder = _local(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    config = _read_json(folder / CONFIG, _CONFIG_BYTES)
    found = _choose([name for name in WEIGHTS if (folder / name).is_file()], folder, read_bin)
    weight_map = _read_index(folder / found) if found.endswith(INDEX) else None
    files = sorted(set(weight_map.values())) if weight_map else [found]
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder / found} names {file}, which is missing")
    shards, flax = _open_files([folder / file for file in files])
    tensors = {}
    for file, part in shards.items():
        for name, tensor in part.items():
            _require_harmless(folder / file, name, tensor)
        if weight_map is not None:
            promised = {name for name, at in weight_map.items() if at == file}
            if promised != part.keys():
                raise ValueError(
                    f"{folder / file} and {found} disagree: "
                    f"missing {some(promised - part.keys())}; "
                    f"unexpected {some(part.keys() - promised)}"
                )
        tensors.update(part)
    if flax:  # joined with dots in safetensors
        renamed = {name.replace(".", "/"): tensor for name, tensor in tensors.items()}
        if len(renamed) < len(tensors):
            raise ValueError(f"{folder / found}: names that differ in '.' and '/' only")
        tensors = renamed
    return Folder(folder, config, tensors, flax)


def write_safetensors(
    folder: epath.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Writes `model.safetensors`, or shards and their index if it would be too large.

    Each shard is read back and compared: safetensors 0.8.0 writes garbage for an array that is
    not C-contiguous, without a word.

    Args:
      folder: local; made if needed. It must hold no weights yet, which could be preferred to
        these or mixed with them.
      tensors: by torch's names.
      max_shard_bytes: of one file; a larger tensor has a file of its own. One shard at a time is
        in memory.

    Returns:
      The names of the files.

    Raises:
      FileExistsError: if weights are there.
      ValueError: on a name or dtype that `open_folder` would refuse.
      OSError: if it cannot be written, or reads back different.
    """
    folder = _local(folder)
    there = [name for name in WEIGHTS if (folder / name).exists()]
    if there:
        raise FileExistsError(f"{folder} already holds {', '.join(there)}")
    for name, tensor in tensors.items():
        _require_harmless(folder, name, tensor)
        if tensor.dtype not in _DTYPES.values():
            raise ValueError(f"{name} is {tensor.dtype}, which is none of {some(_DTYPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        _write_shard(folder / SAFETENSORS, tensors)
        return [SAFETENSORS]
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / (SAFETENSORS + INDEX)).write_text(json.dumps(index, indent=2) + "\n")
    return [*sorted(set(weight_map.values())), SAFETENSORS + INDEX]


# ---- the hub ------------------------------------------------------------------------------------


def is_hub_id(text: str) -> bool:
    """Whether this names a model on the hub: "google/flan-t5-base", "org/name@revision".

    A name without an organization ("t5-small") is not taken: it looks like any folder's, and the
    hub knows those models as "google-t5/t5-small" as well. Neither is a path that exists.
    """
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
    if not re.fullmatch(rf"{part}/{part}(?:@\w[\w./-]{{0,199}})?", text, re.ASCII):
        return False
    return ".." not in text and not os.path.lexists(text)


def download(hub_id: str, *, read_bin: bool = False) -> epath.Path:
    """Downloads a model's config, vocabulary and best weights into Hugging Face's own cache.

    Args:
      hub_id: see `is_hub_id`; without a revision it is the newest.
      read_bin: whether to take `pytorch_model.bin` if there is nothing better.

    Returns:
      The local folder, for `open_folder`. Without a network it is what an earlier call left.

    Raises:
      ValueError: if huggingface_hub is not installed, the model has no weights that can be read,
        or the download fails; with a way out.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ValueError(
            f"{hub_id} is on the Hugging Face hub, and huggingface_hub is not installed: "
            "pip install 'distill-step-by-step[hub]', or download it elsewhere and give the folder"
        ) from error
    name, _, revision = hub_id.partition("@")

    def get(*files: str) -> epath.Path:
        # Exact names: in its patterns "*" stands for "/" as well.
        patterns = [CONFIG, *TOKENIZER, *files]
        return epath.Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=patterns
            )
        )

    wanted = [file for file in WEIGHTS if read_bin or not file.startswith(BIN)]
    try:
        for file in wanted:
            folder = get(file)
            if (folder / file).is_file():
                break
        else:
            hint = "" if read_bin else f". {_BIN_IS_REFUSED}"
            raise ValueError(f"it has none of {', '.join(wanted)}{hint}")
        if file.endswith(INDEX):
            folder = get(file, *_read_index(folder / file).values())
    except Exception as error:  # its HTTP library's too: requests, httpx or httpx2, by version
        if isinstance(error, errors.GatedRepoError):
            reason = "its owners want their conditions accepted on its page, and HF_TOKEN set"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "there is no such model, here or on the hub, or it is private (set HF_TOKEN)"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"it has no revision {revision or 'main'!r}"
        else:
            reason = " ".join(str(error).split())[:800] or type(error).__name__
        raise ValueError(
            f"{hub_id} cannot be had from the Hugging Face hub: {reason}. "
            "Its files can also be downloaded elsewhere; give their folder then"
        ) from error
    return folder


# ---- what is in a folder ------------------------------------------------------------------------

_BIN_IS_REFUSED = (
    f"{BIN} is a pickle and is not opened unasked: give --read_bin to "
    "scripts/convert_checkpoint.py where torch is installed, or take a revision or a copy of the "
    f"model with {SAFETENSORS} or {MSGPACK}"
)


def _local(folder: epath.PathLike) -> epath.Path:
    if "://" in os.fspath(folder):
        raise ValueError(
            f"Hugging Face's files are mapped into memory, from a local folder; got {folder}. "
            "Copy them first"
        )
    return epath.Path(folder)


def _choose(there: list[str], folder: epath.Path, read_bin: bool) -> str:
    """Returns the file, or index, that the weights are read from."""
    if not there:
        raise ValueError(f"{folder} has no weights: none of {', '.join(WEIGHTS)}")
    if there[0].startswith(BIN) and not read_bin:
        others = ", ".join(name for name in WEIGHTS if not name.startswith(BIN))
        raise ValueError(f"{folder} has {there[0]} but none of {others}. {_BIN_IS_REFUSED}")
    return there[0]


def _read_json(path: epath.Path, most: int) -> dict[str, Any]:
    """Reads a JSON file of at most `most` bytes that holds a dict."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {path.parent} is no Hugging Face model")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no dict but {type(value).__name__}")
    return value


def _read_index(path: epath.Path) -> dict[str, str]:
    """Reads {tensor's name: file}; each file is a plain name with the ending it should have."""
    weight_map = _read_json(path, _INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map of names and files")
    ending = os.path.splitext(path.name.removesuffix(INDEX))[1]
    for name, file in weight_map.items():
        plain = isinstance(file, str) and re.fullmatch(r"\w[\w.-]{0,199}", file, re.ASCII)
        if not plain or not file.endswith(ending):
            raise ValueError(
                f"{path}: {name[:200]!r} is said to be in {str(file)[:200]!r}, "
                f"which is not a plain file name that ends in {ending}"
            )
    return weight_map


def _require_harmless(file: epath.Path, name: str, tensor: Tensor) -> None:
    """Raises ValueError on a name that is no parameter's, and on a shape that numpy cannot hold."""
    if not name or len(name) > 200 or ".." in name or not name.isprintable():
        raise ValueError(f"{file}: {name[:250]!r} is not a tensor's name")
    if len(tensor.shape) > 32 or math.prod(max(n, 1) for n in tensor.shape) >= 2**59:
        raise ValueError(f"{file}: {name} has the impossible shape {tensor.shape}")


# ---- one file -----------------------------------------------------------------------------------


def _open_files(paths: list[epath.Path]) -> tuple[dict[str, dict[str, Tensor]], bool]:
    """Opens files of one format; returns ({file's name: its tensors}, whether Flax wrote them)."""
    if paths[0].suffix == ".bin":
        return _open_bins(paths), False
    if paths[0].suffix == ".msgpack":
        return {path.name: msgpack_file.open_file(path) for path in paths}, True
    opened = {path.name: _open_safetensors(path) for path in paths}
    frameworks = {framework for _, framework in opened.values()}
    return {name: tensors for name, (tensors, _) in opened.items()}, frameworks == {"flax"}


def _open_safetensors(
    path: epath.Path, origin: epath.Path | None = None
) -> tuple[dict[str, Tensor], str | None]:
    """Opens one file.

    Args:
      path: of the file.
      origin: what to call it in errors, if that is not `path`.

    Returns:
      ({name: Tensor}, the framework that its metadata names).
    """
    origin = origin or path
    try:
        file = safetensors.safe_open(os.fspath(path), framework="numpy")
        tensors = {}
        for name in file.keys():
            described = file.get_slice(name)
            dtype = _DTYPES.get(described.get_dtype())
            if dtype is None:
                raise ValueError(
                    f"{name[:200]!r} is {described.get_dtype()}, none of {', '.join(_DTYPES)}"
                )
            read = functools.partial(_read_safetensors, file, name, dtype, origin)
            tensors[name] = Tensor(tuple(described.get_shape()), dtype, read)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{origin} is not a safetensors file, or damaged: {error}") from error
    return tensors, (file.metadata() or {}).get("format")


def _read_safetensors(
    file: Any, name: str, dtype: np.dtype, origin: epath.Path, index: Index
) -> np.ndarray:
    shape = [axis.stop - axis.start for axis in index]
    if 0 in shape:  # safetensors takes the start of an empty slice for an element
        return np.empty(shape, dtype)
    try:
        return file.get_slice(name)[index]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{origin}: {name} cannot be read: {error}") from error


def _write_shard(path: epath.Path, tensors: Mapping[str, Tensor]) -> None:
    # np.ascontiguousarray would make [1] of a scalar.
    arrays = {name: np.asarray(tensor.whole(), order="C") for name, tensor in tensors.items()}
    try:
        safetensors.numpy.save_file(arrays, os.fspath(path), metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    written, _ = _open_safetensors(path)
    for name, array in arrays.items():
        read = written[name].whole()
        if not np.array_equal(array.reshape(-1).view(np.uint8), read.reshape(-1).view(np.uint8)):
            raise OSError(f"{path}: {name} reads back different from what was written")


def _open_bins(paths: list[epath.Path]) -> dict[str, dict[str, Tensor]]:
    """Turns `.bin` files into temporary safetensors files in another process, and opens those."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f"{paths[0]} needs torch to be opened, which is not installed here")
    script = os.path.join(os.path.dirname(__file__), "torch_bin.py")
    # The files stay mapped, and go with the last tensor that needs them. Where the system does
    # not remove a file in use, they stay.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-P", script, folder, *map(os.fspath, paths)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            reason = lines[-1][:1000] if lines else f"{paths[0]}: exit status {done.returncode}"
            raise ValueError(f"torch failed: {reason}")
        return {
            path.name: _open_safetensors(epath.Path(folder) / f"{path.name}.safetensors", path)[0]
            for path in paths
        }
