"""Memory and speed of a training step by formula: what needs no compiler and no device.

Bytes are of one device. What is held between steps (parameters, optimizer, batch) is exact: it is
read off the shardings. What lives during a step is counted from the model's own shapes;
docs/scale.md compares it with what XLA:TPU reports (`scripts/plan.py` compiles).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from distill import optim, packing, partitioning, t5

GIB = 2.0**30
# Where LOGITS_CHUNK is not given, a device holds at most so many bytes of float32 logits at a time:
# 2,000 target tokens of T5's vocabulary. Smaller slices save less than the rest of the step holds.
# A scanned model's program has about the same size whatever the model is; libtpu 0.0.51.
CODE_BYTES = 0.1 * GIB
LOGITS_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator, as its vendor publishes it.

    Attributes:
      name: short name, `v5e` or `h100`.
      hbm: bytes of memory that a program may use.
      flops: bfloat16 products per second.
      bandwidth: bytes per second between memory and chip.
      network: bytes per second that it sends to its neighbours, all links together; within a TPU
        slice, or a host of GPUs.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    network: float


# TPUs: cloud.google.com/tpu/docs; memory is what XLA offers a program where that is known. GPUs:
# the vendor's data sheets, SXM, dense; memory less 5 %, which the driver and libraries take. JAX
# itself takes three quarters unless XLA_CLIENT_MEM_FRACTION=0.95 is set.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75 * GIB, 275e12, 1228e9, 300e9),
        Chip("v5e", 15.75 * GIB, 197e12, 819e9, 200e9),
        Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 600e9),
        Chip("v6e", 31.25 * GIB, 918e12, 1640e9, 448e9),
        Chip("a100-40gb", 0.95 * 40e9, 312e12, 1555e9, 300e9),
        Chip("a100-80gb", 0.95 * 80e9, 312e12, 2039e9, 300e9),
        Chip("h100-80gb", 0.95 * 80e9, 989e12, 3350e9, 450e9),
        Chip("h200-141gb", 0.95 * 141e9, 989e12, 4800e9, 450e9),
    )
}
# `jax.Device.device_kind` -> name.
_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "NVIDIA H200": "h200-141gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb", "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
}  # fmt: skip


def chip_of(device: Any) -> Chip | None:
    """The chip of a `jax.Device`; None where it is not known, with a warning, and on a CPU."""
    kind = getattr(device, "device_kind", "")
    if kind not in _KINDS and getattr(device, "platform", "cpu") != "cpu":
        logging.warning(
            "The memory of a %s is not known here, so the mesh is not chosen for it: if the model "
            "does not fit, set --gin.MeshConfig.fsdp.", kind,
        )  # fmt: skip
    return CHIPS.get(_KINDS.get(kind))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
      rows: packed rows of a step, all devices together.
      inputs: tokens of a row's inputs.
      targets: tokens of a row's targets.
      num_microbatches: parts that are computed one after the other.
    """

    rows: int
    inputs: int
    targets: int
    num_microbatches: int = 1

    @property
    def tokens(self) -> int:
        """Positions of a step, padding included."""
        return self.rows * (self.inputs + self.targets)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters: of the model, as they are kept.
      optimizer: its slots.
      batch: the arrays of a step.
      saved: activations kept for the backward pass.
      gradients: with what is held for the sum over micro-batches, where there are several.
      workspace: what a layer, or the logits, need besides, where the backward pass needs most.
      code: the program.
    """

    parameters: float
    optimizer: float
    batch: float
    saved: float
    gradients: float
    workspace: float
    code: float

    @property
    def held(self) -> float:
        """Between steps."""
        return self.parameters + self.optimizer + self.batch

    @property
    def total(self) -> float:
        return self.held + self.saved + self.gradients + self.workspace + self.code


def bytes_on_device(tree: Any) -> float:
    """Bytes that one device holds of a tree of arrays or ShapeDtypeStructs with shardings."""
    return float(sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    ))  # fmt: skip


def saved_per_layer(model: t5.T5Config, work: Work, rows: float, tensor: int) -> tuple:
    """Bytes that the backward pass finds of one encoder and one decoder layer.

    Args:
      model: its sizes, compute type and remat policy.
      work: lengths of a row.
      rows: of a micro-batch on a device.
      tensor: slices of heads, feed-forward and the stream's length.
    """
    size = model.compute_dtype.itemsize
    inputs, targets = rows * work.inputs, rows * work.targets
    stream = size * model.emb_dim / tensor
    heads = size * model.num_heads * model.head_dim / tensor
    wide = size * model.mlp_dim * len(model.mlp_activations) / tensor
    policy = model.remat_policy
    if policy == "none":
        # What elementwise operations need is kept, too: of the scores the softmax in float32, its
        # cast and what dropout leaves; the stream some ten times over, the wide layer four times.
        scores = (4 + 2 * size) * model.num_heads / tensor * (model.attention == "plain")
        encoder = inputs * (10 * stream + 4 * heads + 4 * wide + scores * work.inputs)
        decoder = targets * (15 * stream + 6 * heads + 4 * wide)
        decoder += targets * scores * (work.targets + work.inputs) + inputs * 2 * heads
        return encoder, decoder
    encoder, decoder = stream * inputs, stream * targets
    qkv = ("minimal", "attention")
    if policy in qkv:
        encoder += 3 * heads * inputs
        decoder += 4 * heads * targets + 2 * heads * inputs
    if policy in (*qkv, "out"):
        encoder += stream * inputs
        decoder += 2 * stream * targets
    if policy == "minimal":
        encoder += wide * inputs
        decoder += wide * targets
    return encoder, decoder


def memory(
    model: t5.T5Config, work: Work, mesh: dict[str, int], parameters: float, optimizer: float
) -> Memory:
    """Bytes of one device during a step.

    Args:
      model: its sizes, compute type and remat policy.
      work: rows, lengths and micro-batches.
      mesh: devices along `data`, `fsdp`, `tensor`.
      parameters: bytes of them on a device (`bytes_on_device`).
      optimizer: bytes of its slots on a device.
    """
    tensor, batch_shards = mesh["tensor"], mesh["data"] * mesh["fsdp"]
    rows = work.rows / batch_shards / work.num_microbatches
    size, layers = (
        model.compute_dtype.itemsize,
        (model.num_encoder_layers, model.num_decoder_layers),
    )
    kept = saved_per_layer(model, work, rows, tensor)
    whole = saved_per_layer(dataclasses.replace(model, remat_policy="minimal"), work, rows, tensor)
    # Of one layer: what is recomputed, scores and their gradients in both types, and the stream,
    # gathered over its length, in some eight steps of the way.
    stream = rows * model.emb_dim * size
    of_scores = 2 * (4 + size) * rows * model.num_heads / tensor * (model.attention == "plain")
    logits = min(rows * work.targets * model.vocab_size / tensor * 4, LOGITS_BYTES)
    again = [max(0.0, w - k) for w, k in zip(whole, kept, strict=True)]
    in_encoder = again[0] + of_scores * work.inputs**2 + 8 * stream * work.inputs
    in_decoder = again[1] + of_scores * work.targets * max(work.inputs, work.targets)
    in_decoder += stream * (8 * work.targets + 3 * work.inputs) + 2 * logits
    # The backward pass begins with all that was saved; when it comes to the encoder, only the
    # encoder's is left.
    of_encoder, of_decoder = (n * k for n, k in zip(layers, kept, strict=True))
    moments = [(of_encoder, in_encoder), (of_encoder + of_decoder, in_decoder)]
    saved, workspace = max(moments, key=sum)
    # The backward pass gives gradients in the parameters' type, their sum over parts is float32,
    # and the parameters are cast to the compute type once, before the loop over parts.
    kept_size = jnp.dtype(model.param_dtype).itemsize
    several = work.num_microbatches > 1
    of_parts = parameters / kept_size * (4 + size * (size != kept_size)) if several else 0.0
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=work.rows / batch_shards * (2 * work.inputs + 5 * work.targets) * 4,
        saved=saved,
        gradients=parameters + of_parts,
        workspace=workspace,
        code=CODE_BYTES,
    )


def flops(model: t5.T5Config, work: Work) -> tuple[float, float]:
    """Products of a step, all devices together: (with what is recomputed, without).

    A backward pass is two forward passes; the logits are never recomputed.
    """
    forward = work.rows * float(packing.Flops.of(model).row(work.inputs, work.targets))
    return 3 * forward + work.rows * recomputed(model, work), 3 * forward


def recomputed(model: t5.T5Config, work: Work) -> float:
    """Products of a row that the backward pass makes again, by the remat policy."""
    policy = model.remat_policy
    if policy == "none":
        return 0.0
    attention = model.num_heads * model.head_dim
    inputs, targets = work.inputs, work.targets
    encoder, decoder = model.num_encoder_layers, model.num_decoder_layers
    scores = 2 * attention * (encoder * inputs**2 + decoder * targets * (targets + inputs))
    scores *= 2  # and the weighted sums of the values, which the output's weights need
    project = 2 * model.emb_dim * attention
    qkv = project * (3 * encoder * inputs + decoder * (4 * targets + 2 * inputs))
    out = project * (encoder * inputs + 2 * decoder * targets)
    wide = 2 * model.emb_dim * model.mlp_dim * len(model.mlp_activations)
    wide *= encoder * inputs + decoder * targets
    return {
        "minimal": scores,
        "attention": scores + wide,
        "out": scores + wide + qkv,
        "full": scores + wide + qkv + out,
    }[policy]


def seconds(
    model: t5.T5Config, work: Work, mesh: dict[str, int], chip: Chip, param_count: int
) -> dict[str, float]:
    """Lower bounds of a step by what it waits for: `compute`, `memory`, `network`.

    The network carries the weights, gathered from `fsdp` for the forward and the backward pass of
    every micro-batch, their gradients, and the stream, gathered and scattered over `tensor` around
    every block.
    """
    devices = math.prod(mesh.values())
    tensor, fsdp, copies = mesh["tensor"], mesh["fsdp"], mesh["data"]
    size = model.compute_dtype.itemsize
    weights = size * param_count / tensor
    sent = 3 * weights * (fsdp - 1) / fsdp * work.num_microbatches
    sent += 2 * 4 * param_count / (tensor * fsdp) * (copies - 1) / copies * work.num_microbatches
    rows = work.rows / (copies * fsdp)
    blocks = (
        2 * model.num_encoder_layers * work.inputs + 3 * model.num_decoder_layers * work.targets
    )
    # Forward, gradient and, gathered again, recomputation.
    sent += 5 * size * rows * model.emb_dim * blocks * (tensor - 1) / tensor
    moved = 3 * size * param_count / tensor * work.num_microbatches + 16 * param_count / (
        tensor * fsdp
    )
    return {
        "compute": flops(model, work)[0] / devices / chip.flops,
        "memory": moved / chip.bandwidth,
        "network": sent / chip.network,
    }


# What is held between steps, and gradients, may take this share of the memory; activations need
# the rest.
_STATE_SHARE = 0.4


def choose_mesh(
    config: partitioning.MeshConfig,
    model: t5.T5Config,
    optimizer: optim.Optimizer | None,
    rows: int | None,
    chip: Chip | None,
    devices: int,
) -> partitioning.MeshConfig:
    """Fills in what a MeshConfig leaves open.

    `tensor` is 1, or the least that lets the shares of a batch divide its rows. `fsdp` is 1 where a
    copy of the model fits into 40 % of a device's memory, else as little as makes it fit, and the
    rest goes to `data`: copies talk least. Where `data` is given, `fsdp` is what it leaves.

    Args:
      config: what it says is left as it is.
      model: its size.
      optimizer: None = there is none, the model is only evaluated.
      rows: of a micro-batch; None = as many as divide.
      chip: of the devices; None = not known, nothing is chosen but 1.
      devices: how many there are.
    """
    data, fsdp, tensor = config.data, config.fsdp, config.tensor
    if chip is None:
        return dataclasses.replace(config, fsdp=fsdp or 1, tensor=tensor or 1)
    if tensor is None:
        given = (data if data > 0 else 1) * (fsdp if fsdp and fsdp > 0 else 1)
        fits = [
            n for n in partitioning.divisors(devices)
            if devices // n % given == 0 and (rows is None or rows % (devices // n) == 0)
            and not any(size % n for size in (model.num_heads, model.mlp_dim, model.vocab_size))
        ]  # fmt: skip
        tensor = fits[0] if fits else 1  # 1: what does not divide is then said of the rows
    if fsdp is None and data > 0:
        fsdp = max(1, devices // (data * tensor))
    elif fsdp is None:
        copy = _bytes_of_copy(model, optimizer) / tensor
        ways = [n for n in partitioning.divisors(devices // tensor) if model.emb_dim % n == 0]
        enough = [n for n in ways if copy / n <= _STATE_SHARE * chip.hbm]
        fsdp = enough[0] if enough else ways[-1]
    return dataclasses.replace(config, fsdp=fsdp, tensor=tensor)


def _bytes_of_copy(model: t5.T5Config, optimizer: optim.Optimizer | None) -> float:
    """Parameters, and where it is trained gradients and slots."""
    shapes = t5.param_shapes(model)
    trees = [shapes]
    if optimizer is not None:
        trees += [jax.eval_shape(optimizer.build(10).init, shapes)]
    held = float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees)))
    gradients = 4.0 * sum(x.size for x in jax.tree.leaves(shapes))
    return held + (gradients if optimizer is not None else 0)
