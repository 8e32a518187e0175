"""The training state and its update, shared by all stages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlalign_jax.optim import loss_scale


class TrainState(NamedTuple):
  """The state that an update changes."""

  step: jax.Array  # int32[], updates done or skipped
  params: dict[str, Any]  # trained parameters only
  optimizer: Any
  skipped: jax.Array  # int32[], updates skipped because loss or gradient was not finite
  skipped_in_a_row: jax.Array  # int32[]

  def with_params(self, params) -> "TrainState":
    """Returns the state with other parameters."""
    return self._replace(params=params)


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first update; Adam's moments are float32 for all parameters."""
  zero = jnp.zeros((), jnp.int32)
  moments = optimizer.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
  return TrainState(zero, params, moments, zero, zero)


def apply_gradients(state: TrainState, optimizer, gradients, loss):
  """Updates the parameters, or skips the update if the loss or a gradient is not finite.

  Args:
    state: before the update.
    optimizer: the optax transformation.
    gradients: float32 tree like state.params, of the mean loss.
    loss: float32[].

  Returns:
    The next state, and the metrics of all stages: loss, grad_norm (before clipping), skipped_steps
    and skipped_in_a_row.
  """
  norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, new_optimizer = optimizer.update(gradients, state.optimizer, state.params)
  new_params = optax.apply_updates(state.params, updates)
  keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
  skipped = 1 - finite.astype(jnp.int32)
  # Overflows that a smaller loss scale may avoid do not count as skipped in a row.
  counted = skipped * (1 - (loss_scale.may_shrink(state.optimizer) & jnp.isfinite(loss)))
  new_state = TrainState(
    step=state.step + 1,
    params=jax.tree.map(keep, new_params, state.params),
    optimizer=loss_scale.adapt(jax.tree.map(keep, new_optimizer, state.optimizer), finite),
    skipped=state.skipped + skipped,
    skipped_in_a_row=(state.skipped_in_a_row + counted) * skipped,
  )
  metrics = {"loss": loss, "grad_norm": norm, "skipped_steps": new_state.skipped}
  return new_state, metrics | {"skipped_in_a_row": new_state.skipped_in_a_row}
