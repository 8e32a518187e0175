"""Keys and values of earlier tokens, so that a decoder computes only its newest token.

All samples of a prompt share the prompt's keys and values; each sample has those of its own tokens.
The samples' own places are a ring: the newest tokens of all rows go to the same place, whatever
their numbers in their answers. So rows may begin at different times, and one slice is written.
Inside the loop over layers, each layer reads its slice of the cache and returns only the newest
token's keys and values: a cache carried through that loop would be copied at every layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlalign_jax.models import stack
from vlalign_jax.sharding.mesh import ROWS, constrain_rows, constrain_tensor, tensor_size

# Instead of -inf, see models.tiles.
_HIDDEN = -1e30


class Cache(NamedTuple):
  """Keys and values of B prompts with N samples each; one layer's arrays have no first axis L."""

  prompt_keys: jax.Array  # [L, B, K, S, D]
  prompt_values: jax.Array  # [L, B, K, S, D]
  keys: jax.Array  # [L, B, K, N, M, D], of the samples' own tokens
  values: jax.Array  # [L, B, K, N, M, D]


def extend(prompt_keys, prompt_values, samples: int, tokens: int, mesh: Mesh | None) -> Cache:
  """Makes the cache of prompts, with space for M tokens of each of N samples.

  Args:
    prompt_keys, prompt_values: [L, B, K, S, D].
    samples: N.
    tokens: M.
    mesh: splits B and K.
  """
  L, B, K, _, D = prompt_keys.shape
  empty = jnp.zeros((L, B, K, samples, tokens, D), prompt_keys.dtype)
  return _place(Cache(prompt_keys, prompt_values, empty, empty), mesh)


def append(cache: Cache, newest, clock, mesh: Mesh | None) -> Cache:
  """Adds keys and values [L, B, N, K, D] of the samples' newest tokens, after `clock` others."""
  place = clock % cache.keys.shape[4]

  def add(cached, new):
    new = new.swapaxes(2, 3)[:, :, :, :, None]
    return jax.lax.dynamic_update_slice_in_dim(cached, new, place, axis=4)

  keys, values = newest
  return _place(cache._replace(keys=add(cache.keys, keys), values=add(cache.values, values)), mesh)


def spec(cache: Cache, mesh: Mesh) -> PartitionSpec:
  """Returns how each array of a cache is split."""
  heads = "tensor" if cache.keys.shape[2] % tensor_size(mesh) == 0 else None
  return PartitionSpec(None, ROWS, heads)


def _place(cache: Cache, mesh: Mesh | None) -> Cache:
  if mesh is None:
    return cache
  return jax.lax.with_sharding_constraint(cache, NamedSharding(mesh, spec(cache, mesh)))


def attend(
  query,
  key,
  value,
  cache: Cache,
  prompt_lengths,
  steps,
  clock,
  *,
  window: int | None = None,
  images=None,
  mesh: Mesh | None = None,
):
  """Computes attention of the samples' newest tokens over prompt, earlier tokens and themselves.

  Args:
    query: float[B, N, H, D].
    key, value: float[B, N, K, D] with H a multiple of K; head h reads key head h // (H / K).
    cache: of one layer.
    prompt_lengths: int32[B]; the cache's tokens of a prompt beyond its length are padding.
    steps: int32[B], how many earlier tokens the samples have, at most M.
    clock: int32[], how many tokens were appended to the cache.
    window: how many positions a query sees, up to and including its own; None: all.
    images: bool[B, S], image tokens of the prompts, for multi-modal causal attention; None: not
      used.
    mesh: splits B and K.

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

  # All samples of a prompt share one product with its keys, Q = N * G.
  prompt = product("BKQD,BKSD->BKQS", query.reshape(B, K, N * G, D), cache.prompt_keys)
  prompt = prompt.reshape(B, K, N, G, S)
  earlier = product("BKNGD,BKNMD->BKNGM", query, cache.keys)
  newest = product("BKNGD,BKND->BKNG", query, key)[..., None]
  scores = jnp.concatenate([prompt, earlier, newest], axis=-1) * D**-0.5
  mask = _visible(prompt_lengths, S, steps, clock, M, window)[:, None, None, None]
  scores = jnp.where(mask, scores, _HIDDEN)
  if images is None:
    weights = _softmax(scores)
  else:
    is_image = jnp.pad(images, ((0, 0), (0, M + 1)))[:, None, None, None]
    weights = _softmax(jnp.where(is_image, _HIDDEN, scores))
    weights += _softmax(jnp.where(is_image, scores, _HIDDEN))
  weights = weights.astype(value.dtype)
  prompt = weights[..., :S].reshape(B, K, N * G, S)
  prompt = product("BKQS,BKSD->BKQD", prompt, cache.prompt_values)
  earlier = product("BKNGM,BKNMD->BKNGD", weights[..., S:-1], cache.values)
  newest = weights[..., -1:].astype(jnp.float32) * value[:, :, :, None]
  attended = prompt.reshape(B, K, N, G, D) + earlier + newest
  attended = attended.astype(query.dtype).swapaxes(1, 2).reshape(B, N, H, D)
  return constrain_tensor(attended, mesh, axis=2)


def _visible(prompt_lengths, prompt_length: int, steps, clock, tokens: int, window: int | None):
  """Returns bool[B, S + M + 1], which prompt, earlier and newest tokens queries see."""
  prompt_index = jnp.arange(prompt_length)
  age = jnp.mod(clock - 1 - jnp.arange(tokens), tokens)  # 0: the token before the newest
  lengths, steps = prompt_lengths[:, None], steps[:, None]
  prompt, earlier = prompt_index < lengths, age < steps
  if window is not None:  # the position of a prompt's token is its index
    prompt &= lengths + steps - prompt_index < window
    earlier &= age + 1 < window
  return jnp.concatenate([prompt, earlier, jnp.ones_like(lengths, bool)], axis=1)


def _softmax(scores):
  """Returns the softmax over the last axis; zeros if all scores are hidden."""
  highest = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - jnp.maximum(highest, _HIDDEN / 2))
  # The sum is at least 1 if any score is not hidden: exp(highest - highest).
  return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)


def run_layers(layers: nnx.Module, x, call, cache: Cache | None, mesh: Mesh | None):
  """Applies stacked layers without a backward pass, each with its own slice of a cache.

  Args:
    layers: from `stack.build_stack`.
    x: input of the first layer.
    call: `(layer, x, the layer's slice of the cache) -> (x, output)`.
    cache: None: the layers get None.
    mesh: splits the first axis of x.

  Returns:
    The last layer's x, and the outputs of all layers, stacked [L, ...].
  """
  graphdef, params = nnx.split(layers)
  scanned, select_layer = stack.in_loop((params, cache), mesh)

  def body(x, scanned):
    layer_params, layer_cache = select_layer(scanned)
    if mesh is not None and mesh.size > 1:
      layer_params = jax.tree.map(stack.cast_in_loop, layer_params)
    return call(nnx.merge(graphdef, layer_params), constrain_rows(x, mesh), layer_cache)

  return jax.lax.scan(body, x, scanned)


def cache_bytes(
  config, prompts: int, prompt_length: int, samples: int, max_new_tokens: int, itemsize: int
) -> int:
  """Returns the bytes of a cache over all devices, which `data`, `fsdp` and `tensor` split evenly.

  Args:
    config: LanguageConfig.
    prompts: B, rows of the batch, padding included.
    prompt_length: S, tokens of a row.
    samples: N of each prompt.
    max_new_tokens: of each sample; the last one is never attended to, so it is not in the cache.
    itemsize: bytes of one element.
  """
  tokens = prompts * (prompt_length + samples * max(max_new_tokens - 1, 1))
  return 2 * config.layers * config.kv_heads * config.head_dim * tokens * itemsize
