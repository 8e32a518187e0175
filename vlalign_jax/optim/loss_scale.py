"""Dynamic loss scaling for float16, whose gradients would otherwise underflow or overflow.

Micikevicius et al. 2018, "Mixed precision training", section 3.2. An update whose gradients
overflow is skipped and halves the scale; WINDOW finite updates in a row double it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

FIRST = 2.0**16
LEAST, MOST = 1.0, 2.0**24
WINDOW = 1000


class Scaled(NamedTuple):
  """State of an optimizer with loss scaling."""

  factor: jax.Array  # float32[], multiplies the mean loss before it is differentiated
  good: jax.Array  # int32[], finite updates since the factor last changed
  inner: Any


def scale(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Adds the loss scale to the optimizer's state; `update` takes gradients that are unscaled."""

  def init(params):
    return Scaled(jnp.float32(FIRST), jnp.zeros((), jnp.int32), optimizer.init(params))

  def update(updates, state: Any, params=None):
    updates, inner = optimizer.update(updates, state.inner, params)
    return updates, state._replace(inner=inner)

  return optax.GradientTransformation(init, update)


def factor(optimizer_state):
  """Returns the loss scale, float32[]; None without loss scaling."""
  return optimizer_state.factor if isinstance(optimizer_state, Scaled) else None


def may_shrink(optimizer_state):
  """Returns bool[], whether the loss scale can be reduced."""
  if not isinstance(optimizer_state, Scaled):
    return jnp.zeros((), bool)
  return optimizer_state.factor > LEAST


def adapt(optimizer_state, finite):
  """Returns the state with the loss scale of the next update.

  Args:
    optimizer_state: after an update, or before it if it was skipped.
    finite: bool[], whether the update's gradients were finite.
  """
  if not isinstance(optimizer_state, Scaled):
    return optimizer_state
  good = jnp.where(finite, optimizer_state.good + 1, 0)
  grows = good >= WINDOW
  change = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
  return optimizer_state._replace(
    factor=jnp.clip(optimizer_state.factor * change, LEAST, MOST),
    good=jnp.where(grows, 0, good),
  )
