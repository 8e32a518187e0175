"""Keys and values of what has been read, so that a decoder computes only its newest token.

A prompt's are held once and seen by all of its samples; each sample holds those of its own tokens.
Inside the loop over layers every layer reads its own slice and gives back only the newest token's
keys and values: a cache that went through that loop as a whole would be copied at every layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlalign_jax.models import stack
from vlalign_jax.sharding.mesh import ROWS, constrain_rows, constrain_tensor, tensor_size

# Instead of -inf, as in models.tiles.
_HIDDEN = -1e30


class Cache(NamedTuple):
  """B prompts with N samples each; arrays of one layer lack the first axis, L."""

  prompt_keys: jax.Array  # [L, B, K, S, D]
  prompt_values: jax.Array  # [L, B, K, S, D]
  keys: jax.Array  # [L, B, K, N, M, D], of the samples' own tokens
  values: jax.Array  # [L, B, K, N, M, D]


def extend(prompt_keys, prompt_values, samples: int, tokens: int, mesh: Mesh | None) -> Cache:
  """The cache of prompts that are read, with room for `tokens` of each sample.

  Args:
    prompt_keys, prompt_values: [L, B, K, S, D].
    samples: N.
    tokens: M.
    mesh: over which B and K are split.
  """
  L, B, K, _, D = prompt_keys.shape
  empty = jnp.zeros((L, B, K, samples, tokens, D), prompt_keys.dtype)
  return _placed(Cache(prompt_keys, prompt_values, empty, empty), mesh)


def append(cache: Cache, newest, step, mesh: Mesh | None) -> Cache:
  """The cache with keys and values [L, B, N, K, D] of the samples' token number `step`."""

  def put(held, new):
    new = new.swapaxes(2, 3)[:, :, :, :, None]
    return jax.lax.dynamic_update_slice_in_dim(held, new, step, axis=4)

  keys, values = newest
  return _placed(cache._replace(keys=put(cache.keys, keys), values=put(cache.values, values)), mesh)


def _placed(cache: Cache, mesh: Mesh | None) -> Cache:
  if mesh is None:
    return cache
  heads = "tensor" if cache.keys.shape[2] % tensor_size(mesh) == 0 else None
  place = NamedSharding(mesh, PartitionSpec(None, ROWS, heads))
  return jax.lax.with_sharding_constraint(cache, place)


def attend(
  query,
  key,
  value,
  cache: Cache,
  prompt_lengths,
  step,
  *,
  window: int | None = None,
  images=None,
  mesh: Mesh | None = None,
):
  """Attention of the samples' newest tokens over their prompt, their earlier tokens and themselves.

  Args:
    query: float[B, N, H, D].
    key, value: float[B, N, K, D] with H a multiple of K; head h reads key head h // (H / K).
    cache: of one layer.
    prompt_lengths: int32[B]; what the cache holds of a prompt behind its length is padding.
    step: int32[], how many earlier tokens the samples have.
    window: how many positions a query sees, its own included; None: all.
    images: bool[B, S], which of the prompts' tokens are an image's, for multi-modal causal
      attention; None: without.
    mesh: over which B and K are split.

  Returns:
    float[B, N, H, D] in the query's dtype.
  """
  B, N, H, D = query.shape
  K, S = cache.prompt_keys.shape[1:3]
  M = cache.keys.shape[3]
  G = H // K
  query = query.reshape(B, N, K, G, D).swapaxes(1, 2)
  key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)

  def product(equation, *arrays):
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)

  # All samples of a prompt go through one product with its keys, Q = N * G.
  of_prompt = product("BKQD,BKSD->BKQS", query.reshape(B, K, N * G, D), cache.prompt_keys)
  of_prompt = of_prompt.reshape(B, K, N, G, S)
  of_earlier = product("BKNGD,BKNMD->BKNGM", query, cache.keys)
  of_itself = product("BKNGD,BKND->BKNG", query, key)[..., None]
  scores = jnp.concatenate([of_prompt, of_earlier, of_itself], axis=-1) * D**-0.5
  seen = _seen(prompt_lengths, S, step, M, window)[:, None, None, None]
  scores = jnp.where(seen, scores, _HIDDEN)
  if images is None:
    weights = _softmax(scores)
  else:
    of_images = jnp.pad(images, ((0, 0), (0, M + 1)))[:, None, None, None]
    weights = _softmax(jnp.where(of_images, _HIDDEN, scores))
    weights += _softmax(jnp.where(of_images, scores, _HIDDEN))
  weights = weights.astype(value.dtype)
  of_prompt = weights[..., :S].reshape(B, K, N * G, S)
  of_prompt = product("BKQS,BKSD->BKQD", of_prompt, cache.prompt_values)
  of_earlier = product("BKNGM,BKNMD->BKNGD", weights[..., S:-1], cache.values)
  of_itself = weights[..., -1:].astype(jnp.float32) * value[:, :, :, None]
  mixed = of_prompt.reshape(B, K, N, G, D) + of_earlier + of_itself
  mixed = mixed.astype(query.dtype).swapaxes(1, 2).reshape(B, N, H, D)
  return constrain_tensor(mixed, mesh, axis=2)


def _seen(prompt_lengths, prompt_length: int, step, tokens: int, window: int | None):
  """bool[B, S + M + 1], which of their prompt's, the earlier and the newest tokens queries see."""
  prompt, earlier = jnp.arange(prompt_length), jnp.arange(tokens)
  lengths = prompt_lengths[:, None]
  of_prompt, of_earlier = prompt < lengths, earlier < step
  if window is not None:  # a prompt's token has the position of its place
    of_prompt &= lengths + step - prompt < window
    of_earlier &= step - earlier < window
  of_earlier = jnp.broadcast_to(of_earlier, (len(lengths), tokens))
  return jnp.concatenate([of_prompt, of_earlier, jnp.ones_like(lengths, bool)], axis=1)


def _softmax(scores):
  """Over the last axis; zeros where all is hidden."""
  highest = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - jnp.maximum(highest, _HIDDEN / 2))
  # The highest score alone gives 1.
  return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)


def run_layers(layers: nnx.Module, x, call, cache: Cache | None, mesh: Mesh | None):
  """Applies stacked layers without a backward pass, each with its own slice of a cache.

  Args:
    layers: of `stack.build_stack`.
    x: the array that enters the first layer.
    call: `(layer, x, the layer's slice of the cache) -> (x, what is kept of the layer)`.
    cache: None: the layers get None.
    mesh: over which the first axis of x is split.

  Returns:
    The last layer's output, and what was kept, stacked [L, ...].
  """
  graphdef, params = nnx.split(layers)
  scanned, layer_of = stack.in_loop((params, cache), mesh)

  def body(x, scanned):
    layer_params, of_layer = layer_of(scanned)
    if mesh is not None and mesh.size > 1:
      layer_params = jax.tree.map(stack.cast_in_loop, layer_params)
    return call(nnx.merge(graphdef, layer_params), constrain_rows(x, mesh), of_layer)

  return jax.lax.scan(body, x, scanned)


def cache_bytes(
  config, prompts: int, prompt_length: int, samples: int, max_new_tokens: int, itemsize: int
) -> int:
  """Bytes of a cache over all devices; `data`, `fsdp` and `tensor` split it evenly.

  Args:
    config: LanguageConfig.
    prompts: B, rows of the batch, padding included.
    prompt_length: S, tokens of a row.
    samples: N of each prompt.
    max_new_tokens: of each sample; the last one is never read, so it takes no room.
    itemsize: bytes of a number of the model's dtype.
  """
  tokens = prompts * (prompt_length + samples * max(max_new_tokens - 1, 1))
  return 2 * config.layers * config.kv_heads * config.head_dim * tokens * itemsize
