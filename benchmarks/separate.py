"""Steps of DPO and of reward models the usual way: each answer behind a prompt of its own."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from vlalign_jax import trees
from vlalign_jax.losses import dpo as dpo_losses
from vlalign_jax.losses import reward as reward_losses
from vlalign_jax.models import vlm
from vlalign_jax.stages import dpo, reward
from vlalign_jax.steps import answers, sft
from vlalign_jax.steps import program as programs


def separate_dpo_loss(inputs, *, graphdef, settings, examples: int, mesh, chunk):
  """As `stages.dpo.make_loss`, of rows of one plain sequence each."""

  def loss(params, rows, number):
    del number
    rows = rows | sft.ONE_ANSWER
    policy = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
    rows["vision_features"] = policy.vision_features(rows["images"])

    def log_probabilities(params):
      model = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
      tokens = answers.token_log_probabilities(model, rows, mesh=mesh, chunk=chunk)
      return jnp.sum(tokens, axis=1).reshape(examples, -1)

    initial = jax.lax.stop_gradient(log_probabilities(inputs.reference))
    logps = log_probabilities(params)
    lengths = jnp.sum(rows["loss_mask"], axis=1).reshape(examples, -1)
    everywhere = jnp.ones(logps.shape, bool)
    total, _ = dpo_losses.loss(logps, initial, lengths, everywhere, beta=settings.beta)
    return total, {}

  return loss


def separate_reward_loss(inputs, *, graphdef, settings, examples: int, mesh, chunk):
  """As `stages.reward.make_loss`, of rows of one plain sequence each."""
  del settings, mesh, chunk

  def loss(params, rows, number):
    del number
    model = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
    found = answers.scores(model, rows | sft.ONE_ANSWER).reshape(examples, -1)
    total, _ = reward_losses.loss(found, jnp.ones(found.shape, bool))
    return total, {}

  return loss


def make_program(stage: str, config, model: vlm.ModelConfig, mesh, examples: int, *, shared: bool):
  """Returns the step's program, by the library or the usual way.

  Args:
    stage: dpo or reward.
    config, model, mesh: of the run.
    examples: of a batch.
    shared: whether rows share a prompt; else each answer is a row of its own, those of an example
      one after the other.
  """
  if shared:
    return {"dpo": dpo, "reward": reward}[stage].make_program(config, model, mesh, 1000)
  losses = {"dpo": separate_dpo_loss, "reward": separate_reward_loss}
  return programs.make_program(
    config,
    model,
    mesh,
    1000,
    make_loss=functools.partial(losses[stage], settings=config[stage], examples=examples),
    denominators=lambda batch: {"loss": jnp.float32(examples)},
    metrics=lambda sums, denominators: {},
    eval_step=lambda params, inputs, batch, graphdef, mesh, chunk: {},
    with_reference=stage == "dpo",
  )
