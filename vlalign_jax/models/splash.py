"""Attention on TPUs: JAX's Pallas kernel, for rows whose examples have one answer each."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from vlalign_jax.sharding.mesh import ROWS

# The kernel's blocks are multiples of the lanes of a TPU's vector unit.
LANES = 128
BLOCKS = (512, 384, 256, 128)


def attend(query, key, value, segments, *, mesh: Mesh | None, interpret: bool = False):
  """Causal attention within segments.

  Args:
    query: float[B, T, H, D].
    key, value: float[B, T, K, D] with H a multiple of K; head h reads key head h // (H / K).
    segments: int32[B, T].
    mesh: over which B and, by `tensor`, heads are split; None: one device.
    interpret: run the kernel as plain JAX, on any platform.

  Returns:
    float[B, T, H, D] in the query's dtype.
  """
  T, D = query.shape[1], query.shape[3]
  padding = -T % LANES
  query = query * jnp.asarray(D**-0.5, query.dtype)
  query, key, value = (
    jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    for x in (query, key, value)
  )
  # Nothing real looks at the end of a row.
  segments = jnp.pad(segments, ((0, 0), (0, padding)))

  def local(query, key, value, segments):
    kernel = _kernel(query.shape[1], query.shape[2], interpret)
    ids = kernels.SegmentIds(segments, segments)
    return jax.vmap(kernel)(query, key, value, ids)

  if mesh is not None:
    heads, rows = PartitionSpec(ROWS, "tensor"), PartitionSpec(ROWS)
    local = jax.shard_map(
      local, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
  mixed = local(query, key, value, segments)
  return mixed.transpose(0, 2, 1, 3)[:, :T]


def _kernel(heads: int, length: int, interpret: bool):
  block = next(size for size in BLOCKS if length % size == 0)
  sizes = kernels.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
  make = functools.partial(kernels.make_splash_mha, head_shards=1, q_seq_shards=1)
  return make(mask, block_sizes=sizes, interpret=interpret)
