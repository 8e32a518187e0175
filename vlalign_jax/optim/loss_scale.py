"""Dynamic scaling of the loss, for float16: its gradients neither vanish nor overflow.

Micikevicius et al. 2018, "Mixed precision training", section 3.2. An update whose gradients
overflow is skipped and halves the factor; many good updates in a row double it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

FIRST = 2.0**16
LEAST, MOST = 1.0, 2.0**24
WINDOW = 1000  # good updates before the factor is doubled


class Scaled(NamedTuple):
  """State of an optimizer whose gradients are of a scaled loss."""

  factor: jax.Array  # float32[], of the mean loss while it is differentiated
  good: jax.Array  # int32[], updates since the factor changed
  inner: Any


def scale(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer with a factor beside its state; it is given gradients of the loss itself."""

  def init(params):
    return Scaled(jnp.float32(FIRST), jnp.zeros((), jnp.int32), optimizer.init(params))

  def update(updates, state: Any, params=None):
    updates, inner = optimizer.update(updates, state.inner, params)
    return updates, state._replace(inner=inner)

  return optax.GradientTransformation(init, update)


def factor(optimizer_state):
  """float32[], by which the mean loss is multiplied while it is differentiated; None: it is not."""
  return optimizer_state.factor if isinstance(optimizer_state, Scaled) else None


def may_shrink(optimizer_state):
  """bool[], whether an overflow may be gone with a smaller factor."""
  if not isinstance(optimizer_state, Scaled):
    return jnp.zeros((), bool)
  return optimizer_state.factor > LEAST


def adapt(optimizer_state, finite):
  """The state with the factor of the next update.

  Args:
    optimizer_state: after an update, or before it if that was skipped.
    finite: bool[], whether its gradients were.
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
