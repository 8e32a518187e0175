"""One optimizer update of PPO: of the critic and the actor, from a mini-batch of a rollout.

A mini-batch is a batch of `steps.answer_rows` with float32[B, N, M] per answer token:
`old_log_probabilities` (from sampling), `reference_log_probabilities`, `advantages`, and with a
critic `old_values` and `returns`. `mask` bool[B, N, M] is true where there is a token.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.generation import sampling as samplings
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.losses import entropy, kl
from vlalign_jax.losses import ppo as losses
from vlalign_jax.losses.support import Support
from vlalign_jax.optim.state import TrainState
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import answer_rows as layout
from vlalign_jax.steps import answers, sft, update

GAE, GRPO = "gae", "grpo"


class PPOState(NamedTuple):
  """What a PPO run changes; checkpoints hold the actor's parameters as those of any run."""

  step: jax.Array  # int32[], rollouts that were learned from
  actor: TrainState
  critic: Any  # TrainState; (): there is none

  @property
  def params(self) -> dict[str, Any]:
    """The actor's trained parameters."""
    return self.actor.params

  def with_params(self, params) -> "PPOState":
    """Returns the state with other parameters of the actor."""
    return self._replace(actor=self.actor.with_params(params))


def make_state(actor: TrainState, critic: TrainState | tuple) -> PPOState:
  """Returns the state before the first rollout."""
  return PPOState(jnp.zeros((), jnp.int32), actor, critic)


def drop_unused_branches(batch, count: int):
  """Drops the branches of a batch with one answer to each prompt: attention is then faster."""
  return batch | sft.ONE_ANSWER if count == 1 else batch


def support(batch, shape, sampling: Sampling, vocab_size: int) -> Support:
  """Returns which tokens the sampler may choose at each position; `shape` is (N, M)."""
  steps = layout.answer_steps(batch["targets"].shape[1], *shape)
  early = jnp.broadcast_to(steps < sampling.min_new_tokens, batch["targets"].shape)
  always, at_first = samplings.forbidden(sampling, vocab_size)
  return Support(jnp.asarray(always), jnp.asarray(at_first), early)


def log_probabilities(model, batch, shape, *, sampling: Sampling, **options):
  """Returns the log-probability of each answer token, float32[B, N, M].

  Args:
    model, batch: see `answers.token_log_probabilities`, which takes the options.
    shape: (N, M).
    sampling: how the answers were sampled.
    **options: see there.
  """
  allowed = support(batch, shape, sampling, model.config.language.vocab_size)
  found = answers.token_log_probabilities(
    model,
    drop_unused_branches(batch, shape[0]),
    temperature=sampling.temperature,
    support=allowed,
    **options,
  )
  return layout.select_answers(found, *shape)


def values(model, batch, shape):
  """Returns the critic's value before each answer token, float32[B, N, M]; `shape` is (N, M)."""
  hidden = layout.select_answers(model(drop_unused_branches(batch, shape[0])), *shape)
  kernel = model.score.kernel[...][:, 0].astype(hidden.dtype)
  return jnp.einsum("BNMD,D->BNM", hidden, kernel, preferred_element_type=jnp.float32)


def _flat(batch, *names):
  """Returns fields [B, N, M] as [B * N, M]."""
  return (batch[name].reshape(-1, batch[name].shape[-1]) for name in names)


def loss_denominators(batch, level: str):
  """Returns what a step's loss is divided by: the number of tokens, or of answers."""
  (mask,) = _flat(batch, "mask")
  return {"loss": losses.average(jnp.ones(mask.shape), mask, level=level)[1]}


def make_policy_loss(
  inputs: update.StepInputs,
  *,
  graphdef,
  settings,
  sampling: Sampling,
  kl_coef,
  mesh: Mesh | None,
  chunk: int,
):
  """Returns the loss of a micro-batch, `losses.ppo.policy_loss`; see `update.train_step`.

  Args:
    inputs: of the step.
    graphdef: of the actor.
    settings: the config's `ppo` group.
    sampling: how the answers were sampled.
    kl_coef: float32[], weight of the KL penalty in GRPO's loss.
    mesh: over which the batch is split.
    chunk: see `losses.head.cross_entropy_sum`.
  """
  level = settings.loss_level

  def loss(params, batch, number):
    del number
    shape = batch["mask"].shape[1:]
    model = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
    logps, entropies = (
      layout.select_answers(x, *shape).reshape(-1, shape[1])
      for x in entropy.token_log_probabilities_and_entropies(
        answers.tempered(model(drop_unused_branches(batch, shape[0])), sampling.temperature),
        model.head_kernel(),
        batch["targets"],
        batch["loss_mask"],
        scatter=functools.partial(meshes.scatter_head_gradient, mesh=mesh),
        support=support(batch, shape, sampling, model.config.language.vocab_size),
        **sft.chunking(mesh, chunk),
      )
    )
    old, reference, advantages, mask = _flat(
      batch, "old_log_probabilities", "reference_log_probabilities", "advantages", "mask"
    )
    clip = settings.cliprange or jnp.inf
    (total, _), found = losses.policy_loss(logps, old, advantages, mask, clip=clip, level=level)
    if settings.entropy_coef:
      total -= settings.entropy_coef * losses.average(entropies, mask, level=level)[0]
    if settings.estimator == GRPO:
      total += kl_coef * losses.average(kl.estimate(logps, reference, "k3"), mask, level=level)[0]
    return total, found | {
      "policy/entropy_avg": losses.average(entropies, mask),
      "val/sampler_gap": losses.average(jnp.abs(logps - old), mask),
    }

  return loss


def make_value_loss(inputs: update.StepInputs, *, graphdef, settings):
  """Returns the loss of a micro-batch, `losses.ppo.value_loss`; see `update.train_step`."""

  def loss(params, batch, number):
    del number
    shape = batch["mask"].shape[1:]
    model = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
    found = values(model, batch, shape).reshape(-1, shape[1])
    arrays = _flat(batch, "old_values", "returns", "mask")
    (total, _), found = losses.value_loss(found, *arrays, clip=settings.cliprange_value or jnp.inf)
    return total, found

  return loss


def auxiliary_loss(
  batch, *, graphdef, settings, mesh: Mesh | None, chunk: int
) -> update.AuxiliaryLoss:
  """Returns the supervised loss that is added to the policy's (Ouyang et al. 2022, equation 2).

  Args:
    batch: as supervised fine-tuning learns from.
    graphdef: of the actor.
    settings: the config's `ppo` group.
    mesh: over which the batch is split.
    chunk: see `losses.head.cross_entropy_sum`.
  """
  make_loss = functools.partial(sft.make_loss, graphdef=graphdef, mesh=mesh, chunk=chunk)
  return update.AuxiliaryLoss(
    "loss/sft", settings.sft_weight, make_loss, sft.loss_denominators, batch
  )


def metrics(reported, denominators):
  """Returns the sums of a mini-batch, see `losses.sums`; a rollout has several mini-batches."""
  del denominators
  return reported


def update_step(
  state: PPOState,
  frozen,
  critic_frozen,
  batch,
  index,
  kl_coef,
  sft_batch=None,
  *,
  actor,
  critic,
  config,
  sampling: Sampling,
  mesh: Mesh,
  with_policy: bool,
  same_tower: bool,
):
  """Updates the critic, if there is one, and the actor, unless only the critic learns yet.

  Args:
    state: given up.
    frozen: the actor's frozen parameters.
    critic_frozen: the critic's.
    batch: of a whole rollout of B prompts, with the fields named at the top of this file.
    index: int32[b], the rows of the mini-batch.
    kl_coef: float32[].
    sft_batch: of `auxiliary_loss`; None: there is none.
    actor, critic: program.TrainedModel; critic may be None.
    config: of the run.
    sampling: how the answers were sampled.
    mesh: over which the batch is split.
    with_policy: whether the actor learns.
    same_tower: whether the critic has the actor's vision tower, and so its `vision_features`.

  Returns:
    (PPOState, dict of values as in `losses.sums`; names of the critic's begin with `critic/`).
  """
  batch = {
    name: meshes.constrain_rows(jnp.take(x, index, axis=0), mesh) for name, x in batch.items()
  }
  common = {
    "metrics": metrics,
    "seed": config.seed,
    "mesh": mesh,
    "accumulation": config.grad_accumulation,
  }
  logged = {}
  if critic is not None:
    seen = {"same_tower": same_tower, "blank": config.ppo.blank_images}
    critic_state, found = update.train_step(
      state.critic,
      critic_frozen,
      layout.batch_for_scorer(batch, **seen),
      make_loss=functools.partial(make_value_loss, graphdef=critic.graphdef, settings=config.ppo),
      denominators=functools.partial(loss_denominators, level="token"),
      **common,
      **critic.update,
    )
    shared_names = (
      "loss",
      "grad_norm",
      "learning_rate",
      "skipped_steps",
      "skipped_in_a_row",
      "loss_scale",
    )
    logged = {f"critic/{name}" if name in shared_names else name: found[name] for name in found}
    # One after the other, as in stages.dpo.
    state, batch, critic_state, logged = jax.lax.optimization_barrier(
      (state, batch, critic_state, logged)
    )
    state = state._replace(critic=critic_state)
  if with_policy:
    options = {
      "graphdef": actor.graphdef,
      "settings": config.ppo,
      "mesh": mesh,
      "chunk": meshes.head_chunk(mesh),
    }
    actor_state, found = update.train_step(
      state.actor,
      frozen,
      batch,
      make_loss=functools.partial(make_policy_loss, kl_coef=kl_coef, sampling=sampling, **options),
      denominators=functools.partial(loss_denominators, level=config.ppo.loss_level),
      auxiliary=None if sft_batch is None else auxiliary_loss(sft_batch, **options),
      **common,
      **actor.update,
    )
    state, logged = state._replace(actor=actor_state), logged | found
  return state, logged
