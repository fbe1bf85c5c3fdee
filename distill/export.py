"""Weights out: a folder that Hugging Face's transformers loads, or a checkpoint of T5X or ours.

What is written is read back, compared bit by bit, and has to give the same logits. Files of others
go into a temporary folder beside their destination, which is renamed then.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from distill import checkpoints, convert, t5
from distill import vocabulary as vocabulary_lib
from distill.formats import hugging_face, t5x, tensors
from distill.formats.tensors import Tensor

PyTree = Any

# <extra_id_0> ... behind the ids that mean something: T5 has 100, ByT5 125.
_SENTINELS, _BYTE_SENTINELS = 100, 125


def save_hugging_face(
    folder: epath.PathLike,
    params: PyTree | convert.Weights,
    model: t5.T5Config,
    vocabulary: vocabulary_lib.Vocabulary | None = None,
    *,
    tokenizer: epath.PathLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json, generation_config.json, safetensors and the tokenizer's files.

    Args:
      folder: local; absent or empty.
      params: our tree of arrays, or a checkpoint that has not been read.
      model: the architecture.
      vocabulary: the tokenizer's files are made for it; None = no tokenizer.
      tokenizer: a folder of Hugging Face's whose tokenizer is copied instead.
      max_shard_bytes: of one safetensors file.

    Raises:
      FileExistsError: the folder holds something.
      ValueError: the folder is not local, the parameters are not the model's, the vocabulary has
        more ids than the model, or what was read back differs.
    """
    ours = _tensors(params, model)
    config = _config(model)  # an activation that transformers lacks is an error now
    with _written_whole(folder) as temporary:
        named = convert.from_ours(ours, "torch")
        hugging_face.write_safetensors(temporary, named, max_shard_bytes=max_shard_bytes)
        _write_json(temporary / hugging_face.CONFIG, config)
        _write_json(temporary / "generation_config.json", _generation_config())
        if tokenizer is not None:
            for name in hugging_face.TOKENIZER:
                if (file := epath.Path(tokenizer) / name).exists():
                    (temporary / name).write_bytes(file.read_bytes())
        elif vocabulary is not None:
            _write_tokenizer(temporary, vocabulary, model)
        _require_same(temporary, ours, model)


def save_t5x(
    folder: epath.PathLike,
    params: PyTree | convert.Weights,
    model: t5.T5Config,
    step: int = 0,
    slots: Mapping[str, Tensor] | None = None,
) -> epath.Path:
    """Writes a T5X checkpoint.

    Args:
      folder: local; the checkpoint itself where it is named `checkpoint_<step>`, else the folder
        that gets one of that name.
      params: our tree of arrays, or a checkpoint that has not been read.
      model: the architecture.
      step: global step.
      slots: Adafactor's, as `convert.Weights.slots`; None = T5X starts them afresh, if it is told
        to (fallback_to_scratch).

    Returns:
      The checkpoint's folder.

    Raises:
      FileExistsError: there is such a checkpoint.
      ValueError: the folder is not local, the parameters are not the model's, or what was read back
        differs.
    """
    ours = _tensors(params, model)
    folder = epath.Path(folder).expanduser()
    if folder.name != f"checkpoint_{step}":
        if folder.name.startswith("checkpoint_"):
            raise ValueError(f"{folder}: the checkpoint is of step {step}; name it accordingly")
        folder = folder / f"checkpoint_{step}"
    with _written_whole(folder) as temporary:
        named = convert.from_ours(ours, "t5x")
        t5x.write_checkpoint(temporary, named, _t5x_slots(slots or {}), step)
        _require_same(temporary, ours, model, slots or {})
    return folder


def save_ours(
    folder: epath.PathLike, weights: convert.Weights, vocabulary: str | None = None
) -> epath.Path:
    """Writes `checkpoint_<step>` of this project in float32, to start from or to evaluate.

    It is read back and compared like the others; its manifest, written last, is what makes it a
    checkpoint, so there is no temporary folder.

    Args:
      folder: local or gs://, absent or empty; gets the checkpoint.
      weights: what to write.
      vocabulary: what evaluation shall load; None = what the weights say.

    Returns:
      The checkpoint's folder.

    Raises:
      FileExistsError: the folder holds something.
      ValueError: a file of the weights is damaged.
    """
    folder = epath.Path(folder).expanduser()
    _require_empty(folder)
    metadata = {
        "step": weights.step,
        "base_step": weights.step,
        "model": dataclasses.asdict(dataclasses.replace(weights.model, param_dtype="float32")),
        "vocabulary": vocabulary or weights.vocabulary,
        "converted_from": str(weights.path),
    }
    params = convert.read_params(weights)
    with checkpoints.Checkpointer(folder, keep=None) as saver:
        saver.save(weights.step, {"params": params}, metadata)
    ours = {name: tensors.of(x) for name, x in t5x.flatten(params).items()}
    _require_same(folder, ours, weights.model)
    return folder / f"checkpoint_{weights.step}"


# ---- whole or not at all ------------------------------------------------------------------------


@contextlib.contextmanager
def _written_whole(folder: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a folder to write into, which takes its place once everything in it is right."""
    if "://" in os.fspath(folder):
        raise ValueError(f"{folder}: write to a local folder, and copy that")
    folder = epath.Path(os.path.realpath(epath.Path(folder).expanduser()))  # behind a link
    _require_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        temporary = epath.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        mask = _umask()  # mkdtemp and safetensors make things private
        os.chmod(temporary, 0o777 & ~mask)
        for file in temporary.iterdir():
            os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~mask)
        try:
            os.rename(temporary, folder)  # takes the place of an empty folder
        except OSError as error:
            _require_empty(folder)  # another export was quicker
            raise error
    except BaseException:
        # A write of tensorstore goes on in its threads, and makes the folder again.
        deadline = time.monotonic() + 10
        while temporary is not None and temporary.exists() and time.monotonic() < deadline:
            shutil.rmtree(temporary, ignore_errors=True)
            time.sleep(0.5)
        raise


def _require_empty(folder: epath.Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; choose another name")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _tensors(params: PyTree | convert.Weights, model: t5.T5Config) -> dict[str, Tensor]:
    """The parameters under our names, as float32, once they are known to be the model's."""
    if isinstance(params, convert.Weights):
        convert.require_fit(params, model)
        convert.require_copies(params)
        found = params.tensors
    else:
        found = {name: tensors.of(np.asarray(x)) for name, x in t5x.flatten(params).items()}
    float32 = np.dtype(np.float32)
    found = {
        name: tensors.cast(x, float32) if x.dtype.name in convert.FLOATS else x
        for name, x in found.items()
    }
    want = {n: (x.shape, "float32") for n, x in t5x.flatten(t5.param_shapes(model)).items()}
    have = {name: (x.shape, x.dtype.name) for name, x in found.items()}
    checkpoints.require_match("the tree of parameters", want, have)
    return found


def _require_same(
    folder: epath.Path, ours: Mapping[str, Tensor], model: t5.T5Config,
    slots: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Reads an export back: every array bit by bit, and the logits of the model it describes.

    T5X's files do not tell the activation, so there the logits show the other settings only.
    """
    back = convert.open_weights(os.fspath(folder), slots=bool(slots))
    if back.kind == convert.T5X:
        back = dataclasses.replace(
            back, model=dataclasses.replace(back.model, mlp_activations=model.mlp_activations)
        )
    for name, want in (ours | dict(slots or {})).items():
        have = back.tensors.get(name) or back.slots.get(name)
        if have is None or have.whole().tobytes() != want.whole().tobytes():
            raise ValueError(
                f"{name} did not come back from {folder} as it was written: try another disk"
            )
    params = {name: x.whole() for name, x in back.tensors.items()}
    want = _logits(params, model)
    if not np.isfinite(want).all():
        logging.warning("The logits of this model are not all finite.")
    if not convert.differences(model, back.model):
        return  # the same program on the same arrays
    if not np.array_equal(want, _logits(params, back.model), equal_nan=True):
        raise ValueError(f"the logits of {folder} are not those of the model that was written")


def _logits(params: dict[str, np.ndarray], model: t5.T5Config) -> np.ndarray:
    """Logits [1, 6, vocab] of one short example with padding, in float32, on the host."""
    net = t5.T5(dataclasses.replace(model, dtype="float32", dropout_rate=0.0))
    ids = np.random.default_rng(0).integers(2, model.vocab_size, size=(1, 8), dtype=np.int32)
    ids[0, 6:] = 0
    batch = {
        "encoder_input_tokens": ids,
        "decoder_input_tokens": ids[:, :6][:, ::-1].copy(),
        "decoder_target_tokens": ids[:, :6],
    }
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(_apply(net, t5x.nest(params), batch))


@functools.partial(jax.jit, static_argnames="net")
def _apply(net: t5.T5, params: PyTree, batch: dict[str, np.ndarray]) -> jax.Array:
    return net.apply({"params": params}, batch)


def _t5x_slots(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slots by T5X's names, with the momentum that it expects, empty."""
    named: dict[str, Tensor] = {}
    for row in convert.TABLE:
        for slot in ("v_row", "v_col", "v"):
            tensor = slots.get(f"{row.ours}/{slot}")
            if tensor is None:
                continue
            layers = range(tensor.shape[0]) if convert.LAYER in row.t5x else [None]
            for i in layers:
                name = row.t5x.replace(convert.LAYER, str(i))
                named[f"{name}/{slot}"] = tensor if i is None else tensors.layer(tensor, i)
                named[f"{name}/m"] = tensors.of(np.zeros(1, np.float32))
    return named


# ---- Hugging Face's files -----------------------------------------------------------------------


def _config(model: t5.T5Config) -> dict[str, Any]:
    """config.json, as both transformers 4 and 5 understand it."""
    names = [n for n, a in convert.ACTIVATIONS.items() if a == model.mlp_activations]
    if not names:
        raise ValueError(
            f"transformers has no T5 with activations {model.mlp_activations}; it has "
            f"{', '.join(map(str, convert.ACTIVATIONS.values()))}"
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": model.vocab_size,
        "d_model": model.emb_dim,
        "d_kv": model.head_dim,
        "d_ff": model.mlp_dim,
        "num_layers": model.num_encoder_layers,
        "num_decoder_layers": model.num_decoder_layers,
        "num_heads": model.num_heads,
        "feed_forward_proj": names[0],
        "dropout_rate": model.dropout_rate,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": t5.RELPOS_BUCKETS,
        "relative_attention_max_distance": t5.RELPOS_MAX_DISTANCE,
        # transformers 4 goes by the first, 5 by the second: it ties whatever is equal.
        "tie_word_embeddings": model.logits_via_embedding,
        "scale_decoder_outputs": model.logits_via_embedding,
        "torch_dtype": "float32",
        **_generation_config(),
    }


def _generation_config() -> dict[str, Any]:
    return {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def _write_tokenizer(
    folder: epath.Path, vocabulary: vocabulary_lib.Vocabulary, model: t5.T5Config
) -> None:
    """The files from which AutoTokenizer makes the tokenizer with the vocabulary's ids."""
    if vocabulary.size > model.vocab_size:
        raise ValueError(
            f"The vocabulary {vocabulary.spec!r} has {vocabulary.size} ids, the model only "
            f"{model.vocab_size}: it is not the model's."
        )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    # The sentinels of pre-training follow where the model has room for all of them.
    room = model.vocab_size - vocabulary.size
    if vocabulary.spec == vocabulary_lib.BYTES:
        settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": min(_BYTE_SENTINELS, room)}
    else:
        sentinels = _SENTINELS if room >= _SENTINELS else 0
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": sentinels, "legacy": True}
        (folder / vocabulary_lib.SPIECE).write_bytes(epath.Path(vocabulary.path).read_bytes())
    settings |= special
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: epath.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
