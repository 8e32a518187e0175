"""Attention on NVIDIA GPUs: cuDNN's fused kernels, through jax.nn.dot_product_attention.

The kernel takes the attention rule as a mask [B, 1, T, T], one for all heads, and skips keys after
a query. Packing, shared prompts, sliding windows and multi-modal causal attention are all masks.
Before jax 0.11.1 the backward pass also computes an unused gradient of the mask, which costs time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from vlalign_jax.models import tiles
from vlalign_jax.sharding.mesh import ROWS

# The kernels' backward pass needs even numbers of queries and keys.
_TOKENS_MULTIPLE = 2


def attend(
  query,
  key,
  value,
  layout: tiles.Layout | None,
  *,
  window: int | None = None,
  mesh: Mesh | None = None,
  implementation: str = "cudnn",
):
  """Computes softmax attention by the rule of `models.attention`.

  Args:
    query: bfloat16 or float16[B, T, H, D], D a multiple of 8.
    key, value: the same dtype, [B, S, K, D] with H a multiple of K; S = T if there is a layout.
    layout: of the rows; None: every query sees all keys.
    window: see `tiles.visible`.
    mesh: splits B and, over `tensor`, heads; None: one device.
    implementation: of jax.nn.dot_product_attention; "xla" computes the same on any platform.

  Returns:
    [B, T, H, D] in the query's dtype.
  """
  options: Any = {"implementation": implementation}
  kernel = functools.partial(jax.nn.dot_product_attention, **options)
  attend = functools.partial(_attend, kernel=kernel, window=window)
  if mesh is not None:
    heads, rows = PartitionSpec(ROWS, None, "tensor"), PartitionSpec(ROWS)
    specs = (heads, heads, heads, rows)
    attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
  return attend(query, key, value, layout)


def _attend(query, key, value, layout, *, kernel, window):
  """Computes `attend` for the rows and heads of one device."""
  B, T, S = *query.shape[:2], key.shape[1]
  query, key, value, layout = jax.tree.map(_pad_tokens, (query, key, value, layout))
  if layout is None:
    lengths = None if key.shape[1] == S else jnp.full(B, S, jnp.int32)
    return kernel(query, key, value, key_value_seq_lengths=lengths)[:, :T]
  # Padding comes after all real keys: no real query sees it.
  index = jnp.arange(query.shape[1])
  mask = tiles.visible(layout, layout, index, index, window)
  if layout.images is None:
    attended = kernel(query, key, value, mask=mask[:, None], is_causal=True)
    return attended[:, :T]
  attended = jnp.zeros_like(query)
  for class_keys in (~layout.images, layout.images):
    class_mask = mask & class_keys[:, None, :]
    class_attended = kernel(query, key, value, mask=class_mask[:, None], is_causal=True)
    # The kernel's result for a query that sees no key of the class is arbitrary.
    sees_any = jnp.any(class_mask, axis=2)[:, :, None, None]
    attended += jnp.where(sees_any, class_attended, 0)
  return attended[:, :T]


def _pad_tokens(x):
  """Returns [B, T, ...] with T padded to a number that the kernels take."""
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % _TOKENS_MULTIPLE)] + [(0, 0)] * (x.ndim - 2))
