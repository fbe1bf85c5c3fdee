"""Weights of other projects in our tree: Hugging Face and T5X, by one table of names.

`open_weights` looks at a checkpoint without reading its arrays, `load` reads it into sharded
arrays, part by part, once it is known to fit. `export` is the way back.

Our tree has T5X's names, with the layers of each stack on axis 0 of one array:
`encoder/layers_<i>/mlp/wo/kernel` [mlp, embed] -> `encoder/layers/mlp/wo/kernel`
[layers, mlp, embed]. torch's linear layers hold the transpose of ours.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from distill import checkpoints, partitioning, t5, vocabulary
from distill.formats import hugging_face, t5x, tensors
from distill.formats.tensors import Tensor

PyTree = Any

LAYER = "{i}"  # stands for the layer's index in the other formats' names
OURS, T5X, HUGGING_FACE = "this project", "T5X", "Hugging Face"
_BLOCK = 64 << 20  # bytes compared at a time
VOCAB_MULTIPLE = 128  # embeddings are padded to a multiple of it

# The fields of T5Config that the parameters depend on.
ARCHITECTURE = (
    "vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim",
    "mlp_dim", "mlp_activations", "logits_via_embedding",
)  # fmt: skip

# The types of parameters in files; all of them are exact as float32.
FLOATS = ("float32", "bfloat16", "float16")

# Hugging Face's `feed_forward_proj`. Its "gated-gelu" is the tanh approximation, as ours; a plain
# "gelu" there is the exact one, which we do not have.
ACTIVATIONS = {
    "relu": ("relu",),
    "silu": ("silu",),
    "gated-relu": ("relu", "linear"),
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
}

# T5 1.0 as released has this array for decoder layer 0; no implementation ever used it.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
# Other names that torch files have for shared.weight.
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# The sizes of released T5s by their model file: (vocabulary, emb_dim, heads, encoder and decoder
# layers, head_dim, mlp_dim). T5 1.0 is tied with ReLU, all others are untied with gated GELU.
RELEASED = {
    "t5_1_0/small": (32128, 512, 8, 6, 6, 64, 2048),
    "t5_1_0/base": (32128, 768, 12, 12, 12, 64, 3072),
    "t5_1_0/large": (32128, 1024, 16, 24, 24, 64, 4096),
    "t5_1_0/xl": (32128, 1024, 32, 24, 24, 128, 16384),
    "t5_1_0/xxl": (32128, 1024, 128, 24, 24, 128, 65536),
    "t5_1_1/small": (32128, 512, 6, 8, 8, 64, 1024),
    "t5_1_1/base": (32128, 768, 12, 12, 12, 64, 2048),
    "t5_1_1/large": (32128, 1024, 16, 24, 24, 64, 2816),
    "t5_1_1/xl": (32128, 2048, 32, 24, 24, 64, 5120),
    "t5_1_1/xxl": (32128, 4096, 64, 24, 24, 64, 10240),
    "mt5/small": (250112, 512, 6, 8, 8, 64, 1024),
    "mt5/base": (250112, 768, 12, 12, 12, 64, 2048),
    "mt5/large": (250112, 1024, 16, 24, 24, 64, 2816),
    "mt5/xl": (250112, 2048, 32, 24, 24, 64, 5120),
    "mt5/xxl": (250112, 4096, 64, 24, 24, 64, 10240),
    "byt5/small": (384, 1472, 6, 12, 4, 64, 3584),
    "byt5/base": (384, 1536, 12, 18, 6, 64, 3968),
    "byt5/large": (384, 1536, 16, 36, 12, 64, 3840),
    "byt5/xl": (384, 2560, 32, 36, 12, 64, 6720),
    "byt5/xxl": (384, 4672, 64, 36, 12, 64, 12352),
}


# ---- one table of names -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter's name in each format.

    Attributes:
      ours: path in our tree; with "layers" in it, the array has the layers on axis 0.
      t5x: path in T5X's tree; `{i}` is the layer.
      torch: name in Hugging Face's torch files.
      optional: whether a model may lack it (tied logits; either `wi` or `wi_0` and `wi_1`).
    """

    ours: str
    t5x: str
    torch: str
    optional: bool = False

    @property
    def flax(self) -> str:
        """Name in Hugging Face's Flax files: torch's, with Flax's word for the array itself."""
        *path, _ = self.torch.split(".")
        kind = self.ours.rsplit("/", 1)[1]
        leaf = {"scale": "weight", "rel_embedding": "embedding"}.get(kind, kind)
        return "/".join([*path, leaf])

    def transposed(self, form: str) -> bool:
        """Whether the array of a form ("t5x", "torch" or "flax") is the transpose of ours."""
        kinds = {"t5x": (), "torch": ("kernel", "rel_embedding"), "flax": ("rel_embedding",)}
        return self.ours.rsplit("/", 1)[1] in kinds[form]


def _table() -> tuple[Row, ...]:
    self_attention = ("0.SelfAttention", "0.layer_norm")
    cross_attention = ("1.EncDecAttention", "1.layer_norm")
    # Stack -> (attention and its norm in our tree, the same in torch's), and the place of the mlp.
    blocks = {
        "encoder": ([(("attention", "pre_attention_layer_norm"), self_attention)], 1),
        "decoder": (
            [
                (("self_attention", "pre_self_attention_layer_norm"), self_attention),
                (("encoder_decoder_attention", "pre_cross_attention_layer_norm"), cross_attention),
            ],
            2,
        ),
    }
    rows = [Row("token_embedder/embedding", "token_embedder/embedding", "shared.weight")]
    for stack, (attentions, mlp) in blocks.items():
        bias, norm = f"{stack}/relpos_bias/rel_embedding", f"{stack}/{stack}_norm/scale"
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rows.append(Row(bias, bias, first))
        rows.append(Row(norm, norm, f"{stack}.final_layer_norm.weight"))
        names = {f"mlp/{w}/kernel": f"{mlp}.DenseReluDense.{w}" for w in ("wi", "wi_0", "wi_1")}
        names |= {"mlp/wo/kernel": f"{mlp}.DenseReluDense.wo"}
        names |= {"pre_mlp_layer_norm/scale": f"{mlp}.layer_norm"}
        for (attention, layer_norm), (torch_attention, torch_norm) in attentions:
            for projection in ("query", "key", "value", "out"):
                theirs = f"{torch_attention}.{projection[0]}"
                names[f"{attention}/{projection}/kernel"] = theirs
            names[f"{layer_norm}/scale"] = torch_norm
        for name, torch in names.items():
            rows.append(
                Row(
                    f"{stack}/layers/{name}",
                    f"{stack}/layers_{LAYER}/{name}",
                    f"{stack}.block.{LAYER}.layer.{torch}.weight",
                    optional=name.startswith("mlp/wi"),
                )
            )
    rows.append(
        Row("decoder/logits_dense/kernel", "decoder/logits_dense/kernel", "lm_head.weight", True)
    )
    return tuple(rows)


TABLE = _table()


def to_ours(found: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """Renames and stacks parameters of another format.

    Args:
      found: tensors under the names of `form`, one for each layer.
      form: "t5x", "torch" or "flax".

    Returns:
      Tensors under our names, dtypes unchanged; nothing is read.

    Raises:
      ValueError: if names are missing (a gap in the layers, for instance) or unexpected, or if
        the layers of a stack differ in shape or dtype; it lists all of them.
    """
    depth = {stack: _depth(found, stack, form) for stack in ("encoder", "decoder")}
    _require_names(found.keys(), {row: _names(row, form, depth) for row in TABLE})
    ours: dict[str, Tensor] = {}
    for row in TABLE:
        names = _names(row, form, depth)
        if names[0] not in found:
            continue
        kinds = {(found[name].shape, found[name].dtype.name) for name in names}
        if len(kinds) > 1:
            raise ValueError(f"the layers of {getattr(row, form)} differ: {sorted(kinds)}")
        arrays = [found[name] for name in names]
        if row.transposed(form):
            arrays = [tensors.transposed(array) for array in arrays]
        ours[row.ours] = tensors.stacked(arrays) if LAYER in row.t5x else arrays[0]
    return ours


def from_ours(ours: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """The inverse of `to_ours`, bit for bit.

    Raises:
      ValueError: if names are missing or unexpected, or the layers of a stack disagree in number.
    """
    _require_names(ours.keys(), {row: [row.ours] for row in TABLE})
    depth: dict[str, int] = {}
    for name, tensor in ours.items():
        stack, *rest = name.split("/")
        layers = tensor.shape[0]
        if rest[0] == "layers" and depth.setdefault(stack, layers) != layers:
            raise ValueError(f"{name} has {layers} layers, others in {stack} {depth[stack]}")
    found = {}
    for row in TABLE:
        if row.ours not in ours:
            continue
        tensor, names = ours[row.ours], _names(row, form, depth)
        layers = [tensor]
        if LAYER in row.t5x:
            layers = [tensors.layer(tensor, i) for i in range(tensor.shape[0])]
        if row.transposed(form):
            layers = [tensors.transposed(layer) for layer in layers]
        found.update(zip(names, layers, strict=True))
    return found


def _depth(found: Mapping[str, Any], stack: str, form: str) -> int:
    """Returns the number of layers of a stack that the names imply, at least 1.

    It counts the indices rather than trusting the largest: one hostile `layers_999999999` must
    not make a list of missing names that fills the memory.
    """
    before = {"t5x": rf"{stack}/layers_", "torch": rf"{stack}\.block\.", "flax": rf"{stack}/block/"}
    after = {"t5x": "/", "torch": r"\.", "flax": "/"}
    pattern = re.compile(rf"{before[form]}(0|[1-9][0-9]{{0,4}}){after[form]}")
    indices = {int(match[1]) for name in found if (match := pattern.match(name))}
    missing = sorted(set(range(max(indices, default=0))) - indices)
    if missing:
        raise ValueError(
            f"{stack} has no layers {tensors.some(missing)} below layer {max(indices)}"
        )
    return max(len(indices), 1)


def _names(row: Row, form: str, depth: Mapping[str, int]) -> list[str]:
    name = getattr(row, form)
    if LAYER not in name:
        return [name]
    return [name.replace(LAYER, str(i)) for i in range(depth[row.ours.split("/")[0]])]


def _require_names(have: Iterable[str], names: Mapping[Row, list[str]]) -> None:
    """Raises one ValueError with all missing and all unexpected names.

    Args:
      have: the names that are there.
      names: for each row of the table, the names it stands for in this model.
    """
    have = set(have)
    gated = any("/wi_" in row.ours and have.intersection(names[row]) for row in names)
    missing, known = [], set()
    for row, alternatives in names.items():
        there = have.intersection(alternatives)
        if "/mlp/wi" in row.ours:
            needed = gated != ("/mlp/wi/" in row.ours)
        else:
            needed = not row.optional or bool(there)
        if needed:
            known.update(alternatives)
            missing += sorted(set(alternatives) - there)
    unexpected = sorted(have - known)
    if missing or unexpected:
        raise ValueError(
            "these are not the parameters of a T5: "
            f"{len(missing)} missing: {tensors.some(missing)}; "
            f"{len(unexpected)} unexpected: {tensors.some(unexpected)}"
        )


# ---- opening ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint that has been looked at, but not read.

    Attributes:
      path: the folder of this one checkpoint.
      kind: OURS, T5X or HUGGING_FACE.
      tensors: the parameters under our names, dtypes as stored.
      model: the architecture. T5X's files do not tell the activation, only whether the
        feed-forward block is gated: GELU is taken then, else ReLU, as in every released one.
      step: global step; 0 at Hugging Face, which keeps none.
      slots: Adafactor's second moments, "<our name>/<v_row, v_col or v>"; empty unless asked for.
      vocabulary: what `vocabulary.load` takes, where the checkpoint says.
      notes: what a user should know about it.
      copies: pairs of names and tensors that have to be equal, which is seen when they are read.
    """

    path: epath.Path
    kind: str
    tensors: dict[str, Tensor]
    model: t5.T5Config
    step: int
    slots: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    vocabulary: str | None = None
    notes: tuple[str, ...] = ()
    copies: tuple[tuple[str, Tensor, str, Tensor], ...] = ()


def open_weights(path: str, *, slots: bool = False, read_bin: bool = False) -> Weights:
    """Looks at a checkpoint: what it is, what is in it, whether that is a T5.

    Args:
      path: a MODEL_DIR or one checkpoint of ours or of T5X (of several the newest is taken), a
        folder in Hugging Face's format, or the id of a model on the Hugging Face hub.
      slots: whether to open the second moments of Adafactor as well.
      read_bin: whether `pytorch_model.bin` may be read, by torch in a process of its own.

    Raises:
      FileNotFoundError: there is no such folder, or no checkpoint in it.
      ValueError: a file is damaged, or it is no T5 that we have, with what differs.
    """
    folder = epath.Path(path).expanduser()
    if "://" not in str(path):
        folder = epath.Path(os.path.abspath(folder))  # it is remembered in checkpoints
    if not folder.exists() and hugging_face.is_hub_id(str(path)):
        try:
            folder = hugging_face.download(str(path), read_bin=read_bin)
        except ValueError as error:
            raise ValueError(f"There is no folder {path} here. As an id, {error}") from error
    if not str(path) or not folder.is_dir():
        kind = (
            f"{path} is a file: give its folder" if folder.exists() else f"No checkpoint at {path}"
        )
        raise FileNotFoundError(
            f"{kind}. It takes a folder of this project, of T5X, or in Hugging Face's format, or "
            "the id of a model on its hub with its organization, such as google-t5/t5-small."
        )
    if t5x.is_t5x(folder):
        return _open_t5x(folder, slots)
    steps = {
        child: int(match[1])
        for child in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint_([0-9]+)", child.name)) and child.is_dir()
    }
    if not steps and hugging_face.is_hugging_face(folder):
        return _open_hugging_face(folder, read_bin)
    theirs = {step: child for child, step in steps.items() if t5x.is_t5x(child)}
    newest = max(theirs, default=-1)
    if theirs and newest == max(steps.values()):
        logging.info("%s holds %d T5X checkpoints; step %d is taken", folder, len(theirs), newest)
        return _open_t5x(theirs[newest], slots)
    return _open_ours(folder, slots)


def _open_ours(folder: epath.Path, slots: bool) -> Weights:
    found = checkpoints.list_checkpoints(folder)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint of this project, of T5X or of Hugging Face."
        )
    newest = found[-1]
    metadata = checkpoints.read_metadata(newest)
    leaves = checkpoints.leaves(newest)

    @functools.cache
    def whole(key: str) -> dict[str, np.ndarray]:
        """All arrays under a key of the state: Orbax restores them together."""
        names = [name for name in leaves if name.split("/")[0] == key]
        target = {n: jax.ShapeDtypeStruct(*leaves[n]) for n in names}
        tree, _ = checkpoints.restore(newest, t5x.nest(target)[key], subtree=key)
        return t5x.flatten(tree)

    def lazy(key: str, name: str) -> Tensor:
        shape, dtype = leaves[f"{key}/{name}"]
        return Tensor(tuple(shape), jnp.dtype(dtype), lambda index: whole(key)[name][index])

    slot = re.compile(r"opt_state/(.*/(v_row|v_col|v)/(.+))")
    return Weights(
        newest,
        OURS,
        {n.partition("/")[2]: lazy("params", n.partition("/")[2])
         for n in leaves if n.startswith("params/")},
        t5.T5Config(**metadata["model"]),
        metadata["step"],
        {f"{match[3]}/{match[2]}": lazy("opt_state", match[1])
         for n in leaves if slots and (match := slot.fullmatch(n))},
        metadata.get("vocabulary"),
    )  # fmt: skip


def _open_t5x(folder: epath.Path, slots: bool) -> Weights:
    found = t5x.open_checkpoint(folder, slots=slots)
    target = _unscanned_t5x(folder, found.target)
    with _named(folder):
        ours = to_ours(target, "t5x")
        gated = "encoder/layers/mlp/wi_0/kernel" in ours
        model = _architecture(ours, ("gelu", "linear") if gated else ("relu",))
    moments: dict[str, Tensor] = {}
    for slot in ("v_row", "v_col", "v"):
        named = {n.rpartition("/")[0]: x for n, x in found.slots.items() if n.endswith("/" + slot)}
        if named.keys() == target.keys() == found.target.keys():  # else scanned: left alone
            for name, tensor in _stack_slots(named).items():
                moments[f"{name}/{slot}"] = tensor
    assumed = " and ".join(model.mlp_activations)
    note = f"T5X's files do not tell the activation of the feed-forward block; {assumed} is assumed"
    return Weights(folder, T5X, ours, model, found.step, moments, notes=(note,))


def _stack_slots(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `to_ours`, for one slot of each parameter."""
    depth = {stack: _depth(named, stack, "t5x") for stack in ("encoder", "decoder")}
    result = {}
    for row in TABLE:
        names = _names(row, "t5x", depth)
        if names[0] in named:
            arrays = [named[name] for name in names]
            result[row.ours] = tensors.stacked(arrays) if LAYER in row.t5x else arrays[0]
    return result


def _unscanned_t5x(folder: epath.Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in T5X's unscanned model, one relative bias a stack.

    A scanned stack is `encoder/encoder/...` with the layers on axis 1. T5X's scalable T5, scanned
    or not, has heads and channels as two axes, and a relative bias in every layer (as UMT5); only
    if these are all equal it is our T5.
    """
    result = dict(found)
    for stack in ("encoder", "decoder"):
        inside, norm = f"{stack}/{stack}/", found.get(f"{stack}/{stack}_norm/scale")
        for name, tensor in found.items():
            if not name.startswith(inside) or norm is None:
                continue
            scale = found.get(f"{inside}pre_mlp_layer_norm/scale")
            transposed = scale is not None and scale.shape[1:] == norm.shape != scale.shape[:1]
            layers_first = tensors.axis_first(tensor, 0 if transposed else 1)
            del result[name]
            for i in range(layers_first.shape[0]):
                inner = name.removeprefix(inside)
                result[f"{stack}/layers_{i}/{inner}"] = tensors.layer(layers_first, i)
        for name, tensor in result.items():
            projection = re.fullmatch(rf"{stack}/layers_[0-9]+/\w*attention/(\w+)/kernel", name)
            if projection and len(tensor.shape) == 3:
                result[name] = tensors.merged(tensor, 0 if projection[1] == "out" else 1)
        own = re.compile(rf"{stack}/layers_[0-9]+/relpos_bias/rel_embedding")
        biases = [result.pop(name) for name in sorted(result) if own.fullmatch(name)]
        if biases:
            values = [bias.whole() for bias in biases]
            if any(not np.array_equal(values[0], value) for value in values[1:]):
                raise ValueError(
                    f"{folder} has a relative position bias in every layer of the {stack} (UMT5, "
                    "T5X's scalable T5); our T5 has one for the stack."
                )
            result[f"{stack}/relpos_bias/rel_embedding"] = biases[0]
    return result


def _open_hugging_face(folder: epath.Path, read_bin: bool) -> Weights:
    opened = hugging_face.open_folder(folder, read_bin=read_bin)
    config, found = opened.config, dict(opened.tensors)
    notes: list[str] = []
    copies: list[tuple[str, Tensor, str, Tensor]] = []
    kind = config.get("model_type")
    if kind == "umt5":
        raise ValueError(
            f"{folder} is a UMT5, which has a relative position bias in every layer; our T5 has "
            "one for the stack. Take an mT5 (google/mt5-*) instead."
        )
    if kind not in ("t5", "mt5"):
        raise ValueError(f"{folder} is a {kind!r} model; this reads T5, Flan-T5, mT5 and ByT5.")
    form = "flax" if opened.flax else "torch"
    with _named(folder):
        if opened.flax:
            found = _unscanned_flax(found)
        if found.pop(_UNUSED, None) is not None:
            notes.append(f"{_UNUSED} is left out: no T5 uses it")
        for alias in _ALIASES:
            if alias in found and "shared.weight" in found:
                copies.append((alias, found.pop(alias), "shared.weight", found["shared.weight"]))
            elif alias in found:
                found["shared.weight"] = found.pop(alias)
        activations = _activations(config)
        head = "lm_head/kernel" if opened.flax else "lm_head.weight"
        shared = "shared/embedding" if opened.flax else "shared.weight"
        if shared not in found:
            raise ValueError(f"{shared}, the embedding, is missing")
        scaled = kind == "t5" and config.get(
            "scale_decoder_outputs", config.get("tie_word_embeddings") is not False
        )
        if scaled and head in found:
            own = tensors.transposed(found.pop(head)) if opened.flax else found.pop(head)
            copies.append((head, own, shared, found[shared]))
        elif not scaled and head not in found:
            if config.get("tie_word_embeddings") is False:
                raise ValueError(
                    f"{head} is missing, and config.json does not tie the logits to the embedding "
                    "(tie_word_embeddings is false)"
                )
            # transformers 5 writes such files: one array where both are equal.
            found[head] = tensors.transposed(found[shared]) if opened.flax else found[shared]
            notes.append("the logits' weights are those of the embedding, as config.json says")
        ours = to_ours(found, form)
        model = _architecture(ours, activations)
        _require_config(config, model)
    rate = config.get("dropout_rate")
    if isinstance(rate, int | float) and 0 <= rate < 1:
        model = dataclasses.replace(model, dropout_rate=float(rate))
    return Weights(
        folder, HUGGING_FACE, ours, model, 0, {}, _tokenizer(folder), tuple(notes), tuple(copies),
    )  # fmt: skip


def _unscanned_flax(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`encoder/block/<module>/layer/...`, layers on axis 0, as `encoder/block/<i>/layer/...`."""
    result = {}
    for name, tensor in found.items():
        match = re.fullmatch(r"(encoder|decoder)/block/(?:([A-Za-z_]\w*)/)?(layer/.+)", name)
        if not match or match[2] == "layer":
            result[name] = tensor
            continue
        for i in range(tensor.shape[0]):
            result[f"{match[1]}/block/{i}/{match[3]}"] = tensors.layer(tensor, i)
    for stack in ("encoder", "decoder"):  # scanned, every layer has the bias of the first
        own = f"{stack}/block/{{}}/layer/0/SelfAttention/relative_attention_bias/embedding"
        first = result.get(own.format(0))
        for i in range(1, len(result)):
            other = result.pop(own.format(i), None)
            if other is None:
                break
            if not np.array_equal(other.whole(), first.whole()):
                raise ValueError(
                    f"the {stack} has a relative position bias in every layer (UMT5); our T5 has "
                    "one for the stack"
                )
    return result


def require_copies(weights: Weights) -> None:
    """Compares what a file holds twice, such as the embedding, a part at a time.

    Raises:
      ValueError: it holds two different arrays where the model has one.
    """
    for name, one, other, two in weights.copies:
        same = one.shape == two.shape and one.dtype == two.dtype
        rows = max(1, _BLOCK * one.shape[0] // max(1, one.nbytes)) if same else 1
        for start in range(0, one.shape[0] if same else 0, rows):
            part = (
                slice(start, min(start + rows, one.shape[0])),
                *tensors.everything(one.shape)[1:],
            )
            same = same and np.array_equal(one.read(part), two.read(part))
        if not same:
            raise ValueError(
                f"{weights.path}: {name} is not {other}, but the model that config.json describes "
                "has one array for both"
            )


def _activations(config: Mapping[str, Any]) -> tuple[str, ...]:
    name = config.get(
        "feed_forward_proj", "gated-gelu" if config["model_type"] == "mt5" else "relu"
    )
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(
            f"config.json has feed_forward_proj={name!r}; there are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _require_config(config: Mapping[str, Any], model: t5.T5Config) -> None:
    """Compares config.json with the shapes of the arrays and with what is fixed in our T5."""
    fixed = {
        "relative_attention_num_buckets": t5.RELPOS_BUCKETS,
        "relative_attention_max_distance": t5.RELPOS_MAX_DISTANCE,
        "layer_norm_epsilon": 1e-6,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    sizes = {
        "vocab_size": model.vocab_size,
        "d_model": model.emb_dim,
        "d_kv": model.head_dim,
        "d_ff": model.mlp_dim,
        "num_heads": model.num_heads,
        "num_layers": model.num_encoder_layers,
        "num_decoder_layers": model.num_decoder_layers,
    }
    for name, value in (sizes | fixed).items():
        if config.get(name) not in (None, value, [value]):
            where = "the arrays have" if name in sizes else "our T5 has"
            raise ValueError(f"config.json has {name}={config[name]!r}, {where} {value}")


def _tokenizer(folder: epath.Path) -> str | None:
    """What `vocabulary.load` takes for a folder's tokenizer, where we can read it."""
    if (folder / vocabulary.SPIECE).exists():
        return str(folder)
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        return None
    byte_level = isinstance(settings, dict) and settings.get("tokenizer_class") == "ByT5Tokenizer"
    return vocabulary.BYTES if byte_level else None


def _architecture(ours: Mapping[str, Tensor], activations: tuple[str, ...]) -> t5.T5Config:
    """The config that the shapes imply; the heads are counted in the relative biases."""
    embedding, bias = ours["token_embedder/embedding"], ours["encoder/relpos_bias/rel_embedding"]
    query, wo = ours["encoder/layers/attention/query/kernel"], ours["encoder/layers/mlp/wo/kernel"]
    for tensor, rank in ((embedding, 2), (bias, 2), (query, 3), (wo, 3)):
        if len(tensor.shape) != rank or 0 in tensor.shape:
            raise ValueError(f"not the shape of a T5's parameter: {tensor.shape}")
    gated = "encoder/layers/mlp/wi_0/kernel" in ours
    if gated != (len(activations) == 2):
        raise ValueError(
            f"its activations are {activations}, but its arrays are those of a "
            f"{'gated' if gated else 'plain'} feed-forward block"
        )
    if query.shape[2] % bias.shape[0]:
        raise ValueError(f"{query.shape[2]} query channels do not divide by {bias.shape[0]} heads")
    model = t5.T5Config(
        vocab_size=embedding.shape[0],
        emb_dim=embedding.shape[1],
        num_heads=bias.shape[0],
        num_encoder_layers=query.shape[0],
        num_decoder_layers=ours["decoder/layers/mlp/wo/kernel"].shape[0],
        head_dim=query.shape[2] // bias.shape[0],
        mlp_dim=wo.shape[1],
        mlp_activations=activations,
        logits_via_embedding="decoder/logits_dense/kernel" not in ours,
    )
    want = {name: (x.shape, "float") for name, x in _shapes(model).items()}
    checkpoints.require_match("the checkpoint, as a T5,", want, _leaves(ours))
    return model


def _shapes(model: t5.T5Config) -> dict[str, jax.ShapeDtypeStruct]:
    return t5x.flatten(t5.param_shapes(model))


def _leaves(found: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """A leaf table in which all types that float32 holds exactly are one."""
    return {
        name: (x.shape, "float" if x.dtype.name in FLOATS else x.dtype.name)
        for name, x in found.items()
    }


@contextlib.contextmanager
def _named(folder: epath.Path) -> Iterator[None]:
    """Puts the folder before the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


# ---- loading ------------------------------------------------------------------------------------


def require_fit(weights: Weights, model: t5.T5Config) -> None:
    """Compares a checkpoint with the model that it shall be read into.

    Embeddings may differ by the rows that pad them to a multiple of 128.

    Raises:
      ValueError: they differ; the message has a want/have table and the likely reason.
    """
    have = weights.model
    differ = differences(have, model)
    gated = [len(config.mlp_activations) == 2 for config in (have, model)]
    if weights.kind == T5X and gated[0] == gated[1] and "mlp_activations" in differ:
        differ.remove("mlp_activations")  # its files do not tell which
    found = _leaves(_with_vocabulary(weights.tensors, model))
    want = {name: (x.shape, "float") for name, x in _shapes(model).items()}
    if not differ and found == want:
        return
    lines = [f"  {f}: want {getattr(model, f)!r}, have {getattr(have, f)!r}" for f in differ]
    if name := released(have):
        cause = f"this is {name}: use --gin_file={name}.gin"
    else:
        cause = "set them with --gin.T5Config.<name>=..., or choose the --gin_file of its size"
    reason = "\n".join(["T5Config:", *lines, cause] if lines else [])
    checkpoints.require_match(str(weights.path), want, found, reason)
    raise ValueError(f"{weights.path} does not fit.\n{reason}")


def released(model: t5.T5Config) -> str | None:
    """The model file that a released T5 of this architecture has ("t5_1_1/base"), or None."""
    return next((name for name in RELEASED if not differences(model, released_config(name))), None)


def released_config(name: str) -> t5.T5Config:
    """The architecture that a name of RELEASED stands for."""
    vocab, emb, heads, encoder, decoder, head_dim, mlp = RELEASED[name]
    old = name.startswith("t5_1_0")
    return t5.T5Config(
        vocab_size=vocab, emb_dim=emb, num_heads=heads, num_encoder_layers=encoder,
        num_decoder_layers=decoder, head_dim=head_dim, mlp_dim=mlp, logits_via_embedding=old,
        mlp_activations=("relu",) if old else ("gelu", "linear"),
    )  # fmt: skip


def differences(one: t5.T5Config, other: t5.T5Config) -> list[str]:
    """The fields in which two architectures differ; padding of the vocabulary is none."""
    differ = [field for field in ARCHITECTURE if getattr(one, field) != getattr(other, field)]
    return [field for field in differ if field != "vocab_size" or _padded(one) != _padded(other)]


def _padded(model: t5.T5Config) -> int:
    return -(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _with_vocabulary(found: Mapping[str, Tensor], model: t5.T5Config) -> dict[str, Tensor]:
    """Cuts or pads the vocabulary's axis to the model's size where only the padding differs.

    New rows are copies of the padding token's. Like them it is never a target, so whatever the
    model makes of such tokens it makes of these; rows of zeros could win the argmax, since the
    logits of real tokens may all be negative.
    """
    result = dict(found)
    for name, axis in (("token_embedder/embedding", 0), ("decoder/logits_dense/kernel", 1)):
        if name not in result:
            continue
        have, want = result[name].shape[axis], model.vocab_size
        if have != want and -(-have // VOCAB_MULTIPLE) == -(-want // VOCAB_MULTIPLE):
            result[name] = tensors.with_rows(result[name], want, fill=0, axis=axis)
    return result


def load(weights: Weights, model: t5.T5Config, abstract: PyTree | None = None) -> PyTree:
    """Reads a checkpoint into arrays of the model's type, each device only what it holds.

    What a file holds in more bits than the model has is rounded to nearest.

    Args:
      weights: from `open_weights`.
      model: what the arrays are for.
      abstract: tree of jax.ShapeDtypeStructs with shardings; None = numpy arrays, whole.

    Returns:
      Our tree of parameters.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it does not fit the model (before anything is allocated), or a file is damaged.
    """
    require_fit(weights, model)
    require_copies(weights)
    for note in weights.notes:
        logging.info("%s: %s", weights.path, note)
    if weights.model.vocab_size != model.vocab_size:
        logging.warning(
            "%s has %d rows in its embedding, the model %d: %s.", weights.path,
            weights.model.vocab_size, model.vocab_size,
            "the last ones are cut off" if weights.model.vocab_size > model.vocab_size
            else "the rest are copies of the padding token's",
        )  # fmt: skip
    stored = sorted({x.dtype.name for x in weights.tensors.values()} - {model.param_dtype})
    if stored:
        logging.info(
            "%s holds %s, %s %s", weights.path, " and ".join(stored),
            "rounded to nearest" if model.param_dtype == "bfloat16" else "read as",
            model.param_dtype,
        )  # fmt: skip
    elif weights.kind == OURS and abstract is not None:
        if weights.model.vocab_size == model.vocab_size:  # Orbax reads shards by itself
            return checkpoints.restore(weights.path, abstract, subtree="params")[0]
    found = _with_vocabulary(weights.tensors, model)
    wanted = t5x.flatten(abstract if abstract is not None else t5.param_shapes(model))
    bar = tqdm(wanted.items(), f"reading {weights.path.name}", disable=not sys.stderr.isatty())
    return t5x.nest({name: _read(found[name], spec) for name, spec in bar})


def _read(tensor: Tensor, spec: Any) -> Any:
    """One parameter as numpy, or, where the spec has a sharding, as a jax.Array."""

    def part(index: tensors.Index) -> np.ndarray:
        array = np.asarray(tensor.read(index), dtype=spec.dtype, order="C")
        # JAX may keep the memory of the array on a CPU, so it may not be a file's.
        return array if array.flags.owndata and array.flags.writeable else array.copy()

    if getattr(spec, "sharding", None) is None:
        return part(tensors.everything(tensor.shape))

    @functools.cache  # copies on several devices are read once
    def bounds(*limits: tuple[int, int]) -> np.ndarray:
        return part(tuple(slice(*pair) for pair in limits))

    def callback(index: tuple[slice, ...]) -> np.ndarray:
        limits = (s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True))
        return bounds(*limits)

    return jax.make_array_from_callback(spec.shape, spec.sharding, callback)


def read_params(weights: Weights) -> PyTree:
    """All parameters as numpy float32, in the checkpoint's own size."""
    return load(weights, dataclasses.replace(weights.model, param_dtype="float32"))


def load_slots(weights: Weights, abstract: PyTree) -> PyTree | None:
    """Adafactor's state from a checkpoint's slots.

    The second moments and their count of updates are taken over; the count of the learning rate's
    schedule starts at 0.

    Args:
      weights: opened with `slots`.
      abstract: tree of the optimizer's state, jax.ShapeDtypeStructs with shardings.

    Returns:
      The optimizer's state; None where the slots are not those of this optimizer.
    """
    paths = [
        (partitioning.path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    ]
    moments = re.compile(r"(.*)/(v_row|v_col|v)/(.+)")
    factored = {match[1] for name, _ in paths if (match := moments.fullmatch(name))}
    if not factored or not weights.slots:
        return None
    leaves = []
    for name, spec in paths:
        state, _, last = name.rpartition("/")
        if match := moments.fullmatch(name):
            tensor = weights.slots.get(f"{match[3]}/{match[2]}")
            if tensor is not None and tensor.shape != spec.shape:
                tensor = _slot_with_vocabulary(tensor, weights.model, spec.shape)
            if tensor is None:
                logging.warning(
                    "Adafactor starts afresh: %s has no %s of shape %s for %s", weights.path,
                    match[2], spec.shape, match[3],
                )  # fmt: skip
                return None
            leaves.append(tensor)
        else:  # counts: of the second moments, and of the learning rate's schedule
            value = weights.step if state in factored and last == "count" else 0
            leaves.append(tensors.of(np.full(spec.shape, value, spec.dtype)))
    logging.info("Adafactor's second moments are those of %s", weights.path)
    read = [_read(x, spec) for x, (_, spec) in zip(leaves, paths, strict=True)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), read)


def _slot_with_vocabulary(
    tensor: Tensor, have: t5.T5Config, shape: tuple[int, ...]
) -> Tensor | None:
    """A slot whose vocabulary axis is cut or padded to `shape`, as its parameter is; else None."""
    axes = [i for i, (m, n) in enumerate(zip(tensor.shape, shape, strict=False)) if m != n]
    if len(tensor.shape) != len(shape) or len(axes) != 1:
        return None
    axis = axes[0]
    if tensor.shape[axis] != have.vocab_size:
        return None
    return tensors.with_rows(tensor, shape[axis], fill=0, axis=axis)
