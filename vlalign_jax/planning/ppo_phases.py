"""The programs of a PPO step: what each takes, by formula, and how it is lowered."""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import cache, lora
from vlalign_jax.planning import flops, hlo, memory, ppo_models, roofline
from vlalign_jax.planning.compiled import Compiled
from vlalign_jax.planning.topology import Topology
from vlalign_jax.planning.workload import Workload
from vlalign_jax.rollout import collect
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import ppo_program
from vlalign_jax.steps import program as programs


@dataclasses.dataclass(frozen=True)
class Phase:
  """One program of a step.

  Attributes:
    name: of it.
    times: it runs in a step.
    temporaries: bytes on a device beside what is held and the rollout, by formula.
    operations: over all devices, of one time, by formula.
    time: of one time; None where the chip's speed is not known.
    trips: of its loops whose counts depend on data.
    lower: () -> what `jax.jit(...).lower(...)` gives.
    compiled: the compiler's word; None where it was not asked.
  """

  name: str
  times: int
  temporaries: float
  operations: float
  time: roofline.Time | None
  trips: hlo.Trips
  lower: Callable
  compiled: Compiled | None = None

  @property
  def needed(self) -> float:
    """Bytes beside what is held: by the compiler's word, or else by formula."""
    if self.compiled is None:
      return self.temporaries
    return self.compiled.total if self.compiled.refused else self.compiled.temporaries


class Sizes(NamedTuple):
  """B prompts of L tokens with I images; N answers of M tokens to each, in rows of T tokens."""

  B: int
  L: int
  I: int  # noqa: E741
  N: int
  M: int
  T: int


@dataclasses.dataclass(frozen=True)
class Given:
  """What phases are made of: see `ppo.Plan`."""

  config: object
  models: ppo_models.Models
  topology: Topology
  mesh: object
  program: ppo_program.Program

  @property
  def sizes(self) -> Sizes:
    config, ppo = self.config, self.config.ppo
    N, M, L = ppo.num_samples, ppo.max_new_tokens, config.data.max_length
    return Sizes(config.batch_size, L, config.data.max_images or 1, N, M, L + N * (M + 1))

  @property
  def cache(self) -> float:
    """Bytes of keys and values on a device, while sampling."""
    sizes, rows = self.sizes, self.sizes.B // self.config.ppo.sample_parts
    size = jnp.dtype(self.config.model.dtype).itemsize
    language = self.models.actor.language
    whole = cache.cache_bytes(language, rows, sizes.L, sizes.N, sizes.M, size)
    return whole / self.mesh.size

  @property
  def parts(self) -> int:
    """In so many parts rows are scored."""
    return self.config.ppo.minibatches * self.config.grad_accumulation

  @property
  def frozen(self) -> dict:
    """The actor's parameters that stay."""
    return {part: x for part, x in self.program.actor.frozen.items() if part != "reference"}

  @property
  def shares(self) -> bool:
    """Whether a rollout's pictures go once through the actor's tower, see `rollout.roles`."""
    return not (self.config.train.vision or self.config.lora.vision_rank)

  @functools.cached_property
  def same_towers(self) -> dict[str, bool]:
    return ppo_models.same_towers(self.models)

  def has_features(self, role: str) -> bool:
    """Whether a role is given what the actor's tower made of pictures."""
    if role == "actor":
      return self.shares
    return self.shares and self.same_towers[role] and not self.config.ppo.blank_images

  def work(self, rows: int, parts: int, length: int | None = None) -> Workload:
    """Of rows with their answers, or of those without answers whose length is given."""
    return Workload(
      rows=rows,
      length=length or self.sizes.T,
      images=self.sizes.I,
      examples=1,
      # With one answer to each prompt, models are not told of answers.
      answers=0 if length or self.sizes.N == 1 else self.sizes.N,
      blocks=meshes.row_blocks(self.mesh),
      accumulation=parts,
      platform=self.topology.kind,
    )

  def of_rows(self, shape: tuple, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(self.mesh))

  def rows(self, role: str = "actor", length: int | None = None) -> dict:
    """Shapes of a rollout, or of prompts of a length, as a role is given them."""
    B, _, I, _, _, T = self.sizes
    rows = programs.abstract_rows(self.models.actor, self.mesh, B, length or T, I)
    if self.has_features(role):
      see = functools.partial(self.program.vision_features, shape=None)
      features = jax.eval_shape(see, trees.merge(self.program.state.params, self.frozen), rows)
      rows["vision_features"] = self.of_rows(features.shape, features.dtype)
    return rows

  def fields(self) -> dict:
    """Shapes of what updates learn from besides rows."""
    names = ["old_log_probabilities", "reference_log_probabilities", "advantages"]
    names += ["old_values", "returns"] * (self.models.critic is not None)
    B, _, _, N, M, _ = self.sizes
    fields = {name: self.of_rows((B, N, M), jnp.float32) for name in names}
    return fields | {"mask": self.of_rows((B, N, M), jnp.bool_)}


def check(given: Given) -> None:
  """Refuses pictures that do not fit into prompts.

  Raises:
    InputError: names them.
  """
  sizes, tokens = given.sizes, given.models.actor.tokens_per_image
  if sizes.I * tokens > sizes.L:
    raise InputError(
      f"{sizes.I} images of {tokens} tokens do not fit into prompts of config.data.max_length="
      f"{sizes.L}; raise it, or lower config.data.max_images"
    )


def phases(given: Given) -> Iterator[Phase]:
  """Those of a step, in their order; advantages and the laying out of rows take next to nothing."""
  config, program, models, sizes = given.config, given.program, given.models, given.sizes
  actor = trees.merge(program.state.params, given.frozen)
  own, others = ppo_program.of_actor(config), ppo_program.of_critic(config)
  shape = (sizes.N, sizes.M)
  if given.shares:
    prompts = given.rows(length=sizes.L)
    del prompts["vision_features"]
    yield _vision(given, lambda: program.vision_features.lower(actor, prompts, None))
  yield _sample(given, own, actor)
  base = lora.base_params(program.actor.params)
  yield _pass(
    given,
    "reference",
    own,
    programs.reference_model(config, models.actor),
    program.actor.params if config.lora.init_from else base,
    "actor",
    lambda: program.reference.lower(program.actor.frozen, given.rows(), shape),
  )
  if program.reward:
    rows = given.rows("reward") | {"answers": given.of_rows((sizes.B, 1, sizes.N), jnp.int32)}
    lower = lambda: program.scores.lower(program.reward.params, rows, None)  # noqa: E731
    scored = (models.reward, program.reward.params, "reward", lower)
    yield _pass(given, "reward model", others, *scored)
  if program.critic:
    critic = program.state.critic.params, program.critic.frozen
    lower = lambda: program.values.lower(critic, given.rows("critic"), shape)  # noqa: E731
    valued = (models.critic, program.critic.params, "critic", lower)
    yield _pass(given, "values", others, *valued)
  yield _update(given)


def _still(params) -> types.SimpleNamespace:
  """A program that trains nothing, for the formulas."""
  state = types.SimpleNamespace(params={}, optimizer={})
  return types.SimpleNamespace(params=params, state=state, frozen={})


def _parts(given: Given, program, config, model, work: Workload, role: str) -> dict:
  """`flops.count` without what is not computed: pictures seen before, logits of prompts."""
  parts = flops.count(program, config, model, work)
  if given.has_features(role):
    del parts["vision"]
  parts["head"] = parts["head"].share(work.length / (given.sizes.N * given.sizes.M))
  return parts


def _beside(needed: memory.Memory) -> float:
  """Bytes of a step beside its state."""
  return needed.estimate - needed.params - needed.optimizer


def _trips(given: Given, work: Workload, most: float | None = None) -> hlo.Trips:
  """As of `planner.compile_plan`; the head's loop ends with the answers' tokens."""
  heads = work.device_rows * given.sizes.N * given.sizes.M / meshes.head_chunk(given.mesh)
  half = (math.ceil(work.length / work.tile) + 1) / 2
  return hlo.Trips(to_unknown=most or math.ceil(heads), from_unknown=half, to_counter=half)


def _vision(given: Given, lower) -> Phase:
  work = given.work(given.sizes.B, given.parts, given.sizes.L)
  model, params = given.models.actor, given.program.actor.params
  found = flops.count(_still(params), given.config, model, work)["vision"].forward
  needed = memory.count(_still(params), given.config, model, given.mesh, work)
  own = ppo_program.of_actor(given.config)
  time = roofline.of_passes(
    given.topology.chip, found, trees.size(params["vision"]), own, given.mesh, given.parts
  )
  return Phase("pictures", 1, needed.working, found, time, _trips(given, work), lower)


def _pass(given: Given, name: str, config, model, params, role: str, lower) -> Phase:
  """Rows go once through a model, some at a time."""
  work = given.work(given.sizes.B, given.parts)
  still = _still(params)
  found = sum(x.forward for x in _parts(given, still, config, model, work, role).values())
  needed = memory.count(still, config, model, given.mesh, work)
  time = roofline.of_passes(
    given.topology.chip, found, trees.size(params), config, given.mesh, work.accumulation
  )
  return Phase(name, 1, _beside(needed), found, time, _trips(given, work), lower)


def _sample(given: Given, config, actor) -> Phase:
  """Prompts are read, then all answers are written token by token, each step with all weights."""
  B, L, _, N, M, _ = given.sizes
  model, language, parts = given.models.actor, given.models.actor.language, config.ppo.sample_parts
  work = given.work(B, parts, L)
  still = _still(given.program.actor.params)
  read = flops.count(still, config, model, work)
  if given.shares:
    del read["vision"]
  steps, answers = M - 1, B * N
  logits = 2 * answers * M * language.width * language.vocab_size
  attention = 4 * answers * steps * (L + M) * language.heads * language.head_dim * language.layers
  written = read["language"].forward / (B * L) * answers * steps
  del read["head"]
  found = sum(part.forward for part in read.values()) + written + attention + logits
  size = jnp.dtype(config.model.dtype).itemsize
  needed = memory.count(still, config, model, given.mesh, work)
  # Matrices in the dtype they are used in, where they are trained in another.
  trained = memory.device_bytes(given.program.state.params)
  trained *= size / jnp.dtype(config.model.param_dtype).itemsize
  if config.ppo.gather:
    trained += trees.size(still.params["language"]) * size / given.mesh.shape["tensor"]
  # Of the logits, copies in float32 while the likeliest are found.
  drawn = 4 * 4 * answers / (parts * meshes.row_blocks(given.mesh)) * language.vocab_size
  time = roofline.of_passes(
    given.topology.chip,
    found,
    trees.size(still.params),
    config,
    given.mesh,
    parts * M,
    gathers=parts if config.ppo.gather else parts * M,
    moved=parts * steps * given.cache,
  )
  prompts = given.rows(length=L)
  lower = lambda: given.program.sample.lower(  # noqa: E731
    actor, collect.for_sampling(prompts), given.of_rows((B,), jnp.int32), 0
  )
  temporaries = given.cache + trained + drawn + _beside(needed)
  return Phase("sampling", 1, temporaries, found, time, _trips(given, work, max(1, steps)), lower)


def _update(given: Given) -> Phase:
  """The critic's update, then the actor's."""
  config, program, models, mesh = given.config, given.program, given.models, given.mesh
  rows = config.batch_size // config.ppo.minibatches
  work = given.work(rows, config.grad_accumulation)
  policy = dataclasses.replace(program.actor, frozen=given.frozen)
  learners = [(policy, ppo_program.of_actor(config), models.actor, "actor", work)]
  if program.critic:
    own = ppo_program.of_critic(config)
    learners.append((program.critic, own, models.critic, "critic", work))
  sft_rows = None
  if config.ppo.sft_weight:
    length = given.sizes.L
    sft_rows = programs.abstract_rows(models.actor, mesh, rows, length, given.sizes.I)
    told = given.work(rows, config.grad_accumulation, length)
    as_sft = ppo_program.of_actor(config)
    as_sft.stage = "sft"
    learners.append((policy, as_sft, models.actor, "sft", told))
  temporaries = operations = moved = sent = 0.0
  for learner, own, model, role, its in learners:
    needed = memory.count(learner, own, model, mesh, its)
    if role == "sft":
      parts = flops.count(learner, own, model, its)
    else:
      parts = _parts(given, learner, own, model, its, role)
    both = needed.gradients * (role == "sft")  # its gradient waits for the policy's
    temporaries = max(temporaries, _beside(needed)) + both
    operations += sum(part.total for part in parts.values())
    attention = parts["attention"].share(mesh.size)
    moved += roofline.moved(learner, own, needed, its, model.language, attention)
    sent += roofline.sent(learner, own, mesh, its, model.language)
  time = roofline.estimate(given.topology.chip, operations / mesh.size, moved, sent)
  critic_frozen = program.critic and program.critic.frozen
  lower = lambda: program.update_step.lower(  # noqa: E731
    program.state,
    given.frozen,
    critic_frozen,
    given.rows() | given.fields(),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
    jax.ShapeDtypeStruct((), jnp.float32),
    sft_rows,
    with_policy=True,
    same_tower=given.same_towers.get("critic", False),
  )
  times = config.ppo.epochs * config.ppo.minibatches
  return Phase("update", times, temporaries, operations, time, _trips(given, work), lower)
