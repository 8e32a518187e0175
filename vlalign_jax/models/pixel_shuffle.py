"""Projectors that join squares of patches to one embedding: of InternVL and of Idefics3."""

import functools

from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.models import activations
from vlalign_jax.models.linear import Linear
from vlalign_jax.sharding.mesh import constrain_rows


def join(features, side: int):
  """Joins squares of patches: [N, P, C] to [N, P / side^2, side^2 * C].

  Args:
    features: of a square grid of P patches, row by row.
    side: of the squares. Their patches' channels follow each other row by row.
  """
  N, P, C = features.shape
  squares = int(P**0.5) // side
  x = features.reshape(N, squares, side, squares, side, C).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(N, squares**2, side**2 * C)


class NormMlpProjector(nnx.Module):
  """LayerNorm, linear, activation, linear, on joined patches: InternVL."""

  def __init__(self, config, vision, *, rngs: nnx.Rngs, **types):
    linear = functools.partial(Linear, use_bias=config.use_bias, rngs=rngs, **types)
    self.activation, self.joined = config.activation, config.joined
    self.norm = nnx.LayerNorm(
      config.in_width, epsilon=1e-5, use_fast_variance=False, rngs=rngs, **types
    )
    self.first = linear(config.in_width, config.out_width)
    self.second = linear(config.out_width, config.out_width)

  def __call__(self, features, mesh: Mesh | None = None):
    features = self.norm(constrain_rows(join(features, self.joined), mesh))
    hidden = activations.ACTIVATIONS[self.activation](constrain_rows(self.first(features), mesh))
    return constrain_rows(self.second(hidden), mesh)


class JoinedLinearProjector(nnx.Module):
  """Linear map of joined patches: Idefics3 and SmolVLM."""

  def __init__(self, config, vision, *, rngs: nnx.Rngs, **types):
    self.joined = config.joined
    widths = config.in_width, config.out_width
    self.linear = Linear(*widths, use_bias=config.use_bias, rngs=rngs, **types)

  def __call__(self, features, mesh: Mesh | None = None):
    return constrain_rows(self.linear(join(features, self.joined)), mesh)
