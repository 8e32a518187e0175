"""LLaMA decoders and similar language models (Touvron et al. 2023)."""

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.models import activations, backends, cache, rope, stack
from vlalign_jax.models import attention as attentions
from vlalign_jax.models.linear import Linear
from vlalign_jax.sharding.mesh import constrain_rows, constrain_tensor


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
  vocab_size: int  # rows of the embedding; may exceed the tokenizer's
  width: int
  mlp_width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  norm_epsilon: float
  rope: rope.RopeConfig
  tied_embeddings: bool = False
  attention_bias: bool = False  # of all four maps
  qkv_bias: bool = False  # of query, key and value, as Qwen2 has it
  mlp_bias: bool = False
  query_key_norm: bool = False  # of each head, before its rotation, as Qwen3 has it
  activation: str = "silu"
  sliding_window: int | None = None  # positions a query sees, up to and including its own


class LanguageAttention(nnx.Module):
  def __init__(self, config: LanguageConfig, linear, norm, rngs):
    self.head_dim = config.head_dim
    into = functools.partial(linear, use_bias=config.attention_bias or config.qkv_bias)
    self.query = into(config.width, config.heads * config.head_dim, rngs=rngs)
    self.key = into(config.width, config.kv_heads * config.head_dim, rngs=rngs)
    self.value = into(config.width, config.kv_heads * config.head_dim, rngs=rngs)
    self.out = linear(
      config.heads * config.head_dim, config.width, use_bias=config.attention_bias, rngs=rngs
    )
    self.normed = config.query_key_norm
    if self.normed:
      self.query_norm = norm(config.head_dim, rngs=rngs)
      self.key_norm = norm(config.head_dim, rngs=rngs)

  def __call__(self, x, rotation, attend, mesh):
    """Returns [B, T, D] and the second output of `attend(query, key, value)`."""
    B, T, _ = x.shape

    def heads(projected):
      return constrain_tensor(projected.reshape(B, T, -1, self.head_dim), mesh, axis=2)

    query, key = heads(self.query(x)), heads(self.key(x))
    if self.normed:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = rope.rotate(query, *rotation), rope.rotate(key, *rotation)
    value = heads(self.value(x))
    attended, keys_values = attend(query, key, value)
    return self.out(constrain_tensor(attended, mesh, axis=2).reshape(B, T, -1)), keys_values


class LanguageMlp(nnx.Module):
  def __init__(self, config: LanguageConfig, linear, rngs):
    self.activation = config.activation
    linear = functools.partial(linear, use_bias=config.mlp_bias)
    self.gate = linear(config.width, config.mlp_width, rngs=rngs)
    self.up = linear(config.width, config.mlp_width, rngs=rngs)
    self.down = linear(config.mlp_width, config.width, rngs=rngs)

  def __call__(self, x, mesh):
    gate, up = (constrain_tensor(part(x), mesh, axis=2) for part in (self.gate, self.up))
    return self.down(activations.ACTIVATIONS[self.activation](gate) * up)


class LanguageLayer(nnx.Module):
  def __init__(self, config: LanguageConfig, linear, norm, rngs):
    self.attention_norm = norm(config.width, rngs=rngs)
    self.attention = LanguageAttention(config, linear, norm, rngs)
    self.mlp_norm = norm(config.width, rngs=rngs)
    self.mlp = LanguageMlp(config, linear, rngs)

  def __call__(self, x, rotation, attend, mesh):
    attended, keys_values = self.attention(self.attention_norm(x), rotation, attend, mesh)
    x = x + attended
    return x + self.mlp(self.mlp_norm(x), mesh), keys_values


class LanguageModel(nnx.Module):
  """Token embedding, decoder layers, final norm and the output head."""

  def __init__(
    self, config: LanguageConfig, *, dtype, param_dtype, rngs: nnx.Rngs, with_head: bool = True
  ):
    self.config = config
    types = {"dtype": dtype, "param_dtype": param_dtype}
    normal = nnx.initializers.normal(config.width**-0.5)
    linear = functools.partial(Linear, kernel_init=normal, **types)
    norm = functools.partial(nnx.RMSNorm, epsilon=config.norm_epsilon, **types)
    self.embedding = nnx.Embed(
      config.vocab_size, config.width, embedding_init=normal, rngs=rngs, **types
    )
    self.layers = stack.build_stack(
      lambda rngs: LanguageLayer(config, linear, norm, rngs), config.layers, rngs
    )
    self.norm = norm(config.width, rngs=rngs)
    if with_head and not config.tied_embeddings:
      self.head = linear(config.width, config.vocab_size, use_bias=False, rngs=rngs)

  def __call__(
    self,
    x,
    positions,
    segments,
    branches,
    *,
    images=None,
    remat: str = "none",
    mesh: Mesh | None = None,
    attention: str = backends.AUTO,
    dropout_key=None,
  ):
    """Computes hidden states after the final norm.

    Args:
      x: float[B, T, D], token embeddings, with image embeddings at image tokens.
      positions, segments, branches: int32[B, T], see ARCHITECTURE.md, "Rows"; branches None: all 0.
      images: bool[B, T], image tokens, for multi-modal causal attention; None: not used.
      remat: see `stack.REMAT_NAMES`.
      mesh: splits B.
      attention: the kernel of attention, see `backends.ATTENTION_NAMES`.
      dropout_key: for the dropout of adapters; None: no dropout.

    Returns:
      [B, T, D] in the model's dtype.
    """
    rotation = rope.rotation(self.config.rope, self.config.head_dim, positions)
    run_attention = self._attention(positions, segments, branches, images, mesh, attention)

    def attend(query, key, value):
      return run_attention(query, key, value), None

    def call(layer, x):
      return layer(x, rotation, attend, mesh)[0]

    x, _ = stack.run_stack(self.layers, x, call, remat=remat, mesh=mesh, dropout_key=dropout_key)
    return self.norm(constrain_rows(x, mesh))

  def _attention(self, positions, segments, branches, images, mesh, backend):
    """Returns `(query, key, value) -> attended`."""
    return functools.partial(
      attentions.attend,
      segments=segments,
      branches=branches,
      positions=positions,
      window=self.config.sliding_window,
      images=images,
      mesh=mesh,
      backend=backend,
    )

  def prefill(
    self,
    x,
    positions,
    segments,
    *,
    images=None,
    mesh: Mesh | None = None,
    attention: str = backends.AUTO,
  ):
    """Computes `__call__` with one branch; also returns keys, values [L, B, K, T, head_dim]."""
    rotation = rope.rotation(self.config.rope, self.config.head_dim, positions)
    run_attention = self._attention(positions, segments, None, images, mesh, attention)

    def attend(query, key, value):
      keys_values = [constrain_tensor(x.swapaxes(1, 2), mesh, axis=1) for x in (key, value)]
      return run_attention(query, key, value), keys_values

    def call(layer, x, _):
      return layer(x, rotation, attend, mesh)

    x, keys_values = cache.run_layers(self.layers, x, call, None, mesh)
    return self.norm(constrain_rows(x, mesh)), keys_values

  def decode(
    self,
    x,
    positions,
    kv_caches: tuple[cache.Cache, ...],
    prompt_lengths,
    steps,
    clock,
    *,
    images=None,
    mesh: Mesh | None = None,
  ):
    """Computes hidden states of the samples' newest tokens.

    Args:
      x: float[B, N, D], embeddings of these tokens.
      positions: int32[B, N].
      kv_caches: keys and values of prompts and earlier tokens, of each group of rows.
      prompt_lengths: int32[B].
      steps: int32[B], how many earlier tokens the samples have.
      clock: int32[], how many tokens were appended to the cache.
      images: bool[Bi, S] of each group, image tokens of the prompts, for multi-modal causal
        attention.
      mesh: splits B.

    Returns:
      [B, N, D] after the final norm, and keys and values of these tokens, [L, B, N, K, head_dim].
    """
    rotation = rope.rotation(self.config.rope, self.config.head_dim, positions)
    options = {"window": self.config.sliding_window, "images": images, "mesh": mesh}

    def call(layer, x, layer_caches):
      def attend(query, key, value):
        places = prompt_lengths, steps, clock
        attended = cache.attend(query, key, value, layer_caches, *places, **options)
        return attended, (key, value)

      return layer(x, rotation, attend, mesh)

    x, keys_values = cache.run_layers(self.layers, x, call, kv_caches, mesh)
    return self.norm(constrain_rows(x, mesh)), keys_values

  def embed(self, tokens):
    """Embeds tokens int32[B, T] as [B, T, D] in the model's dtype.

    The gather comes before the cast, so that gradients of a token that occurs several times are
    summed in the parameters' dtype.
    """
    table = self.embedding.embedding[...]
    return jnp.take(table, tokens, axis=0, mode="clip").astype(self.embedding.dtype)

  def head_kernel(self):
    """Returns the matrix [D, V] that maps hidden states to logits, in its stored dtype."""
    if self.config.tied_embeddings:
      return self.embedding.embedding[...].T
    return self.head.kernel[...]
