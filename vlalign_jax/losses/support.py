"""Which tokens a policy can choose at each position: the others have probability 0."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Not -inf: an entropy multiplies a logit by its probability, 0.
FORBIDDEN = -1e30


class Support(NamedTuple):
  """The tokens that the softmax of each position leaves out.

  Attributes:
    forbidden: bool[V], tokens left out at all positions.
    forbidden_early: bool[V], tokens left out only at the positions in `early`.
    early: bool[B, T], positions within an answer's minimum length.
  """

  forbidden: jax.Array
  forbidden_early: jax.Array
  early: jax.Array


def restrict(logits, support: Support | None):
  """Sets the logits of tokens that a position cannot have to FORBIDDEN.

  Args:
    logits: float32[..., V].
    support: with `early` bool[...]; None: leaves all logits unchanged.
  """
  if support is None:
    return logits
  left_out = support.forbidden | (support.early[..., None] & support.forbidden_early)
  return jnp.where(left_out, FORBIDDEN, logits)
