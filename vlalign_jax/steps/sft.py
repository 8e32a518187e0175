"""One optimizer update of supervised fine-tuning, and the sums of its evaluation."""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.losses import sft
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import program, update

# Told before the step is compiled, so that attention need not look at branches.
ONE_ANSWER = {"branches": None}


def chunking(mesh: Mesh | None, chunk: int) -> dict:
  """How the output head goes through rows that are split over a mesh."""
  place = functools.partial(meshes.constrain_vocabulary, mesh=mesh)
  return {"shards": meshes.row_blocks(mesh), "chunk": chunk, "place": place}


def count(rows):
  """What the loss of a step is divided by: learnt tokens."""
  return {"loss": jnp.sum(rows["loss_mask"])}


def make_loss(frozen, counts, key, *, graphdef, mesh: Mesh | None = None, chunk: int = 128):
  """See `update.train_step`; the sum is of cross-entropies."""
  del counts

  def loss(params, rows, number):
    model = nnx.merge(graphdef, trees.merge(params, frozen))
    total, _ = sft.loss(
      model(rows | ONE_ANSWER | update.dropout(model, key, number)),
      model.head_kernel(),
      rows,
      scatter=functools.partial(meshes.scatter_head_gradient, mesh=mesh),
      **chunking(mesh, chunk),
    )
    return total, {}

  return loss


def metrics(sums, counts):
  """What is logged besides what all stages log."""
  del sums
  return {"learnt_tokens": counts["loss"]}


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


def make_program(config, model, mesh: Mesh, total_steps: int) -> program.TrainProgram:
  """See `program.make_program`."""
  return program.make_program(
    config,
    model,
    mesh,
    total_steps,
    make_loss,
    count,
    metrics,
    eval_step,
    static=("max_segments",),
  )
