"""Attention over rows that hold several examples, each with a shared prompt and several answers.

One rule covers padding, packing and shared prompts: query q sees key k iff both are of the same
segment, k belongs to the prompt (branch 0) or to q's own branch, and k is not after q.
"""

import jax
from jax.sharding import Mesh

from vlalign_jax.models import splash, tiles
from vlalign_jax.sharding.mesh import row_blocks


def attend(query, key, value, segments=None, branches=None, *, mesh: Mesh | None = None):
  """Softmax self-attention with grouped key/value heads and float32 statistics.

  Args:
    query: float[B, T, H, D].
    key, value: float[B, T, K, D] with H a multiple of K; head h reads key head h // (H / K).
    segments, branches: int32[B, T], for the rule above. Without branches all is branch 0; without
      segments everything sees everything.
    mesh: over which B is split; None: one device of JAX's default platform.

  Returns:
    float[B, T, H, D] in the query's dtype.
  """
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  if platform == "tpu" and segments is not None and branches is None:
    return splash.attend(query, key, value, segments, mesh=mesh)
  B, T, H, D = query.shape
  K = key.shape[2]
  query = query.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
  key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
  layout = None if segments is None else tiles.Layout(segments, branches)
  on_cpu = platform == "cpu"
  mixed = tiles.attend(
    query,
    key,
    value,
    layout,
    tile=tiles.CPU_TILE if on_cpu else tiles.TILE,
    row_shards=row_blocks(mesh) if on_cpu else 0,
  )
  return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
