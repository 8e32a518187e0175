"""The plan of a PPO step: a rollout and its updates, program by program as a run has them."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import cache
from vlalign_jax.planning import ppo_models, train_step
from vlalign_jax.planning.step_plan import StepPlan, StepProgram, device_bytes
from vlalign_jax.planning.topology import Topology
from vlalign_jax.rollout import collect
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import ppo_program
from vlalign_jax.steps import program as programs


class Sizes(NamedTuple):
  """B prompts of L tokens with I images; N answers of M tokens to each, in rows of T tokens."""

  B: int
  L: int
  I: int  # noqa: E741
  N: int
  M: int
  T: int


@dataclasses.dataclass(frozen=True)
class RolloutShapes:
  """A run's programs with the shapes of what a rollout gives them."""

  config: object
  models: ppo_models.Models
  mesh: object
  program: ppo_program.PPOProgram

  @property
  def sizes(self) -> Sizes:
    config, ppo = self.config, self.config.ppo
    N, M, L = ppo.num_generations, ppo.max_new_tokens, config.data.max_length
    return Sizes(config.batch_size, L, config.data.max_images or 1, N, M, L + N * (M + 1))

  @property
  def frozen(self) -> dict:
    """The actor's parameters that stay."""
    return self.program.actor.frozen

  @property
  def shares(self) -> bool:
    """Whether a rollout's pictures go once through the actor's tower, see `rollout.roles`."""
    return not (self.config.train.vision or self.config.lora.vision_rank)

  @functools.cached_property
  def same_towers(self) -> dict[str, bool]:
    """Role -> whether it has the actor's vision tower."""
    return ppo_models.same_towers(self.models)

  def array(self, shape: tuple, dtype) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array that is split by rows."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(self.mesh))

  def batch(self, role: str = "actor", length: int | None = None) -> dict:
    """Returns the shapes of a rollout, or of prompts of a length, as a role is given them."""
    B, _, I, _, _, T = self.sizes
    batch = programs.abstract_batch(self.models.actor, self.mesh, B, length or T, I)
    if self.shares and (
      role == "actor" or (self.same_towers[role] and not self.config.ppo.blank_images)
    ):
      see = functools.partial(self.program.vision_features, shape=None)
      params = trees.merge(self.program.state.params, self.frozen)
      features = jax.eval_shape(see, params, batch)
      batch["vision_features"] = self.array(features.shape, features.dtype)
    return batch

  def fields(self) -> dict:
    """Returns the shapes of what updates learn from next to the batch."""
    names = ["old_log_probabilities", "reference_log_probabilities", "advantages"]
    names += ["old_values", "returns"] * (self.models.critic is not None)
    B, _, _, N, M, _ = self.sizes
    fields = {name: self.array((B, N, M), jnp.float32) for name in names}
    return fields | {"mask": self.array((B, N, M), jnp.bool_)}


def plan(config, topology: Topology) -> StepPlan:
  """Returns a plan that is yet to be compiled, see `step_plan.compile_plan`.

  Raises:
    InputError: mesh, batch or models do not fit together.
  """
  mesh = meshes.make_mesh(config.mesh, topology.devices)
  parts = config.ppo.num_mini_batches * config.grad_accumulation
  meshes.check_batch(config.batch_size, parts, config.data.pack, mesh)
  models = ppo_models.open_models(config)
  program = ppo_program.make_program(
    config,
    models.actor,
    models.critic,
    models.reward,
    models.sampling,
    mesh,
    train_step.TOTAL_STEPS,
  )
  rollout = RolloutShapes(config, models, mesh, program)
  sizes, tokens = rollout.sizes, models.actor.tokens_per_image
  if sizes.I * tokens > sizes.L:
    raise InputError(
      f"{sizes.I} images of {tokens} tokens do not fit into prompts of config.data.max_length="
      f"{sizes.L}; raise it, or lower config.data.max_images"
    )
  batch = device_bytes(rollout.batch() | rollout.fields())
  return StepPlan(
    config=config,
    topology=topology,
    mesh=mesh,
    programs=tuple(_programs(rollout)),
    resident=ppo_models.held(models, program, config) | {"batch of a rollout": batch},
    parameters=train_step.count_parameters(program.actor.params, program.state.params),
    tokens=sizes.B * sizes.T,
    model_flops=None,
    summary=tuple(_summary(rollout)),
    assumptions=(*_assumptions(rollout), *models.assumptions),
  )


def cache_bytes(rollout: RolloutShapes) -> float:
  """Returns the bytes of keys and values on a device, while sampling."""
  sizes, config = rollout.sizes, rollout.config
  rows, itemsize = sizes.B // config.ppo.sample_parts, jnp.dtype(config.model.dtype).itemsize
  language = rollout.models.actor.language
  total = cache.cache_bytes(language, rows, sizes.L, sizes.N, sizes.M, itemsize)
  return total / rollout.mesh.size


def _summary(rollout: RolloutShapes) -> Iterator[str]:
  config, ppo = rollout.config, rollout.config.ppo
  stages = [
    f"{role} ZeRO {config.mesh.zero_stage if stage is None else stage}"
    for role, stage in (("actor", ppo.actor_zero_stage), ("critic", ppo.critic_zero_stage))
    if role == "actor" or rollout.program.critic
  ]
  yield f"stage ppo ({ppo.estimator}): {', '.join(stages)}, remat {config.model.remat}"
  yield (
    f"sampled in {ppo.sample_parts} part{'s' * (ppo.sample_parts > 1)}; {ppo.num_ppo_epochs} x "
    f"{ppo.num_mini_batches} updates, micro-batches of each: {config.grad_accumulation}"
  )
  size = cache_bytes(rollout) / 2**30
  yield f"keys and values while sampling: {size:,.2f} GiB a device, among its temporaries"


def _assumptions(rollout: RolloutShapes) -> Iterator[str]:
  settings, (B, L, I, N, M, T) = rollout.config.ppo, rollout.sizes
  plural = lambda count: "s" * (count > 1)  # noqa: E731
  yield (
    f"{B} prompts of {L} tokens with {I} image{plural(I)} each, and {N} answer{plural(N)} of {M} "
    f"tokens: rows of {T}; every answer is as long as it may be"
  )
  if settings.critic_warmup:
    yield "the actor learns, too: updates of the critic alone take less"
  if settings.sft_weight:
    yield f"each update also has {B // settings.num_mini_batches} conversations of {L} tokens"
  if settings.reward_function:
    yield "the reward function's own time is not counted"


def _programs(rollout: RolloutShapes) -> Iterator[StepProgram]:
  """Yields those of a step; advantages and the laying out of rows take next to nothing."""
  config, program, sizes = rollout.config, rollout.program, rollout.sizes
  B, L, _, N, M, T = sizes
  actor, shape = trees.merge(program.state.params, rollout.frozen), (N, M)
  blocks = meshes.row_blocks(rollout.mesh)

  def one(name, lower, rows=B, parts=1, times=1, length=T, decoded=0):
    head_tokens = rows // (blocks * parts) * N * M
    trips = train_step.trips(rollout.mesh, length, head_tokens, decoded)
    return StepProgram(name, times, trips, lower)

  scored = config.ppo.num_mini_batches * config.grad_accumulation  # in so many parts
  prompts = rollout.batch(length=L)
  if rollout.shares:
    seen = {name: x for name, x in prompts.items() if name != "vision_features"}
    yield one("pictures", lambda: program.vision_features.lower(actor, seen, None), length=L)
  shapes = collect.for_sampling(prompts), rollout.array((B,), jnp.int32), 0
  lower = lambda: program.sample.lower(actor, *shapes)  # noqa: E731
  yield one("sampling", lower, length=L, decoded=max(1, M - 1))
  reference = program.actor.reference, rollout.frozen
  lower = lambda: program.reference.lower(reference, rollout.batch(), shape)  # noqa: E731
  yield one("reference", lower, parts=scored)
  if program.reward:
    answers = {"answers": rollout.array((B, 1, N), jnp.int32)}
    judged = rollout.batch("reward") | answers
    lower = lambda: program.scores.lower(program.reward.params, judged, None)  # noqa: E731
    yield one("reward model", lower, parts=scored)
  if program.critic:
    critic = program.state.critic.params, program.critic.frozen
    lower = lambda: program.values.lower(critic, rollout.batch("critic"), shape)  # noqa: E731
    yield one("values", lower, parts=scored)
  rows = B // config.ppo.num_mini_batches
  times = config.ppo.num_ppo_epochs * config.ppo.num_mini_batches
  lower = functools.partial(_lower_update, rollout, rows)
  yield one("update", lower, rows=rows, parts=config.grad_accumulation, times=times)


def _lower_update(rollout: RolloutShapes, rows: int):
  """Lowers the critic's update and the actor's, which are one program."""
  config, program, sizes = rollout.config, rollout.program, rollout.sizes
  conversations = None
  if config.ppo.sft_weight:
    actor = rollout.models.actor
    conversations = programs.abstract_batch(actor, rollout.mesh, rows, sizes.L, sizes.I)
  return program.update_step.lower(
    program.state,
    rollout.frozen,
    program.critic and program.critic.frozen,
    rollout.batch() | rollout.fields(),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
    jax.ShapeDtypeStruct((), jnp.float32),
    conversations,
    with_policy=True,
    same_tower=rollout.same_towers.get("critic", False),
  )
