"""PPO's compiled functions together with the shapes and placements of all that they take."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models.vlm import ModelConfig, abstract_params
from vlalign_jax.optim import updates
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero
from vlalign_jax.steps import accumulate, advantages, ppo, program
from vlalign_jax.steps import answer_rows as layout


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A reward model; nothing is allocated.

  Attributes:
    graphdef: of the model.
    params: shapes of its parameters, all in model.dtype.
  """

  graphdef: Any
  params: dict


@dataclasses.dataclass(frozen=True)
class PPOProgram:
  """Nothing here is allocated; shapes are trees of jax.ShapeDtypeStruct with shardings.

  `shape` is (N, M), answers to a prompt and tokens of each; all but `update_step` leave what they
  are given.

  Attributes:
    sampling: how answers are sampled.
    actor: with a reference.
    critic: None: there is none.
    reward: None: a function alone scores.
    state: shapes of the PPOState.
    init_state: (actor's trained parameters, critic's or None; both given up) -> PPOState.
    answer_rows: see `steps.answer_rows`.
    vision_features: (the actor's vision parameters, batch) -> float[B, I, P, W].
    reference: ((reference's parameters, the actor's frozen ones), batch, shape) ->
      float32[B, N, M] log-probabilities.
    values: (the critic's trained and frozen parameters, batch, shape) -> float32[B, N, M].
    scores: (the reward model's parameters, rows with `answers` [B, 1, N]) -> float32[B, N].
    compute_advantages: see `steps.advantages`.
    update_step: (state, frozen, the critic's frozen, batch, index, kl_coef, sft_batch,
      with_policy, same_tower).
    finish: PPOState -> PPOState, with one more rollout counted; the state is given up.
  """

  sampling: Sampling
  actor: program.TrainedModel
  critic: program.TrainedModel | None
  reward: Scorer | None
  state: ppo.PPOState
  init_state: Callable
  answer_rows: Callable
  vision_features: Callable
  reference: Callable
  values: Callable | None
  scores: Callable | None
  compute_advantages: Callable
  update_step: Callable
  finish: Callable


def make_program(
  config,
  model: ModelConfig,
  critic_model: ModelConfig | None,
  reward_model: ModelConfig | None,
  sampling: Sampling,
  mesh: Mesh,
  steps: int,
) -> PPOProgram:
  """Returns the program of a run.

  Args:
    config: of the run.
    model, critic_model, reward_model: architectures.
    sampling: of answers.
    mesh: over which rows are split.
    steps: rollouts of the whole run.
  """
  settings = config.ppo
  parts = settings.num_mini_batches * config.grad_accumulation
  own = of_actor(config)
  actor = program.make_trained_model(
    own, model, mesh, actor_updates(config, steps), with_reference=True
  )
  critic = critic_model and program.make_trained_model(
    of_critic(config), critic_model, mesh, critic_updates(config, steps)
  )
  reward = reward_model and _make_scorer(config, reward_model, mesh)
  reference_graphdef = program.reference_graphdef(config, model, mesh)
  of_head = {"mesh": mesh, "chunk": meshes.head_chunk(mesh), "sampling": sampling}
  rows_place, everywhere = meshes.batch_sharding(mesh), meshes.replicated(mesh)
  # As many rows at a time as a micro-batch has.
  of_parts = functools.partial(_by_parts, mesh=mesh, parts=parts, placement=rows_place)

  def reference(params, batch, shape):
    reference_model = nnx.merge(reference_graphdef, trees.merge(*params))
    return ppo.log_probabilities(reference_model, batch, shape, **of_head)

  def values(params, batch, shape):
    return ppo.values(nnx.merge(critic.graphdef, trees.merge(*params)), batch, shape)

  def scores(params, batch, shape):
    del shape
    whole = nnx.merge(reward.graphdef, params)
    hidden = whole(ppo.drop_unused_branches(batch, batch["answers"].shape[2]))
    return whole.scores(hidden, batch["answers"])[:, 0]

  def vision_features(params, batch, shape):
    del shape
    found = nnx.merge(actor.graphdef, params).vision_features(batch["images"])
    return found.reshape(*batch["images"].shape[:2], *found.shape[1:])

  def init_state(params, critic_params):
    of_critic_state = critic.init_state(critic_params) if critic else ()
    return ppo.make_state(actor.init_state(params), of_critic_state)

  state = jax.eval_shape(init_state, actor.state.params, critic and critic.state.params)
  placement = ppo.make_state(actor.placement, critic.placement if critic else ())
  placement = placement._replace(step=everywhere)
  update_step = functools.partial(
    ppo.update_step, actor=actor, critic=critic, config=config, sampling=sampling, mesh=mesh
  )
  return PPOProgram(
    sampling=sampling,
    actor=actor,
    critic=critic,
    reward=reward,
    state=meshes.place(state, placement),
    init_state=jax.jit(init_state, out_shardings=placement, donate_argnums=(0, 1)),
    answer_rows=jax.jit(layout.answer_rows, out_shardings=rows_place),
    vision_features=of_parts(vision_features),
    reference=of_parts(reference),
    values=of_parts(values) if critic else None,
    scores=of_parts(scores) if reward else None,
    compute_advantages=jax.jit(
      functools.partial(advantages.compute_advantages, settings=settings),
      out_shardings=(rows_place, everywhere),
    ),
    update_step=jax.jit(
      update_step,
      static_argnames=("with_policy", "same_tower"),
      donate_argnums=0,
      out_shardings=(placement, everywhere),
    ),
    finish=jax.jit(
      lambda state: state._replace(step=state.step + 1), donate_argnums=0, out_shardings=placement
    ),
  )


def actor_updates(config, steps: int) -> int:
  """Returns the number of updates of the actor in so many rollouts, before ppo.stop_kl."""
  settings = config.ppo
  return (
    max(1, steps - settings.critic_warmup) * settings.num_ppo_epochs * settings.num_mini_batches
  )


def critic_updates(config, steps: int) -> int:
  """Returns the number of updates of the critic in so many rollouts."""
  return steps * config.ppo.num_ppo_epochs * config.ppo.num_mini_batches


def check_updates(config, program: PPOProgram, steps: int) -> None:
  """Checks the updates of actor and critic, see `optim.updates.check`.

  Args:
    config: of the run.
    program: of the run.
    steps: rollouts of the whole run.

  Raises:
    InputError: one of them would never learn.
  """
  updates.check(of_actor(config), program.state.params, actor_updates(config, steps), "the actor")
  if program.critic is not None:
    params, count = program.critic.state.params, critic_updates(config, steps)
    updates.check(of_critic(config), params, count, "the critic")


def of_actor(config):
  """Returns the config that the actor is placed by."""
  return _side(config, config.ppo.actor_zero_stage)


def of_critic(config):
  """Returns the config that the critic learns by."""
  own = _side(config, config.ppo.critic_zero_stage)
  if config.ppo.critic_learning_rate is not None:
    own.optim.learning_rate = config.ppo.critic_learning_rate
    for group in ("embedding", "projector", "vision"):
      own.optim[f"{group}_learning_rate"] = None
  return own


def _side(config, stage: int | None):
  own = config.copy_and_resolve_references()
  if stage is not None:
    own.mesh.zero_stage = stage
  return own


def _make_scorer(config, model: ModelConfig, mesh: Mesh) -> Scorer:
  meshes.check_heads(mesh, model.language.heads, model.language.kv_heads)
  dtype = config.model.dtype
  options = {"attention": config.model.attention, "mesh": mesh}
  graphdef, shapes = abstract_params(model, dtype=dtype, param_dtype=dtype, **options)
  split = of_critic(config).mesh.zero_stage >= 3
  return Scorer(graphdef, meshes.place(shapes, zero.shardings(mesh, shapes, split=split)))


def _by_parts(function, *, mesh: Mesh, parts: int, placement):
  """Compiles `(params, batch, shape)` so that it takes some rows at a time."""

  def whole(params, batch, shape):
    def of_part(part):
      part = jax.tree.map(lambda x: meshes.constrain_rows(x, mesh), part)
      return function(params, part, shape)

    return accumulate.join_rows(jax.lax.map(of_part, accumulate.split_rows(batch, parts)))

  return jax.jit(whole, static_argnames="shape", out_shardings=placement)
