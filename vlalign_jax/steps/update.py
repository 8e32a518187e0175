"""One optimizer update, whatever the stage: gradients of a sum, divided by what it counts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlalign_jax.optim import loss_scale
from vlalign_jax.optim import state as training_state
from vlalign_jax.steps import accumulate


class StepInputs(NamedTuple):
  """What a loss is computed from besides trained parameters and a batch.

  Attributes:
    frozen: nested dict of the parameters that are not trained.
    reference: nested dict of the initial values of those that are; None: the step has no reference.
    denominators: dict of float32[], of the whole step; None in an evaluation.
    key: of what is random in a step; None in an evaluation.
  """

  frozen: dict
  reference: dict | None = None
  denominators: dict | None = None
  key: Any = None


class AuxiliaryLoss(NamedTuple):
  """A second loss, of another batch, whose mean times `weight` is added; reported as `name`.

  `make_loss` and `denominators` are as of `train_step`.
  """

  name: str
  weight: float
  make_loss: Callable
  denominators: Callable
  batch: dict


def train_step(
  state,
  frozen,
  batch,
  reference=None,
  *,
  make_loss,
  denominators,
  metrics,
  optimizer,
  learning_rate,
  accumulation: int,
  seed: int,
  mesh: Mesh | None = None,
  constrain_gradients=lambda gradients: gradients,
  auxiliary: AuxiliaryLoss | None = None,
):
  """Updates the parameters once.

  Args:
    state: TrainState.
    frozen: nested dict of the parameters that are not trained.
    batch: dict of arrays, see ARCHITECTURE.md, "Rows".
    reference: nested dict of the initial values of the trained parameters, for stages that compare
      with them.
    make_loss: `(StepInputs) -> loss`, with loss as in `accumulate.sum_gradients`.
    denominators: batch -> dict of float32[], of the whole step; its loss is divided by "loss".
    metrics: `(sums, denominators) -> dict of float32[]` for the log.
    optimizer: optax transformation for state.params.
    learning_rate: its base schedule, for the log.
    accumulation: micro-batches, a divisor of the number of rows of each shard.
    seed: of what is random in a step.
    mesh: over which the batch is split.
    constrain_gradients: tree -> tree, places gradients over devices.
    auxiliary: a loss that is added to the stage's own.

  Returns:
    (next state, dict of float32[] metrics).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  factor = loss_scale.factor(state.optimizer)

  def mean(make_loss, counts, batch):
    """Returns (mean loss, sums, gradients of the mean)."""
    divisor = jnp.maximum(counts["loss"], 1.0)
    scale = 1.0 if factor is None else factor / divisor
    loss = make_loss(StepInputs(frozen, reference, counts, key))
    total, sums, grads = accumulate.sum_gradients(
      loss, state.params, batch, accumulation, mesh, constrain_gradients, scale
    )
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / (divisor * scale), grads)
    return total / divisor, sums, grads

  extra = {}
  if auxiliary is not None:
    counts = auxiliary.denominators(auxiliary.batch)
    added, _, more = mean(auxiliary.make_loss, counts, auxiliary.batch)
    # One after the other, as in stages.dpo.
    state, batch, added, more = jax.lax.optimization_barrier((state, batch, added, more))
    extra = {auxiliary.name: added}
  counts = denominators(batch)
  loss, sums, grads = mean(make_loss, counts, batch)
  if auxiliary is not None:
    loss += auxiliary.weight * added
    grads = jax.tree.map(lambda g, other: g + auxiliary.weight * other, grads, more)
  rate = learning_rate(state.step - state.skipped)
  state, logged = training_state.apply_gradients(state, optimizer, grads, loss)
  if factor is not None:
    extra |= {"loss_scale": factor}
  return state, logged | extra | {"learning_rate": rate} | metrics(sums, counts)


def dropout(model, key, number) -> dict:
  """Returns the field of a micro-batch that adapters with dropout need: a key; else nothing."""
  lora = model.config.lora
  return {"dropout_key": jax.random.fold_in(key, number)} if lora and lora.dropout else {}
