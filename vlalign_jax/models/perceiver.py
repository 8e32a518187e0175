"""The `perceiver` projector: learned queries attend to patches (Bai et al. 2023, "Qwen-VL").

An image of any size becomes 256 embeddings. Fixed position embeddings are added to keys and
queries, not to values.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.models import attention
from vlalign_jax.models.linear import Linear
from vlalign_jax.sharding.mesh import constrain_rows, constrain_tensor

GRID = 16  # queries along a side
QUERIES = GRID**2
HEAD_DIM = 128
EPSILON = 1e-12


class CrossAttention(nnx.Module):
  def __init__(self, width: int, linear, rngs):
    self.query = linear(width, width, rngs=rngs)
    self.key = linear(width, width, rngs=rngs)
    self.value = linear(width, width, rngs=rngs)
    self.out = linear(width, width, rngs=rngs)

  def __call__(self, queries, keys, values, mesh):
    """Returns [N, Q, D] from queries [Q, D], shared by all images, and keys, values [N, P, D]."""
    N = len(keys)

    def heads(x):
      x = x.reshape(*x.shape[:-1], -1, HEAD_DIM)
      return constrain_tensor(jnp.broadcast_to(x, (N, *x.shape[-3:])), mesh, axis=2)

    query, key, value = heads(self.query(queries)), heads(self.key(keys)), heads(self.value(values))
    attended = constrain_tensor(attention.attend(query, key, value, mesh=mesh), mesh, axis=2)
    return self.out(attended.reshape(N, -1, keys.shape[-1]))


class PerceiverProjector(nnx.Module):
  def __init__(self, config, vision, *, dtype, param_dtype, rngs: nnx.Rngs):
    """Builds the module; see `projector.build_projector`."""
    width, types = config.out_width, {"dtype": dtype, "param_dtype": param_dtype}
    normal = nnx.initializers.normal(0.02)
    linear = functools.partial(Linear, kernel_init=normal, **types)
    norm = functools.partial(
      nnx.LayerNorm, width, epsilon=EPSILON, use_fast_variance=False, rngs=rngs, **types
    )
    self.has_class_token = bool(vision.class_tokens) and vision.keep_class_token
    self.queries = nnx.Param(normal(rngs.params(), (QUERIES, width), param_dtype))
    self.query_norm = norm()
    self.input = linear(config.in_width, width, rngs=rngs)
    self.input_norm = norm()
    self.attention = CrossAttention(width, linear, rngs)
    self.norm = norm()
    self.linear = linear(width, width, rngs=rngs)

  def __call__(self, features, mesh: Mesh | None = None):
    if self.has_class_token:
      features = features[:, 1:]
    values = self.input_norm(constrain_rows(self.input(features), mesh))
    width, side = values.shape[-1], round(values.shape[1] ** 0.5)
    keys = values + positions(width, side).astype(values.dtype)
    queries = self.query_norm(self.queries[...])
    queries += positions(width, GRID).astype(queries.dtype)
    attended = constrain_rows(self.attention(queries, keys, values, mesh), mesh)
    return constrain_rows(self.linear(self.norm(attended)), mesh)


def positions(width: int, side: int):
  """Returns position embeddings of a grid: those of the queries' grid, resized.

  They are sines and cosines of the column, then of the row (Chen et al. 2021, MoCo v3), a quarter
  of the width each, at frequencies 10000^(-4 i / width).

  Args:
    width: D, a multiple of 4.
    side: length of the grid's side.

  Returns:
    float32[side * side, D], row by row.
  """
  frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
  angles = np.arange(GRID)[:, None] * frequencies
  # Weights sum to 1, so resizing changes a channel only along the coordinate that it depends on.
  line = cubic_weights(GRID, side) @ np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  line = jnp.asarray(line, jnp.float32)
  shape = (side, side, width // 2)
  column, row = jnp.broadcast_to(line, shape), jnp.broadcast_to(line[:, None], shape)
  return jnp.concatenate([column, row], axis=-1).reshape(side * side, width)


def cubic_weights(source: int, target: int) -> np.ndarray:
  """Returns float64[target, source], which resizes a line by cubic convolution (Keys 1981).

  a = -0.75; the centers of pixels are at 0.5, 1.5, ...; the line is padded with its edge pixels.
  """
  a = -0.75
  centers = (np.arange(target) + 0.5) * source / target - 0.5
  weights = np.zeros((target, source))
  for tap in range(-1, 3):
    index = np.floor(centers) + tap
    x = np.abs(centers - index)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    index = np.clip(index, 0, source - 1).astype(int)
    np.add.at(weights, (np.arange(target), index), np.where(x <= 1, inner, outer))
  return weights
