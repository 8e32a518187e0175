"""The supervised loss of a step, also mixed into PPO's updates."""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.losses import sft
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import update

# Known before the step is compiled, so that attention need not look at branches.
ONE_ANSWER = {"branches": None}


def chunking(mesh: Mesh | None, chunk: int) -> dict:
  """Returns how the output head goes through a batch that is split over a mesh."""
  place = functools.partial(meshes.constrain_vocabulary, mesh=mesh)
  return {"shards": meshes.row_blocks(mesh), "chunk": chunk, "place": place}


def loss_denominators(batch):
  """Returns what the loss of a step is divided by: the number of learned tokens."""
  return {"loss": jnp.sum(batch["loss_mask"])}


def make_loss(inputs: update.StepInputs, *, graphdef, mesh: Mesh | None = None, chunk: int = 128):
  """Returns the loss of a micro-batch, see `update.train_step`; its sum is of cross-entropies."""

  def loss(params, batch, number):
    model = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
    total, _ = sft.loss(
      model(batch | ONE_ANSWER | update.dropout(model, inputs.key, number)),
      model.head_kernel(),
      batch,
      scatter=functools.partial(meshes.scatter_head_gradient, mesh=mesh),
      **chunking(mesh, chunk),
    )
    return total, {}

  return loss
