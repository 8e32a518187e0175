"""The plan of a PPO step: a rollout and its updates, program by program as a run has them."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlalign_jax import matmul_precision, trees
from vlalign_jax.config_checks import Config
from vlalign_jax.errors import InputError
from vlalign_jax.generation import memory
from vlalign_jax.generation.slots import groups_of, refill_sizes
from vlalign_jax.planning import ppo_models, train_step
from vlalign_jax.planning.step_plan import StepPlan, StepProgram, device_bytes
from vlalign_jax.planning.topology import Topology
from vlalign_jax.rollout import collect
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import ppo_program
from vlalign_jax.steps import program as programs
from vlalign_jax.steps import sampler as samplers

MOVE = "weights to the sampler"  # the program that only copies


class Sizes(NamedTuple):
  """B prompts of L tokens with I tiles; N answers of M tokens to each, in rows of T tokens."""

  B: int
  L: int
  I: int  # noqa: E741
  N: int
  M: int
  T: int


@dataclasses.dataclass(frozen=True)
class RolloutShapes:
  """A run's programs, and the shapes of the batches that a rollout gives them."""

  config: Config
  models: ppo_models.Models
  mesh: Mesh
  program: ppo_program.PPOProgram
  sampler: samplers.Sampler

  @property
  def sizes(self) -> Sizes:
    """Returns the sizes of a rollout."""
    config, ppo = self.config, self.config.ppo
    N, M, L = ppo.num_generations, ppo.max_new_tokens, config.data.max_length
    I = config.data.max_images or self.models.actor.most_tiles  # noqa: E741
    return Sizes(config.batch_size, L, I, N, M, L + N * (M + 1))

  @property
  def frozen(self) -> dict:
    """Returns the actor's frozen parameters."""
    return self.program.actor.frozen

  @property
  def shares_features(self) -> bool:
    """Returns whether a rollout's images pass once through the actor's tower (`rollout.roles`)."""
    return not (self.config.train.vision or self.config.lora.vision_rank)

  @functools.cached_property
  def same_towers(self) -> dict[str, bool]:
    """Returns role -> whether it has the actor's vision tower."""
    return ppo_models.same_towers(self.models)

  def array(self, shape: tuple, dtype) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array that is split by rows."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(self.mesh))

  def batch(self, role: str = "actor", length: int | None = None) -> dict:
    """Returns the shapes of the batch that a role reads: prompts of a length, or else full rows.

    The role "sampler" always has the pictures' features.
    """
    B, _, I, _, _, T = self.sizes
    batch = programs.abstract_batch(self.models.actor, self.mesh, B, length or T, I)
    sees_blank, keeps = self.config.ppo.blank_images, self.shares_features
    seen_by_actor = role in ("actor", "sampler")
    same = seen_by_actor or (self.same_towers[role] and not sees_blank)
    if role == "sampler" or (keeps and same):
      encode = functools.partial(self.program.vision_features, shape=None)
      params = trees.merge(self.program.state.params, self.frozen)
      features = jax.eval_shape(encode, params, batch)
      batch["vision_features"] = self.array(features.shape, features.dtype)
    return batch

  def fields(self) -> dict:
    """Returns the shapes that updates add to the batch."""
    names = ["old_log_probabilities", "reference_log_probabilities", "advantages"]
    names += ["old_values", "returns"] * (self.models.critic is not None)
    B, _, _, N, M, _ = self.sizes
    fields = {name: self.array((B, N, M), jnp.float32) for name in names}
    return fields | {"mask": self.array((B, N, M), jnp.bool_)}


def plan(config, topology: Topology) -> StepPlan:
  """Returns a plan for `step_plan.compile_plan` to compile.

  Raises:
    InputError: mesh, batch or models do not fit together.
  """
  mesh = meshes.make_mesh(config.mesh, topology.devices)
  matmul_precision.set_for(config.model.dtype, topology.kind)
  parts = config.ppo.num_mini_batches * config.grad_accumulation
  meshes.check_batch(config.batch_size, parts, config.data.pack, mesh)
  models = ppo_models.open_models(config)
  architectures = models.actor, models.critic, models.reward
  program = ppo_program.make_program(
    config, *architectures, models.sampling, mesh, train_step.TOTAL_STEPS
  )
  resident = ppo_models.resident_bytes(models, program, config)
  actor, lengths = models.actor, np.array([config.data.max_length])
  sampler = samplers.make_sampler(
    config, actor, program.actor, models.sampling, mesh, lengths, sum(resident.values())
  )
  rollout = RolloutShapes(config, models, mesh, program, sampler)
  sizes, tokens = rollout.sizes, models.actor.tokens_per_image
  if sizes.I * tokens > sizes.L:
    name = "tiles" if actor.most_tiles > 1 else "images"
    raise InputError(
      f"{sizes.I} {name} of {tokens} tokens do not fit into prompts of config.data.max_length="
      f"{sizes.L}; raise it, or lower config.data.max_images"
    )
  return StepPlan(
    config=config,
    topology=topology,
    mesh=mesh,
    programs=tuple(_programs(rollout)),
    resident=resident | {"batch of a rollout": device_bytes(rollout.batch() | rollout.fields())},
    parameters=train_step.count_parameters(program.actor.params, program.state.params),
    tokens=sizes.B * sizes.T,
    model_flops=None,
    summary=tuple(_summary(rollout)),
    assumptions=(*_assumptions(rollout), *models.assumptions),
  )


def cache_bytes(rollout: RolloutShapes) -> float:
  """Returns the bytes of keys and values on a device during sampling."""
  config, models = rollout.config, rollout.models
  groups = ((samplers.rows_at_a_time(config, rollout.sizes.B), rollout.sizes.L),)
  total = memory.cache_bytes(models.actor, models.sampling, groups, config.model.dtype)
  return total / rollout.mesh.size


def _summary(rollout: RolloutShapes) -> Iterator[str]:
  config, ppo = rollout.config, rollout.config.ppo
  zero_stages = {"actor": ppo.actor_zero_stage}
  if rollout.program.critic:
    zero_stages["critic"] = ppo.critic_zero_stage
  zero = ", ".join(
    f"{role} ZeRO {config.mesh.zero_stage if stage is None else stage}"
    for role, stage in zero_stages.items()
  )
  yield f"stage ppo ({ppo.estimator}): {zero}, remat {config.model.remat}"
  sampled = f"in {ppo.sample_parts} part{'s' * (ppo.sample_parts > 1)}"
  if ppo.slots:
    sampled = f"on {ppo.slots} slots, which are refilled"
  yield (
    f"sampled {sampled}; {ppo.num_ppo_epochs} x {ppo.num_mini_batches} updates, micro-batches of "
    f"each: {config.grad_accumulation}"
  )
  sampler, size = rollout.sampler, cache_bytes(rollout) / 2**30
  axes = " x ".join(f"{axis}={size}" for axis, size in sampler.mesh.shape.items() if size > 1)
  copied = device_bytes(sampler.moved) / 2**30
  yield f"sampled on {axes or 'one device'}, with {copied:,.2f} GiB a device of weights moved there"
  yield f"keys and values while sampling: {size:,.2f} GiB a device, among its temporaries"


def _assumptions(rollout: RolloutShapes) -> Iterator[str]:
  settings, (B, L, I, N, M, T) = rollout.config.ppo, rollout.sizes
  yield (
    f"{B} prompts of {L} tokens with {I} image{'s' * (I > 1)} each, and {N} answer{'s' * (N > 1)} "
    f"of {M} tokens: rows of {T}; every answer has the maximum length"
  )
  if settings.critic_warmup:
    yield "the actor learns, too: updates of the critic alone take less"
  if settings.sft_weight:
    yield f"each update also has {B // settings.num_mini_batches} conversations of {L} tokens"
  if settings.reward_function:
    yield "the reward function's own time is not counted"


def _programs(rollout: RolloutShapes) -> Iterator[StepProgram]:
  """Yields the programs of a step; advantages and the layout of rows take next to nothing."""
  config, program = rollout.config, rollout.program
  B, L, _, N, M, T = rollout.sizes
  actor, shape = trees.merge(program.state.params, rollout.frozen), (N, M)
  blocks = meshes.row_blocks(rollout.mesh)

  def one(name, lower, num_rows=B, parts=1, times=1, length=T, decoded=0, held=0.0):
    head_tokens = num_rows // (blocks * parts) * N * M
    trips = train_step.trips(rollout.mesh, length, head_tokens, decoded)
    return StepProgram(name, times, trips, lower, held)

  def lower(function, *arguments):
    return lambda: function.lower(*arguments)

  prompts, sampler = rollout.batch("sampler", L), rollout.sampler
  images = {name: x for name, x in prompts.items() if name != "vision_features"}
  yield one("pictures", lower(program.vision_features, actor, images, None), length=L)
  flat = trees.flatten(actor)
  if sampler.moved:
    leaves = {path: flat[path] for path in sampler.moved}
    yield one(MOVE, lower(sampler.move, leaves))
  placed = trees.unflatten(flat | sampler.params)
  prompts = collect.for_sampling(prompts), rollout.array((B,), jnp.int32)
  held = device_bytes(sampler.moved)
  if sampler.generate is not None:
    times = config.ppo.sample_parts
    part = jax.eval_shape(functools.partial(jax.tree.map, lambda x: x[: B // times]), prompts)
    on_mesh = jax.tree.map(lambda _: meshes.batch_sharding(sampler.mesh), part)
    sample = lower(sampler.generate, placed, *meshes.place(part, on_mesh), 0)
    yield one("sampling", sample, B // times, 1, times, L, max(1, M - 1), held)
  else:
    yield from _on_slots(rollout, sampler.slots, one, placed, prompts, held)
  parts = config.ppo.num_mini_batches * config.grad_accumulation  # read one by one
  params = program.actor.reference, rollout.frozen
  yield one("reference", lower(program.reference, params, rollout.batch(), shape), parts=parts)
  if program.reward:
    batch = rollout.batch("reward") | {"answers": rollout.array((B, 1, N), jnp.int32)}
    scores = lower(program.scores, program.reward.params, batch, None)
    yield one("reward model", scores, parts=parts)
  if program.critic:
    params = program.state.critic.params, program.critic.frozen
    values = lower(program.values, params, rollout.batch("critic"), shape)
    yield one("values", values, parts=parts)
  num_rows = B // config.ppo.num_mini_batches
  times = config.ppo.num_ppo_epochs * config.ppo.num_mini_batches
  update = functools.partial(_lower_update, rollout, num_rows)
  yield one("update", update, num_rows, config.grad_accumulation, times)


def _on_slots(rollout: RolloutShapes, slots, one, params, prompts, held: float):
  """Yields the programs of slots; as every answer is as long as it can be, none ends early."""
  B, L, _, _, M, _ = rollout.sizes
  count, lengths = rollout.config.ppo.slots, rollout.sampler.slot_lengths
  (group,) = groups_of(lengths)  # a plan knows the longest prompt only
  state = jax.eval_shape(functools.partial(slots.empty, lengths))
  state = meshes.place(state, slots.shardings(state))
  held += device_bytes(state)
  taken = slots.blocks * refill_sizes(group)[0]
  index = jax.ShapeDtypeStruct((taken,), jnp.int32)
  picked = jax.eval_shape(functools.partial(slots.pick, length=group.length), *prompts, index)
  picked = meshes.place(picked, jax.tree.map(lambda _: meshes.batch_sharding(slots.mesh), picked))
  refill = functools.partial(slots.refill.lower, params, state, *picked, index, group)
  yield one("prompts into slots", refill, num_rows=taken, times=-(-B // taken), length=L, held=held)
  decode = functools.partial(slots.decode.lower, params, state, 0)
  looks = -(-M // slots.look_every) * -(-B // count)
  yield one("sampling", decode, times=looks, length=L, decoded=slots.look_every, held=held)


def _lower_update(rollout: RolloutShapes, num_rows: int):
  """Lowers the critic's update and the actor's, which are one program."""
  program, sizes, conversations = rollout.program, rollout.sizes, None
  if rollout.config.ppo.sft_weight:
    actor = rollout.models.actor
    conversations = programs.abstract_batch(actor, rollout.mesh, num_rows, sizes.L, sizes.I)
  return program.update_step.lower(
    program.state,
    rollout.frozen,
    program.critic and program.critic.frozen,
    rollout.batch() | rollout.fields(),
    jax.ShapeDtypeStruct((num_rows,), jnp.int32),
    jax.ShapeDtypeStruct((), jnp.float32),
    conversations,
    with_policy=True,
    same_tower=rollout.same_towers.get("critic", False),
  )
