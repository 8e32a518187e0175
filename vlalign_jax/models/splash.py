"""Attention on TPUs: JAX's Pallas kernel, for rows of examples and for pictures.

The kernel computes causal masks and segments by itself. What it cannot compute, the answers to a
shared prompt that do not see each other, is a mask [T, T] of each row, one for all heads; blocks in
which no query sees a key are skipped either way.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from vlalign_jax.models import tiles
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
  layout: tiles.Layout | None,
  *,
  window: int | None = None,
  mesh: Mesh | None = None,
  interpret: bool = False,
):
  """Computes softmax attention by the rule of `models.attention`.

  Args:
    query: float[B, T, H, D].
    key, value: float[B, S, K, D] with H a multiple of K; S = T if there is a layout.
    layout: of the rows; None: every query sees all keys.
    window: see `tiles.visible`.
    mesh: splits B and, over `tensor`, heads; None: one device.
    interpret: run the kernel as plain JAX, on any platform.

  Returns:
    float[B, T, H, D] in the query's dtype.
  """
  attend = functools.partial(_attend, window=window, interpret=interpret)
  if mesh is not None:
    heads, rows = PartitionSpec(ROWS, None, "tensor"), PartitionSpec(ROWS)
    specs = (heads, heads, heads, rows)
    attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
  return attend(query, key, value, layout)


def _attend(query, key, value, layout: tiles.Layout | None, *, window, interpret):
  """Computes `attend` for the rows and heads of one device."""
  T, S, D = query.shape[1], key.shape[1], query.shape[3]
  query = query * jnp.asarray(D**-0.5, query.dtype)
  query, key, value = (_pad_tokens(x).swapaxes(1, 2) for x in (query, key, value))
  run = functools.partial(_run, query, key, value, interpret=interpret)
  attended: Any
  if layout is None:
    attended = run(masks.FullMask((query.shape[2], key.shape[2])), _hide_padding(query, key, S))
  elif layout.branches is None:
    attended = _attend_segments(run, value, layout, window)
  else:
    attended = _attend_branches(run, layout, window)
  return attended.swapaxes(1, 2)[:, :T]


def _hide_padding(query, key, keys: int) -> kernels.SegmentIds | None:
  """Returns segments [B, T] and [B, S] that hide keys from number `keys` on; None if none are."""
  B, T, S = query.shape[0], query.shape[2], key.shape[2]
  if keys == S:
    return None
  is_padding = (jnp.arange(S) >= keys).astype(jnp.int32)
  return kernels.SegmentIds(jnp.zeros((B, T), jnp.int32), jnp.broadcast_to(is_padding, (B, S)))


def _attend_segments(run, value, layout: tiles.Layout, window):
  """Computes attention of examples with one answer each; the kernel makes the mask."""
  segments = _pad_tokens(layout.segments)  # no query before the padding sees it
  shape = segments.shape[1], segments.shape[1]
  # Within a segment, indices in the row differ by as much as positions.
  mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
  if layout.images is None:
    return run(mask, kernels.SegmentIds(segments, segments))
  images = _pad_tokens(layout.images)
  from_text = run(mask, kernels.SegmentIds(segments, jnp.where(images, _NO_KEY, segments)))
  text_queries = jnp.where(images, _NO_QUERY, segments)
  from_images = run(mask, kernels.SegmentIds(text_queries, jnp.where(images, segments, _NO_KEY)))
  # The kernel's result for a query that sees no key is arbitrary.
  from_text = _where(_sees_any(~images, segments, window), from_text, 0)
  from_images = _where(_sees_any(images, segments, window), from_images, 0)
  # An image token's softmax over images sees only the token itself.
  values = jnp.repeat(value, from_text.shape[1] // value.shape[1], axis=1)
  return from_text + _where(images, values, from_images)


def _attend_branches(run, layout: tiles.Layout, window):
  """Computes attention of examples with several answers, by a mask for each row."""
  layout = jax.tree.map(_pad_tokens, layout)
  index = jnp.arange(layout.segments.shape[1])
  mask = tiles.visible(layout, layout, index, index, window)
  if layout.images is None:
    return run(mask, None)
  attended: Any = 0
  for class_keys in (~layout.images, layout.images):
    class_mask = mask & class_keys[:, None, :]
    # The kernel's result for a query that sees no key of the class is arbitrary.
    attended += _where(jnp.any(class_mask, axis=2), run(class_mask, None), 0)
  return attended


def _where(condition, attended, other):
  """Returns [B, H, T, D]: `attended` where `condition` bool[B, T] is true, else `other`."""
  return jnp.where(condition[:, None, :, None], attended, other)


def _sees_any(keys, segments, window: int | None):
  """Returns bool[B, T], whether each query sees a key where `keys` bool[B, T] is true."""
  index = jnp.arange(segments.shape[1])
  is_start = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
  start = jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)
  if window is not None:
    start = jnp.maximum(start, index - window + 1)
  return jax.lax.cummax(jnp.where(keys, index, -1), axis=1) >= start


def _run(query, key, value, mask, ids, *, interpret: bool):
  """Runs the kernel for each row.

  Args:
    query: [B, H, T, D], scaled; T and S are multiples of LANES.
    key, value: [B, K, S, D].
    mask: a mask of the kernel's library, for all rows, or bool[B, T, S].
    ids: kernels.SegmentIds of [B, T] and [B, S]; None: there are no segments.
    interpret: see `attend`.
  """
  sizes = _block_sizes(query.shape[2], key.shape[2])
  make = functools.partial(
    kernels.make_splash_mha, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
  )
  if not isinstance(mask, jax.Array):
    kernel = make(masks.MultiHeadMask([mask] * query.shape[1]))
    return jax.vmap(kernel)(query, key, value, ids)

  def run_row(query, key, value, mask):
    kernel = make(mask[None])  # of one head: the kernel then takes it for all
    # The library turns this field into an array, and then asks for its truth while tracing.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel(query, key, value)

  return jax.vmap(run_row)(query, key, value, mask)


def _block_sizes(queries: int, keys: int) -> kernels.BlockSizes:
  block_q, block_kv = (
    next(size for size in BLOCKS if length % size == 0) for length in (queries, keys)
  )
  return kernels.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
  )


def _pad_tokens(x):
  """Returns [B, T, ...] with T padded to a multiple of the kernel's lanes."""
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES)] + [(0, 0)] * (x.ndim - 2))
