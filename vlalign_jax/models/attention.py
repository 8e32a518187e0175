"""Attention over rows that hold several examples, each with a shared prompt and several answers.

One rule covers padding, packing and shared prompts: query q sees key k iff both have the same
segment, k belongs to the prompt (branch 0) or to q's own branch, and k is not after q. With a
sliding window, q's position must also be less than `window` greater than k's.

Multi-modal causal attention (Yao et al. 2023, "DeepSpeed-VisualChat") applies that rule with two
softmaxes, over text keys and over image keys, and adds their results. An image token sees no other
image token. A query that sees no key of a class gets zero from its softmax.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from vlalign_jax.models import backends, cudnn, splash, tiles
from vlalign_jax.sharding.mesh import row_blocks


def attend(
  query,
  key,
  value,
  segments=None,
  branches=None,
  *,
  positions=None,
  window: int | None = None,
  images=None,
  mesh: Mesh | None = None,
  backend: str = backends.AUTO,
):
  """Computes softmax attention with grouped key/value heads and float32 statistics.

  Args:
    query: float[B, T, H, D].
    key, value: float[B, S, K, D] with H a multiple of K; head h reads key head h // (H / K). S = T
      if there are segments.
    segments, branches: int32[B, T], for the rule above. Without branches all tokens are in branch
      0; without segments every query sees all keys.
    positions: int32[B, T], from 0 in every example; needed if there is a window.
    window: how many positions a query sees, up to and including its own; None: all.
    images: bool[B, T], image tokens, for multi-modal causal attention; None: not used.
    mesh: splits B; None: one device of JAX's default platform.
    backend: the kernel, one of `backends.ATTENTION_NAMES`.

  Returns:
    float[B, T, H, D] in the query's dtype.

  Raises:
    InputError: the kernel does not support these arguments.
  """
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  B, T, H, D = query.shape
  if window and window >= T:
    window = None
  backend = backends.choose(backend, backends.request_for(platform, query, segments, branches))
  layout = None
  if segments is not None:
    layout = tiles.Layout(segments, branches, None if window is None else positions, images)
  if backend == backends.SPLASH:
    return splash.attend(query, key, value, layout, window=window, mesh=mesh)
  if backend == backends.CUDNN:
    return cudnn.attend(query, key, value, layout, window=window, mesh=mesh)
  K = key.shape[2]
  query = query.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
  key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
  on_cpu = platform == "cpu"
  attended: Any = tiles.attend(
    query,
    key,
    value,
    layout,
    tile=tiles.CPU_TILE if on_cpu else tiles.TILE,
    row_shards=row_blocks(mesh) if on_cpu else 0,
    window=window,
  )
  return attended.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
