"""One optimizer update of a reward model, and the sums of its evaluation."""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.losses import reward, sums
from vlalign_jax.steps import answers, program, update


def scores(model, rows):
  """float32[B, S, K], the score of each answer of rows of preferences."""
  return model.scores(model(rows), rows["answers"])


def _loss(found, rows, settings):
  """(sum, count) of the config's loss, and what is reported, of scores float32[B, S, K]."""
  found, valid = answers.flat(found), answers.flat(answers.valid(rows))
  margin = jnp.full(len(found), settings.margin) if settings.margin else None
  total = reward.loss(
    found, valid, margin=margin, center_rewards_coefficient=settings.center_rewards_coefficient
  )
  return total, reward.metrics(found, valid) | reward.extremes(found, valid)


def count(rows):
  """What the loss of a step is divided by: examples."""
  return {"loss": answers.examples(rows)}


def make_loss(frozen, counts, key, *, graphdef, settings, mesh: Mesh | None = None, chunk=None):
  """See `update.train_step`; the sum is of the losses of examples.

  Args:
    settings: the config's `reward` group.
  """
  del counts, mesh, chunk  # scores need no vocabulary

  def loss(params, rows, number):
    model = nnx.merge(graphdef, trees.merge(params, frozen))
    found = scores(model, rows | update.dropout(model, key, number))
    (total, _), reported = _loss(found, rows, settings)
    return total, reported

  return loss


def metrics(found, counts):
  """What is logged besides what all stages log."""
  return sums.quotients(found) | {"examples": counts["loss"]}


def eval_step(params, frozen, rows, *, graphdef, settings, mesh=None, chunk=None):
  """Sums over a batch, see `losses.sums`."""
  del mesh, chunk
  model = nnx.merge(graphdef, trees.merge(params, frozen))
  loss, reported = _loss(scores(model, rows), rows, settings)
  return {"loss": loss, "examples": answers.examples(rows)} | reported


def make_program(config, model, mesh: Mesh, total_steps: int) -> program.TrainProgram:
  """See `program.make_program`."""
  return program.make_program(
    config,
    model,
    mesh,
    total_steps,
    functools.partial(make_loss, settings=config.reward),
    count,
    metrics,
    functools.partial(eval_step, settings=config.reward),
  )
