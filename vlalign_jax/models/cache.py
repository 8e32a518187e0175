"""Keys and values of earlier tokens, so that a decoder computes only its newest token.

All samples of a prompt share the prompt's keys and values; each sample has those of its own tokens.
The samples' own places are a ring: the newest tokens of all rows go to the same place, whatever
their numbers in their answers. So rows may begin at different times, and one slice is written.
Rows may be in groups, each with a cache whose prompts have places of its own number: all rows pass
the model together, and attend group by group.
Inside the loop over layers, each layer reads its slice of the caches and returns only the newest
token's keys and values: a cache carried through that loop would be copied at every layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlalign_jax.models import row_groups, stack, stored
from vlalign_jax.models.stored import Stored
from vlalign_jax.sharding.mesh import ROWS, constrain_rows, constrain_tensor, tensor_size

# Instead of -inf, see models.tiles.
_HIDDEN = -1e30


class Cache(NamedTuple):
  """Keys and values of B prompts with N samples each; one layer's arrays have no first axis L."""

  prompt_keys: Stored  # [L, B, K, S, D]
  prompt_values: Stored  # [L, B, K, S, D]
  keys: Stored  # [L, B, K, N, M, D], of the samples' own tokens
  values: Stored  # [L, B, K, N, M, D]


def extend(
  prompt_keys,
  prompt_values,
  samples: int,
  tokens: int,
  mesh: Mesh | None,
  dtype: str = stored.MODEL,
) -> Cache:
  """Makes the cache of prompts, with space for M tokens of each of N samples.

  Args:
    prompt_keys, prompt_values: [L, B, K, S, D].
    samples: N.
    tokens: M.
    mesh: splits B and K.
    dtype: of `stored.CACHE_DTYPES`.
  """
  L, B, K, _, D = prompt_keys.shape
  empty = stored.zeros((L, B, K, samples, tokens, D), prompt_keys.dtype, dtype)
  keys, values = (stored.store(vectors, dtype) for vectors in (prompt_keys, prompt_values))
  return _place(Cache(keys, values, empty, empty), mesh)


def rows(caches: tuple[Cache, ...]) -> tuple[int, ...]:
  """Returns the rows of each group."""
  return tuple(cache.keys.numbers.shape[1] for cache in caches)


def append(caches: tuple[Cache, ...], newest, clock, mesh: Mesh | None) -> tuple[Cache, ...]:
  """Adds keys and values [L, B, N, K, D] of the samples' newest tokens, after `clock` others."""

  def add(cached, new, axis):
    place = clock % cached.shape[axis]
    return jax.lax.dynamic_update_slice_in_dim(cached, jnp.expand_dims(new, axis), place, axis)

  def of_group(cache: Cache, *vectors) -> Cache:
    kept = [
      jax.tree.map(
        lambda cached, new: add(cached, new, 4),
        old,
        stored.store(new.swapaxes(2, 3), stored.MODEL if old.scales is None else stored.INT8),
      )
      for old, new in zip((cache.keys, cache.values), vectors, strict=True)
    ]
    return _place(cache._replace(keys=kept[0], values=kept[1]), mesh)

  groups = (row_groups.split(vectors, rows(caches), mesh, axis=1) for vectors in newest)
  return tuple(map(of_group, caches, *groups))


def spec(cache: Cache, mesh: Mesh) -> PartitionSpec:
  """Returns how each array of a cache is split."""
  heads = "tensor" if cache.keys.numbers.shape[2] % tensor_size(mesh) == 0 else None
  return PartitionSpec(None, ROWS, heads)


def _place(cache: Cache, mesh: Mesh | None) -> Cache:
  if mesh is None:
    return cache
  return jax.lax.with_sharding_constraint(cache, NamedSharding(mesh, spec(cache, mesh)))


def attend(
  query,
  key,
  value,
  caches: tuple[Cache, ...],
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
    caches: of one layer, of each group of rows.
    prompt_lengths: int32[B]; the cache's tokens of a prompt beyond its length are padding.
    steps: int32[B], how many earlier tokens the samples have, at most M.
    clock: int32[], how many tokens were appended to the cache.
    window: how many positions a query sees, up to and including its own; None: all.
    images: bool[Bi, S] of each group, image tokens of the prompts, for multi-modal causal
      attention; None: not used.
    mesh: splits B and K.

  Returns:
    float[B, N, H, D] in the query's dtype.
  """
  sizes = tuple(cache.keys.numbers.shape[0] for cache in caches)
  given = (query, key, value, prompt_lengths, steps)
  groups = zip(*(row_groups.split(x, sizes, mesh) for x in given), strict=True)
  by_group = zip(groups, caches, images or [None] * len(caches), strict=True)
  attended = [
    _attend(*of_rows, clock=clock, cache=cache, window=window, images=of_images)
    for of_rows, cache, of_images in by_group
  ]
  return constrain_tensor(row_groups.join(attended, mesh), mesh, axis=2)


def _attend(query, key, value, prompt_lengths, steps, clock, cache: Cache, window, images):
  """Computes `attend` for one group of rows."""
  B, N, H, D = query.shape
  K, S = cache.prompt_keys.numbers.shape[1:3]
  M = cache.keys.numbers.shape[3]
  G = H // K
  query = query.reshape(B, N, K, G, D).swapaxes(1, 2)
  key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)

  # All samples of a prompt share one product with its keys, Q = N * G.
  prompt = query.reshape(B, K, N * G, D)
  prompt = stored.products("BKQD,BKSD->BKQS", prompt, cache.prompt_keys)
  earlier = stored.products("BKNGD,BKNMD->BKNGM", query, cache.keys)
  newest = jnp.einsum("BKNGD,BKND->BKNG", query, key, preferred_element_type=jnp.float32)
  scores = [prompt.reshape(B, K, N, G, S), earlier, newest[..., None]]
  scores = jnp.concatenate(scores, axis=-1) * D**-0.5
  mask = _visible(prompt_lengths, S, steps, clock, M, window)[:, None, None, None]
  scores = jnp.where(mask, scores, _HIDDEN)
  if images is None:
    weights = _softmax(scores)
  else:
    is_image = jnp.pad(images, ((0, 0), (0, M + 1)))[:, None, None, None]
    weights = _softmax(jnp.where(is_image, _HIDDEN, scores))
    weights += _softmax(jnp.where(is_image, scores, _HIDDEN))
  prompt = weights[..., :S].reshape(B, K, N * G, S)
  prompt = stored.sums("BKQS,BKSD->BKQD", prompt, cache.prompt_values, value.dtype)
  earlier = stored.sums("BKNGM,BKNMD->BKNGD", weights[..., S:-1], cache.values, value.dtype)
  newest = weights[..., -1:].astype(value.dtype).astype(jnp.float32) * value[:, :, :, None]
  attended = prompt.reshape(B, K, N, G, D) + earlier + newest
  return attended.astype(query.dtype).swapaxes(1, 2).reshape(B, N, H, D)


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


def run_layers(layers: nnx.Module, x, call, caches: tuple[Cache, ...] | None, mesh: Mesh | None):
  """Applies stacked layers without a backward pass, each with its own slice of caches.

  Args:
    layers: from `stack.build_stack`.
    x: input of the first layer.
    call: `(layer, x, the layer's slice of the caches) -> (x, output)`.
    caches: None: the layers get None.
    mesh: splits the first axis of x.

  Returns:
    The last layer's x, and the outputs of all layers, stacked [L, ...].
  """
  graphdef, params = nnx.split(layers)
  scanned, select_layer = stack.in_loop((params, caches), mesh)

  def body(x, scanned):
    layer_params, layer_caches = select_layer(scanned)
    if mesh is not None and mesh.size > 1:
      layer_params = jax.tree.map(stack.cast_in_loop, layer_params)
    return call(nnx.merge(graphdef, layer_params), constrain_rows(x, mesh), layer_caches)

  return jax.lax.scan(body, x, scanned)


def cache_bytes(
  config,
  prompts: int,
  prompt_length: int,
  samples: int,
  max_new_tokens: int,
  itemsize: int,
  dtype: str = stored.MODEL,
) -> int:
  """Returns the bytes of a cache over all devices, which `data`, `fsdp` and `tensor` split evenly.

  Args:
    config: LanguageConfig.
    prompts: B, rows of the batch, padding included.
    prompt_length: S, tokens of a row.
    samples: N of each prompt.
    max_new_tokens: of each sample; the last one is never attended to, so it is not in the cache.
    itemsize: bytes of one element of activations.
    dtype: of `stored.CACHE_DTYPES`.
  """
  tokens = prompts * (prompt_length + samples * max(max_new_tokens - 1, 1))
  vector = stored.vector_bytes(config.head_dim, itemsize, dtype)
  return 2 * config.layers * config.kv_heads * tokens * vector
