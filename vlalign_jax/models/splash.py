"""Attention on TPUs: JAX's Pallas kernel, for rows of examples with one answer each."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from vlalign_jax.sharding.mesh import ROWS

# Lanes of a TPU's vector unit; the kernel's blocks are multiples of it.
LANES = 128
BLOCKS = (512, 384, 256, 128)
# Segments of queries and keys that a softmax excludes; they differ, so that none see each other.
_NO_QUERY, _NO_KEY = -1, -2


def attend(
  query,
  key,
  value,
  segments,
  *,
  window: int | None = None,
  images=None,
  mesh: Mesh | None,
  interpret: bool = False,
):
  """Computes causal attention within segments.

  Args:
    query: float[B, T, H, D].
    key, value: float[B, T, K, D] with H a multiple of K; head h reads key head h // (H / K).
    segments: int32[B, T].
    window: how many positions a query sees, up to and including its own; None: all.
    images: bool[B, T], for multi-modal causal attention: the kernel then runs once for each class
      of keys; None: not used.
    mesh: splits B and, over `tensor`, heads; None: one device.
    interpret: run the kernel as plain JAX, on any platform.

  Returns:
    float[B, T, H, D] in the query's dtype.
  """
  run = functools.partial(
    _softmax, query, key, value, window=window, mesh=mesh, interpret=interpret
  )
  if images is None:
    return run(segments, segments)
  from_text = run(segments, jnp.where(images, _NO_KEY, segments))
  text_queries = jnp.where(images, _NO_QUERY, segments)
  from_images = run(text_queries, jnp.where(images, segments, _NO_KEY))

  def where(condition, attended, other):
    return jnp.where(condition[:, :, None, None], attended, other)

  # The kernel's result for a query that sees no key is arbitrary.
  from_text = where(_sees_any(~images, segments, window), from_text, 0)
  from_images = where(_sees_any(images, segments, window), from_images, 0)
  # An image token's softmax over images sees only the token itself.
  values = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
  return from_text + where(images, values, from_images)


def _sees_any(keys, segments, window: int | None):
  """Returns bool[B, T], whether each query sees a key where `keys` bool[B, T] is true."""
  index = jnp.arange(segments.shape[1])
  is_start = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
  start = jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)
  if window is not None:
    start = jnp.maximum(start, index - window + 1)
  return jax.lax.cummax(jnp.where(keys, index, -1), axis=1) >= start


def _softmax(query, key, value, query_segments, key_segments, *, window, mesh, interpret):
  """Computes one softmax over the keys of a query's segment, up to the query; see `attend`."""
  T, D = query.shape[1], query.shape[3]
  padding = -T % LANES
  query = query * jnp.asarray(D**-0.5, query.dtype)
  query, key, value = (
    jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    for x in (query, key, value)
  )
  # No query before the padding sees it.
  ids = kernels.SegmentIds(
    *(jnp.pad(x, ((0, 0), (0, padding))) for x in (query_segments, key_segments))
  )

  def run(query, key, value, ids):
    kernel = _make_kernel(query.shape[1], query.shape[2], window, interpret)
    return jax.vmap(kernel)(query, key, value, ids)

  if mesh is not None:
    heads, rows = PartitionSpec(ROWS, "tensor"), PartitionSpec(ROWS)
    specs = (heads, heads, heads, rows)
    run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
  attended: Any = run(query, key, value, ids)
  return attended.transpose(0, 2, 1, 3)[:, :T]


def _make_kernel(heads: int, length: int, window: int | None, interpret: bool):
  block = next(size for size in BLOCKS if length % size == 0)
  sizes = kernels.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  shape = (length, length)
  # Within a segment, indices in the row differ by as much as positions.
  mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
  mask = masks.MultiHeadMask([mask] * heads)
  make = functools.partial(kernels.make_splash_mha, head_shards=1, q_seq_shards=1)
  return make(mask, block_sizes=sizes, interpret=interpret)
