"""One optimizer update, whatever the stage: gradients of a sum, divided by what it counts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlalign_jax.optim import loss_scale
from vlalign_jax.optim import state as training_state
from vlalign_jax.steps import accumulate


class AuxiliaryLoss(NamedTuple):
  """A second loss, of other rows, whose mean times `weight` is added; reported as `name`.

  `make_loss` and `count` are as of `train_step`.
  """

  name: str
  weight: float
  make_loss: Callable
  count: Callable
  rows: dict


def train_step(
  state,
  frozen,
  rows,
  *,
  make_loss,
  count,
  metrics,
  optimizer,
  learning_rate,
  accumulation: int,
  seed: int,
  mesh: Mesh | None = None,
  constrain_gradients=lambda gradients: gradients,
  mixed: AuxiliaryLoss | None = None,
):
  """One update.

  Args:
    state: TrainState.
    frozen: nested dict of the parameters that stay.
    rows: dict of arrays, see ARCHITECTURE.md, "Rows".
    make_loss: `(frozen, counts, key) -> loss`, with loss as in `accumulate.sum_gradients`.
    count: rows -> dict of float32[], of all rows of the step; the loss is divided by its "loss".
    metrics: `(sums, counts) -> dict of float32[]` for the log.
    optimizer: optax transformation for state.params.
    learning_rate: its base schedule, for the log.
    accumulation: micro-batches, a divisor of the number of rows of each shard.
    seed: of what is random in a step.
    mesh: over which rows are split.
    constrain_gradients: tree -> tree, places gradients over devices.
    mixed: what else is learnt from in this step.

  Returns:
    (next state, dict of float32[] metrics).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  factor = loss_scale.factor(state.optimizer)

  def mean(make_loss, counts, rows):
    """(mean loss, sums, gradients of the mean)."""
    divisor = jnp.maximum(counts["loss"], 1.0)
    scale = 1.0 if factor is None else factor / divisor
    loss = make_loss(frozen, counts, key)
    total, sums, grads = accumulate.sum_gradients(
      loss, state.params, rows, accumulation, mesh, constrain_gradients, scale
    )
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / (divisor * scale), grads)
    return total / divisor, sums, grads

  extra = {}
  if mixed is not None:
    added, _, more = mean(mixed.make_loss, mixed.count(mixed.rows), mixed.rows)
    # One after the other, as in steps.dpo.
    state, rows, added, more = jax.lax.optimization_barrier((state, rows, added, more))
    extra = {mixed.name: added}
  counts = count(rows)
  loss, sums, grads = mean(make_loss, counts, rows)
  if mixed is not None:
    loss += mixed.weight * added
    grads = jax.tree.map(lambda g, other: g + mixed.weight * other, grads, more)
  rate = learning_rate(state.step - state.skipped)
  state, logged = training_state.apply_gradients(state, optimizer, grads, loss)
  if factor is not None:
    extra |= {"loss_scale": factor}
  return state, logged | extra | {"learning_rate": rate} | metrics(sums, counts)


def dropout(model, key, number) -> dict:
  """What a micro-batch's rows hold besides where the model's adapters have dropout: a key."""
  lora = model.config.lora
  return {"dropout_key": jax.random.fold_in(key, number)} if lora and lora.dropout else {}
