"""Which tokens a policy may say where: those that a sampler never chooses have no probability."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Not -inf: an entropy multiplies a logit by its probability, 0.
FORBIDDEN = -1e30


class Support(NamedTuple):
  """What is left out of the softmax of each position.

  Attributes:
    forbidden: bool[V], tokens that no position may have.
    forbidden_early: bool[V], tokens that only the positions in `early` may not have.
    early: bool[B, T], positions within an answer's least number of tokens.
  """

  forbidden: jax.Array
  forbidden_early: jax.Array
  early: jax.Array


def restrict(logits, support: Support | None):
  """Logits with FORBIDDEN where a position may not have the token.

  Args:
    logits: float32[..., V].
    support: with `early` bool[...]; None: every token may be anywhere.
  """
  if support is None:
    return logits
  left_out = support.forbidden | (support.early[..., None] & support.forbidden_early)
  return jnp.where(left_out, FORBIDDEN, logits)
