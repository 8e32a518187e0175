"""Reward models: a score for each of several ranked answers to a prompt."""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlalign_jax import trees
from vlalign_jax.config_checks import Config, check_at_least
from vlalign_jax.input_pipeline.preferences import TASK
from vlalign_jax.losses import reward, sums
from vlalign_jax.models.vlm import SCORE
from vlalign_jax.stage import Stage
from vlalign_jax.steps import answers, program, update


def add_keys(c: Config) -> None:
  """Adds the keys of reward models to a config."""
  c.metric_for_best_model = "eval/accuracy"
  c.reward = ConfigDict()
  c.reward.margin = 0.0  # by how much a better answer must outscore a worse one
  # Weight of a penalty that keeps scores around 0: for two answers, the mean of (s_0 + s_1)^2.
  c.reward.center_rewards_coefficient = 0.0


def check_keys(config: Config) -> None:
  """Raises an InputError for values that no run can have."""
  check_at_least(config, {"reward.margin": 0, "reward.center_rewards_coefficient": 0})


def _loss(scores, batch, settings):
  """Returns the (sum, count) of the loss and what is reported, of scores float32[B, S, K]."""
  scores, valid = answers.flat(scores), answers.flat(answers.valid(batch))
  margin = jnp.full(len(scores), settings.margin) if settings.margin else None
  weight = settings.center_rewards_coefficient
  total = reward.loss(scores, valid, margin=margin, center_rewards_coefficient=weight)
  return total, reward.metrics(scores, valid) | reward.extremes(scores, valid)


def loss_denominators(batch):
  """Returns what the loss of a step is divided by: the number of examples."""
  return {"loss": answers.examples(batch)}


def make_loss(inputs: update.StepInputs, *, graphdef, settings, mesh: Mesh | None = None, chunk=0):
  """Returns the loss of a micro-batch, see `update.train_step`; its sum is over examples.

  Args:
    inputs: of the step.
    graphdef: of the model.
    settings: the config's `reward` group.
    mesh, chunk: not used, as scores need no vocabulary.
  """
  del mesh, chunk

  def loss(params, batch, number):
    model = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
    scores = answers.scores(model, batch | update.dropout(model, inputs.key, number))
    (total, _), reported = _loss(scores, batch, settings)
    return total, reported

  return loss


def metrics(reported, denominators):
  """Returns what is logged in addition to what all stages log."""
  return sums.quotients(reported) | {"examples": denominators["loss"]}


def eval_step(params, inputs, batch, *, graphdef, settings, mesh=None, chunk=0):
  """Returns the sums over a batch, see `losses.sums`."""
  del mesh, chunk
  model = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
  loss, reported = _loss(answers.scores(model, batch), batch, settings)
  return {"loss": loss, "examples": answers.examples(batch)} | reported


def make_program(config, model, mesh: Mesh, total_steps: int) -> program.TrainProgram:
  """Returns the program of a run; arguments as of `program.make_program`."""
  return program.make_program(
    config,
    model,
    mesh,
    total_steps,
    make_loss=functools.partial(make_loss, settings=config.reward),
    denominators=loss_denominators,
    metrics=metrics,
    eval_step=functools.partial(eval_step, settings=config.reward),
  )


STAGE = Stage(
  name="reward",
  task=TASK,
  metrics=("eval/loss", "eval/accuracy", "eval/margin"),
  add_keys=add_keys,
  check_keys=check_keys,
  head=SCORE,
  make_program=make_program,
)
