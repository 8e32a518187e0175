"""Attention on TPUs: JAX's Pallas kernel, for rows whose examples have one answer each."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from vlalign_jax.sharding.mesh import ROWS

# The kernel's blocks are multiples of the lanes of a TPU's vector unit.
LANES = 128
BLOCKS = (512, 384, 256, 128)
# Segments of what takes no part in a softmax: no query is equal to a key.
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
  """Causal attention within segments.

  Args:
    query: float[B, T, H, D].
    key, value: float[B, T, K, D] with H a multiple of K; head h reads key head h // (H / K).
    segments: int32[B, T].
    window: how many places back a query sees, its own included; None: all.
    images: bool[B, T], for multi-modal causal attention: the kernel then runs once for each class
      of keys; None: without.
    mesh: over which B and, by `tensor`, heads are split; None: one device.
    interpret: run the kernel as plain JAX, on any platform.

  Returns:
    float[B, T, H, D] in the query's dtype.
  """
  run = functools.partial(
    _softmax, query, key, value, window=window, mesh=mesh, interpret=interpret
  )
  if images is None:
    return run(segments, segments)
  of_text = run(segments, jnp.where(images, _NO_KEY, segments))
  asking, shown = jnp.where(images, _NO_QUERY, segments), jnp.where(images, segments, _NO_KEY)
  of_images = run(asking, shown)

  def where(condition, mixed, other):
    return jnp.where(condition[:, :, None, None], mixed, other)

  # The kernel gives anything where it sees nothing.
  of_text = where(_sees(~images, segments, window), of_text, 0)
  of_images = where(_sees(images, segments, window), of_images, 0)
  # An image token's softmax over images sees itself alone.
  own = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
  return of_text + where(images, own, of_images)


def _sees(keys, segments, window: int | None):
  """bool[B, T], whether at or before a place, in its segment and window, there is one of `keys`."""
  index = jnp.arange(segments.shape[1])
  begins = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
  start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
  if window is not None:
    start = jnp.maximum(start, index - window + 1)
  return jax.lax.cummax(jnp.where(keys, index, -1), axis=1) >= start


def _softmax(query, key, value, query_segments, key_segments, *, window, mesh, interpret):
  """One softmax over the keys of a query's segment, up to its place; arguments as of `attend`."""
  T, D = query.shape[1], query.shape[3]
  padding = -T % LANES
  query = query * jnp.asarray(D**-0.5, query.dtype)
  query, key, value = (
    jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    for x in (query, key, value)
  )
  # Nothing real looks at the end of a row.
  ids = kernels.SegmentIds(
    *(jnp.pad(x, ((0, 0), (0, padding))) for x in (query_segments, key_segments))
  )

  def local(query, key, value, ids):
    kernel = _kernel(query.shape[1], query.shape[2], window, interpret)
    return jax.vmap(kernel)(query, key, value, ids)

  if mesh is not None:
    heads, rows = PartitionSpec(ROWS, "tensor"), PartitionSpec(ROWS)
    local = jax.shard_map(
      local, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
  mixed: Any = local(query, key, value, ids)
  return mixed.transpose(0, 2, 1, 3)[:, :T]


def _kernel(heads: int, length: int, window: int | None, interpret: bool):
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
  # Within a segment, so many places back is so many positions back.
  mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
  mask = masks.MultiHeadMask([mask] * heads)
  make = functools.partial(kernels.make_splash_mha, head_shards=1, q_seq_shards=1)
  return make(mask, block_sizes=sizes, interpret=interpret)
