"""One optimizer update of supervised fine-tuning, and the sums of its evaluation."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.losses import sft
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import accumulate, program
from vlalign_jax.training import state as training_state

# Told before the step is compiled, so that attention need not look at branches.
ONE_ANSWER = {"branches": None}


def chunking(mesh: Mesh | None, chunk: int) -> dict:
  """How the output head goes through rows that are split over a mesh."""
  place = functools.partial(meshes.constrain_vocabulary, mesh=mesh)
  return {"shards": meshes.row_blocks(mesh), "chunk": chunk, "place": place}


def make_loss(graphdef, frozen, *, mesh: Mesh | None = None, chunk: int = 128):
  """`(trained params, rows) -> (sum of cross-entropies, {"tokens": number of learnt tokens})`."""

  def loss(params, rows):
    model = nnx.merge(graphdef, trees.merge(params, frozen))
    total, tokens = sft.loss(
      model(rows | ONE_ANSWER),
      model.head_kernel(),
      rows,
      scatter=functools.partial(meshes.scatter_head_gradient, mesh=mesh),
      **chunking(mesh, chunk),
    )
    return total, {"tokens": tokens}

  return loss


def train_step(
  state,
  frozen,
  rows,
  *,
  graphdef,
  optimizer,
  learning_rate,
  accumulation: int,
  chunk: int,
  mesh: Mesh | None = None,
  constrain_gradients=lambda gradients: gradients,
):
  """One update.

  Args:
    state: TrainState.
    frozen: nested dict of the parameters that stay.
    rows: dict of arrays, see ARCHITECTURE.md, "Rows".
    graphdef: of the whole model.
    optimizer: optax transformation for state.params.
    learning_rate: its base schedule, for the log.
    accumulation: micro-batches, a divisor of the number of rows of each shard.
    chunk: see `losses.head.cross_entropy_sum`.
    mesh: over which rows are split.
    constrain_gradients: tree -> tree, places gradients over devices.

  Returns:
    (next state, dict of float32[] metrics).
  """
  loss = make_loss(graphdef, frozen, mesh=mesh, chunk=chunk)
  total, sums, grads = accumulate.sum_gradients(
    loss, state.params, rows, accumulation, mesh, constrain_gradients
  )
  count = jnp.maximum(sums["tokens"], 1.0)
  rate = learning_rate(state.step - state.skipped)
  grads = jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads)
  state, metrics = training_state.apply_gradients(state, optimizer, grads, total / count)
  return state, metrics | {"learning_rate": rate, "learnt_tokens": sums["tokens"]}


def eval_step(
  params, frozen, rows, *, graphdef, max_segments: int, chunk: int, mesh: Mesh | None = None
):
  """Sums over a batch, see `losses.sft.evaluation`."""
  model = nnx.merge(graphdef, trees.merge(params, frozen))
  return sft.evaluation(
    model(rows | ONE_ANSWER),
    model.head_kernel(),
    rows,
    max_segments=max_segments,
    **chunking(mesh, chunk),
  )


def make_program(config, model, mesh: Mesh, total_steps: int) -> program.Program:
  """See `program.make_program`."""
  return program.make_program(config, model, mesh, total_steps, train_step, eval_step)
