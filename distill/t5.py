"""T5 1.1 and 1.0 as one linen module: encoder, decoder, cached decoding.

The parameter tree carries T5X's names (`encoder/layers/attention/query/kernel`, ...), with the
layers of a stack stacked on axis 0, so that a program has one copy of a layer however deep the
model is and a checkpoint maps 1:1 to T5X's.

Einsum letters: b batch, q query length, k key length, e embed, m mlp, h heads, d head_dim,
v vocab, r relative position buckets.

Source: Raffel et al. 2020 (arXiv 1910.10683); T5 1.1 as released with T5X (gated GELU, logits not
tied to the embedding, no dropout in pre-training). Every number that matters for equality with
released checkpoints is tested against logits that T5X itself produced.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from distill import attention

Array = jax.Array
# `partitioning.Activations`: (array, logical axis names) -> array, pinned to its slice of the mesh.
# None on one device, where there is nothing to pin.
Constrain = Callable[[Array, tuple[str | None, ...]], Array] | None

# Axes of the residual stream, which is what the backward pass keeps most of.
STREAM = ("batch", "stream_length", "embed")

# Additive mask of the attention scores, as in T5X. Finite, so that a row of padding, which may
# attend to nothing, gives a uniform softmax instead of NaN.
MASKED = -1e10

RELPOS_BUCKETS = 32
RELPOS_MAX_DISTANCE = 128

ACTIVATIONS = {
    "gelu": nn.gelu,  # the tanh approximation, as in T5 1.1 ("gelu_new" at Hugging Face)
    "relu": nn.relu,
    "silu": nn.silu,
    "linear": lambda x: x,
}

# What the backward pass finds, beside the stream that enters a layer; the rest is recomputed.
# Names and not "every product": they stand behind the constraints, so that slices are kept.
_save = jax.checkpoint_policies.save_only_these_names
REMAT_POLICIES = {
    "none": None,
    # The outputs of the weight products: attention scores and what is elementwise is recomputed.
    "minimal": _save("query", "key", "value", "attention_out", "mlp_in"),
    # Without the widest of them, the feed-forward block's.
    "attention": _save("query", "key", "value", "attention_out"),
    # Only what both halves of a layer add to the stream.
    "out": _save("attention_out"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Size and numerics of a T5; the fields are those of T5X's config of the same name.

    Attributes:
      vocab_size: rows of the embedding; a vocabulary with fewer ids is padded up to it.
      dtype: compute type, `float32` or `bfloat16`; logits, softmax and layer norm statistics are
        always float32. `auto` is bfloat16 on TPU and GPU, else float32.
      param_dtype: type that parameters are kept in, `float32` or `bfloat16`; with the latter
        training rounds every update stochastically (`optim.apply_updates`).
      emb_dim: width of the residual stream.
      num_heads: attention heads.
      num_encoder_layers: layers of the encoder.
      num_decoder_layers: layers of the decoder.
      head_dim: width of one head; `num_heads * head_dim` need not equal `emb_dim`.
      mlp_dim: hidden width of the feed-forward block.
      mlp_activations: one name, or two for a gated block, such as `("gelu", "linear")`.
      dropout_rate: probability of dropping, in [0, 1).
      logits_via_embedding: True ties the logits to the embedding (T5 1.0).
      remat_policy: what the backward pass recomputes: `none`, `minimal` (what is cheap),
        `attention` (and the feed-forward block), `out` (and the attention), `full`.
      attention: `plain`, or `fused`: kernels that keep no scores in memory, for GPUs; see
        `distill.attention`. Decoding is always plain.
    """

    vocab_size: int
    dtype: str = "auto"
    param_dtype: str = "float32"
    emb_dim: int = 512
    num_heads: int = 6
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    head_dim: int = 64
    mlp_dim: int = 1024
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    remat_policy: str = "none"
    attention: str = "plain"

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for field in ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers",
                      "num_decoder_layers", "head_dim", "mlp_dim"):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"T5Config.{field} must be a positive integer, not {value!r}.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"T5Config.dtype must be 'auto', 'float32' or 'bfloat16', not {self.dtype!r}"
                " (float16 overflows in T5)."
            )
        if self.param_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                "T5Config.param_dtype must be 'float32' or 'bfloat16', not "
                f"{self.param_dtype!r} (PARAM_DTYPE)."
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"T5Config.dropout_rate must be in [0, 1), not {self.dropout_rate!r}.")
        unknown = [a for a in self.mlp_activations if a not in ACTIVATIONS]
        if unknown or not 1 <= len(self.mlp_activations) <= 2:
            raise ValueError(
                f"T5Config.mlp_activations must be one or two of {sorted(ACTIVATIONS)}, "
                f"not {self.mlp_activations!r}."
            )
        if self.remat_policy not in REMAT_POLICIES:
            raise ValueError(
                f"T5Config.remat_policy must be one of {sorted(REMAT_POLICIES)}, "
                f"not {self.remat_policy!r}."
            )
        if self.attention not in ("plain", "fused"):
            raise ValueError(
                f"T5Config.attention must be 'plain' or 'fused', not {self.attention!r}."
            )

    @property
    def compute_dtype(self) -> jnp.dtype:
        if self.dtype != "auto":
            return jnp.dtype(self.dtype)
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _pin(constrain: Constrain, x: Array, axes: tuple[str | None, ...], name: str = "") -> Array:
    """An activation on its slice of the mesh, under the name that REMAT_POLICIES know it by."""
    if constrain is not None:
        x = constrain(x, axes)
    return checkpoint_name(x, name) if name else x


def _kernel(module: nn.Module, name: str, shape, axes, init) -> Array:
    """A parameter that knows the logical name of each of its axes; `init_params` casts it."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class RMSNorm(nn.Module):
    """Layer norm without mean or bias, statistics in float32: x * rsqrt(mean(x^2) + 1e-6)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = _kernel(self, "scale", (x.shape[-1],), ("embed",), nn.initializers.ones)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return x.astype(self.dtype) * jnp.expand_dims(scale.astype(self.dtype), range(x.ndim - 1))


class Dense(nn.Module):
    """y = x W over the last axis, no bias.

    Attributes:
      features: size of the last axis of the output.
      axes: logical names of the two axes of the kernel.
      kernel_init: initializer of the kernel [in, features].
      dtype: type of the product.
      constrain: None on one device.
    """

    features: int
    axes: tuple[str, str]
    kernel_init: Callable
    dtype: Any
    constrain: Constrain

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = _kernel(self, "kernel", (x.shape[-1], self.features), self.axes, self.kernel_init)
        if self.constrain is not None:  # batch and length are split: as one axis they could not be
            return x.astype(self.dtype) @ kernel.astype(self.dtype)
        # As one matrix product over all tokens: XLA:CPU computes the kernel's gradient, which
        # sums over batch and length, four times slower as a product over two axes (jax 0.10.2).
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
        return flat.reshape(*x.shape[:-1], self.features)


class Dropout(nn.Module):
    """Drops with one mask for the whole length of a row (axis -2), as T5X does.

    It is on whenever `apply` is given a `dropout` rng, so no flag has to be passed down.
    """

    rate: float
    broadcast_length: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.rate == 0 or not self.has_rng("dropout"):
            return x
        shape = (*x.shape[:-2], 1, x.shape[-1]) if self.broadcast_length else x.shape
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(keep, x / (1 - self.rate), 0)


@functools.partial(jax.tree_util.register_dataclass, meta_fields=["causal"],
                   data_fields=["relative", "query_segments", "key_segments"])  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Parts:
    """What `Attention` would add to the scores, for a kernel that builds it block by block.

    Attributes:
      relative: bias of the relative positions, [1, h, q, k], float32, or None.
      query_segments: int32 [b, q], from `token_segments`.
      key_segments: int32 [b, k].
      causal: True hides later keys.
    """

    relative: Array | None
    query_segments: Array
    key_segments: Array
    causal: bool


class Attention(nn.Module):
    """Multi-head attention with unscaled scores: 1 / sqrt(d) is folded into the query's init."""

    config: T5Config
    constrain: Constrain

    def setup(self):
        cfg = self.config
        width, dtype = cfg.num_heads * cfg.head_dim, cfg.compute_dtype
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

        def query_init(*args):
            return init(*args) / np.sqrt(cfg.head_dim)

        into, out = ("embed", "joined_kv"), ("joined_kv", "embed")
        self.query = Dense(width, into, query_init, dtype, self.constrain)
        self.key = Dense(width, into, init, dtype, self.constrain)
        self.value = Dense(width, into, init, dtype, self.constrain)
        self.out = Dense(cfg.emb_dim, out, init, dtype, self.constrain)
        self.dropout = Dropout(cfg.dropout_rate)

    def _heads(self, x: Array, name: str) -> Array:
        x = x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)
        return _pin(self.constrain, x, ("batch", "length", "heads", "kv"), name)

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """[b, k, e] -> keys and values, each [b, k, h, d]."""
        return self._heads(self.key(x), "key"), self._heads(self.value(x), "value")

    def __call__(self, x: Array, kv: tuple[Array, Array], bias: Array | Parts) -> Array:
        """Attends from x [b, q, e] to kv ([b, k, h, d], [b, k, h, d]).

        Args:
          x: normalised residual stream, [b, q, e].
          kv: keys and values from `keys_values`.
          bias: added to the scores, broadcastable to [b, h, q, k], float32: mask and relative
            positions together. Or its parts, for the fused kernel.

        Returns:
          [b, q, e] in the compute dtype.
        """
        query = self._heads(self.query(x), "query")
        mix = self._fused if isinstance(bias, Parts) else self._plain
        mixed = mix(query, *kv, bias)
        # Without this the gradient comes in the slices of the stream's length, with all heads.
        mixed = _pin(self.constrain, mixed, ("batch", "length", "heads", "kv"))
        out = self.out(mixed.reshape(*mixed.shape[:-2], -1))
        return _pin(self.constrain, out, STREAM, "attention_out")

    def context(self, x: Array) -> tuple[Array, Array]:
        """Keys and values of [b, k, e] as `step` reads them: [b, h, d, k] and [b, h, k, d]."""
        keys, values = self.keys_values(x)
        return jnp.einsum("bkhd->bhdk", keys), jnp.einsum("bkhd->bhkd", values)

    def cached(self, x: Array, cache: tuple[Array, Array], position: Array, bias: Array):
        """Attends from new tokens to those before them and to themselves.

        Args:
          x: normalised stream of q new tokens of each of n sequences a row, [b, n * q, e].
          cache: keys [b * n, h, d, t] and values [b * n, h, t, d].
          position: int32 scalar, of the first new token.
          bias: [h, q, t], float32, with the mask in it.

        Returns:
          [b, n * q, e], and the cache with the new tokens at `position`.
        """
        query, key, value = (
            self._heads(dense(x), "").reshape(cache[0].shape[0], -1, *cache[1].shape[1::2])
            for dense in (self.query, self.key, self.value)
        )
        update = jax.lax.dynamic_update_slice_in_dim
        keys = update(cache[0], jnp.einsum("bqhd->bhdq", key), position, axis=3)
        values = update(cache[1], jnp.einsum("bqhd->bhqd", value), position, axis=2)
        scores = jnp.einsum("bqhd,bhdt->bhqt", query, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias[None]).astype(values.dtype)
        mixed = jnp.einsum("bhqt,bhtd->bqhd", weights, values)
        return self.out(mixed.reshape(*x.shape[:2], -1)), (keys, values)

    def step(self, x: Array, context: tuple[Array, Array], bias: Array) -> Array:
        """Attends from x [b, q, e] to what all of a row's sequences share, from `context`.

        `bias` is the mask of it, [b, k].
        """
        query, (keys, values) = self._heads(self.query(x), ""), context
        scores = jnp.einsum("bqhd,bhdk->bhqk", query, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias[:, None, None]).astype(values.dtype)
        mixed = jnp.einsum("bhqk,bhkd->bqhd", weights, values)
        return self.out(mixed.reshape(*x.shape[:2], -1))

    def _plain(self, query: Array, keys: Array, values: Array, bias: Array) -> Array:
        """Mixed values, [b, q, h, d]."""
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias).astype(values.dtype)
        weights = self.dropout(weights)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, values)

    def _fused(self, query: Array, keys: Array, values: Array, bias: Parts) -> Array:
        """The same without scores in memory."""
        if jax.default_backend() != "gpu" and not attention.INTERPRET:
            raise ValueError(
                "T5Config.attention='fused' is for GPUs, and JAX runs on "
                f"{jax.default_backend()!r} here: set --gin.T5Config.attention=plain."
            )
        # A weight is dropped for all queries of a row at once, which is to drop the value that it
        # multiplies. In this order of axes the mask is the one that the weights would draw.
        values = jnp.einsum("bhdk->bkhd", self.dropout(jnp.einsum("bkhd->bhdk", values)))
        kernel = functools.partial(
            attention.fused_attention, causal=bias.causal, interpret=attention.INTERPRET
        )
        relative = None if bias.relative is None else bias.relative[0]
        heads = ("batch", "length", "heads", "kv")
        operands = (
            (query, heads), (keys, heads), (values, heads), (relative, ("heads", None, None)),
            (bias.query_segments, ("batch", "length")), (bias.key_segments, ("batch", "length")),
        )  # fmt: skip
        if self.constrain is not None:
            return self.constrain.per_device(kernel, *operands)
        return kernel(*(x for x, _ in operands))


class MLP(nn.Module):
    """Feed-forward block; with two activations the products of both branches are multiplied."""

    config: T5Config
    constrain: Constrain

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        hidden = 1
        for i, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            branch = Dense(
                cfg.mlp_dim, ("embed", "mlp"), init, cfg.compute_dtype, self.constrain, name=name
            )
            wide = _pin(self.constrain, branch(x), ("batch", "length", "mlp"), "mlp_in")
            hidden = hidden * ACTIVATIONS[activation](wide)
        hidden = Dropout(cfg.dropout_rate)(hidden)
        out = Dense(
            cfg.emb_dim, ("mlp", "embed"), init, cfg.compute_dtype, self.constrain, name="wo"
        )
        return out(hidden)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each on the normalised stream and added back."""

    config: T5Config
    constrain: Constrain

    @nn.compact
    def __call__(self, x: Array, bias: Array | Parts) -> tuple[Array, None]:
        cfg = self.config
        drop = Dropout(cfg.dropout_rate)
        y = RMSNorm(cfg.compute_dtype, name="pre_attention_layer_norm")(x)
        attend = Attention(cfg, self.constrain, name="attention")
        x = x + drop(attend(y, attend.keys_values(y), bias))
        y = RMSNorm(cfg.compute_dtype, name="pre_mlp_layer_norm")(x)
        x = x + drop(MLP(cfg, self.constrain, name="mlp")(y))
        return _pin(self.constrain, x, STREAM), None


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder, feed-forward."""

    config: T5Config
    constrain: Constrain

    def setup(self):
        cfg = self.config
        self.pre_self_attention_layer_norm = RMSNorm(cfg.compute_dtype)
        self.self_attention = Attention(cfg, self.constrain)
        self.pre_cross_attention_layer_norm = RMSNorm(cfg.compute_dtype)
        self.encoder_decoder_attention = Attention(cfg, self.constrain)
        self.pre_mlp_layer_norm = RMSNorm(cfg.compute_dtype)
        self.mlp = MLP(cfg, self.constrain)
        self.drop = Dropout(cfg.dropout_rate)

    def __call__(self, x: Array, encoded: Array, self_bias: Array, cross_bias: Array):
        """The layer over whole sequences: x [b, q, e], encoded [b, k, e] -> ([b, q, e], None)."""
        y = self.pre_self_attention_layer_norm(x)
        keys_values = self.self_attention.keys_values(y)
        x = x + self.drop(self.self_attention(y, keys_values, self_bias))
        y = self.pre_cross_attention_layer_norm(x)
        cross = self.encoder_decoder_attention.keys_values(encoded)
        x = x + self.drop(self.encoder_decoder_attention(y, cross, cross_bias))
        x = x + self.drop(self.mlp(self.pre_mlp_layer_norm(x)))
        return _pin(self.constrain, x, STREAM), None

    def context(self, encoded: Array) -> tuple[Array, Array]:
        """Keys and values of the encoder's states for `step`; see `Attention.context`."""
        return self.encoder_decoder_attention.context(encoded)

    def step(self, x: Array, cache, context, position: Array, self_bias: Array, cross_bias: Array):
        """New tokens of each of a row's sequences; see `Decoder.step`.

        Args:
          x: [b, n * q, e].
          cache: of this layer, see `Attention.cached`.
          context: of this layer, from `context`.
          position: int32 scalar, of the first new token.
          self_bias: [h, q, t].
          cross_bias: [b, k].

        Returns:
          The stream [b, n * q, e], and the cache with the new tokens in it.
        """
        y = self.pre_self_attention_layer_norm(x)
        y, cache = self.self_attention.cached(y, cache, position, self_bias)
        x = x + y
        y = self.pre_cross_attention_layer_norm(x)
        x = x + self.encoder_decoder_attention.step(y, context, cross_bias)
        x = x + self.mlp(self.pre_mlp_layer_norm(x))
        return _pin(self.constrain, x, STREAM), cache


def relative_position_buckets(offsets: Array, bidirectional: bool) -> Array:
    """Maps key position minus query position to one of 32 buckets.

    Half of a direction's buckets hold one offset each, the other half grow logarithmically up to
    128; all larger offsets share the last one. Source: Raffel et al. 2020, section 2.1.

    Args:
      offsets: integers of any shape, in tokens.
      bidirectional: True (encoder) splits the buckets between both directions; False (decoder)
        puts all later keys into bucket 0.

    Returns:
      int32 in [0, 32) of the same shape.
    """
    buckets = RELPOS_BUCKETS
    result = jnp.zeros_like(offsets)
    distance = -offsets
    if bidirectional:
        buckets //= 2
        result += (distance < 0) * buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    # The clip keeps log(0) out of the branch that is not taken.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact + np.finfo(np.float32).eps)
    large = exact + (ratio / np.log(RELPOS_MAX_DISTANCE / exact) * (buckets - exact)).astype(
        jnp.int32
    )
    return result + jnp.where(distance < exact, distance, jnp.minimum(large, buckets - 1))


class RelativePositionBias(nn.Module):
    """A learned number per (head, bucket), shared by all layers of a stack."""

    num_heads: int
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        """Positions [q] and [k], in tokens -> bias [1, h, q, k], float32."""
        embedding = _kernel(
            self, "rel_embedding", (self.num_heads, RELPOS_BUCKETS), ("heads", "relpos_buckets"),
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
        )  # fmt: skip
        offsets = key_positions[None, :] - query_positions[:, None]
        buckets = relative_position_buckets(offsets, self.bidirectional)
        # A product with a one-hot: its gradient is a product too, where that of a gather would be
        # a scatter of q * k rows into 32.
        one_hot = jax.nn.one_hot(buckets, RELPOS_BUCKETS, dtype=jnp.float32)
        return jnp.einsum("hr,qkr->hqk", embedding, one_hot)[None]


def _scanned(layer: type[nn.Module], config: T5Config, length: int):
    """`length` copies of a layer as one, parameters stacked on axis 0, recomputed by policy."""
    policy = REMAT_POLICIES[config.remat_policy]
    if policy is not None:
        # prevent_cse=False: inside a scan there is no common subexpression to protect.
        layer = nn.remat(layer, policy=policy, prevent_cse=False)
    return nn.scan(
        layer, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast, length=length, metadata_params={nn.PARTITION_NAME: "layers"},
    )  # fmt: skip


class Encoder(nn.Module):
    """Embedded tokens -> states."""

    config: T5Config
    constrain: Constrain

    def setup(self):
        cfg = self.config
        self.relpos_bias = RelativePositionBias(cfg.num_heads, bidirectional=True)
        stack = _scanned(EncoderLayer, cfg, cfg.num_encoder_layers)
        self.layers = stack(cfg, self.constrain)
        self.encoder_norm = RMSNorm(cfg.compute_dtype)
        self.drop = Dropout(cfg.dropout_rate)
        # T5X drops single values, not whole channels, after the encoder's last norm only.
        self.drop_values = Dropout(cfg.dropout_rate, broadcast_length=False)

    def __call__(self, embedded: Array, segments: Array) -> Array:
        """embedded [b, k, e], from `token_segments` [b, k] -> [b, k, e]."""
        positions = jnp.arange(embedded.shape[1])
        relative = self.relpos_bias(positions, positions)
        bias = _attention_bias(self.config, relative, segments, segments)
        x, _ = self.layers(self.drop(embedded), bias)
        return self.drop_values(self.encoder_norm(x))


class Decoder(nn.Module):
    """Embedded target tokens and the encoder's states -> states."""

    config: T5Config
    constrain: Constrain

    def setup(self):
        cfg = self.config
        self.relpos_bias = RelativePositionBias(cfg.num_heads, bidirectional=False)
        stack = _scanned(DecoderLayer, cfg, cfg.num_decoder_layers)
        self.layers = stack(cfg, self.constrain)
        self.decoder_norm = RMSNorm(cfg.compute_dtype)
        self.drop = Dropout(cfg.dropout_rate)
        if not cfg.logits_via_embedding:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            self.logits_dense = Dense(
                cfg.vocab_size, ("embed", "vocab"), init, jnp.float32, self.constrain
            )

    def __call__(self, embedded, encoded, target_segments, input_segments) -> Array:
        """[b, q, e], [b, k, e], from `token_segments` [b, q] and [b, k] -> states [b, q, e]."""
        cfg, positions = self.config, jnp.arange(embedded.shape[1])
        relative = self.relpos_bias(positions, positions)
        self_bias = _attention_bias(cfg, relative, target_segments, target_segments, causal=True)
        cross_bias = _attention_bias(cfg, None, target_segments, input_segments)
        x, _ = self.layers(self.drop(embedded), encoded, self_bias, cross_bias)
        return self.drop(self.decoder_norm(x))

    def context(self, encoded: Array) -> list[dict[str, Any]]:
        """What `step` reads of the encoder's states and of the parameters, for each layer.

        `params`: the layer's, in the compute type. Taken out of the stack here, once for all steps:
        a scan over the stack would copy each layer's parameters in every step. `cross`: keys and
        values of the states, [b, h, d, k] and [b, h, k, d].
        """
        stacked = self.layers.variables["params"]
        layers = []
        for i in range(self.config.num_decoder_layers):
            params = jax.tree.map(lambda x, i=i: x[i].astype(self.config.compute_dtype), stacked)
            cross = self._layer.apply({"params": params}, encoded, method="context")
            layers.append({"params": params, "cross": cross})
        return layers

    def step(self, embedded: Array, position: Array, cache: list, context: list, cross_bias: Array):
        """q new tokens of each of n sequences a row.

        Args:
          embedded: [b, n * q, e].
          position: int32 scalar, of the first new token, from 0.
          cache: for each layer keys [b * n, h, d, t] and values [b * n, h, t, d].
          context: from `context`.
          cross_bias: [b, k].

        Returns:
          States [b, n * q, e], and the cache with the new tokens in it.
        """
        (answers, _, length, _), (rows, tokens, _) = cache[0][1].shape, embedded.shape
        positions = position + jnp.arange(tokens * rows // answers)
        keys = jnp.arange(length)
        later = keys[None, :] > positions[:, None]  # or not written yet
        bias = self.relpos_bias(positions, keys)[0] + jnp.where(later, MASKED, 0.0)[None]
        x, written = embedded, []
        for layer, before in zip(context, cache, strict=True):
            x, after = self._layer.apply(
                {"params": layer["params"]}, x, before, layer["cross"], position, bias, cross_bias,
                method="step",
            )  # fmt: skip
            written.append(after)
        return self.decoder_norm(x), written

    @property
    def _layer(self) -> DecoderLayer:
        """One layer by itself, to be applied to parameters of its own."""
        return DecoderLayer(self.config, self.constrain, parent=None)


class T5(nn.Module):
    """Encoder-decoder with a shared embedding.

    Dropout is on when `apply` gets `rngs={"dropout": key}`, off otherwise.

    Attributes:
      config: sizes and numerics.
      constrain: pins activations to the mesh; see `partitioning.activation_constraint`.
    """

    config: T5Config
    constrain: Constrain = None

    def setup(self):
        cfg = self.config
        self.token_embedder = Embedder(
            cfg.vocab_size, cfg.emb_dim, cfg.compute_dtype, self.constrain
        )
        self.encoder = Encoder(cfg, self.constrain)
        self.decoder = Decoder(cfg, self.constrain)

    def encode(self, tokens: Array, segment_ids: Array | None = None) -> Array:
        """Encodes input tokens.

        Args:
          tokens: int32 [b, k], 0 = padding.
          segment_ids: int32 [b, k], which packed sequence each token belongs to (from 1); None =
            one sequence a row.

        Returns:
          States [b, k, e] in the compute dtype.
        """
        return self.encoder(self._embed(tokens), token_segments(tokens, segment_ids))

    def decode(
        self,
        encoded: Array,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
    ) -> Array:
        """States of the decoder under teacher forcing.

        Args:
          encoded: from `encode`, [b, k, e].
          encoder_input_tokens: int32 [b, k], for the mask.
          decoder_input_tokens: int32 [b, q], the targets shifted right within each sequence.
          decoder_target_tokens: int32 [b, q], 0 = padding.
          encoder_segment_ids: int32 [b, k] or None.
          decoder_segment_ids: int32 [b, q] or None.

        Returns:
          [b, q, e] in the compute dtype; `unembed` turns (a slice of) it into logits.
        """
        return self.decoder(
            self._embed(decoder_input_tokens),
            encoded,
            token_segments(decoder_target_tokens, decoder_segment_ids),
            token_segments(encoder_input_tokens, encoder_segment_ids),
        )

    def unembed(self, states: Array) -> Array:
        """States [..., e] -> float32 logits [..., v]."""
        states = states.astype(jnp.float32)
        if self.config.logits_via_embedding:
            logits = self.token_embedder.attend(states) / np.sqrt(self.config.emb_dim)
        else:
            logits = self.decoder.logits_dense(states)
        # In slices of the vocabulary; in those of the length the whole kernel would be gathered.
        return _pin(self.constrain, logits, ("batch", "length", "vocab"))

    def states(self, batch: dict[str, Array]) -> Array:
        """Decoder states [b, q, e] of a batch under T5X's batch keys."""
        encoder_segments = batch.get("encoder_segment_ids")
        encoded = self.encode(batch["encoder_input_tokens"], encoder_segments)
        return self.decode(
            encoded,
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            encoder_segments,
            batch.get("decoder_segment_ids"),
        )

    def __call__(self, batch: dict[str, Array]) -> Array:
        """Logits [b, q, v], float32, of a batch under T5X's batch keys."""
        return self.unembed(self.states(batch))

    # --- What `decode` asks of a network. It knows nothing of an encoder: it hands the context from
    # `start_decoding` to every step, and reorders a cache along its first axis.

    def start_decoding(self, inputs: Array) -> tuple[Array, Any]:
        """What is computed once for a batch of inputs.

        Args:
          inputs: int32 [b, k], one sequence a row, 0 = padding.

        Returns:
          int32 [b], the token that each row's answers start from, and the context, which is for
          `decode_step` alone; all answers to a row share it.
        """
        context = {
            "layers": self.decoder.context(self.encode(inputs)),
            "bias": jnp.where(inputs > 0, 0.0, MASKED),
        }
        return jnp.zeros(inputs.shape[:1], jnp.int32), context

    def empty_cache(self, rows: int, n: int, length: int) -> Any:
        """A cache of `length` positions for n answers to each of so many rows.

        Returns:
          A tree of arrays [rows * n, ...], answers of a row side by side. (Two axes would be
          merged for the products, and XLA:CPU, jax 0.10.2, then copies the whole cache in every
          step instead of writing one position.) What was written into one of fewer positions stays
          valid in the first corner of a longer one.
        """
        cfg, heads = self.config, self.config.num_heads
        axes = ("batch", "heads", None, None)
        shapes = (rows * n, heads, cfg.head_dim, length), (rows * n, heads, length, cfg.head_dim)
        return [
            tuple(_pin(self.constrain, jnp.zeros(s, cfg.compute_dtype), axes) for s in shapes)
            for _ in range(cfg.num_decoder_layers)
        ]

    def decode_step(self, tokens: Array, position: Array, cache: Any, context: Any):
        """States after q more tokens of each of n answers a row.

        Args:
          tokens: int32 [b, n, q]; a step of a loop has q = 1.
          position: int32 scalar, of the first of them, from 0.
          cache: from `empty_cache`, with all earlier tokens in it.
          context: from `start_decoding`.

        Returns:
          States [b, n, q, e], of which `unembed` makes logits of the next token, and the cache with
          the new tokens in it.
        """
        rows, n, q = tokens.shape
        embedded = self.token_embedder.few(tokens.reshape(rows, n * q))
        states, cache = self.decoder.step(
            embedded, position, cache, context["layers"], context["bias"]
        )
        return states.reshape(rows, n, q, -1), cache

    def _embed(self, tokens: Array) -> Array:
        return _pin(self.constrain, self.token_embedder(tokens), STREAM)


class Embedder(nn.Module):
    """Token embedding by gather; `attend` is its transpose."""

    vocab_size: int
    emb_dim: int
    dtype: Any
    constrain: Constrain

    def setup(self):
        self.embedding = _kernel(
            self, "embedding", (self.vocab_size, self.emb_dim), ("vocab", "embed"),
            nn.initializers.normal(1.0),
        )  # fmt: skip

    def __call__(self, tokens: Array) -> Array:
        table = _pin(self.constrain, self.embedding.astype(self.dtype), ("vocab", None))
        found = jnp.take(table, tokens, axis=0)
        return _pin(self.constrain, found, ("batch", "length", "embed"))

    def few(self, tokens: Array) -> Array:
        """The same for few tokens, as decoding has them: they go to the table, not it to them."""
        found = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return _pin(self.constrain, found, STREAM)

    def attend(self, states: Array) -> Array:
        return jnp.einsum("...e,ve->...v", states, self.embedding)


def token_segments(tokens: Array, segment_ids: Array | None = None) -> Array:
    """Which packed sequence each token belongs to, int32 [b, length] from 1; 0 = padding.

    Args:
      tokens: int32 [b, length], 0 = padding.
      segment_ids: int32 [b, length] from 0, or None = one sequence a row.
    """
    return jnp.where(tokens > 0, 1 if segment_ids is None else segment_ids + 1, 0)


def _attention_bias(
    config: T5Config, relative: Array | None, query_segments, key_segments, causal: bool = False
) -> Array | Parts:
    """What `Attention` adds to the scores: both real, of one packed sequence, and not later.

    Args:
      config: says whether the parts are to stay apart.
      relative: bias of the relative positions, [1, h, q, k], or None.
      query_segments: int32 [b, q], from `token_segments`.
      key_segments: int32 [b, k], from `token_segments`.
      causal: True hides keys behind a query's own position.

    Returns:
      float32 [b, h or 1, q, k], or Parts.
    """
    if config.attention == "fused":
        return Parts(relative, query_segments, key_segments, causal)
    query, key = query_segments[:, None, :, None], key_segments[:, None, None, :]
    mask = (query == key) & (query > 0)
    if causal:
        mask &= jnp.tril(jnp.ones(mask.shape[2:], bool))[None, None]
    masked = jnp.where(mask, 0.0, MASKED)
    return masked if relative is None else relative + masked


def _init_boxed(config: T5Config, rng: Array):
    config = dataclasses.replace(config, attention="plain")  # the same parameters, on any device
    tokens = jnp.ones((1, 1), jnp.int32)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    return T5(config).init(rng, {name: tokens for name in names})["params"]


def init_params(config: T5Config, rng: Array):
    """Random parameters as a nested dict of arrays, drawn in float32 as T5X does, then rounded."""
    dtype = jnp.dtype(config.param_dtype)
    return jax.tree.map(lambda x: x.astype(dtype), nn.unbox(_init_boxed(config, rng)))


@functools.cache  # a run asks for shapes and axes several times, and each time would be a trace
def _abstract_boxed(config: T5Config):
    return jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))


def param_shapes(config: T5Config):
    """The tree of `init_params` as `jax.ShapeDtypeStruct`s; allocates nothing."""
    dtype = jnp.dtype(config.param_dtype)
    shapes = nn.unbox(_abstract_boxed(config))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def param_axes(config: T5Config):
    """The tree of `init_params` with each array's logical axis names, e.g. `(layers, embed, mlp)`.

    Leaves are tuples of str; pass `is_leaf=lambda x: isinstance(x, tuple)` to map over them.
    """
    specs = nn.get_partition_spec(_abstract_boxed(config))
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.P))


def param_count(config: T5Config) -> int:
    """Number of parameters; 76,961,152 for T5 1.1 small."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(param_shapes(config)))
